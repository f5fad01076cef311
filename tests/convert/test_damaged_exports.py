"""Folders that cannot be exported: told from names and headers before anything is written, else while they are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints, changed
from torch import Tensor

import bitwright
from bitwright.core.errors import CheckpointError, RecipeError, UserError
from bitwright.core.recipe import Recipe

LAST = "model.layers.1.self_attn.v_proj"
UP = "model.layers.0.mlp.up_proj"
INTO = {"compressed-tensors": "gptq", "bitwright": "awq", "gptq": "awq", "awq": "gptq"}
Tensors = dict[str, Tensor]
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folders("gptq")``: 4 bits in groups of 32, of awq with zero points; nobody writes to it."""
    made: dict[str, Path] = {}

    def of(format: str) -> Path:
        if format not in made:
            made[format] = tmp_path_factory.mktemp("sound") / "folder"
            scheme = "W4A16g32" if format == "awq" else "W4A16g32sym"
            model = str(tiny(eos_token_id=0, num_key_value_heads=4))
            bitwright.quantize(Recipe(model, scheme, "rtn", format), made[format])
        return made[format]

    return of


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("source", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("format", ["gguf", "mlc", "awq", "bitwright", "dense"])
def test_a_linear_that_is_there_twice(format: str, source: str, folders: Folders, tmp_path: Path) -> None:
    double = changed(folders(source), tmp_path / "double", lambda t: t.update({f"{UP}.weight": torch.ones(192, 64)}))
    says = rf"{UP} is there twice, quantized and in full precision \({UP}\.weight\).*Remove one of them, or quantize"
    for lossy in (False, True):
        with pytest.raises(CheckpointError, match=says):
            bitwright.export(double, tmp_path / "out", format=format, lossy=lossy)
    assert names(tmp_path) == ["double"]


def twice(leaf: str, dim: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{LAST}.{leaf}"] = torch.cat([tensors[f"{LAST}.{leaf}"]] * 2, dim=dim)

    return change


def cast(leaf: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{LAST}.{leaf}": tensors[f"{LAST}.{leaf}"].to(dtype)})


def turned(tensors: Tensors) -> None:
    tensors[f"{LAST}.g_idx"] = tensors[f"{LAST}.g_idx"].flip(0)


HEADERS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "gptq, codes in int64": ("gptq", cast("qweight", torch.int64), r"qweight is torch\.int64 \[8, 64\], the others"),
    "gptq, zero points": ("gptq", twice("qzeros", 1), r"qzeros is torch\.int32 \[2, 16\], the others call for int32"),
    "gptq, order": ("gptq", turned, r"v_proj: its input channels are sorted into groups out of order"),
    "gptq, scales": ("gptq", cast("scales", torch.int16), r"scales of dtype torch\.int16"),
    "gptq, groups": ("gptq", twice("scales", 0), r"qzeros is .* the others call for int32 \[4, 8\]"),
    "awq, codes in int64": ("awq", cast("qweight", torch.int64), r"qweight is torch\.int64 \[64, 8\], the others call"),
    "awq, zero points": ("awq", twice("qzeros", 1), r"qzeros is torch\.int32 \[2, 16\], the others call for int32"),
    "compressed-tensors, codes in int64": (
        "compressed-tensors", cast("weight_packed", torch.int64), r"words of dtype torch\.int64, not int32"
    ),
    "compressed-tensors, scales": (
        "compressed-tensors", twice("weight_scale", 0), r"scales \[128, 2\] for a weight \[64, 64\]"
    ),
    "compressed-tensors, words": ("compressed-tensors", twice("weight_packed", 1), r"16 words for 64 codes of 4 bits"),
    "bitwright, codes in int64": ("bitwright", cast("weight_packed", torch.int64), r"weight_packed is torch\.int64"),
    "bitwright, words": ("bitwright", twice("weight_packed", 1), r"weight_packed is .* the others call .*\[64, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_tensors_that_do_not_fit_together(what: str, folders: Folders, tmp_path: Path) -> None:
    """Of the last linear, which nobody would have read before the others are written."""
    source, change, says = HEADERS[what]
    damaged = changed(folders(source), tmp_path / "damaged", change)
    for format in ("gguf", "dense", INTO[source]):
        with pytest.raises(CheckpointError, match=says) as error:
            bitwright.export(damaged, tmp_path / "out", format=format, lossy=True)
        assert LAST in str(error.value)
    assert names(tmp_path) == ["damaged"]


def test_a_tensor_that_is_missing(folders: Folders, tmp_path: Path) -> None:
    damaged = changed(folders("gptq"), tmp_path / "damaged", lambda t: t.pop(f"{LAST}.qzeros"))
    with pytest.raises(CheckpointError, match=rf"there is no tensor {LAST}\.qzeros"):
        bitwright.export(damaged, tmp_path / "out", format="awq")
    assert names(tmp_path) == ["damaged"]


@pytest.mark.parametrize("lacking", ["model.norm.weight", "lm_head.weight", LAST])
@pytest.mark.parametrize("format", ["gguf", "mlc", "awq", "dense"])
def test_a_model_that_is_not_whole(format: str, lacking: str, folders: Folders, tmp_path: Path) -> None:
    """llama.cpp would take the embedding for an output layer that is not there."""

    def cut(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(lacking)]:
            del tensors[name]

    damaged = changed(folders("gptq"), tmp_path / "damaged", cut)
    lacks = rf"has no tensor {lacking}\S*, which MLC" if format == "mlc" else rf": {lacking}\S* is not there"
    with pytest.raises(CheckpointError, match=lacks):
        bitwright.export(damaged, tmp_path / "out", format=format)
    assert names(tmp_path) == ["damaged"]


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["awq", "bitwright", "compressed-tensors", "dense", "gguf", "mlc"])
def test_scales_that_are_not_finite(format: str, number: float, lossy: bool, folders: Folders, tmp_path: Path) -> None:
    damaged = changed(folders("gptq"), tmp_path / "damaged", lambda t: t[f"{LAST}.scales"][0].fill_(number))
    says = rf"{LAST}: 64 of its 128 scales are not finite \(NaN or infinite\).*damaged"
    with pytest.raises(CheckpointError, match=says):
        bitwright.export(damaged, tmp_path / "out", format=format, lossy=lossy)


@pytest.mark.parametrize("format", ["gguf", "mlc"])
def test_of_a_file_that_cannot_be_made_nothing_is_left(format: str, folders: Folders, tmp_path: Path) -> None:
    """A scale that is no number is seen only when it is read."""
    damaged = changed(folders("gptq"), tmp_path / "damaged", lambda t: t[f"{LAST}.scales"].fill_(torch.nan))
    for restart in (False, True):
        with pytest.raises(UserError, match=LAST):
            bitwright.export(damaged, tmp_path / "out", format=format, restart=restart)
        assert names(tmp_path) == ["damaged"]


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("which", ["", LAST])
def test_scales_too_small_for_a_gguf_file(which: str, lossy: bool, folders: Folders, tmp_path: Path) -> None:
    def lower(tensors: Tensors) -> None:
        for name in (name for name in tensors if name.startswith(which) and name.endswith(".weight_scale")):
            tensors[name].mul_(1e-9)

    small = changed(folders("compressed-tensors"), tmp_path / "small", lower)
    with pytest.raises(CheckpointError, match=rf"{which or 'model.layers.0'}.*: its scales are too small for float16"):
        bitwright.export(small, tmp_path / "out.gguf", format="gguf", lossy=lossy)
    assert names(tmp_path) == ["small"]


def test_work_of_another_run_is_kept(folders: Folders, tmp_path: Path) -> None:
    damaged = changed(folders("gptq"), tmp_path / "damaged", lambda t: t[f"{LAST}.scales"].fill_(torch.nan))
    work = tmp_path / "out.partial"
    (work / "result").mkdir(parents=True)
    for name in (".lock", "journal.jsonl"):
        (work / name).touch()
    with pytest.raises(UserError, match=LAST):
        bitwright.export(damaged, tmp_path / "out", format="gguf")
    assert (work / "journal.jsonl").exists()


@pytest.mark.parametrize("group", [0, -2, "32", True, 1.5])
@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_a_group_size_that_is_none(format: str, group: object, folders: Folders, tmp_path: Path) -> None:
    lying = Path(shutil.copytree(folders(format), tmp_path / "lying"))
    config = json.loads((lying / "config.json").read_text())
    said = config["quantization_config"]
    place = said["config_groups"]["group_0"]["weights"] if format == "compressed-tensors" else said
    place["group_size"] = group
    (lying / "config.json").write_text(json.dumps(config))
    for run in (
        lambda: bitwright.verify(lying, logits=False),
        lambda: bitwright.export(lying, tmp_path / "out", format="dense"),
    ):
        with pytest.raises(CheckpointError, match=r"its group_size is .*, and a group has 1 input feature at least"):
            run()
    assert names(tmp_path) == ["lying"]


def test_what_is_sound_is_exported(folders: Folders, tmp_path: Path) -> None:
    """The headers of a sound folder pass, whatever the format; a symmetric awq is refused for nothing else."""
    for format in INTO:
        bitwright.export(folders(format), tmp_path / format, format="dense")
    with pytest.raises(RecipeError, match="is a gptq folder already"):
        bitwright.export(folders("gptq"), tmp_path / "out", format="gptq")
