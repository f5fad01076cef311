"""A decoder block: its linears, which of them share an input, and where equivalent transformations go.

Names are relative to the block, as transformers names them: "self_attn.q_proj".
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from bitwright.core.decoder import BLOCKS, EMBEDDING, FINAL_NORM, HEAD, Config, Decoder


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input, and the module whose output shows their joint error.

    ``enclosing`` is the attention for q, k and v, the MLP for gate and up, and otherwise the linear itself (AWQ, arXiv
    2306.00978, and AdaDim, arXiv 2309.15531, judge a choice there).
    """

    linears: tuple[str, ...]
    enclosing: str


@dataclass(frozen=True)
class Side:
    """One module at a site, and which of the site's parameters each of its channels uses.

    ``index[c]`` is the parameter of channel ``c``; None means one to one. A ``reciprocal`` producer is multiplied by
    the scale, while the others are divided by it (the keys of q.k).
    """

    module: str
    index: tuple[int, ...] | None = None
    reciprocal: bool = False


@dataclass(frozen=True)
class Site:
    """A place where channels can be scaled (and shifted) without changing the block's output.

    Output channels of every producer are divided by the scale, input channels of every consumer are multiplied by it.
    ``channels`` is the number of free parameters: channels that must share one (rotary pairs, the query heads of one
    key-value head) are tied through ``Side.index``. ``shift`` says whether both ends can absorb a shift, ``paper``
    whether OmniQuant's authors transform it. ``in_full`` are consumers that stay in full precision: they are multiplied
    too, but have no say in the scale. SmoothQuant, AWQ, Outlier Suppression+, LET and AdaDim all use this one table.
    """

    name: str
    producers: tuple[Side, ...]
    consumers: tuple[Side, ...]
    channels: int
    shift: bool = False
    paper: bool = True
    in_full: tuple[Side, ...] = ()

    @property
    def readers(self) -> tuple[Side, ...]:
        """Everything that is multiplied by the scale."""
        return self.consumers + self.in_full


@dataclass(frozen=True)
class Topology:
    """The linears of a block, in the order in which data flows through them, and its sites."""

    groups: tuple[LinearGroup, ...]
    sites: tuple[Site, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of all linears that are quantized."""
        return tuple(name for group in self.groups for name in group.linears)

    def only(self, linears: Collection[str], attention: bool = False) -> "Topology":
        """The topology with these linears quantized; the others are like its norms.

        A site is left out if nothing of it is quantized: no consumer, and of q.k neither queries nor keys.
        ``attention`` says that those are quantized as they pass.
        """
        groups = (replace(group, linears=tuple(n for n in group.linears if n in linears)) for group in self.groups)
        sites = (_only(site, linears) for site in self.sites if _is_quantized(site, linears, attention))
        return Topology(tuple(group for group in groups if group.linears), tuple(sites))


def _is_quantized(site: Site, linears: Collection[str], attention: bool) -> bool:
    if not site.consumers and attention:
        return True
    return any(side.module in linears for side in site.consumers or site.producers)


def _only(site: Site, linears: Collection[str]) -> Site:
    quantized = tuple(side for side in site.readers if side.module in linears)
    return replace(site, consumers=quantized, in_full=tuple(side for side in site.readers if side not in quantized))


@dataclass(frozen=True)
class Family:
    """How a model is made: the names of its parts in transformers, and the topology of its blocks.

    ``attention_class`` is transformers' class of a block's attention, ``head_dim`` the features of an attention head.
    ``flattened`` are the linears, by name in the block with their input features, that see all tokens of a batch as
    rows of one matrix.
    """

    attention_class: str
    head_dim: int
    topology: Topology
    blocks: str = BLOCKS
    embedding: str = EMBEDDING
    final_norm: str = FINAL_NORM
    head: str = HEAD
    flattened: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """What a file in ``families/`` knows of the models of one ``model_type``; ``ARCHITECTURE`` at its end.

    ``decoder`` reads a config.json whose model is a decoder like Llama's: engines' formats are written from it. It is
    None for another kind of model. ``family`` tells groups of linears and sites, for methods that work on whole blocks;
    None if nobody has described them. Each raises a UserError for a config.json that cannot be.
    """

    decoder: Callable[[Config], Decoder] | None = None
    family: Callable[[Config], Family] | None = None


@dataclass(frozen=True)
class Block:
    """One decoder block in memory: the real transformers module and its topology.

    ``name`` is its path in the model ("model.layers.3"); with a linear's name it gives a tensor's name.
    """

    index: int
    name: str
    module: nn.Module
    topology: Topology

    def linear(self, name: str) -> nn.Linear:
        """One of the block's linears."""
        linear = self.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    def weight(self, linear: str) -> Float[Tensor, "O I"]:
        """The weight of one of the block's linears."""
        return self.linear(linear).weight.detach()

    def path(self, linear: str) -> str:
        """The linear's name in the whole model."""
        return f"{self.name}.{linear}" if self.name else linear
