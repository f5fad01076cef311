"""Compare two source trees of Bitwright: the same calls write the same bytes, and refuse with the same words.

    python tools/compare_trees.py BEFORE AFTER --work DIR [--model PATH ...] [--only PATTERN]
        [--reuse-before] [--reuse-after]

BEFORE and AFTER are checkouts. Every case of ``compare_cases.py`` runs with each of them, in a child process that
imports Bitwright from that tree's ``src``. The models that both take lie in DIR/models, the outputs of BEFORE in
DIR/before, those of AFTER in DIR/after-NAME, NAME being the path of its checkout. A lock keeps other runs out of both
folders. Then every file is compared by SHA-256, and so is what every call returned or why it refused.

The cases: all methods in all formats on a small random Llama; all methods on the embedded model and on those of
``--model`` (en-llama if it lies beside the repository); OPT, Qwen2, experts; schemes and settings; exports from
format to format; worker processes; runs that are killed with SIGKILL and called again; learned parameters, saved and
loaded; refusals.

If the SHA-256 differs, ``compare_allowed.py`` says what may: of JSON key by key, of a GGUF file the account in it
alone. A line per case says ``same``, ``listed`` (differs only as that list says), ``differs`` or ``failed``;
DIR/after-NAME.differences.txt has every difference. The exit code is 0 if all cases are the same or listed.

``--reuse-before`` keeps the outputs of BEFORE whose source, case and model are the same, ``--reuse-after`` those of
AFTER; with both, only what is missing runs, and all is compared again. ``--only 'small/gptq/*'`` runs some cases, and
those that they need. Delete DIR/models when MODELS change.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from time import monotonic

from compare_allowed import ALLOWED
from compare_cases import EMBEDDED, Case, cases, make_models
from compare_files import compare
from compare_side import Side, locked


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case in one word, and the reasons: what is not listed, or why the rest may differ.

    ``differences`` are all of them, each with its reason if it is listed.
    """

    word: str
    reasons: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


def verdict(case: Case, before: Side, after: Side) -> Verdict:
    """Judge what two trees made of a case."""
    wanted = "refused" if case.refused else "result"
    for side in (before, after):
        outcome = side.outcome(case.name)
        if wanted not in outcome:
            ((kind, words),) = outcome.items()
            return Verdict("failed", (f"{side.name}: {'was not refused' if kind == 'result' else words}",))
    reasons = {
        str(difference): difference.reason(case, after.folder, ALLOWED)
        for difference in compare(before.folder / case.name, after.folder / case.name)
    }
    unlisted = tuple(text for text, reason in reasons.items() if reason is None)
    listed = tuple(sorted({reason for reason in reasons.values() if reason is not None}))
    every = tuple(f"{reason or 'not listed'}: {text}" for text, reason in reasons.items())
    if unlisted:
        return Verdict("differs", unlisted, every)
    return Verdict("listed" if listed else "same", listed, every)


def with_needs(chosen: Sequence[Case], every: Sequence[Case]) -> list[Case]:
    """Add the cases that these need; all in their order."""
    names = {case.name for case in chosen}
    while more := {name for case in every if case.name in names for name in case.needs} - names:
        names |= more
    return [case for case in every if case.name in names]


def shares(chosen: Sequence[Case], count: int) -> list[list[Case]]:
    """Share cases out among so many jobs; cases that need one another stay together."""
    root: dict[str, str] = {}
    for case in chosen:
        roots = {root[name] for name in case.needs}
        first = min(roots, default=case.name)
        root = {name: first if old in roots else old for name, old in root.items()} | {case.name: first}
    groups: dict[str, list[Case]] = {}
    for case in chosen:
        groups.setdefault(root[case.name], []).append(case)
    jobs = [list[Case]() for _ in range(count)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(jobs, key=len).extend(group)
    return [job for job in jobs if job]


def embedded_model(tree: Path) -> Path:
    """Find the embedded model's folder in a tree."""
    return next((tree / "src").rglob("model.safetensors")).parent


def prepare(work: Path, before: Path, models: Sequence[Path], wanted: Collection[str]) -> None:
    """Make the folder of models, and those of the wanted ones that are not there yet."""
    folder = work / "models"
    with locked(folder):
        if not (folder / EMBEDDED).exists():
            shutil.copytree(embedded_model(before), folder / EMBEDDED)
        for model in models:
            link = folder / model.name
            if link.resolve() != model.resolve():
                link.unlink(missing_ok=True)
                link.symlink_to(model.resolve(), target_is_directory=True)
        for name in make_models(folder, wanted):
            print(f"made {name}", flush=True)


class Report:
    """What a run prints of every case and in the end, and the file with all differences."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.listed: Counter[str] = Counter()
        self.start = monotonic()

    def add(self, name: str, verdict: Verdict) -> None:
        """Print a line, and write all differences into the file."""
        word, reasons = verdict.word, verdict.reasons
        self.counts[word] += 1
        self.listed.update(reasons if word == "listed" else ())
        self.file.writelines(f"{name}: {line}\n" for line in verdict.differences or reasons)
        more = f"; {len(reasons) - 3} more" if len(reasons) > 3 else ""
        print(f"{word:8}{name}" + (f": {'; '.join(reasons[:3])}{more}" if reasons else ""), flush=True)

    def end(self) -> int:
        """Print the summary; return the exit code."""
        self.file.close()
        for reason, count in self.listed.items():
            print(f"listed in {count} cases: {reason}")
        words = ", ".join(f"{self.counts[word]} {word}" for word in ("same", "listed", "differs", "failed"))
        print(f"{self.counts.total()} cases in {monotonic() - self.start:.0f} s: {words}")
        return 1 if self.counts["differs"] or self.counts["failed"] or not self.counts.total() else 0


def run(before: Side, after: Side, chosen: Sequence[Case], jobs: int, reuse: bool, reuse_after: bool = False) -> int:
    """Perform cases with both trees and compare; return the exit code.

    ``reuse`` and ``reuse_after`` keep the outputs of the one tree, and of the other, that are up to date.
    """
    origins, origins_after = before.origins(chosen), after.origins(chosen)
    todo = before.missing(chosen, origins) if reuse else list(chosen)
    todo_after = after.missing(chosen, origins_after) if reuse_after else list(chosen)
    print(f"before: {len(todo)} cases to run, {len(chosen) - len(todo)} kept", flush=True)
    if reuse_after:
        print(f"after: {len(todo_after)} cases to run, {len(chosen) - len(todo_after)} kept", flush=True)
    with locked(after.folder), locked(before.folder, shared=not todo):
        report = Report(after.folder.with_name(f"{after.name}.differences.txt"))

        def perform(share: list[Case]) -> None:
            for _ in before.run([case for case in share if case in todo], origins):
                pass
            kept = [case for case in share if case not in todo_after]
            to_run = [case for case in share if case in todo_after]
            for case in chain(kept, after.run(to_run, origins_after)):
                report.add(case.name, verdict(case, before, after))

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(perform, shares(chosen, jobs)))
        differing = tuple(map(str, compare(embedded_model(before.tree), embedded_model(after.tree))))
        report.add("the embedded model itself", Verdict("differs" if differing else "same", differing))
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
    parser.add_argument("--reuse-before", action="store_true", help="keep outputs of BEFORE that are up to date")
    parser.add_argument("--reuse-after", action="store_true", help="keep outputs of AFTER that are up to date")
    args = parser.parse_args(arguments)
    beside = Path(__file__).resolve().parents[2] / "shared" / "models" / "en-llama"
    models: list[Path] = args.model or [path for path in [beside] if path.is_dir()]
    if not models:
        print(f"{beside.name} is not beside the repository: its cases are left out; --model PATH names a model")
    work = args.work.resolve()
    every = cases([EMBEDDED, *(model.name for model in models)])
    chosen = with_needs([case for case in every if fnmatchcase(case.name, args.only)], every)
    prepare(work, args.before, models, {case.model for case in chosen})
    sides = Side.before(args.before, work), Side.after(args.after, work)
    return run(*sides, chosen, args.jobs, args.reuse_before, args.reuse_after)


if __name__ == "__main__":
    sys.exit(main())
