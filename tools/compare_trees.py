"""Compare two source trees of Bitwright: the same calls write the same bytes, and refuse with the same words.

    python tools/compare_trees.py BEFORE AFTER --work DIR [--model PATH ...] [--only PATTERN] [--reuse-before]

BEFORE and AFTER are checkouts. Every case of ``compare_cases.py`` runs with each of them, in a child process that
imports Bitwright from that tree's ``src``. Outputs lie in DIR/before and DIR/after, the models that both take in
DIR/models. Then every file is compared by SHA-256, and so is what every call returned or why it refused.

The cases: all methods in all formats on a small random Llama; all methods on the embedded model and on those of
``--model`` (en-llama where it lies beside the repository); OPT, Qwen2, experts; schemes and settings; exports from
format to format; worker processes; runs that are killed with SIGKILL and called again; learned parameters, saved and
loaded; refusals.

Where the SHA-256 differs, ALLOWED says what may: of JSON key by key, of a GGUF file the account in it alone. A line
per case says ``same``, ``listed`` (differs only in what ALLOWED lists), ``differs`` or ``failed``;
DIR/differences.txt has every difference. The exit code is 0 where all are the same or listed. To list a difference,
add a line with its reason to ALLOWED.

``--reuse-before`` keeps what BEFORE wrote where its source, the case and the model are the same. ``--only
'small/gptq/*'`` runs some cases, and those that they need. Delete DIR/models when MODELS change.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic
from typing import Any

from compare_cases import EMBEDDED, OUTCOME, Case, cases, make_models
from compare_files import CLOSE, NEW, Allowed, compare, digest

ALLOWED = (
    Allowed("Bitwright's version", "bitwright"),
    Allowed("Bitwright's version", "*meta.quantizer.*", file="*.json"),
    Allowed("what a run allocated is said", "allocation*", NEW),
    Allowed("which weights have a scheme of their own is said", "*scheme_for*", NEW),
    Allowed("a key that a recipe has gained", "recipe.*", NEW),
    Allowed("bits are those that the format stores", "*bits_per_weight*"),
    Allowed("bits are those that the format stores", "*storage_bits"),
    Allowed("config.json says which linears have a scheme of their own", "*quantization_config.exceptions*", NEW),
    Allowed("bits are those that the format stores", "result.bits_per_weight", file="outcome.json"),
    Allowed("the account, inside a GGUF file or beside the weights, has more keys", "*.bytes_out"),
    Allowed("the account, inside a GGUF file or beside the weights, has more keys", "*.bytes_out", file="outcome.json"),
    Allowed("calibration data are no longer called a text", "*notes.*"),
    Allowed("calibration data are no longer called a text", "result.notes.*", file="outcome.json"),
    Allowed("computed in one place", "blocks.*.linears.*.weight_error", CLOSE),
    Allowed("what a run allocated is said", "<file>", NEW, file="allocation.json"),
    Allowed("what workers had done when they were killed", "result.resumed", file=OUTCOME, case="killed/workers"),
)
"""What may differ between the two trees. ``outcome.json`` is the result of a call, or its message."""


@dataclass(frozen=True)
class Side:
    """One of the two trees, and where what it writes lies."""

    name: str
    tree: Path
    work: Path

    @property
    def folder(self) -> Path:
        """What it wrote."""
        return self.work / self.name

    def run(self, chosen: Sequence[Case], made_of: Mapping[str, str]) -> Iterator[Case]:
        """Perform cases in child processes; yield each when it is done. One that ends its process has failed."""
        left = {case.name: case for case in chosen}
        for name in left:
            self._note(name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / name, ignore_errors=True)
        while left:
            for name in self._performed(list(left.values())):
                if "failed" not in self.outcome(name):
                    self._note(name).parent.mkdir(parents=True, exist_ok=True)
                    self._note(name).write_text(made_of[name], encoding="utf-8")
                yield left.pop(name)
            if left:
                case = left.pop(next(iter(left)))
                (self.folder / case.name).mkdir(parents=True, exist_ok=True)
                failed = {"failed": f"its process came to an end; see {self.log}"}
                (self.folder / case.name / OUTCOME).write_text(json.dumps(failed), encoding="utf-8")
                yield case

    def missing(self, chosen: Sequence[Case], made_of: Mapping[str, str]) -> list[Case]:
        """List the cases that have not been performed yet as they are now."""
        notes = {case.name: self._note(case.name) for case in chosen}
        known = [name for name, note in notes.items() if note.is_file() and note.read_text() == made_of[name]]
        return [c for c in chosen if c.name not in known or not (self.folder / c.name / OUTCOME).is_file()]

    def outcome(self, name: str) -> dict[str, Any]:
        """Return what the call of a case returned, or why it did not."""
        found: dict[str, Any] = json.loads((self.folder / name / OUTCOME).read_text(encoding="utf-8"))
        return found

    @property
    def log(self) -> Path:
        """What the child processes say."""
        return self.work / f"{self.name}.log"

    def _note(self, name: str) -> Path:
        return self.work / "made-of" / self.name / f"{name}.txt"

    def _performed(self, chosen: Sequence[Case]) -> Iterator[str]:
        """Yield the names of cases as one child process performs them, until it ends."""
        told = {"PYTHONPATH": str(self.tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        told |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("compare_child.py")), str(self.tree)]
        pipe, environment = subprocess.PIPE, os.environ | told
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, cwd=self.folder, env=environment, text=True
            ) as process,
        ):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([asdict(case) for case in chosen]))
            process.stdin.close()
            yield from (line.strip() for line in process.stdout)


def verdict(case: Case, sides: Sequence[Side]) -> tuple[str, list[str]]:
    """Say what came of a case in one word, and what there is to say of it."""
    wanted = "refused" if case.refused else "result"
    for side in sides:
        if wanted not in (said := side.outcome(case.name)):
            ((what, words),) = said.items()
            return "failed", [f"{side.name}: {'was not refused' if what == 'result' else words}"]
    found = compare(*(side.folder / case.name for side in sides))
    reasons = {str(one): one.reason(case.name, ALLOWED) for one in found}
    unlisted = [text for text, reason in reasons.items() if reason is None]
    if unlisted:
        return "differs", unlisted
    return ("listed", sorted({str(reason) for reason in reasons.values()})) if found else ("same", [])


def with_needs(chosen: Sequence[Case], every: Sequence[Case]) -> list[Case]:
    """Add the cases that these need; all in their order."""
    names = {case.name for case in chosen}
    while more := {name for case in every if case.name in names for name in case.needs} - names:
        names |= more
    return [case for case in every if case.name in names]


def shares(chosen: Sequence[Case], count: int) -> list[list[Case]]:
    """Share cases out, each with all that hang together with it."""
    root: dict[str, str] = {}
    for case in chosen:
        roots = {root[name] for name in case.needs}
        first = min(roots, default=case.name)
        root = {name: first if one in roots else one for name, one in root.items()} | {case.name: first}
    groups: dict[str, list[Case]] = {}
    for case in chosen:
        groups.setdefault(root[case.name], []).append(case)
    found = [list[Case]() for _ in range(count)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(found, key=len).extend(group)
    return [share for share in found if share]


def embedded_model(tree: Path) -> Path:
    """Find the embedded model's folder in a tree."""
    return next((tree / "src").rglob("model.safetensors")).parent


def prepare(work: Path, before: Path, models: Sequence[Path], wanted: Collection[str]) -> None:
    """Make the folders, and those of the wanted models that are not there yet."""
    for name in ("models", "before", "after"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / "models" / EMBEDDED).exists():
        shutil.copytree(embedded_model(before), work / "models" / EMBEDDED)
    for model in models:
        link = work / "models" / model.name
        link.unlink(missing_ok=True)
        link.symlink_to(model.resolve(), target_is_directory=True)
    for name in make_models(work / "models", wanted):
        print(f"made {name}", flush=True)


def origins(chosen: Sequence[Case], work: Path, tree: Path) -> dict[str, str]:
    """Return by case what decides its output: itself, the cases it needs, the model, the tree it began with."""
    models = {path.name: digest(path.resolve()) for path in (work / "models").iterdir()}
    source, found = digest(tree / "src"), dict[str, str]()
    for case in chosen:
        said = [asdict(case), source, models.get(case.model), *(found[name] for name in case.needs)]
        found[case.name] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return found


class Report:
    """What is said of every case, on the way and in the end."""

    def __init__(self, work: Path) -> None:
        self.file = (work / "differences.txt").open("w", encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.listed: Counter[str] = Counter()
        self.start = monotonic()

    def add(self, name: str, word: str, said: Sequence[str]) -> None:
        """Print a line, and all of it into the file."""
        self.counts[word] += 1
        self.listed.update(said if word == "listed" else ())
        self.file.writelines(f"{word} {name}: {one}\n" for one in said)
        rest = f"; {len(said) - 3} more" if len(said) > 3 else ""
        print(f"{word:8}{name}" + (f": {'; '.join(said[:3])}{rest}" if said else ""), flush=True)

    def end(self) -> int:
        """Print the summary; return the exit code."""
        self.file.close()
        for reason, count in self.listed.items():
            print(f"listed in {count} cases: {reason}")
        words = ", ".join(f"{self.counts[word]} {word}" for word in ("same", "listed", "differs", "failed"))
        print(f"{self.counts.total()} cases in {monotonic() - self.start:.0f} s: {words}")
        return 1 if self.counts["differs"] or self.counts["failed"] or not self.counts.total() else 0


def run(before: Path, after: Path, work: Path, chosen: Sequence[Case], jobs: int, reuse: bool) -> int:
    """Perform cases with both trees and compare; return the exit code."""
    sides = Side("before", before, work), Side("after", after, work)
    made_of, report = [origins(chosen, work, side.tree) for side in sides], Report(work)

    def share(cases: list[Case]) -> None:
        todo = sides[0].missing(cases, made_of[0]) if reuse else cases
        print(f"before: {len(todo)} cases to run, {len(cases) - len(todo)} kept", flush=True)
        for _ in sides[0].run(todo, made_of[0]):
            pass
        for case in sides[1].run(cases, made_of[1]):
            report.add(case.name, *verdict(case, sides))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(share, shares(chosen, jobs)))
    unlisted = [str(one) for one in compare(*(embedded_model(side.tree) for side in sides))]
    report.add("the embedded model itself", "differs" if unlisted else "same", unlisted)
    return report.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="checkout")
    parser.add_argument("after", type=Path, help="checkout")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs")
    parser.add_argument("--model", type=Path, nargs="+", help="folders of larger models")
    parser.add_argument("--only", default="*", help="pattern of case names")
    parser.add_argument("--jobs", type=int, default=1, help="child processes at a time")
    parser.add_argument("--reuse-before", action="store_true", help="keep what BEFORE wrote where it is up to date")
    asked = parser.parse_args(arguments)
    beside = Path(__file__).resolve().parents[2] / "shared" / "models" / "en-llama"
    models: list[Path] = asked.model or [path for path in [beside] if path.is_dir()]
    if not models:
        print(f"{beside.name} is not beside the repository: its cases are left out; --model PATH names a model")
    before, after, work = (path.resolve() for path in (asked.before, asked.after, asked.work))
    every = cases([EMBEDDED, *(model.name for model in models)])
    chosen = with_needs([case for case in every if fnmatchcase(case.name, asked.only)], every)
    prepare(work, before, models, {case.model for case in chosen})
    return run(before, after, work, chosen, asked.jobs, asked.reuse_before)


if __name__ == "__main__":
    sys.exit(main())
