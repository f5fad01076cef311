"""compressed-tensors, ``pack-quantized``: what transformers and vLLM load with no Bitwright installed.

The config is what the library's classes would write (compressed-tensors 0.20, which the tests compare with), without
importing them: that takes as long as torch and transformers together. Its codes are signed,
``-2**(bits-1) .. 2**(bits-1) - 1``, 32 of them in exactly ``bits`` int32 words; asymmetric codes and zero points
are shifted down by ``2**(bits-1)``, which changes no difference ``code - zero``. The tensors are those of
``formats/bitwright``, which can hold more; only what config.json says is this file's own. Folders of others are read
by ``_compressed_tensors_reading.py``.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bitwright.core.errors import RecipeError
from bitwright.core.format import Reader, TensorFormat
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.formats import bitwright, gptq
from bitwright.formats._compressed_tensors_reading import LEAVES, PACKED, codes_may_be_weight, described, read, shape
from bitwright.formats._compressed_tensors_releases import one_scheme, wrongly_loaded
from bitwright.formats.bitwright import decode, packed, stored_bytes

INSTEAD = f"{gptq.INSTEAD} or --format dense"
CANNOT_HOLD = (
    "compressed-tensors holds neither groups along the output nor outliers, and no grid that is an engine's own. "
    f"{INSTEAD}"
)
SPELLINGS = {
    "model.language_model.": ("model.",),
    "language_model.model.": ("model.language_model.", "model."),
    "language_model.lm_head": ("lm_head",),
}
"""How names of a text model inside of another begin: in the whole model, and elsewhere."""
HOLDS = "2 to 8 bits, symmetric or not, per channel or in groups along the input"


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for a linear with this grid and tile, with or without outliers."""
    return tile.out == 1 and not (outliers or tile.ragged or not grid.plain)


def encode(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors to write for one linear. Raises RecipeError for what the format cannot hold."""
    if not holds(weight.grid, weight.tile, weight.outlier_index is not None):
        raise RecipeError(f"{name}: {CANNOT_HOLD}")
    return bitwright.encode(name, weight)


def quantization_config(model: WrittenModel) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json. Raises RecipeError for linears that are not all alike.

    Activations are quantized per token, keys and values (and queries) per token and head: dynamic ``group`` with
    group_size = head_dim. The library's ``token`` strategy on keys would share one scale over the sequence.
    """
    if model.departures:
        raise RecipeError(f"{next(iter(model.departures))}: {CANNOT_HOLD}")
    scheme, family = model.scheme, model.family
    linears = [_linears(scheme, ["Linear"], None), *_linears_by_scheme(model)]
    if scheme.kv is not None and family is None:
        raise RecipeError(
            f"scheme {scheme} quantizes keys and values head by head, and nobody has described this architecture to "
            "Bitwright; quantize the original with a scheme without KV"
        )
    kv = None if scheme.kv is None or family is None else _dynamic(scheme.kv, family.head_dim)
    quantized_family = None if scheme.activations is None else family
    if quantized_family is not None:
        # The library takes dimensions 0 and 1 of an input for batch and token: rows of a matrix would share a scale.
        linears = [_linears(scheme, [f"re:.*{name}$"], width) for name, width in quantized_family.flattened] + linears
    groups = {f"group_{n}": group for n, group in enumerate(linears)}
    if quantized_family is not None and queries_left_out(scheme) is None:
        groups["attention"] = _group([quantized_family.attention_class], None, kv, None)
        kv = None
    written: dict[str, Any] = {
        "config_groups": groups,
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": kv,
        "format": PACKED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": _spelled(model.kept),
        "moe_sparsity_config": None,
    }
    if scheme.activations is None and scheme.kv is None and one_scheme(written):
        # Ordinary weights once loaded. transformers 5.23.0 with compressed-tensors >= 0.18 loads packed zero points
        # in no other way, earlier ones and vLLM pass over the key. With it, 5.23.0 and later read all linears by one
        # scheme, whatever the groups say (docs/decisions.md).
        written["dequantize"] = True
    return written


def queries_left_out(scheme: Scheme) -> Grid | None:
    """The grid of the queries if the config has no place for it.

    An attention's entry gives queries, keys and values one grid; ``kv_cache_scheme`` leaves the queries alone.
    """
    return None if scheme.kv == scheme.activations else scheme.activations


def _spelled(names: Iterable[str]) -> list[str]:
    """Names of linears, those of a text model inside of another also as the class of the text model alone has them.

    transformers' AutoModelForCausalLM makes that class; vLLM takes the name in the whole model. A name that fits no
    module does no harm.
    """
    spelled = dict.fromkeys(names)
    for name in list(spelled):
        for prefix, others in SPELLINGS.items():
            if name.startswith(prefix):
                spelled |= dict.fromkeys(other + name.removeprefix(prefix) for other in others)
    return list(spelled)


def _linears_by_scheme(model: WrittenModel) -> list[dict[str, Any]]:
    """A config group for each scheme of single linears, which are named: a name counts before a class."""
    widths = {} if model.family is None else dict(model.family.flattened)
    names: dict[tuple[Scheme, int | None], list[str]] = {}
    for name, scheme in model.schemes.items():
        width = next((width for end, width in widths.items() if name.endswith(f".{end}")), None)
        names.setdefault((scheme, width), []).append(name)
    return [_linears(scheme, _spelled(targets), width) for (scheme, width), targets in names.items()]


def _linears(scheme: Scheme, targets: list[str], features: int | None) -> dict[str, Any]:
    """One config group; activations per token, or per ``features``, which comes to the same and holds for rows too."""
    group = None if scheme.tile.in_ == FULL else scheme.tile.in_
    weights = _args(scheme.weight, "channel" if group is None else "group", group, dynamic=False)
    inputs = None if scheme.activations is None else _dynamic(scheme.activations, features)
    # Its format is named, because with activations transformers would otherwise infer one code per byte.
    return _group(targets, weights, inputs, PACKED)


def _group(
    targets: list[str], weights: dict[str, Any] | None, inputs: dict[str, Any] | None, format: str | None
) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": format,
    }


def _dynamic(grid: Grid, group: int | None) -> dict[str, Any]:
    return _args(grid, "token" if group is None else "group", group, dynamic=True)


def _args(grid: Grid, strategy: str, group: int | None, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "group_size": group,
        "strategy": strategy,
        "dynamic": dynamic,
    }


FORMAT = TensorFormat(
    name="compressed-tensors",
    summary="transformers, vLLM",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    packed_bits=packed,
    queries_left_out=queries_left_out,
    leaves=LEAVES,
    codes="weight_packed",
    encode=encode,
    decode=decode,
    config=quantization_config,
    reader=Reader(described=described, shape=shape, read=read, codes_may_be_weight=codes_may_be_weight),
    loaded_by_transformers=True,
    wrongly_loaded=wrongly_loaded,
)
