"""Run a part of a block: AWQ, Outlier Suppression+ and AdaDim judge their choices by its output."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear as product

from bitwright.core.block import Block
from bitwright.core.fake_quant import fake_quantize_tokens
from bitwright.core.scheme import Scheme
from bitwright.steps.activations import quantize_attention
from bitwright.stream.activations import tapping
from bitwright.stream.forward import Inputs, call_of, placed, run


def _spread(inputs: Inputs, tokens: int) -> list[int]:
    """Segments that are evenly spread over the calibration data, of at most so many tokens."""
    count = max(1, min(len(inputs), tokens // inputs.length))
    return [int(row) for row in torch.linspace(0, len(inputs) - 1, count).long()]


class ModuleInspection:
    """One module with its inputs and its full-precision outputs, kept on the CPU.

    The inputs are at most ``tokens`` tokens, so that memory does not grow with the calibration data.
    """

    @torch.no_grad()
    def __init__(
        self,
        block: Block,
        module: str,
        parameters: Mapping[str, Tensor],
        scheme: Scheme,
        inputs: Inputs,
        tokens: int,
    ) -> None:
        """``parameters`` are the block's in full precision; ``inputs`` are the block's."""
        self.block, self.scheme, self.name = block, scheme, module
        self.module, self.place = block.module.get_submodule(module), block.device
        full = placed(block, parameters)
        self.full = self._own(full)
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []
        self.targets: list[Tensor] = []
        for rows in inputs.batches(_spread(inputs, tokens)):
            x, others = call_of(block, module, full, inputs.call(rows, block))
            self.calls.append((x.cpu(), others))
            self.targets.append(self._run(self.full, x, others).cpu())

    @torch.no_grad()
    def error(
        self,
        parameters: Mapping[str, Tensor],
        scale: Float[Tensor, " I"] | None = None,
        shift: Float[Tensor, " I"] | None = None,
    ) -> float:
        """The mean squared error of the output; see ``core/method.py``."""
        replaced = self.full | self._own(placed(self.block, parameters))
        total, count = torch.zeros((), dtype=torch.float64), 0
        with self._quantized():
            for (x, others), target in zip(self.calls, self.targets, strict=True):
                x = _changed(x.to(self.place), scale, shift)
                difference = self._run(replaced, x, others).float() - target.to(x.device).float()
                total += torch.linalg.vector_norm(difference).double().cpu() ** 2
                count += difference.numel()
        return float(total) / count

    @contextmanager
    def _quantized(self) -> Iterator[None]:
        """A context in which the module's linears and its attention see quantized activations."""
        undo, hooks = quantize_attention(self.block.module, self.scheme.activations, self.scheme.kv), []
        if self.scheme.activations is not None:
            grid = self.scheme.activations
            places = {name.rpartition(".")[0] for name in self._weights()}
            for place in places:
                part = self.block.module.get_submodule(place)
                hooks.append(part.register_forward_pre_hook(lambda _, args: (fake_quantize_tokens(args[0], grid),)))
        try:
            yield
        finally:
            undo()
            for hook in hooks:
                hook.remove()

    def _weights(self) -> list[str]:
        """The parameters that are the weights of the module's linears."""
        names, prefix = self.block.layout.names, f"{self.name}."
        weights = [names.get(f"{linear}.weight", "") for linear in self.block.topology.linears]
        return [name for name in weights if name.startswith(prefix)]

    def _run(self, parameters: Mapping[str, Tensor], x: Tensor, others: Mapping[str, Any]) -> Tensor:
        result = functional_call(self.module, dict(parameters), (x,), dict(others))
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters, by their names in the module."""
        prefix = f"{self.name}."
        parameters = self.block.layout.parameters(tensors, self.block.parameters)
        return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}


class LinearInspection:
    """Linears with their inputs and full-precision outputs, kept on the CPU, as ``ModuleInspection``."""

    @torch.no_grad()
    def __init__(
        self,
        block: Block,
        linears: Sequence[str],
        parameters: Mapping[str, Tensor],
        scheme: Scheme,
        inputs: Inputs,
        tokens: int,
    ) -> None:
        self.place, self.grid = block.device, scheme.activations
        self.full = {name: parameters[f"{name}.weight"].to(self.place, block.dtype) for name in linears}
        self.biases = {name: parameters[f"{name}.bias"] for name in linears if f"{name}.bias" in parameters}
        self.read: list[tuple[str, Tensor]] = []
        with tapping(block, self):
            full = placed(block, parameters)
            for rows in inputs.batches(_spread(inputs, tokens)):
                run(block, full, inputs.call(rows, block))

    def inputs(self, linears: Sequence[str], x: Tensor) -> None:
        """Keep what the linears read."""
        self.read += [(name, x.cpu()) for name in self.full if name in linears and x.numel()]

    def outputs(self, linear: str, rows: slice, x: Tensor, y: Tensor) -> None:
        """Nothing to see: outputs are computed from the inputs."""

    @torch.no_grad()
    def error(
        self,
        parameters: Mapping[str, Tensor],
        scale: Float[Tensor, " I"] | None = None,
        shift: Float[Tensor, " I"] | None = None,
    ) -> float:
        """The mean squared error of the outputs; zero if no token reached the linears."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for name, kept in self.read:
            x, full = kept.to(self.place), self.full[name]
            weight = parameters.get(f"{name}.weight", full).to(full)
            moved = _changed(x, scale, shift)
            moved = moved if self.grid is None else fake_quantize_tokens(moved, self.grid)
            output = product(moved, weight.to(moved)).float()
            if shift is not None:
                output = output + (parameters[f"{name}.bias"] - self.biases[name]).to(output)
            difference = output - product(x, full.to(x)).float()
            total += torch.linalg.vector_norm(difference).double().cpu() ** 2
            count += difference.numel()
        return float(total) / max(1, count)


def _changed(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = x if shift is None else x - shift.to(x)
    return x if scale is None else x / scale.to(x)
