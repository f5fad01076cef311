"""A model as its architecture describes it: linears, which of them share an input, where transforms go; its outline.

Names of a topology are relative to the block, as transformers names them: "self_attn.q_proj".
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from bitwright.core.decoder import BLOCKS, EMBEDDING, FINAL_NORM, HEAD, Config, Decoder
from bitwright.core.weight import Division, Kept, Weight


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
