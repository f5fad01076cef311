"""Sizes that a config.json states are held against the tensors before transformers builds anything of such a size."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, save_tokenizer

import bitwright
from bitwright.api.benching import bench
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.model import fitting
from bitwright.model.config import model_config
from bitwright.model.fitting import built_within, require_fitting
from bitwright.model.view import ModelView

CONFIG, HUGE = "config.json", 10**12
SCHEME = "W4A16g32"


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An architecture without a family, with learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    sizes: dict[str, Any] = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def lying(tiny: Checkpoints, gpt2: Path, tmp_path: Path) -> Callable[..., Path]:
    """``lying("llama" or "gpt2", key=value, ...)``: a model whose config.json says something else."""

    def folder(kind: str, /, **changes: Any) -> Path:
        copy = Path(shutil.copytree(gpt2 if kind == "gpt2" else tiny(), tmp_path / "lying"))
        config = json.loads((copy / CONFIG).read_text())
        (copy / CONFIG).write_text(json.dumps(config | changes))
        return copy

    return folder


@pytest.mark.parametrize(("kind", "changes", "says"), [
    ("llama", {"head_dim": HUGE}, "head_dim, which is far more than any of the 21 tensors"),
    ("llama", {"num_key_value_heads": HUGE}, "num_key_value_heads, which is far more"),
    ("llama", {"vocab_size": HUGE}, "vocab_size, which is far more"),
    ("llama", {"num_labels": 10**9}, "num_labels, which is far more"),
    ("llama", {"max_position_embeddings": HUGE}, "max_position_embeddings, more positions than any model has"),
    ("llama", {"hidden_size": 10**18}, "hidden_size, more than any size of any model"),
    ("llama", {"layer_types": ["full_attention"] * 100_000}, "a list of 100,000 values for layer_types"),
    ("gpt2", {"n_layer": 100_000}, "n_layer, more layers than there are tensors"),
    ("gpt2", {"n_positions": HUGE}, "n_positions, more positions than any model has"),
    ("gpt2", {"n_layer": -1}, "n_layer, and it has to be a whole number, 1 or more"),
    ("gpt2", {"n_layer": 3}, "num_hidden_layers, and the tensors' names number 2 blocks"),
    ("gpt2", {"n_layer": 1}, "num_hidden_layers, and the tensors' names number 2 blocks"),
    ("gpt2", {"n_head": 0}, "n_head, and it has to be a whole number, 1 or more"),
    ("gpt2", {"n_embd": 96}, "hidden_size, and no tensor has that size"),
    ("gpt2", {"n_embd": "64"}, "n_embd, and it has to be a whole number"),
    ("gpt2", {"num_experts": 10**6}, "num_experts, more experts than any"),
    ("gpt2", {"text_config": {"num_hidden_layers": HUGE}}, "text_config.num_hidden_layers, more layers"),
    ("gpt2", {"vision_config": {"depth": 10**6}}, "vision_config.depth, more layers"),
    ("gpt2", {"vision_config": {"depths": [2, 10**6]}}, "vision_config.depths, more layers"),
    ("gpt2", {"audio_config": {"encoder": {"encoder_layers": 10**5}}}, "audio_config.encoder.encoder_layers, more"),
    ("gpt2", {"audio_config": {"d_model": -5, "hidden_size": -5}}, "less than nothing"),
])  # fmt: skip
def test_sizes_that_no_tensor_has(kind: str, changes: dict[str, Any], says: str, lying: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError) as error:
        require_fitting(Checkpoint.open(lying(kind, **changes)))
    assert says in str(error.value) and "config and weights belong to different models" in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("call", [
    lambda folder, out: bitwright.load(folder),
    lambda folder, out: bitwright.evaluate(folder, seqlen=16, windows=1),
    lambda folder, out: bitwright.quantize(bitwright.Recipe(str(folder), SCHEME, "rtn"), out),
    lambda folder, out: bitwright.export(folder, out, format="gptq"),
    lambda folder, out: bench(folder),
    lambda folder, out: model_config(Checkpoint.open(folder)),
    lambda folder, out: ModelView.of(Checkpoint.open(folder)),
], ids=["load", "evaluate", "quantize", "export", "bench", "config", "view"])  # fmt: skip
def test_every_command_refuses(
    kind: str, call: Callable[[Path, Path], Any], lying: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        call(lying(kind, num_hidden_layers=HUGE, n_layer=HUGE, num_labels=10**9), tmp_path / "out")


def test_inspect_builds_nothing(lying: Callable[..., Path]) -> None:
    assert bitwright.inspect(lying("gpt2", n_layer=HUGE)).parameters > 0


def test_verify_says_so(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(bitwright.Recipe(str(tiny()), SCHEME, "rtn"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    (tmp_path / "out" / CONFIG).write_text(json.dumps(config | {"num_labels": 10**9}))
    checks = bitwright.verify(tmp_path / "out", logits=False).checks
    assert "num_labels" in next(check.found for check in checks if check.name == "complete")


@pytest.mark.parametrize("changes", [
    {}, {"sliding_window": 2**31 - 1}, {"eos_token_id": [HUGE]}, {"rope_theta": 10**7},
    {"max_position_embeddings": 10_485_760}, {"vision_config": {"num_hidden_layers": 27, "hidden_size": 1152}},
    {"num_nextn_predict_layers": 0}, {"trained_tokens": 15 * HUGE}, {"vision_feature_layer": -2},
])  # fmt: skip
def test_what_real_models_say_is_taken(changes: dict[str, Any], lying: Callable[..., Path]) -> None:
    require_fitting(Checkpoint.open(lying("llama", **changes)))


def test_blocks_behind_the_last(lying: Callable[..., Path]) -> None:
    """DeepSeek's files hold a block more than num_hidden_layers counts, for predicting further tokens."""
    require_fitting(Checkpoint.open(lying("llama", num_hidden_layers=1, num_nextn_predict_layers=1)))


@pytest.mark.parametrize("build", [
    lambda: torch.nn.ModuleList(torch.nn.Identity() for _ in range(200)),
    lambda: torch.nn.Linear(1000, 1000, device="meta"),
    lambda: torch.nn.Module().register_buffer("table", torch.empty(10**6, device="meta")),
], ids=["modules", "parameters", "buffers"])  # fmt: skip
def test_building_stops(build: Callable[[], Any], tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "ROOM_ELEMENTS", 1000)
    monkeypatch.setattr(fitting, "ROOM_MODULES", 10)
    with pytest.raises(CheckpointError, match="describes a model of more than"), built_within(Checkpoint.open(tiny())):
        build()
    build()
