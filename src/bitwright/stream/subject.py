"""The model that is quantized block by block: its skeleton and its anatomy, together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.core.block import Block, Layout, LinearGroup, Topology
from bitwright.core.scheme import Allocation
from bitwright.core.weight import Weight
from bitwright.model.anatomy import Anatomy, BlockAnatomy
from bitwright.model.linears import linears_of
from bitwright.model.skeleton import Skeleton


@dataclass(frozen=True)
class Subject:
    """A model whose blocks are known; ``head`` is its output layer as one more block, whose name is empty."""

    skeleton: Skeleton
    anatomy: Anatomy
    head: BlockAnatomy | None

    @classmethod
    def of(cls, skeleton: Skeleton, anatomy: Anatomy) -> "Subject":
        """A model with its output layer."""
        return cls(skeleton, anatomy, _head(skeleton))

    def units(self, allocation: Allocation) -> Iterator[BlockAnatomy]:
        """The blocks, and the output layer if it is quantized."""
        yield from self.anatomy.blocks
        if self.head is not None and allocation.of(self.head.path) is not None:
            yield self.head

    @contextmanager
    def loaded(self, anatomy: BlockAnatomy) -> Iterator[Block]:
        """A context with a block and its weights, which are freed at the end."""
        with self.skeleton.filled(anatomy.path) as module:
            whole = nn.ModuleDict() if not anatomy.name else module
            if not anatomy.name:
                whole._modules[anatomy.path] = module
            index = self.anatomy.blocks.index(anatomy) if anatomy.name else len(self.anatomy.blocks)
            yield Block(index, anatomy.name, whole, anatomy.topology, anatomy.layout)

    def weight_of(self, block: Block, linear: str) -> str:
        """The name in the block of the weight that a linear is, or is an expert of."""
        stacks = self._stacks(block.name)
        stack, _, number = linear.rpartition(".")
        return stack if number.isdecimal() and stack in stacks else linear

    def _stacks(self, block: str) -> set[str]:
        own = next((other for other in self.anatomy.blocks if other.name == block), None)
        weights = () if own is None else own.weights
        return {weight.name.removeprefix(f"{block}.") for weight in weights if weight.stacked}

    def dtype_of(self, block: Block) -> Callable[[str], torch.dtype]:
        """The function that tells the dtype in the checkpoint of a tensor of the block."""
        checkpoint = self.skeleton.checkpoint

        def dtype(name: str) -> torch.dtype:
            path = block.path(name)
            return checkpoint.entry(path).dtype if path in checkpoint else checkpoint.dtype_of_weights

        return dtype

    def as_stored(
        self, block: Block, anatomy: BlockAnatomy, moved: Mapping[str, Tensor], stored: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tensors that a transform changed as the checkpoint has them, by its names."""
        result, left = dict[str, Tensor](), dict(moved)
        for weight in anatomy.weights:
            linears = [f"{linear}.weight" for linear in linears_of(weight, anatomy.name)]
            if not any(linear in left for linear in linears):
                continue
            slices = [left.pop(linear, None) for linear in linears]
            own = stored[weight.tensor].unbind() if weight.stacked else (stored[weight.tensor],)
            turned = [part if new is None else (new.mT if weight.transposed else new) for part, new in zip(own, slices)]  # noqa: B905
            whole = torch.stack(turned) if weight.stacked else turned[0]
            result[weight.tensor] = whole.to(stored[weight.tensor].dtype).contiguous()
        return result | {block.path(name): tensor for name, tensor in left.items()}


def _head(skeleton: Skeleton) -> BlockAnatomy | None:
    name = skeleton.head
    if name is None:
        return None
    stored = skeleton.sources.tensors(f"{name}.weight")
    if len(stored) != 1:
        return None
    shape = skeleton.checkpoint.entry(stored[0]).shape
    layout = Layout({f"{name}.weight": f"{name}.weight"})
    topology = Topology((LinearGroup((name,), name),))
    return BlockAnatomy("", name, topology, layout, (Weight(stored[0], name, shape),), {}, True)
