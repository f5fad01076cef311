"""A block: its linears, which of them share an input, where transforms go, and how its tensors lie in its module.

Names in a block are those of the checkpoint, relative to the block: "self_attn.q_proj". The module that transformers
builds may have others, and may hold many linears in one parameter; a ``Layout`` knows both.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitwright.core.decoder import EMBEDDING, HEAD, Config, Decoder
from bitwright.core.weight import Division, Kept, Weight


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input, and the module whose output shows their joint error.

    ``enclosing`` is the attention for q, k and v, the MLP for gate and up, and otherwise the linear itself (AWQ, arXiv
    2306.00978, and AdaDim, arXiv 2309.15531, judge a choice there). Groups of one ``stage`` do not read each other's
    outputs: the experts of a layer.
    """

    linears: tuple[str, ...]
    enclosing: str
    stage: str = ""

    @property
    def routed(self) -> bool:
        """Whether these are linears of one expert among others: some tokens reach it, and others do not."""
        return "*" in self.stage


@dataclass(frozen=True)
class Side:
    """One module at a site, and which of the site's parameters each of its channels uses.

    ``index[c]`` is the parameter of channel ``c``, -1 if it has none; None means one to one. A ``reciprocal`` producer
    is multiplied by the scale, while the others are divided by it (the keys of q.k). A norm multiplies by ``offset``
    plus its weight: Gemma's offset is 1.
    """

    module: str
    index: tuple[int, ...] | None = None
    reciprocal: bool = False
    offset: float = 0.0


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
class Place:
    """The place of some rows of a linear in the parameters of a module.

    ``index`` is the expert in a parameter [E, ., .]. ``rows`` are the rows (start, stop, step) of its matrix as it
    multiplies, [O, I]; ``transposed`` says that the parameter stores it [I, O].
    """

    parameter: str
    index: int | None
    rows: tuple[int, int, int]
    transposed: bool = False

    def of(self, parameter: Tensor) -> Float[Tensor, "R I"]:
        """The rows, as a view of the parameter."""
        matrix = parameter if self.index is None else parameter[self.index]
        return (matrix.mT if self.transposed else matrix)[slice(*self.rows)]


@dataclass(frozen=True)
class Layout:
    """How a block's tensors lie in the parameters of its module.

    ``names`` maps a tensor's name in the block to the parameter that it is, as a whole. ``linears`` maps a linear's
    name to the places of its rows, if its weight is no whole parameter [O, I].
    """

    names: Mapping[str, str]
    linears: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors by their names, each weight [O, I], from the parameters of the module."""
        whole = {name: parameters[place] for name, place in self.names.items()}
        return whole | {f"{name}.weight": _joined(places, parameters) for name, places in self.linears.items()}

    def parameters(self, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the module that these tensors change; differentiable. ``stored`` are its own."""
        changed = {self.names[name]: tensor for name, tensor in tensors.items() if name in self.names}
        rows: dict[str, list[tuple[Place, Tensor]]] = {}
        for name, places in self.linears.items():
            weight, start = tensors.get(f"{name}.weight"), 0
            if weight is None:
                continue
            for place in places:
                count = len(range(*place.rows))
                rows.setdefault(place.parameter, []).append((place, weight[start : start + count]))
                start += count
        return changed | {name: _filled(stored[name], pieces) for name, pieces in rows.items()}


def _joined(places: tuple[Place, ...], parameters: Mapping[str, Tensor]) -> Tensor:
    parts = [place.of(parameters[place.parameter]) for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _filled(stored: Tensor, pieces: list[tuple[Place, Tensor]]) -> Tensor:
    """A parameter with some of its rows replaced."""
    whole = [place.rows == (0, stored.shape[-1 if place.transposed else -2], 1) for place, _ in pieces]
    indices = [place.index for place, _ in pieces]
    if all(whole) and indices == (list(range(len(stored))) if stored.dim() > 2 else [None]):
        matrices = [piece.mT if place.transposed else piece for place, piece in pieces]
        return matrices[0] if stored.dim() == 2 else torch.stack(matrices)
    filled = stored.to(pieces[0][1].dtype, copy=True)
    for place, piece in pieces:
        place.of(filled).copy_(piece)
    return filled


@dataclass(frozen=True)
class Family:
    """What formats ask about an architecture whose activations are quantized.

    ``attention_class`` is transformers' class of a block's attention, ``head_dim`` the features of an attention head.
    ``flattened`` are the linears, by name in the block with their input features, that see all tokens of a batch as
    rows of one matrix.
    """

    attention_class: str
    head_dim: int
    flattened: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Outline:
    """The tensors and blocks of a model.

    ``shapes`` holds every tensor by its name in the checkpoint, also that of a tied output layer; ``linears`` are those
    of all blocks in the order in which data flows through them, ``blocks`` the paths of the blocks. A tied output layer
    is stored as the ``embedding``.
    """

    shapes: Mapping[str, tuple[int, ...]]
    linears: tuple[str, ...]
    blocks: tuple[str, ...]
    tied: bool
    head: str = HEAD
    embedding: str = EMBEDDING

    @classmethod
    def of(cls, decoder: Decoder) -> "Outline":
        """Outline a model whose decoder is known without building it."""
        names = decoder.block_names
        linears = tuple(f"{block}.{linear}" for block in names for linear in decoder.linears)
        return cls(decoder.parameters, linears, names, decoder.tied)

    def source(self, name: str) -> str:
        """The checkpoint's tensor behind a parameter: a tied output layer is stored as the embedding."""
        return f"{self.embedding}.weight" if name == f"{self.head}.weight" and self.tied else name

    def weights(self, with_head: bool) -> list[Weight]:
        """All weights that can be quantized: the linears of every block, and the output layer if ``with_head``."""
        names = (*self.linears, self.head) if with_head else self.linears
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

    ``decoder`` reads a config.json whose model is a decoder like Llama's: engines' formats are written from it, and it
    is quantized tensor by tensor without transformers. It is None for another kind of model. ``family`` says what
    formats ask if activations are quantized; None if it is to be discovered. Each raises a UserError for a config.json
    that cannot be.
    """

    decoder: Callable[[Config], Decoder] | None = None
    family: Callable[[Config], Family] | None = None


class Tap(Protocol):
    """What looks at a block's linears while it runs."""

    def inputs(self, linears: Sequence[str], x: Float[Tensor, "*N I"]) -> Tensor | None:
        """Look at the inputs that linears are about to read; return others for them to read, or None."""

    def outputs(self, linear: str, rows: slice, x: Float[Tensor, "*N I"], y: Float[Tensor, "*N R"]) -> None:
        """Look at the outputs of some rows of a linear, without biases, and at what it read."""


@dataclass(frozen=True)
class Block:
    """One decoder block in memory: the real transformers module, its topology, and how its tensors lie in it.

    ``name`` is its path in the checkpoint ("model.layers.3"); with a linear's name it gives a tensor's name. ``taps``
    see the inputs of its linears in every forward pass.
    """

    index: int
    name: str
    module: nn.Module
    topology: Topology
    layout: Layout
    taps: list["Tap"] = field(default_factory=list, compare=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The block's tensors by their names in it, each weight [O, I], as views of the parameters where it can be."""
        return self.layout.tensors(self.parameters)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the module."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    @property
    def device(self) -> torch.device:
        """The device that the block is on."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the block computes in."""
        return next(self.module.parameters()).dtype

    def weight(self, linear: str) -> Float[Tensor, "O I"]:
        """The weight of one of the block's linears."""
        places = self.layout.linears.get(linear)
        if places is None:
            return self.parameters[self.layout.names[f"{linear}.weight"]]
        return _joined(places, self.parameters)

    def path(self, linear: str) -> str:
        """The linear's name in the whole model."""
        return f"{self.name}.{linear}" if self.name else linear
