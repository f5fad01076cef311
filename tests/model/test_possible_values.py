"""Values that no model can compute with are refused before any work, wherever a config.json states them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import CheckpointError
from bitwright.core.recipe import Recipe
from bitwright.model.possible_values import require_possible_values

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(("config", "says"), [
    ({"rms_norm_eps": NAN}, "nan for rms_norm_eps"),
    ({"layer_norm_epsilon": -1e-5}, "-1e-05 for layer_norm_epsilon"),
    ({"text_config": {"rms_norm_eps": INFINITE}}, "inf for text_config.rms_norm_eps"),
    ({"rope_theta": 0}, "0 for rope_theta"),
    ({"rope_local_base_freq": -1.0}, "-1.0 for rope_local_base_freq"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 0.0}}}, "0.0 for rope_parameters.full_attention.rope_theta"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 0}}, "0 for rope_scaling.factor"),
    ({"rope_scaling": {"long_factor": [1.0, 0.0]}}, "0.0 for rope_scaling.long_factor"),
    ({"rope_scaling": {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    ({"embedding_multiplier": INFINITE}, "inf for embedding_multiplier"),
    ({"attention_dropout": NAN}, "nan for attention_dropout"),
])  # fmt: skip
def test_impossible(config: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json says") as refused:
        require_possible_values(config, "config.json")
    assert says in str(refused.value)


@pytest.mark.parametrize("config", [
    {"time_step_limit": [0.0, INFINITE]},  # Mamba 2
    {"layer_rope_theta": [10000, 0]},  # a base for each layer, of which some have no positions
    {"rms_norm_eps": 0.0}, {"rope_scaling": None}, {"rope_theta": None}, {"rope_scaling": {"mscale_all_dim": 0}},
    {"quantization_config": {"damp": NAN}},
])  # fmt: skip
def test_possible(config: dict[str, Any]) -> None:
    require_possible_values(config, "config.json")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_refused_before_the_work(method: str, tiny: Checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": NAN}))
    more: dict[str, Any] = {} if method == "rtn" else {"calibration": "builtin", "samples": 1, "seqlen": 16}
    with pytest.raises(CheckpointError, match="nan for rms_norm_eps"):
        bitwright.quantize(Recipe(str(folder), "W4A16", method, **more), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
