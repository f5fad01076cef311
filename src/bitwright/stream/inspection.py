"""Run one module of a block: AWQ, Outlier Suppression+ and AdaDim judge their choices by its output."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from bitwright.core.block import Block
from bitwright.core.scheme import Scheme
from bitwright.steps.activations import quantized_activations
from bitwright.stream.forward import TOKENS_PER_PASS, call_of


class ModuleInspection:
    """One module with its inputs and its full-precision outputs, kept on the CPU.

    The inputs are at most ``tokens`` tokens, in segments that are evenly spread over the calibration data, so that
    memory does not grow with the data.
    """

    @torch.no_grad()
    def __init__(
        self,
        block: Block,
        module: str,
        parameters: Mapping[str, Tensor],
        scheme: Scheme,
        inputs: Float[Tensor, "N T D"],
        kwargs: Mapping[str, Any],
        tokens: int,
    ) -> None:
        """``parameters`` are the block's in full precision; ``inputs`` and ``kwargs`` are the block's arguments."""
        self.block, self.scheme, self.name = block, scheme, module
        self.module, self.place = block.module.get_submodule(module), next(block.module.parameters())
        full = {name: p.to(self.place) for name, p in parameters.items()}
        length = inputs.shape[1]
        count = max(1, min(len(inputs), tokens // length))
        chosen = inputs[torch.linspace(0, len(inputs) - 1, count).long()]
        self.full = self._own(full)
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []
        self.targets: list[Tensor] = []
        for batch in chosen.split(max(1, TOKENS_PER_PASS // length)):
            x, others = call_of(block, module, full, batch.to(self.place), kwargs)
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
        replaced = self.full | self._own({name: p.to(self.place) for name, p in parameters.items()})
        total, count = torch.zeros((), dtype=torch.float64), 0
        with quantized_activations(self.block, self.scheme):
            for (x, others), target in zip(self.calls, self.targets, strict=True):
                x = x.to(self.place)
                x = x if shift is None else x - shift.to(x)
                x = x if scale is None else x / scale.to(x)
                difference = self._run(replaced, x, others).float() - target.to(x.device).float()
                total += torch.linalg.vector_norm(difference).double().cpu() ** 2
                count += difference.numel()
        return float(total) / count

    def _run(self, parameters: Mapping[str, Tensor], x: Tensor, others: Mapping[str, Any]) -> Tensor:
        result = functional_call(self.module, dict(parameters), (x,), dict(others))
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _own(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters, by their names in the module."""
        prefix = f"{self.name}."
        return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
