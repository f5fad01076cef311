"""A folder in the bitwright format as transformers loads it through the plugin: in processes that know nothing else."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints, loaded
from tests.families.test_opt_end_to_end import save as save_opt
from torch import Tensor, nn
from transformers import PreTrainedModel

import bitwright
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision, LinearDecision
from bitwright.core.errors import CheckpointError, RecipeError, SchemeError
from bitwright.core.grid import Tile
from bitwright.core.method import Closed, Context, Freedom
from bitwright.core.outlier_rule import OutlierRule
from bitwright.core.progress import Progress
from bitwright.core.quantized import Described
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings
from bitwright.formats import bitwright as format
from bitwright.kernels.reference import PackedLinear
from bitwright.methods import rtn

TOKENS = torch.arange(0, 250, 7)[None]


def mixed(block: Block, context: Context[Settings], decisions: BlockDecisions) -> BlockDecisions:
    """Groups along the output for some, one scale for a whole tensor, outliers; the others as the scheme says."""
    decided = {}
    for name in block.topology.linears:
        weight = block.weight(name)
        if re.search("q_proj|up_proj|fc1", name):
            decided[name] = LinearDecision(tile=Tile(32, 1))
        elif "k_proj" in name:
            decided[name] = LinearDecision(tile=Tile(-1, -1))
        elif re.search("down_proj|fc2", name):
            decided[name] = LinearDecision(outliers=weight.abs() > 3 * weight.std())
    return decisions.with_linears(decided)


def some_outliers(scheme: Scheme, settings: Settings) -> Freedom:
    return Freedom(outliers=OutlierRule(3.0))


MIXED = Closed(
    summary="",
    settings=Settings,
    decides=frozenset({Decision.AXIS, Decision.OUTLIERS, Decision.RANGE, Decision.ROUNDING}),
    decide=mixed,
    freedom=some_outliers,
)


@pytest.fixture
def mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a test runs, the method that a recipe calls rtn decides per linear."""
    monkeypatch.setattr(rtn, "METHOD", MIXED)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(TOKENS).logits
    assert found.isfinite().all()
    return found


IN_A_FRESH_PROCESS = """
import json, sys
{order}
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = torch.arange(0, 250, 7)[None]
with torch.inference_mode():
    logits = model(tokens).logits
    written = model.generate(tokens, max_new_tokens=16, do_sample=False)
torch.save([logits, written, [type(m).__name__ for m in model.modules()].count("PackedLinear")], sys.argv[2])
"""
ORDERS = {
    "bitwright first": "import bitwright\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
    "from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport bitwright",
    "in the middle": "import transformers\nimport bitwright\nfrom transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.usefixtures("mixing")
def test_a_mixed_model_in_a_fresh_process_equals_the_dense_one(order: str, tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W3A16g32", method="rtn")
    assert bitwright.quantize(recipe, tmp_path / "packed").format == "bitwright"
    bitwright.quantize(replace(recipe, format="dense"), tmp_path / "dense")
    script = IN_A_FRESH_PROCESS.format(order=ORDERS[order])
    command = [sys.executable, "-c", script, str(tmp_path / "packed"), str(tmp_path / "found.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found, written, packed = torch.load(tmp_path / "found.pt")
    dense = loaded(tmp_path / "dense")
    assert packed == 14
    assert torch.equal(found, logits(dense)), "bit for bit"
    with torch.inference_mode():
        again = dense.generate(TOKENS, max_new_tokens=16, do_sample=False)  # type: ignore[operator] # not typed as callable
    assert torch.equal(written, again)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.usefixtures("mixing")
def test_weights_and_report_of_a_mixed_model(dtype: str, tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny(dtype)), "W4A16", method="rtn"), tmp_path / "out")
    model, tensors = bitwright.load(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    rows = {row["name"]: row for block in account["blocks"] for row in block["linears"]}
    assert account["format"] == "bitwright" and account["recipe"]["format"] is None
    for name, row in rows.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, PackedLinear)
        q = format.read(tensors, name, Described(linear.grid))
        assert torch.equal(linear.dequantize(), q.dequantize())
        assert list(q.tile.size(q.shape)) == row["tile"]
        kept = 0 if q.outlier_index is None else len(q.outlier_index)
        assert row["outliers"] == kept and (kept > 0) == ("down_proj" in name)
        assert (name in config["exceptions"]) == bool(re.search("q_proj|k_proj|up_proj|down_proj", name))
        assert row["bits_per_weight"] == pytest.approx(q.bits_per_weight)
    seen = {row.name: row for row in bitwright.inspect(tmp_path / "out").linears}
    down = "model.layers.0.mlp.down_proj"
    stored = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.startswith(down)) - 16  # the shape
    assert seen[down].bits_per_weight == 8 * stored / (64 * 192) == rows[down]["bits_per_weight"]


@pytest.mark.usefixtures("mixing")
def test_opt_with_its_biases(tmp_path: Path) -> None:
    recipe = Recipe(str(save_opt(tmp_path / "opt")), "W2A16g32sym", method="rtn")
    bitwright.quantize(recipe, tmp_path / "packed")
    bitwright.quantize(replace(recipe, format="dense"), tmp_path / "dense")
    packed, dense = loaded(tmp_path / "packed"), loaded(tmp_path / "dense")
    assert torch.equal(logits(packed), logits(dense))
    name = "model.decoder.layers.1.fc1"
    assert torch.equal(packed.get_parameter(f"{name}.bias"), dense.get_parameter(f"{name}.bias"))


@pytest.mark.parametrize("scheme", ["W4A4", "W6A6g32sym", "W4A16KV4", "W4A8KV4", "W4A4KV16"])
def test_activations_as_in_compressed_tensors(scheme: str, tiny: Checkpoints, tmp_path: Path) -> None:
    """Queries too where bitwright.load must add them there."""
    recipe = Recipe(str(tiny("float32")), scheme, method="rtn")
    bitwright.quantize(recipe, tmp_path / "a")
    bitwright.quantize(replace(recipe, format="bitwright"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "bitwright.json").read_text())["notes"] == []
    plain, whole = logits(loaded(tmp_path / "b")), logits(bitwright.load(tmp_path / "b", dtype="float32"))
    assert torch.equal(plain, whole)
    torch.testing.assert_close(plain, logits(bitwright.load(tmp_path / "a", dtype="float32")), rtol=1e-4, atol=1e-4)


def test_an_output_layer_of_its_own(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny(tied=True)), "W4A16g32ic", method="rtn", quantize_lm_head=True)
    bitwright.quantize(recipe, tmp_path / "packed")
    bitwright.quantize(replace(recipe, format="dense"), tmp_path / "dense")
    model = loaded(tmp_path / "packed")
    assert isinstance(model.get_submodule("lm_head"), PackedLinear)
    assert torch.equal(logits(model), logits(loaded(tmp_path / "dense")))


@pytest.mark.usefixtures("mixing")
def test_saved_again_it_is_the_same(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "W5A16g32", method="rtn"), tmp_path / "once")
    model = loaded(tmp_path / "once", torch.bfloat16)
    model.save_pretrained(tmp_path / "twice")
    once, twice = (load_file(tmp_path / n / "model.safetensors") for n in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) and once[name].dtype == twice[name].dtype for name in once)
    assert torch.equal(logits(loaded(tmp_path / "twice")), logits(loaded(tmp_path / "once")))


def test_what_stays_in_memory_is_packed(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "W4A16g32ic", method="rtn"), tmp_path / "out")
    model, folder = bitwright.load(tmp_path / "out"), bitwright.inspect(tmp_path / "out")
    logits(model)
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    held = sum(b.numel() * b.element_size() for m in linears for b in m.buffers())
    assert held == sum(row.bits_per_weight * row.shape[0] * row.shape[1] / 8 for row in folder.linears
                       if row.dtype == "packed") + 16 * len(linears)  # fmt: skip
    assert not [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_submodule("lm_head")]


@pytest.mark.usefixtures("mixing")
def test_a_mixed_run_that_was_stopped_goes_on_to_the_same_bytes(tiny: Checkpoints, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line about nothing much; " * 60)
    recipe = Recipe(str(tiny()), "W3A16g32", method="rtn", calibration=str(text), samples=4, seqlen=32)
    bitwright.quantize(recipe, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop_at(unit: str) -> Callable[[Progress], None]:
        def listen(progress: Progress) -> None:
            if progress.unit == unit:
                raise Stopped

        return listen

    for unit in ("model.layers.1", "all blocks"):
        with pytest.raises(Stopped):
            bitwright.quantize(recipe, tmp_path / "out", listener=stop_at(unit))
    bitwright.quantize(recipe, tmp_path / "out")
    for name in ("model.safetensors", "config.json", "bitwright.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_format_is_settled_by_what_was_decided(tiny: Checkpoints, tmp_path: Path, mixing: None) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", method="rtn")
    assert bitwright.plan(recipe).format == "compressed-tensors or bitwright"
    with pytest.raises(RecipeError, match="cannot hold outliers"):
        bitwright.plan(replace(recipe, format="compressed-tensors"))


def test_the_format_of_schemes(tiny: Checkpoints, tmp_path: Path) -> None:
    per_output, per_input = Recipe(str(tiny()), "W4A16g32"), Recipe(str(tiny()), "W3A16g32ic")
    assert bitwright.plan(per_output).format == bitwright.quantize(per_output, tmp_path / "a").format
    assert bitwright.plan(per_output).format == "compressed-tensors"
    planned, made = bitwright.plan(per_input), bitwright.quantize(per_input, tmp_path / "b")
    assert planned.format == made.format == "bitwright"
    tensors = load_file(tmp_path / "b" / "model.safetensors").values()
    assert planned.bytes_out == sum(t.numel() * t.element_size() for t in tensors)
    with pytest.raises(RecipeError, match=r"compressed-tensors cannot hold groups along the output, .*--format bitwr"):
        bitwright.plan(replace(per_input, format="compressed-tensors"))
    with pytest.raises(SchemeError, match=r"q_proj \[64, 64\] under scheme W3A16g48ic: 64 output features .* 32, 64"):
        bitwright.plan(replace(per_input, scheme="W3A16g48ic"))


Tensors = dict[str, Tensor]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def without(name: str) -> Callable[[Tensors, Any], None]:
    def drop(tensors: Tensors, config: Any) -> None:
        del tensors[name]

    return drop


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Any], None]:
    def apply(tensors: Tensors, config: Any) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def config_with(**changes: Any) -> Callable[[Tensors, Any], None]:
    return lambda tensors, config: config.update(changes)


DAMAGE: dict[str, tuple[Callable[[Tensors, Any], None], str]] = {
    "a tensor is missing": (without(f"{Q}.weight_packed"), f"no tensor {Q}.weight_packed"),
    "outliers are missing": (without(f"{DOWN}.outlier_index"), f"no tensor {DOWN}.outlier_index"),
    "words are missing": (changed(f"{Q}.weight_packed", lambda t: t[:, :-1]), r"is int32 \[64, 5\], and its config"),
    "scales of another dtype": (changed(f"{Q}.weight_scale", lambda t: t.float()), "weight_scale is float32"),
    "a shape that lies": (changed(f"{Q}.weight_shape", lambda t: t + 1), r"weight_shape says \[65, 65\], not"),
    "a scale that is none": (changed(f"{Q}.weight_scale", lambda t: t / 0), "weight_scale holds NaN or infinity"),
    "outliers outside": (changed(f"{DOWN}.outlier_index", lambda t: t + 64 * 192), "outliers outside the weight"),
    "outliers below": (changed(f"{DOWN}.outlier_index", lambda t: t - 64 * 192), "outliers outside the weight"),
    "outliers in disorder": (changed(f"{DOWN}.outlier_index", lambda t: t.flip(0)), "out of order"),
    "another version": (config_with(version=2), "version: Input should be 1, found 2"),
    "other bits": (config_with(weights={"bits": 4, "symmetric": False, "tile": [1, 32], "dtype": "bfloat16"}),
                   r"is int32 \[64, 6\], and its config calls for int32 \[64, 8\]"),
    "a tile that does not divide": (config_with(weights={"bits": 3, "symmetric": False, "tile": [1, 7],
                                                         "dtype": "bfloat16"}), "do not divide into groups of 7"),
    "a linear of no model": (config_with(exceptions={"x.y": {"tile": [1, 1], "outliers": 0}}), "names x.y, which is"),
    "outliers without end": (config_with(exceptions={Q: {"tile": [1, 32], "outliers": 10**12}}), "1000000000000 outl"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed folder, to be damaged in copies."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rtn, "METHOD", MIXED)
        bitwright.quantize(Recipe(str(tiny()), "W3A16g32", method="rtn"), out)
    return out


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change, says = DAMAGE[damage]
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for loading in (bitwright.load, loaded):
        with pytest.raises(CheckpointError, match=says):
            loading(folder)
