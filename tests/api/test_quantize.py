"""What quantize() says of its result is what stands on the disk, and what it refuses it refuses before it writes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, Checkpoints, contents

import bitwright
from bitwright.core.errors import CalibrationError, CheckpointError, OutputError, RecipeError, SchemeError, UserError
from bitwright.core.progress import Progress
from bitwright.core.recipe import Recipe

# q, o: 64 x 64; k, v: 32 x 64; gate, up, down: 64 x 192.
BLOCK_WEIGHTS = 2 * 64 * 64 + 2 * 32 * 64 + 3 * HIDDEN * INTERMEDIATE
HEAD_WEIGHTS = VOCABULARY * HIDDEN
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"scheme": "W4A16g32"}),
    "per channel, symmetric": ({"dtype": "float16"}, {"scheme": "W3A16sym"}),
    "tied": ({"tied": True}, {"scheme": "W2A16g64"}),
    "head": ({}, {"scheme": "W5A16", "quantize_lm_head": True}),
    "tied, head": ({"tied": True, "dtype": "float32"}, {"scheme": "W8A16g16", "quantize_lm_head": True}),
    "dense": ({"tied": True}, {"scheme": "W4A16", "format": "dense", "quantize_lm_head": True}),
    "groups along the output": ({}, {"scheme": "W3A16g32ic"}),
    "activations": ({"shards": True}, {"scheme": "W4A4"}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {"scheme": "W4A16", "shard_size": "50KB"}),
}


def tensor_bytes(folder: Path) -> int:
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", RUNS)
def test_plan_result_account_and_inspection_agree_with_the_disk(name: str, tiny: Checkpoints, tmp_path: Path) -> None:
    model, asked = RUNS[name]
    source, out = tiny(**model), tmp_path / "out"
    recipe = Recipe(model=str(source), **asked)
    planned, result = bitwright.plan(recipe), bitwright.quantize(recipe, out)
    account, seen = json.loads((out / "bitwright.json").read_text()), bitwright.inspect(out)
    head = recipe.quantize_lm_head
    weights = LAYERS * BLOCK_WEIGHTS + (HEAD_WEIGHTS if head else 0)

    assert planned.bytes_in == result.bytes_in == tensor_bytes(source)
    assert planned.bytes_out == tensor_bytes(out)
    assert result.bytes_out == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert planned.linears == result.linears == 7 * LAYERS + head
    assert planned.quantized_weights == account["totals"]["quantized_weights"] == weights
    assert planned.bits_per_weight == pytest.approx(result.bits_per_weight)
    if result.format != "dense":
        assert seen.bits_per_weight == pytest.approx(result.bits_per_weight)
    assert account["recipe"] == recipe.as_dict()
    assert (account["scheme"], account["totals"]["bytes_out"]) == (result.scheme, result.bytes_out)
    rows = [row for block in account["blocks"] for row in block["linears"]]
    assert len(rows) == result.linears
    bits = sum(row["storage_bits"] for row in rows)
    assert result.bits_per_weight == account["totals"]["bits_per_weight"] == bits / weights
    assert (result.output_error, result.fallbacks, result.resumed) == (None, (), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_bits_per_weight_by_hand(tiny: Checkpoints, tmp_path: Path) -> None:
    # Groups of 32: 4 bits a code, and for every 32 codes a scale of 16 bits and a zero point of 4: 4 + 20/32 = 4.625.
    result = bitwright.quantize(Recipe(model=str(tiny()), scheme="W4A16g32"), tmp_path / "a")
    assert result.bits_per_weight == 4.625
    # Per channel and symmetric: rows of 64 (q, k, v, o, gate, up) and of 192 (down), a scale of 32 bits a row.
    rows = LAYERS * (64 + 32 + 32 + 64 + 192 + 192 + 64)
    expected = 3 + 32 * rows / (LAYERS * BLOCK_WEIGHTS)
    result = bitwright.quantize(Recipe(model=str(tiny("float32")), scheme="W3A16sym"), tmp_path / "b")
    assert math.isclose(result.bits_per_weight, expected)


def test_errors_grow_as_bits_shrink(tiny: Checkpoints, text: Path, tmp_path: Path) -> None:
    errors = []
    for bits in (8, 6, 4, 2):
        recipe = Recipe(str(tiny()), f"W{bits}A16g32", calibration=str(text), samples=4, seqlen=32)
        errors.append(bitwright.quantize(recipe, tmp_path / str(bits)).output_error or 0.0)
    assert 0 < errors[0] < errors[1] / 4 < errors[2] / 16 < errors[3] / 64 < 1


def test_the_account_says_what_the_calibration_was(tiny: Checkpoints, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16", calibration=str(text), samples=4, seqlen=32, seed=3)
    bitwright.quantize(recipe, tmp_path / "out")
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    said = account["calibration"]
    assert (said["segments"], said["seqlen"], len(said["tokens_sha256"]), account["seed"]) == (4, 32, 64, 3)
    assert len(account["blocks"]) == LAYERS
    assert all(0 < block["output_error"] < 1 for block in account["blocks"])


@pytest.mark.parametrize("text", [None, "builtin"])
def test_progress_goes_from_check_to_quantize(text: str | None, tiny: Checkpoints, tmp_path: Path) -> None:
    heard: list[Progress] = []
    recipe = Recipe(str(tiny()), "W4A16", "rtn", calibration=text, samples=2, seqlen=32)
    bitwright.quantize(recipe, tmp_path / "out", listener=heard.append)
    stages = [progress.stage for progress in heard]
    assert stages == sorted(stages) and set(stages) == ({"check", "quantize"} if text else {"quantize"})
    for stage in dict.fromkeys(stages):
        of_stage = [progress for progress in heard if progress.stage == stage]
        assert of_stage[-1].done == of_stage[-1].total > 0
        assert [p.done for p in of_stage] == sorted(p.done for p in of_stage)


def refused(kind: type[UserError], recipe: Recipe, out: Path, **how: Any) -> str:
    """The message of a refusal that leaves nothing behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind) as error:
        bitwright.quantize(recipe, out, **how)
    assert sorted(out.parent.rglob("*")) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (SchemeError, {"scheme": "W4A16g48"}, "q_proj [64, 64] under scheme W4A16g48: 64 input features do not divide"),
        (SchemeError, {"scheme": "W4"}, "'W4' is no scheme"),
        (RecipeError, {"method": "rtm"}, "there is no method 'rtm'; did you mean rtn?"),
        (RecipeError, {"format": "gptk"}, "there is no format 'gptk'"),
        (RecipeError, {"scheme": "W4A4", "format": "dense"}, "format dense cannot hold"),
        (CheckpointError, {"model": "org/name"}, "hf download org/name"),
        (CheckpointError, {"model": "/no/such/folder"}, "/no/such/folder"),
        (RecipeError, {"calibration": "builtin", "seqlen": 129}, "longer than the model's own maximum of 128 tokens"),
        (CalibrationError, {"calibration": "no-such-file.txt"}, "no text file or folder no-such-file.txt"),
    ],
)
def test_refusals(kind: type[UserError], changes: dict[str, Any], says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(kind) as error:
        bitwright.quantize(Recipe(**({"model": str(tiny()), "scheme": "W4A16"} | changes)), tmp_path / "out")
    assert says in str(error.value) and not list(tmp_path.iterdir())


def test_too_little_text_says_how_much_is_needed(tiny: Checkpoints, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16", calibration=str(text), samples=64, seqlen=128)
    message = refused(CalibrationError, recipe, tmp_path / "out")
    assert f"64 segments of 128 tokens need 8192 tokens, but '{text}' has 6400" in message
    assert "--samples 50, or --seqlen 100" in message


@pytest.mark.parametrize(("value", "says"), [(math.nan, "1 NaN and 0 infinite"), (math.inf, "0 NaN and 1 infinite")])
def test_a_damaged_weight_is_named(value: float, says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(str(model), "W4A16", "gptq", calibration="builtin", samples=2, seqlen=32)
    message = refused(CheckpointError, recipe, tmp_path / "out")
    assert "'model.layers.1.mlp.up_proj.weight'" in message and says in message


@pytest.mark.parametrize(("place", "says"), [
    ("", "around/model: the model that is read, .*, is there, and would be replaced"),
    ("..", "around: the model that is read, .*, is there, and would be replaced"),
    ("config.json", r"config\.json: lies in .*around/model, which is read"),
])  # fmt: skip
def test_the_model_is_never_written_over(place: str, says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(), tmp_path / "around" / "model"))
    before = {path: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(OutputError, match=says):
        bitwright.quantize(Recipe(model=str(model), scheme="W4A16"), (model / place).resolve(), overwrite=True)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


@pytest.mark.parametrize(("place", "format"), [("sub", None), ("model.gguf", "gguf"), ("deep/er", "mlc")])
def test_an_output_in_the_folder_of_the_model(
    place: str, format: str | None, tiny: Checkpoints, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny(eos_token_id=0), tmp_path / "model"))
    before = sorted(model.rglob("*"))
    with pytest.raises(OutputError, match=r"lies in .*model, which is read"):
        bitwright.quantize(Recipe(str(model), "W4A16g32sym", "rtn", format), model / place)
    assert sorted(model.rglob("*")) == before


def test_a_finished_result_is_kept_unless_overwriting(tiny: Checkpoints, tmp_path: Path) -> None:
    out, three, four = tmp_path / "out", Recipe(str(tiny()), "W3A16"), Recipe(str(tiny()), "W4A16")
    bitwright.quantize(three, out)
    before = contents(out)
    assert "exists and is kept as it is" in refused(OutputError, four, out)
    assert contents(out) == before
    assert bitwright.quantize(four, out, overwrite=True).scheme == "W4A16"
    assert json.loads((out / "bitwright.json").read_text())["scheme"] == "W4A16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_linear_of_zeros_stays_zero(tiny: Checkpoints, tmp_path: Path) -> None:
    """No division by nothing in codes, errors or reports."""
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(str(model), "W2A16", format="dense", calibration="builtin", samples=2, seqlen=16)
    bitwright.quantize(recipe, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.layers.0.mlp.down_proj.weight"], torch.zeros(HIDDEN, INTERMEDIATE).bfloat16())
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    row = next(row for row in account["blocks"][0]["linears"] if row["name"].endswith("down_proj"))
    assert (row["weight_error"], row["output_error"]) == (0.0, 0.0)


def test_the_plan_of_a_tied_model_that_stores_its_output_layer_all_the_same(tiny: Checkpoints, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(tied=True), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(str(model), "W4A16", quantize_lm_head=True)
    planned = bitwright.plan(recipe)
    bitwright.quantize(recipe, tmp_path / "out")
    assert planned.bytes_out == tensor_bytes(tmp_path / "out")
