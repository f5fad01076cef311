"""The outline of a model: the names and shapes of its parameters, known without building it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bitwright.core.block import Family
from bitwright.core.decoder import Decoder
from bitwright.core.weight import Division, Kept, Weight


@dataclass(frozen=True)
class Outline:
    """The parameters and blocks of a model.

    ``shapes`` holds every parameter by its name in the model, also that of a tied output layer; ``blocks`` are the
    paths of the blocks.
    """

    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    blocks: tuple[str, ...]
    tied: bool

    @classmethod
    def of(cls, family: Family, decoder: Decoder) -> "Outline":
        """Outline a model whose decoder is known without building it."""
        return cls(family, decoder.parameters, decoder.block_names, decoder.tied)

    def source(self, name: str) -> str:
        """The checkpoint's tensor behind a parameter: a tied output layer is stored as the embedding."""
        if name == f"{self.family.head}.weight" and self.tied:
            return f"{self.family.embedding}.weight"
        return name

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of every block, in the order in which data flows through them."""
        return tuple(f"{block}.{linear}" for block in self.blocks for linear in self.family.topology.linears)

    def weights(self, with_head: bool) -> list[Weight]:
        """All weights that can be quantized: the linears of every block, and the output layer if ``with_head``."""
        names = (*self.linears, self.family.head) if with_head else self.linears
        return [Weight(self.source(f"{name}.weight"), name, self.shapes[f"{name}.weight"]) for name in names]

    def division(self, with_head: bool, names: Iterable[str], why: Callable[[str], str]) -> Division:
        """The tensors of a checkpoint: what can be quantized, and the others with the reason that ``why`` gives."""
        weights = self.weights(with_head)
        copied = {weights[-1].tensor} if with_head and self.tied else set()
        taken = {weight.tensor for weight in weights} - copied
        taken |= {
            f"{weight.name}.weight" for weight in weights
        }  # an output layer that is tied, and stored all the same
        return Division(tuple(weights), tuple(Kept(name, why(name)) for name in names if name not in taken))
