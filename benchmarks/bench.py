"""Run workers: every row in a process of its own, with the very same segments."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import typer
from jaxtyping import Int
from rivals.worker import UNQUANTIZED_BITS, Task
from rows import Asked, Row
from safetensors.torch import save_file
from torch import Tensor

from bitwright.calibration.segments import calibration_segments
from bitwright.calibration.texts import BUILTIN
from bitwright.core.grid import FULL
from bitwright.core.scheme import Scheme
from bitwright.model.source import open_tokenizer

WORKERS = Path(__file__).parent / "rivals"
LOG_TAIL = 4000


@dataclass(frozen=True)
class Bench:
    """The settings that all runs have in common; ``threads`` is that of the processes that are started.

    ``pythons`` and ``repositories`` are the interpreters and the authors' checkouts, by implementation.
    """

    model: Path
    calibration: str
    samples: int
    seqlen: int
    pythons: dict[str, str]
    repositories: dict[str, str]
    threads: int

    @property
    def protocol(self) -> Row:
        """The part of a protocol that all runs share."""
        return {"calibration": f"{self.samples} segments of {self.seqlen} tokens of {Path(self.calibration).name}"}

    def asked(self, keys: list[str]) -> dict[str, Asked]:
        """The requests of the rows, by their names. Raises typer.BadParameter or SchemeError before anything is run."""
        known = sorted(path.name.removesuffix("_worker.py") for path in WORKERS.glob("*_worker.py"))
        rows = {}
        for key in keys:
            try:
                rows[key] = asked = Asked.parse(key)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            Scheme.parse(asked.scheme)
            if asked.who not in known:
                raise typer.BadParameter(f"there is no implementation '{asked.who}'; there is {', '.join(known)}")
            if asked.who not in self.pythons:
                raise typer.BadParameter(f"which interpreter runs {asked.who}? Give --python {asked.who}=INTERPRETER")
        return rows

    def run(self, asked: Asked, output: Path, windows: Int[Tensor, "W T"] | None = None) -> Row:
        """Run a row and return its account. OUTPUT/model is the result. Raises SystemExit with the worker's output."""
        output.mkdir()
        (output / "task.json").write_text(self._task(asked, output, windows).as_text())
        threads = {f"{library}_NUM_THREADS": str(self.threads) for library in ("OMP", "MKL")}
        with (output / "log.txt").open("w") as log:
            done = subprocess.run(
                [self.pythons[asked.who], str(WORKERS / f"{asked.who}_worker.py"), str(output / "task.json")],
                cwd=output,
                env=os.environ | threads | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            output_end = (output / "log.txt").read_text(errors="replace")[-LOG_TAIL:]
            raise SystemExit(f"{output_end}\n{asked.who}, {asked.shown} {asked.scheme}: ended with {done.returncode}")
        account: Row = json.loads((output / "account.json").read_text())
        return account

    def _task(self, asked: Asked, output: Path, windows: Int[Tensor, "W T"] | None) -> Task:
        """The worker's task, with the segments, and the windows if there are some, in files beside it."""
        drawn = calibration_segments(
            self.calibration,
            open_tokenizer(self.model),
            samples=self.samples,
            seqlen=self.seqlen,
            seed=asked.seed,
        ).tokens
        for name, tokens in (("segments", drawn), ("windows", windows)):
            if tokens is not None:
                save_file({"tokens": tokens.contiguous()}, output / f"{name}.safetensors")
        scheme = Scheme.parse(asked.scheme)
        return Task(
            model=str(self.model.absolute()),
            segments=str(output / "segments.safetensors"),
            output=str(output),
            calibration=self.calibration if self.calibration == BUILTIN else os.path.abspath(self.calibration),
            method=asked.method,
            scheme=asked.scheme,
            bits=scheme.weight.bits,
            activation_bits=scheme.activation_bits or UNQUANTIZED_BITS,
            group_size=None if scheme.tile.in_ == FULL else scheme.tile.in_,
            symmetric=scheme.weight.symmetric,
            seed=asked.seed,
            settings=asked.settings,
            repository=self.repositories.get(asked.who),
            windows=None if windows is None else str(output / "windows.safetensors"),
        )
