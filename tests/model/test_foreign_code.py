"""A config.json makes nothing run and nothing be fetched: it names what transformers and torch bring, or is ignored."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Checkpoints, contents, measured
from transformers.integrations import hub_kernels

import bitwright
from bitwright.core.errors import CheckpointError
from bitwright.core.import_path import HOME
from bitwright.core.recipe import Recipe
from bitwright.evaluation import loading
from bitwright.model.config import read_config, without_hub_kernels

KERNEL = "kernels-community/flash-attn2"
FINDS_KERNELS = """
import sys
from importlib.util import find_spec
sys.argv = [sys.argv[1]]
import bitwright
print(find_spec("kernels") is not None)
"""
Changed = Callable[..., Path]


@pytest.fixture
def changed(tiny: Checkpoints, tmp_path: Path) -> Changed:
    """``changed(key=value)``: a copy of the tiny model with other keys in its config.json."""

    def copy(**changes: Any) -> Path:
        folder = Path(shutil.copytree(tiny(), tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return copy


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "value", [KERNEL, "a/b@main:c", "flash_attention_2", "flash_attention_3", "paged|a/b", {"": KERNEL}]
)
def test_attention_from_elsewhere(key: str, value: Any, changed: Changed) -> None:
    assert read_config(changed(**{key: value}))._attn_implementation is None


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_attention_of_transformers(value: str, changed: Changed) -> None:
    assert read_config(changed(_attn_implementation=value))._attn_implementation == value


@pytest.mark.parametrize(("value", "kept"), [("deepgemm", None), ("a/b", None), ("eager", "eager")])
def test_experts(value: str, kept: str | None, changed: Changed) -> None:
    assert read_config(changed(_experts_implementation=value))._experts_implementation == kept


def test_configs_within_a_config(tmp_path: Path) -> None:
    text = {"model_type": "llama", "_attn_implementation": KERNEL}
    config = {"model_type": "llava", "text_config": text, "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).text_config._attn_implementation is None


def test_every_way_to_a_model(changed: Changed, tiny: Checkpoints, text: Path, tmp_path: Path) -> None:
    """Measured, quantized with calibration data, decoded and verified, as if the kernel were not named."""
    folder = changed(_attn_implementation=KERNEL)
    assert measured(folder, text, seqlen=16, windows=1) == measured(tiny(), text, seqlen=16, windows=1)
    for method, format in (("awq", "gptq"), ("rtn", "compressed-tensors")):
        calibration: dict[str, Any] = {"calibration": str(text), "samples": 2, "seqlen": 16} if method == "awq" else {}
        outputs: list[Path] = []
        for source in (folder, tiny()):
            recipe = Recipe(str(source), "W4A16g32", method, format, **calibration)
            outputs.append(Path(bitwright.quantize(recipe, tmp_path / f"{method}{len(outputs)}").output))
        weights = [contents(output)["model.safetensors"] for output in outputs]
        assert weights[0] == weights[1] and bitwright.verify(outputs[0], folder).passed
        measured(outputs[0], text, seqlen=16, windows=1)


def test_no_kernel_is_fetched() -> None:
    original = hub_kernels.get_kernel
    with without_hub_kernels(), pytest.raises(ImportError, match="Bitwright runs none"):
        hub_kernels.get_kernel(KERNEL, version=1)
    assert hub_kernels.get_kernel is original


@pytest.mark.parametrize("method", ["fbgemm_fp8", "mxfp4", "eetq", "a/b", ["gptq"]])
def test_methods_that_fetch_later(method: Any, changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused only where the package is installed by which transformers fetches."""
    folder = changed(quantization_config={"quant_method": method})
    monkeypatch.setattr(loading, "find_spec", lambda _: importlib.util.find_spec("json"))
    with pytest.raises(CheckpointError, match="may fetch code from the hub"):
        bitwright.load(folder)


@pytest.mark.parametrize(("program", "finds"), [("bitwright", "False"), ("theirs.py", "True")])
def test_the_command_line_finds_no_kernels(program: str, finds: str, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([HOME, str(tmp_path)])}
    command = [sys.executable, "-c", FINDS_KERNELS, program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == finds


@pytest.mark.parametrize("dtype", ["load", "../evil", "float64", "__builtins__"])
def test_dtypes(dtype: str, changed: Changed, text: Path) -> None:
    """A name in torch is not called."""
    folder = changed(dtype=dtype, torch_dtype=dtype)
    try:
        measured(folder, text, seqlen=16, windows=1)
    except CheckpointError:
        return
