"""One of the two trees that ``compare_trees.py`` compares: it performs cases, in a folder of its own."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from compare_cases import OUTCOME, Case
from compare_files import digest


@dataclass(frozen=True)
class Side:
    """A checkout, and where its outputs lie: in the folder ``name`` of ``work``."""

    name: str
    tree: Path
    work: Path

    @classmethod
    def before(cls, tree: Path, work: Path) -> "Side":
        """The tree before a change: one per ``work``, so that its outputs serve many trees after it."""
        return cls("before", tree.resolve(), work)

    @classmethod
    def after(cls, tree: Path, work: Path) -> "Side":
        """The tree after a change: each has a folder of its own, named after where the tree is."""
        return cls("-".join(["after", *tree.resolve().parts[1:]]), tree.resolve(), work)

    @property
    def folder(self) -> Path:
        """The folder of its outputs."""
        return self.work / self.name

    @property
    def log(self) -> Path:
        """The file with what the child processes print."""
        return self.work / f"{self.name}.log"

    def run(self, chosen: Sequence[Case], origins: Mapping[str, str]) -> Iterator[Case]:
        """Perform cases in child processes; yield each when it is done. A case that ends its process has failed."""
        left = {case.name: case for case in chosen}
        for name in left:
            self._note(name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / name, ignore_errors=True)
        while left:
            for name in self._performed(list(left.values())):
                if "failed" not in self.outcome(name):
                    self._note(name).parent.mkdir(parents=True, exist_ok=True)
                    self._note(name).write_text(origins[name], encoding="utf-8")
                yield left.pop(name)
            if left:
                case = left.pop(next(iter(left)))
                (self.folder / case.name).mkdir(parents=True, exist_ok=True)
                failed = {"failed": f"its process came to an end; see {self.log}"}
                (self.folder / case.name / OUTCOME).write_text(json.dumps(failed), encoding="utf-8")
                yield case

    def missing(self, chosen: Sequence[Case], origins: Mapping[str, str]) -> list[Case]:
        """List the cases without an output that the same tree, case and model gave."""
        notes = {case.name: self._note(case.name) for case in chosen}
        kept = {name for name, note in notes.items() if note.is_file() and note.read_text() == origins[name]}
        return [c for c in chosen if c.name not in kept or not (self.folder / c.name / OUTCOME).is_file()]

    def outcome(self, name: str) -> dict[str, object]:
        """Return what the call of a case returned, or why it did not."""
        outcome: dict[str, object] = json.loads((self.folder / name / OUTCOME).read_text(encoding="utf-8"))
        return outcome

    def origins(self, chosen: Sequence[Case]) -> dict[str, str]:
        """Return by case a digest of what decides its output: the case, those it needs, the model, the source."""
        models = {path.name: digest(path.resolve()) for path in (self.work / "models").iterdir()}
        source, origins = digest(self.tree / "src"), dict[str, str]()
        for case in chosen:
            parts = [asdict(case), source, models.get(case.model), *(origins[name] for name in case.needs)]
            origins[case.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return origins

    def _note(self, name: str) -> Path:
        """The file that keeps the origin of a case's output."""
        return self.work / "made-of" / self.name / f"{name}.txt"

    def _performed(self, chosen: Sequence[Case]) -> Iterator[str]:
        """Yield the names of cases as one child process performs them, until it ends."""
        settings = {"PYTHONPATH": str(self.tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        settings |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("compare_child.py")), str(self.tree)]
        pipe, environment = subprocess.PIPE, os.environ | settings
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


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder against other runs; ``shared`` holds it against those that write.

    Raises SystemExit if another run has it. The lock ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run works in {folder}; wait for it, or give another --work") from None
        yield
