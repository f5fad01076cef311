"""Metadata that llama.cpp cannot compute with are told by a check, whichever they are."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe

NAN = float("nan")


@pytest.fixture(scope="module")
def written(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file as Bitwright writes it; nobody writes to it."""
    place = tmp_path_factory.mktemp("possible")
    source = Path(shutil.copytree(tiny(eos_token_id=1, bos_token_id=0), place / "model"))
    stated = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(stated | {"eos_token": "!"}))
    bitwright.quantize(Recipe(str(source), "W4A16g32sym", "rtn", "gguf"), place / "m.gguf")
    return place / "m.gguf"


@pytest.fixture
def changed(written: Path, tmp_path: Path) -> Callable[[str, bytes], Path]:
    """``changed(key, raw)``: a file whose metadata have other bytes for the number of a key."""

    def of(key: str, raw: bytes) -> Path:
        data = written.read_bytes()
        start = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
        (tmp_path / "m.gguf").write_bytes(data[:start] + raw + data[start + len(raw) :])
        return tmp_path / "m.gguf"

    return of


@pytest.mark.parametrize(("key", "value", "says"), [
    ("llama.attention.layer_norm_rms_epsilon", NAN, "is nan, which is no number"),
    ("llama.attention.layer_norm_rms_epsilon", -1e-5, "a norm adds a number between 0 and 1"),
    ("llama.attention.layer_norm_rms_epsilon", 0.0, "a norm adds a number between 0 and 1"),
    ("llama.rope.freq_base", 0.0, "powers of a number above 0"),
    ("llama.rope.freq_base", float("inf"), "is inf, which is no number"),
    ("llama.context_length", 0, "takes at least 1 token"),
    ("llama.rope.dimension_count", 0, "a whole number from 1 on"),
    ("llama.rope.dimension_count", 17, "an even number up to the 16 features of a head"),
    ("llama.rope.dimension_count", 32, "an even number up to the 16 features of a head"),
    ("llama.attention.head_count_kv", 3, "does not divide the 4 heads"),
    ("llama.attention.value_length", 8, "keys of a head have 16 features"),
    ("llama.vocab_size", 7, "is 7, and there are 256 tokens"),
    ("tokenizer.ggml.eos_token_id", 10**6, "is 1000000, and there are 256 tokens"),
    ("tokenizer.ggml.bos_token_id", 256, "is 256, and there are 256 tokens"),
])  # fmt: skip
def test_impossible(key: str, value: int | float, says: str, changed: Callable[[str, bytes], Path]) -> None:
    found = bitwright.verify(changed(key, struct.pack("<I" if type(value) is int else "<f", value)))
    wrong = {check.name: check.found for check in found.checks if check.passed is False}
    assert key in wrong["possible settings"] and says in wrong["possible settings"] and not found.passed


def test_what_is_not_looked_at_is_said(written: Path) -> None:
    found = bitwright.verify(written)
    assert found.passed and {check.name: check.passed for check in found.checks}["possible settings"] is True
    unseen = {check.name: check.found for check in found.checks if check.passed is None}
    assert "--against ORIGINAL tells" in unseen["weights"] and "tokens and merges" in unseen["texts"]


@pytest.mark.parametrize("config", [{"rms_norm_eps": 0.0}, {"max_position_embeddings": 0}])
def test_what_the_original_says_is_refused_before_the_work(
    config: dict[str, float], tiny: Checkpoints, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny(eos_token_id=1), tmp_path / "model"))
    stated = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stated | config))
    with pytest.raises(RecipeError, match=f"says it oddly: {next(iter(config))} is 0"):
        bitwright.quantize(Recipe(str(source), "W4A16g32sym", "rtn", "gguf"), tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
