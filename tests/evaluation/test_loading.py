"""A folder whose weights are not all there is refused: transformers would make them up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import CheckpointError
from bitwright.core.recipe import Recipe
from bitwright.evaluation.loading import load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("scheme", [None, "W4A16", "W4A4"])
def test_weights_that_are_missing(scheme: str | None, tiny: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if scheme is None:
        shutil.copytree(tiny(), folder)
    else:
        bitwright.quantize(Recipe(str(tiny()), scheme), folder)
    load_model(folder, torch.float32, CPU)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    # transformers itself refuses packed weights of which parts are missing, in words of its own.
    says = "transformers cannot load" if scheme == "W4A16" else r"no weights for model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(CheckpointError, match=says):
        load_model(folder, torch.float32, CPU)


def test_what_transformers_refuses_is_said_in_its_words(tiny: Checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny(), tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "none-such"}))
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*folder: .*none-such"):
        load_model(folder, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_in_the_dtype_asked_for(dtype: torch.dtype, tiny: Checkpoints) -> None:
    model = load_model(tiny("float16"), dtype, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
