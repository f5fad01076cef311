"""Apply decisions in one fixed order: transform, outliers, axis, range, rounding.

What no method decides has a default: no transform, no outliers, the scheme's tile, the min-max range, rounding to
nearest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Topology
from bitwright.core.decisions import BlockDecisions, LinearDecision
from bitwright.core.errors import RecipeError
from bitwright.core.qtensor import QTensor, affine, quantize
from bitwright.core.scheme import Allocation, Scheme
from bitwright.steps.ranges import minmax
from bitwright.steps.transform import apply_site


@dataclass(frozen=True)
class Folded:
    """A block after its decisions; its tensors go by their names in the block.

    ``full`` are all parameters, transformed but not quantized, in float32. ``linears`` are the quantized weights.
    ``moved`` are the other parameters that the transform changed, in the dtype they are stored in.
    """

    full: Mapping[str, Tensor]
    linears: Mapping[str, QTensor]
    moved: Mapping[str, Tensor]
    transformed: bool

    def written(self) -> dict[str, Tensor]:
        """The parameters in which the written block differs from the original."""
        return {f"{name}.weight": q.dequantize() for name, q in self.linears.items()} | dict(self.moved)


def transform(parameters: Mapping[str, Tensor], topology: Topology, decisions: BlockDecisions) -> Mapping[str, Tensor]:
    """The parameters with the scale and shift of every decided site applied."""
    for site in topology.sites:
        if site.name in decisions.sites:
            decided = decisions.sites[site.name]
            parameters = apply_site(parameters, site, decided.scale, decided.shift)
    return parameters


@torch.no_grad()
def parameters_of(block: Block, decisions: BlockDecisions) -> Mapping[str, Tensor]:
    """A block's parameters in float32, with the scale and shift of every decided site applied."""
    return transform({name: p.float() for name, p in block.tensors.items()}, block.topology, decisions)


def weights_of(block: Block, decisions: BlockDecisions) -> dict[str, Float[Tensor, "O I"]]:
    """The weights of a block's linears in float32, with the scale and shift of every decided site applied."""
    moved = parameters_of(block, decisions)
    return {name: moved[f"{name}.weight"] for name in block.topology.linears}


def require_held(name: str, weight: Float[Tensor, "O I"], codes: QTensor) -> None:
    """Raise RecipeError if the dtype of a weight's scales cannot hold them."""
    if codes.cuts(weight):
        dtype = str(codes.scale.dtype).removeprefix("torch.")
        raise RecipeError(
            f"{name}: has weights of {float(weight.abs().max()):.3g}, and {dtype}, in which their scales are to be "
            f"stored, ends at {torch.finfo(codes.scale.dtype).max:.3g}; leave it as it is with --exclude, or take a "
            "--format that stores scales in the checkpoint's dtype: bitwright, or compressed-tensors"
        )


def fold(
    parameters: Mapping[str, Tensor],
    topology: Topology,
    decisions: BlockDecisions,
    allocation: Allocation,
    stored: torch.dtype,
) -> Folded:
    """Apply all decisions to a block: ordinary weights, biases, norms and codes are left, and nothing else."""
    full = transform({name: p.float() for name, p in parameters.items()}, topology, decisions)
    linears = {
        name: quantize_linear(full[f"{name}.weight"], decisions.linear(name), allocation.scheme(name), stored)
        for name in topology.linears
    }
    weights = {f"{name}.weight" for name in topology.linears}
    touched = {
        s.module for site in topology.sites if site.name in decisions.sites for s in site.producers + site.readers
    }
    moved = {
        name: p.to(stored) for name, p in full.items() if name not in weights and name.rpartition(".")[0] in touched
    }
    return Folded(full, linears, moved, bool(decisions.sites))


def quantize_linear(
    weight: Float[Tensor, "O I"], decision: LinearDecision, scheme: Scheme, scale_dtype: torch.dtype
) -> QTensor:
    """Quantize a linear's (transformed) weight as decided."""
    tile, inside = decision.tile or scheme.tile, decision.inside(weight)
    low, high = decision.low, decision.high
    if low is None or high is None:
        low, high = minmax(inside, tile)
    scale, zero = affine(low, high, scheme.weight, scale_dtype)
    codes = decision.codes
    if codes is None:
        codes = quantize(inside, scale, zero, scheme.weight, tile)
    if decision.outliers is None:
        return QTensor(codes, scale, zero, scheme.weight, tile)
    index = decision.outliers.flatten().nonzero().flatten().to(torch.int32)
    return QTensor(codes, scale, zero, scheme.weight, tile, index, weight.flatten()[index.long()].to(scale_dtype))
