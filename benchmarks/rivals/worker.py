"""What every worker has in common: the task it is given, the clock, the account, and the dense folder it leaves.

A worker is ``NAME_worker.py TASK.json``, run by an interpreter of its own; ``../bench.py`` starts it. Nothing here may
need more than Python, torch and safetensors, since all the environments import it.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class Task:
    """What to do: the model's folder, the very tokens [N, T] to calibrate with, the scheme, and where results go.

    ``group_size`` None is one scale per output channel. ``calibration`` is the text the segments were drawn from.
    ``windows`` are tokens [W, T] whose logits are wanted, if activations are quantized and no folder can say how.
    """

    model: str
    segments: str
    output: str
    calibration: str
    method: str
    scheme: str
    bits: int
    activation_bits: int
    group_size: int | None
    symmetric: bool
    seed: int
    settings: dict[str, Any]
    repository: str | None = None
    windows: str | None = None

    @classmethod
    def given(cls) -> "Task":
        """The task named on the command line."""
        return cls(**json.loads(Path(sys.argv[1]).read_text()))

    def as_text(self) -> str:
        """What ``given`` reads."""
        return json.dumps(asdict(self))

    def tokens(self) -> Tensor:
        """The segments [N, T]."""
        return safetensors.torch.load_file(self.segments)["tokens"]

    def settled(
        self, *methods: str, symmetric: bool = True, activations: bool = False, **defaults: Any
    ) -> dict[str, Any]:
        """The settings, with defaults for those that are not named. Ends the program for what this worker cannot do."""
        if self.method not in methods:
            raise SystemExit(f"there is no method {self.method} here; there is {', '.join(methods)}")
        if self.symmetric and not symmetric:
            raise SystemExit(f"{self.scheme}: {self.method} is asymmetric here")
        if self.activation_bits != UNQUANTIZED_BITS and not activations:
            raise SystemExit(f"{self.scheme}: {self.method} quantizes weights alone here; activations take A16")
        for key in self.settings:
            if key not in defaults:
                raise SystemExit(f"there is no setting {key} here; there is {', '.join(defaults) or 'none'}")
        return defaults | self.settings

    def checkout(self) -> str:
        """The folder of the authors' code."""
        if self.repository is None:
            raise SystemExit(
                "this worker runs the authors' code; say where a clone of it lies: --repository NAME=CHECKOUT"
            )
        return self.repository


@dataclass
class Clock(AbstractContextManager["Clock"]):
    """Wall-clock and processor seconds (all threads) of what runs inside, and the resident bytes it starts with."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    start_bytes: int = 0
    _since: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __enter__(self) -> "Clock":
        """Start, or go on."""
        self.start_bytes = self.start_bytes or resident_bytes("VmRSS")
        self._since = monotonic(), process_time()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and add to what was counted before."""
        self.seconds += monotonic() - self._since[0]
        self.cpu_seconds += process_time() - self._since[1]


def write_account(task: Task, clock: Clock, blocks: int, *libraries: str, **more: Any) -> None:
    """Write account.json. The peak is the whole process's, libraries and model included, until now."""
    account = {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "blocks": blocks,
        "start_bytes": clock.start_bytes,
        "peak_bytes": resident_bytes("VmHWM"),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in libraries},
    }
    (Path(task.output) / "account.json").write_text(json.dumps(account | more))


def write_dense(task: Task, state: Mapping[str, Tensor]) -> None:
    """OUTPUT/model: the dequantized weights in float32 under the original's names, with the files that go along."""
    source, output = Path(task.model), Path(task.output) / "model"
    output.mkdir()
    for path in source.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    config = json.loads((source / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
    tensors = {name: state[name].detach().float().contiguous() for name in stored_names(source)}
    safetensors.torch.save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def stored_names(folder: Path) -> list[str]:
    """Names of the tensors in a folder."""
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            names += list(file.keys())
    return names


def resident_bytes(which: str) -> int:
    """VmRSS, the resident set of this program, or VmHWM, its largest; ``ru_maxrss`` counts who started it as well."""
    match = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
