"""The contract of an engine: which weights it runs, in which formats, and what one model may mix.

A file in ``engines/`` defines ``ENGINE``, an ``Engine``. That is data: ``prepare/engine_choice.py`` asks it before any
work, ``bitwright engines`` shows it. What a format itself holds (``formats/``) limits an engine further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum

from bitwright.core.errors import RecipeError, nearest
from bitwright.core.grid import FULL, MAX_BITS, MIN_BITS, Grid, Tile
from bitwright.core.mixing import Schemes, any_apart, experts_apart, is_expert, joined_apart, joined_name
from bitwright.core.registry import find, format_of, names
from bitwright.core.scheme import Scheme

HEAD = "lm_head"
EVERY_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))


class BenchInput(StrEnum):
    """What ``bitwright bench`` has an engine load, which decides how it is measured."""

    FOLDER = "folder"
    """A folder, loaded by transformers in this Python environment."""
    GGUF = "gguf"
    """A GGUF file, loaded by llama.cpp: the package xllamacpp, or a library that the user built."""


class Alike(StrEnum):
    """Which experts of a model need one scheme for an engine."""

    NONE = "none"
    LAYER = "layer"
    MODEL = "model"


class Check(IntEnum):
    """The checks of a workload, in their order."""

    ARCHITECTURE = 0
    EXTRAS = 1
    BITS = 2
    GROUPS = 3


@dataclass(frozen=True)
class Refusal:
    """The check that a workload failed, and what the engine does not run: words that go on from "it does not run"."""

    check: Check
    reason: str


@dataclass(frozen=True)
class Workload:
    """What an engine is asked to run.

    ``scheme`` is that of every linear that ``exceptions`` does not name; there, None is a linear left in full
    precision. ``model_type`` is the architecture as config.json names it. ``outliers`` says whether the method keeps
    any. ``tiles`` are those that the method may choose instead of the scheme's own.
    """

    scheme: Scheme
    model_type: str
    outliers: bool = False
    tiles: Sequence[Tile] = ()
    exceptions: Schemes = field(default_factory=dict)

    def uniform(self) -> list["Workload"]:
        """List the workloads of one scheme each that it is made of."""
        schemes = dict.fromkeys([self.scheme, *(scheme for scheme in self.exceptions.values() if scheme is not None)])
        return [replace(self, scheme=scheme, exceptions={}) for scheme in schemes]


@dataclass(frozen=True)
class Way:
    """One format that an engine loads, and which of the weights that the format holds the engine runs.

    ``symmetric`` and ``asymmetric`` are the bits of such weights. ``groups`` are their sizes along the input; None
    stands for every size that the format holds and that is a multiple of one of ``multiples``, if there are any.
    ``channel``: one scale per output channel. ``models``: architectures (``model_type``), None for any. ``checked``:
    the version of the client, and what was done with it.

    What goes beyond such weights: quantized ``activations``, a quantized ``cache`` of keys and values, ``outliers``,
    and groups along the output (``per_input``).

    The sizes of linears: ``inputs`` and ``outputs`` are what their features are multiples of. ``head`` is what the
    outputs of a quantized output layer are a multiple of, 0 if the engine loads none. ``joins``: the engine joins the
    linears of ``mixing.JOINED``; then their outputs count together, and they need one scheme.

    What one model may mix: ``mixes``, schemes that differ from linear to linear; ``leaves``, linears in full precision
    beside quantized ones; ``experts``, which experts need one scheme.
    """

    format: str
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    groups: tuple[int, ...] | None
    channel: bool
    models: tuple[str, ...] | None
    checked: str
    activations: bool = False
    cache: bool = False
    outliers: bool = False
    per_input: bool = False
    multiples: tuple[int, ...] = ()
    inputs: int = 1
    outputs: int = 1
    head: int = 1
    joins: bool = False
    mixes: bool = False
    leaves: bool = True
    experts: Alike = Alike.NONE

    @property
    def sizes(self) -> str:
        """The sizes of its groups, in words."""
        if self.groups is not None:
            return ", ".join(map(str, self.groups))
        return f"multiples of {' or '.join(map(str, self.multiples))}" if self.multiples else "any"

    def refusal(self, workload: Workload) -> Refusal | None:
        """The first check that a workload of one scheme fails; None if the engine runs it.

        Exceptions are not looked at: ask for each of ``Workload.uniform``, and ``refuses_mix``.
        """
        checks = {
            Check.ARCHITECTURE: self._architecture_refused,
            Check.EXTRAS: self._extras_refused,
            Check.BITS: self._bits_refused,
            Check.GROUPS: self._groups_refused,
        }
        for check, refused in checks.items():
            if (reason := refused(workload)) is not None:
                return Refusal(check, reason)
        return None

    def refuses_sizes(self, linears: Mapping[str, tuple[int, int]]) -> str | None:
        """Say which linear, [O, I] by name, has features that the engine does not run; None if there is no such one."""
        linears = _with_outputs_added(linears) if self.joins else linears
        if HEAD in linears and not self.head:
            return f"{HEAD}: a quantized output layer, which it does not load there (leave --quantize-lm-head out)"
        for name, sizes in linears.items():
            multiples = (self.head if name == HEAD else self.outputs, self.inputs)
            for size, multiple, which in zip(sizes, multiples, ("output", "input"), strict=True):
                if size % multiple:
                    return f"{name}: {size} {which} features are no multiple of {multiple}, which it needs"
        return None

    def refuses_mix(self, schemes: Schemes) -> str | None:
        """Say which linears of a model the engine does not run beside each other, and what would do; None if it does.

        Whether it runs each of the schemes by itself, ``refusal`` says.
        """
        kept = [name for name, scheme in schemes.items() if scheme is None and name != HEAD]
        if kept and not self.leaves:
            return f"{kept[0]} in full precision beside quantized linears: quantize all of them, leave --exclude out"
        if not self.mixes and (apart := any_apart(schemes)) is not None:
            return apart
        of_experts = None
        if self.experts is not Alike.NONE:
            of_experts = experts_apart(schemes, of_model=self.experts is Alike.MODEL)
        if of_experts is not None:  # experts of one scheme are alike where they are joined too
            schemes = {name: scheme for name, scheme in schemes.items() if not is_expert(name)}
        joined = joined_apart(schemes) if self.joins else None
        return "; and ".join(filter(None, (of_experts, joined))) or None

    def _architecture_refused(self, workload: Workload) -> str | None:
        if self.models is None or workload.model_type in self.models:
            return None
        return f"the architecture '{workload.model_type}', only {', '.join(self.models)}"

    def _extras_refused(self, workload: Workload) -> str | None:
        """Check everything but the architecture, bits and groups."""
        scheme = workload.scheme
        if scheme.activations and not self.activations:
            return "quantized activations"
        if scheme.kv and not self.cache:
            return "a quantized KV cache"
        if workload.outliers and not self.outliers:
            return "outliers (--outliers 0 keeps none)"
        if scheme.tile.out != 1 and not self.per_input:
            return "groups along the output"
        if any(tile.out != 1 for tile in workload.tiles) and not self.per_input:
            return "groups along the output, which the method may choose (--axis oc lets it not)"
        return None

    def _bits_refused(self, workload: Workload) -> str | None:
        grid = workload.scheme.weight
        return None if grid.bits in (self.symmetric if grid.symmetric else self.asymmetric) else _weights(grid)

    def _groups_refused(self, workload: Workload) -> str | None:
        grid, tile = workload.scheme.weight, workload.scheme.tile
        if tile.in_ == FULL and not self.channel:
            return f"{_weights(grid)} with one scale per output channel, only in {self.sizes}"
        if tile.in_ != FULL and not self._takes(tile.in_):
            return f"{_weights(grid)} in groups of {tile.in_}, only of {self.sizes}"
        if not format_of(self.format).holds(grid, tile, workload.outliers):
            size = "whole channels" if tile.in_ == FULL else f"groups of {tile.in_}"
            return f"this grid of {grid.bits} bits in {size}"
        return None

    def _takes(self, group: int) -> bool:
        if self.groups is not None:
            return group in self.groups
        return not self.multiples or any(group % multiple == 0 for multiple in self.multiples)


@dataclass(frozen=True)
class Engine:
    """An engine and the formats that it loads, the best first.

    ``note`` is a sentence for the table. ``also`` are formats that the engine loads too, and how; the choice of a
    format passes over them. ``bench`` is what ``bitwright bench`` has the engine load, None if it does not measure it.
    ``fused``: the engine joins linears, which then need one scheme.
    """

    name: str
    ways: tuple[Way, ...]
    note: str
    also: Mapping[str, str] = field(default_factory=dict)
    bench: BenchInput | None = None
    fused: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fused", any(way.joins for way in self.ways))

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that it loads, the best first."""
        return tuple(dict.fromkeys(way.format for way in self.ways))


def engines() -> tuple[Engine, ...]:
    """List all engines, sorted by name: the ``ENGINE`` of every file in ``engines/`` that has one."""
    values = (getattr(find("engines", file), "ENGINE", None) for file in names("engines"))
    return tuple(sorted((value for value in values if isinstance(value, Engine)), key=lambda engine: engine.name))


def engine_named(name: str) -> Engine:
    """Find the engine of this name. Raises RecipeError with the nearest known name."""
    known = {engine.name: engine for engine in engines()}
    if name not in known:
        raise RecipeError(f"there is no engine '{name}'; {nearest(name, known)}. bitwright engines shows them")
    return known[name]


def _weights(grid: Grid) -> str:
    return f"{grid.bits}-bit {'symmetric' if grid.symmetric else 'asymmetric'} weights"


def _with_outputs_added(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Replace linears that are joined by one: ``self_attn.q_proj, k_proj, v_proj``, with the sum of their outputs."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, (outputs, inputs) in linears.items():
        joined = joined_name(name)
        sizes[joined] = (sizes.get(joined, (0, inputs))[0] + outputs, inputs)
    return sizes
