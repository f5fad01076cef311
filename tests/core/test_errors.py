"""Messages stay short, whatever a stranger's file puts into them."""

import json
import shutil
from pathlib import Path

import pytest
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import CheckpointError, UserError, cut


def test_short_messages_are_left_alone() -> None:
    message = "\n".join([f"{'x' * 490}: tensor 'a' is missing; try again"] * 7)
    assert cut(message) == message == str(CheckpointError(message))


@pytest.mark.parametrize("part", ["x" * 10**7, "a b " * 10**6, "é\n" * 10**6, ("y" * 400 + " ") * 1000])
def test_long_ones_keep_their_beginning_and_their_end(part: str) -> None:
    message = str(UserError(f"m/config.json: found {part}; download it again"))
    assert len(message) <= 4000
    assert message.startswith("m/config.json: found ") and message.endswith("; download it again")
    assert str(UserError(message)) == message


def test_a_type_of_megabytes(tiny: Checkpoints, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_types": "full_attention" * 10**6}))
    with pytest.raises(UserError) as error:
        bitwright.load(model)
    assert len(str(error.value)) <= 4000


def test_an_index_that_names_a_file_of_thousands_of_characters(tiny: Checkpoints, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": f"{'b' * 5000}.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        bitwright.inspect(model)
    assert len(str(error.value)) < 1000
