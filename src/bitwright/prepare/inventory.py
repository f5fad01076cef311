"""The tensors of a model as a run will treat them: told from names, shapes and dtypes, no weight is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bitwright.core.allocation import Allocation
from bitwright.core.format import Foreseen
from bitwright.core.weight import Weight


@dataclass(frozen=True)
class Inventory:
    """All tensors of a checkpoint.

    ``weights`` are what will be quantized, in the order of the model; ``kept`` the tensors that stay as they are, and
    why; ``kept_linears`` the linears among them, by their names in the model. ``as_stored`` are the tensors that are in
    no part: they are copied from the checkpoint at the end. ``units`` are the names of what is written part by part,
    in the order of the model; ``blocks`` is the number of decoder blocks. ``copied_head``: an output layer that shares
    its weight with the embedding gets a weight of its own.

    ``special`` is a weight that transformers loads only with our plugin, whatever its codes; ``merged`` one that it
    also loads without if it is symmetric. None if there is no such weight.
    """

    weights: Sequence[Weight]
    kept: Mapping[str, str]
    kept_linears: Sequence[str]
    as_stored: Sequence[str]
    units: Sequence[str]
    blocks: int
    copied_head: bool
    special: str | None = None
    merged: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linears that will be quantized."""
        return tuple(weight.name for weight in self.weights)

    def only_ours(self, allocation: Allocation) -> str | None:
        """A weight that transformers loads only with our plugin; None if there is none."""
        symmetric = all(scheme.weight.symmetric for scheme in allocation.distinct)
        return self.special or (None if symmetric else self.merged)

    def foreseen(self, names: Iterable[str], allocation: Allocation) -> Foreseen:
        """The quantized model as far as names and shapes tell; ``names`` are all tensors of the checkpoint."""
        linears = {weight.name: weight.shape for weight in self.weights}
        passed = [name for name in names if name.removesuffix(".weight") not in linears]
        return Foreseen(linears, passed, allocation.default.weight, allocation.default.tile)
