"""Change valid files into hostile ones, kill runs at random moments, and count what comes of it.

    python tools/faults.py --work DIR                                     a short version of everything
    python tools/faults.py --work DIR --examples 300 --kills 200 --result benchmarks/results/faults

A changed file may be read, or refused with a UserError. It must not end in another exception, nor take longer than
``--seconds``. A killed run must go on when it is repeated, and give the bytes of a run that nobody disturbed. The exit
code is 1 if anything else happens; what failed is written to DIR/failed.jsonl, as a corpus keeps it.
"""

import argparse
import json
import platform
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from fault_changes import Change
from fault_files import Kind, kinds
from fault_kills import Kills, kill_runs

READ, REFUSED, FAILED, SLOW = "read", "refused", "failed", "slow"
MEMORY = 12 * 2**30
"""The address space that all cases together may take, in bytes."""
MOST_MESSAGE = 5000
"""The most characters of an error: whoever reads it wants to know what to do."""


class TooSlow(BaseException):
    """A case that took too long; no code catches it by accident."""


@dataclass
class Count:
    """What came of the changed files of one kind."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0


def outcome(kind: Kind, changes: list[Change], seconds: float) -> tuple[str, str]:
    """Place a changed file and make the calls that read it; return what came of it, and the exception if it failed."""
    from bitwright.core.errors import UserError

    refused = False
    for read in kind.reads:
        with tempfile.TemporaryDirectory(dir=kind.source.parent) as folder:
            place = Path(folder) / "case"
            kind.place(place, changes)
            try:
                with _limited(seconds):
                    read(place)
            except UserError as error:
                if len(str(error)) > MOST_MESSAGE:
                    return FAILED, f"a message of {len(str(error)):,} characters"
                refused = True
            except TooSlow:
                return SLOW, f"more than {seconds:g} seconds"
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of a library in Rust is no Exception
                at = traceback.extract_tb(error.__traceback__)[-1]
                return FAILED, f"{type(error).__name__}: {error!s:.200} ({Path(at.filename).name}:{at.lineno})"
    return (REFUSED if refused else READ), ""


def count(kind: Kind, examples: int, start: int, seconds: float) -> Count:
    """Draw changes of a kind of file and count their outcomes."""
    result = Count(kind.name)
    valid = outcome(kind, [], seconds)
    if valid[0] != READ:
        raise SystemExit(f"{kind.name}: the valid file is {' '.join(valid)}")

    @seed(start)
    @settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(kind.changes())
    def case(changes: list[Change]) -> None:
        began = monotonic()
        word, reason = outcome(kind, changes, seconds)
        result.slowest = max(result.slowest, monotonic() - began)
        result.outcomes[word] += 1
        if word in (FAILED, SLOW):
            result.failures.append({"kind": kind.name, "changes": changes, "reason": reason})

    case()
    return result


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for valid files and runs")
    parser.add_argument("--examples", type=int, default=10, help="changed files of each kind")
    parser.add_argument("--kills", type=int, default=0, help="runs that are killed")
    parser.add_argument("--seconds", type=float, default=20.0, help="the most that a changed file may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose names fit this regular expression")
    parser.add_argument("--result", type=Path, help="write RESULT.jsonl and RESULT.md")
    asked = parser.parse_args()
    _quiet()
    work = asked.work.resolve()
    chosen = [kind for kind in kinds(work) if re.search(asked.only, kind.name) and asked.examples]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts = []
    for kind in chosen:
        counts.append(count(kind, asked.examples, asked.seed, asked.seconds))
        print(f"{kind.name}: {dict(counts[-1].outcomes)}, slowest {counts[-1].slowest:.1f} s", flush=True)
        if asked.result:  # what was counted is kept, whatever happens to the rest
            _write(asked.result, counts, Kills(), asked)
    kills = kill_runs(work, asked.kills, asked.seed)
    failures = [failure for result in counts for failure in result.failures] + kills.failures
    (work / "failed.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures))
    for reason, times in Counter(f"{f['kind']}: {f['reason']}" for f in failures).most_common(60):
        print(f"{times} x {reason}")
    if asked.result:
        _write(asked.result, counts, kills, asked)
    return 1 if failures else 0


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def _write(result: Path, counts: list[Count], kills: Kills, asked: argparse.Namespace) -> None:
    """Write the counts: a line of JSON for each kind, and a table."""
    versions = {name: version(name) for name in ("bitwright", "torch", "transformers", "safetensors", "hypothesis")}
    about = {"date": datetime.now(UTC).date().isoformat(), "python": platform.python_version(), **versions,
             "seed": asked.seed, "examples": asked.examples, "kills": asked.kills}  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"kind": c.kind, **{word: c.outcomes[word] for word in (READ, REFUSED, FAILED, SLOW)},
         "slowest_seconds": round(c.slowest, 2)}
        for c in counts
    ]  # fmt: skip
    if asked.kills:
        rows.append({"kind": "killed runs", **kills.counts})
    result.with_suffix(".jsonl").write_text("".join(json.dumps(about | row) + "\n" for row in rows))
    table = [f"| {c.kind} | {c.outcomes[READ]} | {c.outcomes[REFUSED]} | {c.outcomes[FAILED]} | {c.outcomes[SLOW]} "
             f"| {c.slowest:.1f} |" for c in counts]  # fmt: skip
    command = f"python tools/faults.py --work DIR --examples {asked.examples} --kills {asked.kills} --seed {asked.seed}"
    lines = [
        f"# {result.name}",
        "",
        f"Command: `{command}`. {about['date']}, Python {about['python']}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
    ]
    if counts:
        lines += [
            "",
            "Each file is a valid one with one to three changes, drawn by hypothesis. *Read*: every call took it, as "
            "many changes do no harm. *Refused*: a call ended in a UserError. *Failed*: in another exception. *Slow*: "
            f"it took longer than {asked.seconds:g} seconds.",
            "",
            "| file | read | refused | failed | slow | slowest, seconds |",
            "|---|---|---|---|---|---|",
            *table,
        ]
    if asked.kills:
        lines += [
            "",
            f"Runs killed with SIGKILL at a random moment and then repeated: {kills.counts['killed']}, over "
            f"{kills.counts['cases']} combinations of method and format. With the bytes of an undisturbed run: "
            f"{kills.counts['same']}; with others: {kills.counts['different']}; "
            f"not finished: {kills.counts['unfinished']}.",
        ]
    result.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
