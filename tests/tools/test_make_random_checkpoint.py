"""The random checkpoint is a Llama model with the promised tails, the same one whenever and however it is written."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from tests.conftest import loaded_with_info
from torch import Tensor
from typer.testing import CliRunner

import bitwright
import make_random_checkpoint as tool
from bitwright.checkpoint.header import TensorEntry
from bitwright.checkpoint.output import work_folder
from bitwright.core.errors import OutputError, UserError
from bitwright.core.progress import Progress
from llama_shapes import SIZES, Shape
from make_random_checkpoint import Weights, shape_of, write_checkpoint

TINY = SIZES["tiny"]
WEIGHTS = {"1B": 1_235_814_400, "3B": 3_212_749_824, "7B": 6_738_415_616, "70B": 68_976_648_192}
"""As the published checkpoints count theirs."""
BEYOND_THREE = 0.013  # what the tool's own documentation says of --tail 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "model"
    write_checkpoint(folder, TINY)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def linears(folder: Path) -> Iterator[Tensor]:
    return (tensor.float() for name, tensor in tensors(folder).items() if "proj" in name)


@pytest.mark.parametrize("size", WEIGHTS)
def test_sizes_have_as_many_weights_as_the_models_they_are_named_after(size: str) -> None:
    assert sum(entry.elements for entry in SIZES[size].tensors(torch.bfloat16)) == WEIGHTS[size]


def test_same_seed_same_bytes(model: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "again", TINY)
    names = {path.name for path in model.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert all((model / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_another_seed_changes_every_tensor(model: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", TINY, seed=1)
    other = tensors(tmp_path / "other")
    assert not [name for name, tensor in tensors(model).items() if torch.equal(tensor, other[name])]


def test_no_two_tensors_are_the_same(model: Path) -> None:
    found = tensors(model)
    assert len({tensor.view(torch.uint8).numpy().tobytes() for tensor in found.values()}) == len(found)


def test_shards_change_no_tensor(model: Path, tmp_path: Path) -> None:
    told = list[Progress]()
    total = write_checkpoint(tmp_path / "shards", TINY, shard_bytes=200_000, listener=told.append)
    whole, parts = tensors(model), tensors(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert max(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors")) < 210_000
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == told[-1].done == told[-1].total == total


@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_a_tensor_does_not_depend_on_the_blocks_it_comes_in(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "POOL", 2**12)
    weights, entry = Weights.draw(0, 5, 96), TensorEntry("x", torch.float32, (50, 96))
    whole = torch.cat([part.clone() for part in weights.blocks(entry)])
    monkeypatch.setattr(tool, "BLOCK", block)
    parts = [part.clone() for part in weights.blocks(entry)]
    assert max(part.numel() for part in parts) <= max(block, 96)
    assert torch.equal(torch.cat(parts), whole)


def test_every_row_is_another_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "POOL", 2**12)
    monkeypatch.setattr(tool, "ROW_SPREAD", 0.0)  # what is equal now would differ by the factor alone
    weights = Weights.draw(0, 5, 8)
    (tensor,) = weights.blocks(TensorEntry("x", torch.float32, (2**12, 8)))
    assert len(np.unique(np.abs(tensor.numpy()), axis=0)) == 2**12


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_checkpoint(tmp_path / "model", replace(TINY, tied=tied))
    model, loading = loaded_with_info(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer("héllo\n", return_tensors="pt").input_ids
    assert not any(loading.values()), loading
    assert (type(model).__name__, model.dtype) == ("LlamaForCausalLM", torch.bfloat16)
    assert tokens.shape == (1, 7)
    assert tokenizer.decode(tokens[0]) == "héllo\n"
    logits = model(tokens).logits.detach().float()
    assert logits.shape == (1, 7, TINY.vocab)
    assert 0.3 < float(logits.std()) < 10


def test_tails_and_standard_deviations_are_as_promised(model: Path) -> None:
    standard = torch.cat([(weight * weight.shape[1] ** 0.5).flatten() for weight in linears(model)])
    assert float(standard.std()) == pytest.approx(1, abs=0.03)
    assert float((standard.abs() > 3).float().mean()) == pytest.approx(BEYOND_THREE, abs=0.001)


def test_fewer_degrees_of_freedom_are_heavier(model: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "light", TINY, tail=100)

    def share(folder: Path) -> float:
        return float(torch.cat([(w.abs() > 3 * w.std()).flatten() for w in linears(folder)]).float().mean())

    assert share(tmp_path / "light") < 0.6 * share(model)


def test_norms_are_near_one_with_a_few_large_channels(model: Path) -> None:
    norms = [tensor.float() for name, tensor in tensors(model).items() if "norm" in name]
    assert len(norms) == 2 * TINY.layers + 1
    assert all(abs(float(norm.median()) - 1) < 0.1 and float(norm.max()) > 2 for norm in norms)


def test_it_quantizes(model: Path, tmp_path: Path) -> None:
    result = bitwright.quantize(bitwright.Recipe(model=str(model), scheme="W4A16", method="rtn"), tmp_path / "out")
    assert result.linears == 7 * TINY.layers


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    ran = CliRunner().invoke(_command(), [str(tmp_path / "there"), "--size", "tiny"])
    assert ran.exit_code == 2
    assert "exists and is kept" in ran.output
    assert not list((tmp_path / "there").iterdir())


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.checkpoint.output.free_bytes", lambda _: 10**6)
    with pytest.raises(OutputError, match="are needed"):
        write_checkpoint(tmp_path / "out", TINY)
    assert not list(tmp_path.iterdir())


def test_what_breaks_off_leaves_no_output_and_the_next_run_begins_anew(model: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > 600_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", replace(TINY, mlp=256), shard_bytes=200_000, listener=stop)
    assert not (tmp_path / "out").exists()
    assert list(work_folder(tmp_path / "out").rglob("*.safetensors"))
    write_checkpoint(tmp_path / "out", TINY)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in model.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dimensions_override_a_size_or_stand_alone() -> None:
    assert shape_of("7B", {"layers": 2, "tied": None}) == replace(SIZES["7B"], layers=2)
    alone = {"hidden": 64, "mlp": 96, "layers": 1, "heads": 4, "vocab": 300, "kv_heads": None, "tied": None}
    assert shape_of(None, alone) == Shape(64, 96, 1, 4, 4, 300, tied=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "7b"], "did you mean 7B"),
        (["--hidden", "64", "--heads", "4"], "give --mlp, --layers, --vocab too"),
        (["--size", "tiny", "--hidden", "100"], "try a multiple of 8"),
        (["--size", "tiny", "--kv-heads", "3"], "4 heads cannot share 3"),
        (["--size", "tiny", "--layers", "0"], "--layers is 0"),
        (["--size", "tiny", "--vocab", "256"], "--vocab is 256"),
        (["--size", "tiny", "--tail", "2"], "--tail is 2.0"),
        (["--size", "tiny", "--dtype", "int8"], "there is no dtype 'int8'"),
        (["--size", "tiny", "--shard-size", "5 apples"], "is no size"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(_command(), [str(tmp_path / "out"), *arguments])
    assert ran.exit_code == 2
    assert message in ran.output
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_dtype_and_shape_that_are_asked_for(tmp_path: Path) -> None:
    asked = ["--size", "tiny", "--layers", "1", "--tied", "--dtype", "float16", "--shard-size", "100KB"]
    ran = CliRunner().invoke(_command(), [str(tmp_path / "out"), *asked])
    found = tensors(tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    assert "left" in ran.stderr
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert found.keys() == {entry.name for entry in replace(TINY, layers=1, tied=True).tensors(torch.float16)}


def test_a_tail_without_a_variance_is_refused() -> None:
    with pytest.raises(UserError, match="only above 2"):
        Weights.draw(0, float("nan"), 8)


def _command() -> typer.Typer:
    app = typer.Typer()
    app.command()(tool.main)
    return app
