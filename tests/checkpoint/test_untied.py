"""An output layer with values of its own is kept, whatever config.json says of it: transformers keeps it too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints, loaded

import bitwright
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.recipe import Recipe

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def copy_with_head(folder: Path, place: Path, equal: bool) -> Path:
    """A tied model that stores its output layer all the same."""
    copy = Path(shutil.copytree(folder, place))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "!"}))
    tensors = load_file(copy / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone() if equal else 0.2 * torch.randn_like(tensors[EMBEDDING])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("equal", [True, False])
def test_what_the_config_says(equal: bool, tiny: Checkpoints, tmp_path: Path) -> None:
    folder = copy_with_head(tiny(tied=True), tmp_path / "model", equal)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert Checkpoint.open(folder).config["tie_word_embeddings"] is equal


@pytest.mark.parametrize(("format", "calibration"), [
    (None, None), ("bitwright", "builtin"), ("gptq", None), ("gguf", None), ("mlc", None),
])  # fmt: skip
def test_every_format_keeps_it(format: str | None, calibration: str | None, tiny: Checkpoints, tmp_path: Path) -> None:
    folder = copy_with_head(tiny(tied=True, eos_token_id=1, bos_token_id=0), tmp_path / "model", equal=False)
    output = tmp_path / ("out.gguf" if format == "gguf" else "out")
    scheme = {"gguf": "W4A16g32sym", "mlc": "mlc:q4f16_1"}.get(str(format), "W8A16g32")
    bitwright.quantize(Recipe(str(folder), scheme, "rtn", format, calibration, samples=2, seqlen=32), output)
    found = bitwright.verify(output, folder)
    assert found.passed, found.checks
    assert found.kl_divergence is not None and found.kl_divergence < 0.3
    if format is None:
        model = loaded(output)
        assert torch.equal(model.get_parameter(HEAD), load_file(folder / "model.safetensors")[HEAD].float())
