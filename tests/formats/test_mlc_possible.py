"""Settings in mlc-chat-config.json that MLC-LLM cannot compute with are told by a check, whichever they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe

CONFIG = "mlc-chat-config.json"


@pytest.fixture(scope="module")
def written(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MLC-LLM as Bitwright writes it; nobody writes to it."""
    folder = tmp_path_factory.mktemp("possible") / "mlc"
    bitwright.quantize(Recipe(str(tiny(eos_token_id=1)), "mlc:q4f16_1", "rtn", "mlc"), folder)
    return folder


@pytest.mark.parametrize(("change", "says"), [
    (lambda c: c["model_config"].update(rms_norm_eps=-1), "model_config.rms_norm_eps is -1"),
    (lambda c: c["model_config"].update(rms_norm_eps=float("nan")), "model_config.rms_norm_eps is nan"),
    (lambda c: c["model_config"].pop("rms_norm_eps"), "model_config.rms_norm_eps is missing"),
    (lambda c: c["model_config"].update(position_embedding_base=0), "position_embedding_base is 0"),
    (lambda c: c["model_config"].update(rope_scaling={"factor": 0.0}), "rope_scaling.factor is 0.0"),
    (lambda c: c["model_config"].update(prefill_chunk_size=0), "prefill_chunk_size is 0"),
    (lambda c: c["model_config"].update(tensor_parallel_shards=0), "tensor_parallel_shards is 0"),
    (lambda c: c.update(context_window_size=-5), "context_window_size is -5"),
    (lambda c: c.update(vocab_size=7), "vocab_size is 7, and the model's 256"),
    (lambda c: c.update(active_vocab_size=300), "active_vocab_size is 300, of 256 tokens"),
    (lambda c: c.update(eos_token_id=[1, 256]), "eos_token_id is [1, 256]"),
    (lambda c: c["conv_template"].update(stop_token_ids=[-1]), "conv_template.stop_token_ids is [-1]"),
    (lambda c: c.update(conv_template=None), "conv_template is None"),
    (lambda c: c["conv_template"].update(seps=[]), "conv_template lacks roles or seps"),
    (lambda c: c.update(tokenizer_files=["/etc/hostname"]), "tokenizer_files names '/etc/hostname'"),
    (lambda c: c.update(tokenizer_files=[]), "tokenizer_files is []"),
    (lambda c: c.update(top_p=0, temperature=-1), "temperature is -1"),
])  # fmt: skip
def test_impossible(change: Callable[[dict[str, Any]], object], says: str, written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "mlc"))
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    found = bitwright.verify(folder)
    wrong = {check.name: check.found for check in found.checks if check.passed is False}
    assert says in wrong["possible settings"] and not found.passed


def test_what_is_not_looked_at_is_said(written: Path) -> None:
    found = bitwright.verify(written)
    assert found.passed, found.checks
    unseen = {check.name: check.found for check in found.checks if check.passed is None}
    assert "--against ORIGINAL tells" in unseen["weights"] and "tokenizer's files" in unseen["texts"]


def test_what_the_original_says_is_refused_before_the_work(tiny: Checkpoints, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny(eos_token_id=1), tmp_path / "model"))
    (source / "generation_config.json").write_text(json.dumps({"temperature": -0.5}))
    with pytest.raises(RecipeError, match=r"MLC-LLM cannot compute with what .*: temperature is -0\.5"):
        bitwright.quantize(Recipe(str(source), "mlc:q4f16_1", "rtn", "mlc"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
