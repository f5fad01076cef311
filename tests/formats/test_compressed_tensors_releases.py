"""Which releases load a folder wrong: refused before the work, and decoded by ``bitwright.load`` itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.evaluation.loading import load_codes, load_with_loader
from bitwright.formats import QuantizedFolder, _compressed_tensors_releases
from bitwright.formats._compressed_tensors_releases import one_scheme, wrongly_loaded

Quantized = Callable[..., Path]
OLDEST, LOCKED, NEWEST = ("5.0.0", "0.15.0"), ("5.22.2", "0.20.0"), ("5.24.0", "0.20.1")
BETWEEN, BEFORE_UNPACKED_ZEROS = ("5.23.0", "0.18.0"), ("5.23.0", "0.17.1")


def weights(bits: int = 4, symmetric: bool = True, layout: str = "pack-quantized") -> dict[str, Any]:
    args = {"num_bits": bits, "symmetric": symmetric, "strategy": "channel", "group_size": None}
    return {"targets": ["Linear"], "weights": args, "format": layout}


def config(*groups: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"config_groups": {f"group_{n}": group for n, group in enumerate(groups)}, **keys}


ATTENTION = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}
ALIKE = config(weights(symmetric=False), dequantize=True)
ZEROS = config(weights(symmetric=False))
MIXED = config(weights(4), weights(8))
CACHE = config(weights(), kv_cache_scheme={"num_bits": 8, "symmetric": False})


@pytest.mark.parametrize(("folder", "right", "wrong", "says"), [
    (ALIKE, [OLDEST, LOCKED, BETWEEN, NEWEST], [], ""),
    (config(weights()), [OLDEST, LOCKED, BETWEEN, NEWEST], [], ""),
    (ZEROS, [OLDEST, LOCKED, BEFORE_UNPACKED_ZEROS], [BETWEEN, NEWEST], "refuses packed zero points"),
    (config(weights(symmetric=False, layout="int-quantized")), [LOCKED, BETWEEN, NEWEST], [], ""),
    (MIXED, [OLDEST, LOCKED, BETWEEN, NEWEST], [], ""),
    (MIXED | {"dequantize": True}, [OLDEST, LOCKED], [BETWEEN, NEWEST], "takes one scheme for all linears"),
    (config(weights(), ATTENTION), [OLDEST, LOCKED, BETWEEN], [NEWEST], "leaves keys, values and queries"),
    (CACHE, [LOCKED, BETWEEN], [NEWEST], "leaves keys, values and queries"),
    (CACHE, [], [OLDEST, BEFORE_UNPACKED_ZEROS], "has no asymmetric KV cache"),
    (config(weights(3)), [LOCKED, BETWEEN, NEWEST], [OLDEST, BEFORE_UNPACKED_ZEROS], "packs 3, 5, 6 and 7 bits in an"),
    ({"config_groups": 3}, [NEWEST], [], ""),
])  # fmt: skip
def test_what_each_pair_of_releases_does_wrong(
    folder: dict[str, Any], right: list[tuple[str, str]], wrong: list[tuple[str, str]], says: str
) -> None:
    """As tried with these releases: ``benchmarks/results/matrix.md``."""
    assert [pair for pair in right if wrongly_loaded(folder, pair)] == []
    for pair in wrong:
        reason = wrongly_loaded(folder, pair)
        assert reason is not None and says in reason and all(version in reason for version in pair)


def test_linears_with_schemes_of_their_own_are_not_left_to_be_read_by_one(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """From 5.23.0 on, ``dequantize`` means one scheme for all: 8 bits were read as 4, and nobody said so."""
    mixed = Recipe(str(tiny()), "W4A16g32sym", method="rtn", scheme_for={"*.down_proj": "W8A16g32sym"})
    bitwright.quantize(mixed, tmp_path / "mixed")
    written = QuantizedFolder.open(tmp_path / "mixed").checkpoint.config["quantization_config"]
    assert not one_scheme(written) and "dequantize" not in written
    assert all(wrongly_loaded(written, pair) is None for pair in (OLDEST, LOCKED, BETWEEN, NEWEST))


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compressed_tensors_releases, "_installed", lambda: NEWEST)


@pytest.mark.parametrize("format", [None, "compressed-tensors"])
@pytest.mark.usefixtures("newest")
def test_what_the_installed_release_loads_wrong_is_refused_before_the_work(
    format: str | None, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = Recipe(str(tiny()), "W8A8", method="rtn", format=format)
    with pytest.raises(RecipeError, match=r"W8A8 .* transformers 5\.24\.0 .* 0\.20\.1 .* --format bitwright"):
        bitwright.plan(recipe)
    bitwright.plan(recipe.changed(format="bitwright"))
    bitwright.plan(recipe.changed(scheme="W8A16"))
    asymmetric = recipe.changed(scheme="W4A16g32", scheme_for={"*.down_proj": "W8A16g32"})
    with pytest.raises(RecipeError, match=r"W4A16g32 with others for some linears .* packed zero points"):
        bitwright.plan(asymmetric)
    bitwright.plan(asymmetric.changed(scheme="W4A16g32sym", scheme_for={"*.down_proj": "W8A16g32sym"}))


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4", "W4A16KV4"])
def test_a_folder_that_the_installed_release_loads_wrong_is_decoded(
    scheme: str, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitwright.load computes what the folder says, whoever would get it wrong."""
    folder = quantized(scheme, "float32")
    assert load_with_loader(folder, device="cpu", dtype="float32").loader == "transformers"
    monkeypatch.setattr(_compressed_tensors_releases, "_installed", lambda: NEWEST)
    loaded = load_with_loader(folder, device="cpu", dtype="float32")
    tokens = torch.arange(32)[None]
    with torch.inference_mode():
        logits, expected = loaded.model(tokens).logits, load_codes(QuantizedFolder.open(folder))(tokens).logits
    assert loaded.loader == "bitwright" and torch.equal(logits, expected)
