"""Ranges fitted to the weights alone, beside HQQ's optimiser: time and squared error, same tensors, same process.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 hqq==0.2.8.post1 jaxtyping
    PYTHONPATH=src ENV/bin/python benchmarks/range_speed.py MODEL [--threads 1]

What is timed, in turn, a few times over:

- HQQ's optimiser, with the arguments that its ``Quantizer.quantize`` hands it (groups along the input, float32, the
  zero point that it starts from rounded at 4 bits, all as it comes), and that ``quantize`` whole, without packing;
- Bitwright's ``steps.range_fit.fitted`` at alignment 0 and 16; and ``fitted``, ``affine`` and ``quantize``: to codes;
- round-to-nearest: ``minmax``, ``affine`` and ``quantize``.

``fitted`` starts from the weights as they are and ends with ranges; HQQ's optimiser starts from the float32 copy and
the min-max range that ``quantize`` has made, and ends with codes. Tensors: all linears of MODEL, and two of Llama's
shapes with heavy tails (Student's t with 5 degrees of freedom, times 0.02, bfloat16). The squared error is that of what
is stored, over the sum of the squared weights: scales in the weights' dtype for Bitwright, scales and zero points in
float16 for HQQ.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from hqq.core.quantize import Quantizer
from rows import Kept, Row, measured_on
from safetensors.torch import load_file
from torch import Tensor

from bitwright.core.grid import FULL
from bitwright.core.qtensor import affine, dequantize, quantize
from bitwright.core.scheme import Scheme
from bitwright.steps.range_fit import fitted
from bitwright.steps.ranges import minmax

SCHEMES = "W4A16", "W4A16g128", "W3A16g128", "W2A16g128"
RANDOM = (4096, 4096), (11008, 4096)
HQQ, HQQ_WHOLE, RTN = "hqq optimiser", "hqq quantize", "rtn"
FITTED, TO_CODES = {a: f"fitted, alignment {a}" for a in (0, 16)}, "fitted, alignment 0, to codes"
ROUNDED_BITS = 4
COLUMNS = (
    *("tensors", "scheme", "HQQ optimiser", "`fitted`, alignment 0", "of HQQ's", "alignment 16", "of HQQ's"),
    *("HQQ to codes", "`fitted` to codes", "of HQQ's", "RTN to codes"),
    *("error: RTN", "HQQ", "alignment 0", "alignment 16"),
)


class Contest:
    """Everybody on one list of weights, at one scheme."""

    def __init__(self, weights: list[Tensor], scheme: Scheme) -> None:
        self.weights, self.grid, self.tile = weights, scheme.weight, scheme.tile
        self.group = None if scheme.tile.in_ == FULL else scheme.tile.in_
        self.optimiser = Quantizer.optimize_weights
        self.given = [self._what_hqq_hands_over(weight) for weight in weights]

    @property
    def runs(self) -> dict[str, Callable[[Tensor, Row], Any]]:
        """The calls that are timed, each with a weight and with the arguments of HQQ's optimiser for it."""
        own = {name: lambda weight, _, a=a: self._fitted(weight, a) for a, name in FITTED.items()}
        return {
            HQQ: lambda _, given: self.optimiser(**given),
            **own,
            HQQ_WHOLE: lambda weight, _: self._hqq(weight),
            TO_CODES: lambda weight, _: self._codes(weight, self._fitted(weight, 0)),
            RTN: lambda weight, _: self._codes(weight, minmax(weight, self.tile)),
        }

    def errors(self) -> dict[str, float]:
        """The squared error of each, over all weights."""
        writers: dict[str, Callable[[Tensor], Tensor]] = {
            RTN: lambda weight: self._written(weight, minmax(weight, self.tile)),
            HQQ: self._hqq_written,
            **{name: partial(self._written_fitted, alignment=a) for a, name in FITTED.items()},
        }
        whole = sum(float(weight.double().square().sum()) for weight in self.weights)
        return {
            name: sum(float((make(w).double() - w.double()).square().sum()) for w in self.weights) / whole
            for name, make in writers.items()
        }

    def _hqq(self, weight: Tensor) -> tuple[Tensor, Row]:
        quantized: tuple[Tensor, Row] = Quantizer.quantize(
            weight,
            nbits=self.grid.bits,
            group_size=self.group,
            axis=1,
            round_zero=self.grid.bits == ROUNDED_BITS,
            bitpack=False,
            device="cpu",
        )
        return quantized

    def _what_hqq_hands_over(self, weight: Tensor) -> Row:
        handed: Row = {}

        def note(**given: Any) -> Any:
            handed.update(given)
            return self.optimiser(**given)

        Quantizer.optimize_weights = note
        self._hqq(weight)
        Quantizer.optimize_weights = self.optimiser
        return handed

    def _hqq_written(self, weight: Tensor) -> Tensor:
        codes, meta = self._hqq(weight)
        scale, zero = (meta[name].half().float() for name in ("scale", "zero"))
        return ((codes.float() - zero) * scale).reshape(weight.shape)

    def _fitted(self, weight: Tensor, alignment: float) -> tuple[Tensor, Tensor]:
        return fitted(weight, self.grid, self.tile, weight.dtype, alignment=alignment)

    def _codes(self, weight: Tensor, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        scale, zero = affine(*ends, self.grid, weight.dtype)
        return quantize(weight, scale, zero, self.grid, self.tile), scale, zero

    def _written(self, weight: Tensor, ends: tuple[Tensor, Tensor]) -> Tensor:
        codes, scale, zero = self._codes(weight, ends)
        return dequantize(codes, scale.float(), zero, self.tile)

    def _written_fitted(self, weight: Tensor, alignment: float) -> Tensor:
        return self._written(weight, self._fitted(weight, alignment))


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--name", default="range-speed")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    malloc = " ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_"))
    process = f"{asked.threads} threads, {malloc or 'malloc untuned'}"
    kept = Kept(asked.name, {"repetitions": asked.repetitions, "process": process}, ("torch", "hqq"))
    rows = []
    for what, weights in _tensors(asked.model):
        for scheme in SCHEMES:
            identity = {"tensors": what, "scheme": scheme}
            rows.append(kept.row(identity, partial(_measured, weights, Scheme.parse(scheme), asked.repetitions)))
    loads = [row["load_before"] for row in rows]
    kept.write_table(
        "Ranges fitted to the weights, beside HQQ's optimiser",
        f"Nanoseconds of processor time a weight, the least of {asked.repetitions} runs, everybody in turn; ratios are "
        f"the median over turns. {process}; load of the machine before a row {min(loads):.1f} to {max(loads):.1f}. "
        "Error: sum |W - Wq|^2 / sum |W|^2 of what is stored, HQQ with scales and zero points in float16. "
        f"{measured_on(rows)}",
        COLUMNS,
        [_cells(row) for row in rows],
    )


def _tensors(model: Path) -> Iterator[tuple[str, list[Tensor]]]:
    named = load_file(model / "model.safetensors")
    yield f"linears of {model.name}", [w for name, w in named.items() if ".layers." in name and w.ndim == 2]
    seed = torch.Generator().manual_seed(0)
    for rows, columns in RANDOM:
        heavy = torch.empty(rows, columns)
        for row in heavy.split(256):
            spread = torch.randn(*row.shape, 5, generator=seed).square().mean(-1).sqrt()
            row.copy_(torch.randn(row.shape, generator=seed) / spread * 0.02)
        yield f"t, {rows} x {columns}", [heavy.bfloat16()]


def _measured(weights: list[Tensor], scheme: Scheme, repetitions: int) -> Row:
    load, contest = os.getloadavg()[0], Contest(weights, scheme)
    count, pairs = sum(weight.numel() for weight in weights), list(zip(weights, contest.given, strict=True))
    times: dict[str, dict[str, list[float]]] = {name: {"cpu_ns": [], "wall_ns": []} for name in contest.runs}
    for _ in range(repetitions):
        for name, run in contest.runs.items():
            wall, processor = perf_counter(), process_time()
            for weight, given in pairs:
                run(weight, given)
            times[name]["cpu_ns"].append((process_time() - processor) / count * 1e9)
            times[name]["wall_ns"].append((perf_counter() - wall) / count * 1e9)
    return {"load_before": load, "per_weight": times, "error": contest.errors()}


def _cells(row: Row) -> list[str]:
    spent = {name: times_of_one["cpu_ns"] for name, times_of_one in row["per_weight"].items()}
    least = {name: f"{min(times_of_one):.1f}" for name, times_of_one in spent.items()}

    def over(name: str, other: str) -> str:
        return f"{median(a / b for a, b in zip(spent[name], spent[other], strict=True)):.2f}"

    times = [least[HQQ]]
    for name in FITTED.values():
        times += [least[name], over(name, HQQ)]
    times += [least[HQQ_WHOLE], least[TO_CODES], over(TO_CODES, HQQ_WHOLE), least[RTN]]
    return [
        row["tensors"],
        row["scheme"],
        *times,
        *(f"{row['error'][name]:.5f}" for name in (RTN, HQQ, *FITTED.values())),
    ]


if __name__ == "__main__":
    main()
