"""The choice of a preset, and what is refused before any weight is read or written."""

from pathlib import Path

from bitwright.core.convert import described
from bitwright.core.decoder import HEAD, Decoder
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import Foreseen, WriteOptions
from bitwright.core.grid import Grid, Tile
from bitwright.core.weight import NO_WEIGHTS
from bitwright.formats import awq
from bitwright.formats.mlc import architectures
from bitwright.formats.mlc.presets import AUTOAWQ, EMBEDDINGS_KEPT, PRESETS, Preset

FLOAT16 = "f16"
HOLDS = (
    "4 bits in groups of 32 (q4f16_1), 3 bits in groups of 40 (q3f16_1), 2 bits in groups of 64 (q2f16_1) or multiples "
    "of those, symmetric; fewer bits in such groups as 4 bits; of llama also 4 bits with zero points in groups of 128 "
    "(q4f16_autoawq)"
)
"""What the format holds, in words."""


def preset_for(decoder: Decoder, grid: Grid, tile: Tile, options: WriteOptions) -> Preset:
    """The preset of a model with linears of this grid and tile.

    Raises RecipeError if MLC has none, or none in this architecture.
    """
    kind = decoder.model_type
    if AUTOAWQ.holds(grid, tile) and kind == "llama":
        return AUTOAWQ
    if AUTOAWQ.holds(grid, tile) and not options.lossy:
        raise RecipeError(
            f"weights with zero points are {AUTOAWQ.name} to MLC-LLM, which has only half of that for {kind}; "
            f"quantize the original with --scheme mlc:q4f16_1 or W4A16g{tile.in_}sym, or quantize them once more, "
            "with --lossy on bitwright export"
        )
    preset = preset_of(grid, tile)
    if options.embeddings != FLOAT16:
        return preset
    if preset.scheme.weight.bits != EMBEDDINGS_KEPT.scheme.weight.bits:
        raise RecipeError(
            f"--embeddings {FLOAT16} goes with 4 bits (MLC's q4f16_2), and this is {preset.name}; leave it out"
        )
    return EMBEDDINGS_KEPT


def preset_of(grid: Grid, tile: Tile) -> Preset:
    """The smallest preset that holds such weights exactly; else that of the same bits, or 4."""
    exact = (preset for preset in PRESETS if preset.holds(grid, tile))
    near = (preset for preset in PRESETS if preset.scheme.weight.bits >= grid.bits)
    return next(iter([*exact, *near]), PRESETS[-1])


def check_weights(decoder: Decoder, folder: Path, options: WriteOptions, foreseen: Foreseen) -> None:
    """Refuse a model whose weights no preset holds, or that has other tensors than MLC's. Raises UserError."""
    if foreseen.grid is None or foreseen.tile is None:
        raise nothing_quantized(folder)
    preset = preset_for(decoder, foreseen.grid, foreseen.tile, options)
    for name, outline in foreseen.outlines.items():
        if not (options.lossy or preset.may_hold(outline)):
            raise cannot_hold(f"{name}: {described(outline)} cannot be held exactly", preset.name, options.lossy)
    names = {*foreseen.passed, *(f"{linear}.weight" for linear in foreseen.linears)}
    wanted = decoder.tensors.keys()
    for place in architectures.matrices(decoder):
        kept = [linear for linear in place.linears if linear not in foreseen.linears]
        if kept and f"{kept[0]}.weight" in names and not options.lossy:
            raise cannot_hold(f"{kept[0]} is not quantized", preset.name, options.lossy)
        if preset.is_awq and not kept:
            shapes = [foreseen.linears[linear] for linear in place.linears]
            if (outputs := sum(rows for rows, _ in shapes)) % awq.IN_WORD:
                raise RecipeError(
                    f"{place.name}: {outputs} output features are no multiple of {awq.IN_WORD}, as {AUTOAWQ.name} "
                    "packs them; quantize the original with --scheme mlc:q4f16_1"
                )
    for name in sorted(wanted - names):
        raise no_tensor(folder, name)
    for name in sorted(name for name in names - wanted - {f"{HEAD}.weight"} if not name.endswith(NO_WEIGHTS)):
        raise no_place(folder, name, decoder)


def nothing_quantized(folder: Path) -> RecipeError:
    """The error of a folder without quantized linears."""
    return RecipeError(f"{folder} is not quantized; bitwright quantize does that, --scheme mlc:q4f16_1")


def no_tensor(folder: Path, name: str) -> CheckpointError:
    """The error of a tensor that is not there."""
    return CheckpointError(f"{folder} has no tensor {name}, which MLC-LLM's model needs")


def no_place(folder: Path, name: str, decoder: Decoder) -> CheckpointError:
    """The error of a tensor too many."""
    return CheckpointError(
        f"{folder}: {name} has no place in MLC-LLM's {decoder.model_type}; {architectures.ELSEWHERE}"
    )


def cannot_hold(what: str, quantization: str, lossy: bool) -> RecipeError:
    """The error of a linear that is not quantized, or whose codes cannot be kept."""
    more = "bitwright export --lossy quantizes such weights once more and says what that adds"
    return RecipeError(
        f"{what} in MLC-LLM's {quantization}; the format holds {HOLDS}. "
        + ("Quantize the original with --scheme mlc:q4f16_1" if lossy else more)
    )
