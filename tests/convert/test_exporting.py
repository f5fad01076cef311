"""A quantized folder in another format: the same weights, or a refusal; and what lies beside them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints, contents, save_tokenizer
from tests.plugin.experts import save_original
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.checkpoint.journal import Journal
from bitwright.core.errors import OutputError, RecipeError, UserError
from bitwright.core.recipe import Recipe
from bitwright.formats import QuantizedFolder

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """``folder(scheme, format=None, method="rtn")``: a quantized folder, made once."""
    made: dict[str, Path] = {}

    def of(scheme: str, format: str | None = None, method: str = "rtn") -> Path:
        key = f"{scheme} {format} {method}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("folder") / "out"
            bitwright.quantize(Recipe(str(tiny()), scheme, method, format), made[key])
        return made[key]

    return of


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = QuantizedFolder.open(folder)
    return {name: model.read(name).dequantize(torch.float32) for name in model.linears}


@pytest.mark.parametrize(("scheme", "format"), [
    ("W4A16g32", "gptq"), ("W4A16g32", "awq"), ("W3A16g32", "gptq"), ("W4A16g32sym", "awq"), ("W4A16", "bitwright"),
    ("W2A16g32sym", "gptq"), ("W8A16", "gptq"), ("W3A16sym", "bitwright"),
])  # fmt: skip
def test_the_weights_stay(scheme: str, format: str, folder: Folder, tmp_path: Path) -> None:
    """Scales of bfloat16 are numbers of float16 here, so nothing at all is lost."""
    result = bitwright.export(folder(scheme), tmp_path / "out", format=format)
    assert (result.exact, result.codes_kept, result.largest_error) == (result.linears, result.linears, 0)
    before, after = weights(folder(scheme)), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    back = bitwright.export(tmp_path / "out", tmp_path / "back", format="compressed-tensors")
    assert back.exact == back.linears and bitwright.verify(tmp_path / "back").passed


@pytest.mark.parametrize(("scheme", "format"), [
    ("W4A16g32", "gptq"), ("W4A16g32", "awq"), ("W4A16g32", "bitwright"), ("W4A16g64", "awq"),
])  # fmt: skip
def test_a_group_that_is_the_whole_row_of_some_linears_is_no_scheme_of_their_own(
    scheme: str, format: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    """One group of a row cannot be told from a channel: of down_proj in groups of 32, of all others in groups of 64."""
    model = tiny(intermediate_size=32 if scheme == "W4A16g32" else 192)
    bitwright.quantize(Recipe(str(model), scheme, "rtn"), tmp_path / "quantized")
    result = bitwright.export(tmp_path / "quantized", tmp_path / "out", format=format)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert result.exact == result.linears and not config.get("dynamic") and not config.get("exceptions")


@torch.inference_mode()
def test_dense_is_what_the_client_computes(folder: Folder, tmp_path: Path) -> None:
    result = bitwright.export(folder("W4A16g32ic"), tmp_path / "out", format="dense")
    assert result.codes_kept == result.linears and 0 < result.largest_error < 1e-5, "bfloat16 rounds"
    tokens = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(plain, bitwright.load(folder("W4A16g32ic"))(tokens).logits, rtol=0, atol=0.05)


def test_what_does_not_fit_is_refused_unless_lossy(folder: Folder, tmp_path: Path) -> None:
    source = folder("W4A16g32", "bitwright", "easyquant")
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.\S+: a 4-bit .*with \d+ outliers.*--lossy quantizes"):
        bitwright.export(source, tmp_path / "out", format="gptq")
    result = bitwright.export(source, tmp_path / "out", format="gptq", lossy=True)
    assert result.codes_kept < result.linears and 1e-4 < result.largest_error < 0.02
    said = json.loads((tmp_path / "out" / "bitwright.json").read_text())["export"]
    assert max(row["error"] for row in said["linears"]) == result.largest_error
    before, after = weights(source), weights(tmp_path / "out")
    worst = max(float((before[n] - after[n]).square().sum() / before[n].square().sum()) for n in before)
    assert worst == pytest.approx(result.largest_error, rel=1e-4)


def test_activations_go_along_or_are_refused(folder: Folder, tmp_path: Path) -> None:
    bitwright.export(folder("W4A8KV8"), tmp_path / "out", format="bitwright")
    before, after = (QuantizedFolder.open(place).described for place in (folder("W4A8KV8"), tmp_path / "out"))
    assert before is not None and after is not None and before.activations is not None
    assert (before.activations, before.kv) == (after.activations, after.kv)
    assert bitwright.verify(tmp_path / "out").passed
    for format in ("dense", "awq", "gguf", "mlc"):
        for lossy in (False, True):
            with pytest.raises(RecipeError, match=f"{format} cannot hold the activations .* of scheme W4A8, which"):
                bitwright.export(folder("W4A8KV8"), tmp_path / "other", format=format, lossy=lossy)


@pytest.mark.parametrize(("how", "kind", "says"), [
    ({"format": "gptk"}, RecipeError, "there is no format 'gptk'; did you mean gptq"),
    ({"format": "compressed-tensors"}, RecipeError, "is a compressed-tensors folder already"),
    ({"format": "gptq", "embeddings": "f16"}, RecipeError, "has no use for --embeddings"),
    ({"format": "gptq", "shard_size": "many"}, RecipeError, "shard size 'many' is no size"),
    ({"format": "gguf", "shard_size": "1GB"}, RecipeError, "format gguf has no use for --shard-size 1GB"),
    ({"format": "mlc", "shard_size": "1GB"}, RecipeError, "format mlc has no use for --shard-size 1GB"),
])  # fmt: skip
def test_refused(how: dict[str, Any], kind: type[UserError], says: str, folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(kind, match=says):
        bitwright.export(folder("W4A16g32"), tmp_path / "out", **how)
    assert not any(tmp_path.iterdir())


def test_an_output_in_the_folder_that_is_read(folder: Folder) -> None:
    before = sorted(folder("W4A16g32").rglob("*"))
    for output, format in (("sub.gguf", "gguf"), ("sub", "awq"), ("deep/er.gguf", "gguf")):
        with pytest.raises(OutputError, match=r"lies in .*, which is read"):
            bitwright.export(folder("W4A16g32"), folder("W4A16g32") / output, format=format)
    assert sorted(folder("W4A16g32").rglob("*")) == before


@pytest.mark.parametrize(("format", "scheme", "most"), [("gguf", "W4A16g32", 1e-3), ("mlc", "W4A16g32sym", 0.02)])
def test_embeddings_that_a_format_quantizes_are_told_apart(
    format: str, scheme: str, most: float, tiny: Checkpoints, tmp_path: Path
) -> None:
    bitwright.quantize(Recipe(str(tiny(eos_token_id=0)), scheme, "rtn"), tmp_path / "folder")
    found = bitwright.export(tmp_path / "folder", tmp_path / "out", format=format)
    assert found.linears == found.codes_kept == 14
    assert sorted(found.also_quantized) == ["lm_head", "model.embed_tokens"]
    assert found.largest_error < 1e-6 < found.also_error < most
    kept = bitwright.export(tmp_path / "folder", tmp_path / "f16", format=format, embeddings="f16")
    assert (kept.linears, kept.also_quantized, kept.also_error) == (14, (), 0)
    assert bitwright.export(tmp_path / "folder", tmp_path / "awq", format="awq").also_quantized == ()


@pytest.mark.parametrize("format", ["gguf", "mlc"])
def test_quantize_says_that_embeddings_are_quantized_too(format: str, tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny(eos_token_id=0)), "W4A16g32sym", "rtn", format)
    (note,) = (note for note in bitwright.quantize(recipe, tmp_path / "out").notes if "too" in note)
    assert note.startswith(f"format {format} quantizes ") and "model.embed_tokens" in note and "error at most" in note
    kept = bitwright.quantize(replace(recipe, embeddings="f16"), tmp_path / "kept")
    assert not any("too: relative" in note for note in kept.notes)


OWN = ("mlc:q3f16_1", "mlc:q2f16_1")


@pytest.mark.parametrize("scheme", OWN)
def test_grids_of_mlc_in_other_formats(scheme: str, tiny: Checkpoints, tmp_path: Path) -> None:
    """Groups of 40 are no blocks of 32; those of 64 are, of which the last in a row of 96 is cut."""
    bitwright.quantize(Recipe(str(tiny("float16", intermediate_size=96, eos_token_id=0)), scheme), tmp_path / "folder")
    exact = scheme == "mlc:q2f16_1"
    if not exact:
        told = r"layers\.0\.\S+: a 3-bit symmetric weight .* in tiles of 1 x 40 .*--lossy"
        with pytest.raises(RecipeError, match=told):
            bitwright.export(tmp_path / "folder", tmp_path / "out.gguf", format="gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"], "nothing was begun"
    found = bitwright.export(tmp_path / "folder", tmp_path / "out.gguf", format="gguf", lossy=not exact)
    assert found.codes_kept == (found.linears if exact else 0)
    assert found.largest_error < (1e-9 if exact else 0.05)
    with pytest.raises(RecipeError, match=r"layers\.0\.\S+: .*--lossy"):
        bitwright.export(tmp_path / "folder", tmp_path / "gptq", format="gptq")
    assert 0 < bitwright.export(tmp_path / "folder", tmp_path / "gptq", format="gptq", lossy=True).largest_error < 0.2


WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}


def test_what_mlc_has_no_place_for_is_quantized_again_in_its_awq_layout(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny("float16", **WIDE)), "W4A16g128", "easyquant"), tmp_path / "folder")
    with pytest.raises(
        RecipeError, match=r"outliers, cannot be held exactly .*--lossy quantizes such weights once more"
    ):
        bitwright.export(tmp_path / "folder", tmp_path / "mlc", format="mlc")
    found = bitwright.export(tmp_path / "folder", tmp_path / "mlc", format="mlc", lossy=True)
    assert found.codes_kept < found.linears == 14 and 1e-4 < found.largest_error < 0.02
    assert json.loads((tmp_path / "mlc" / "mlc-chat-config.json").read_text())["quantization"] == "q4f16_autoawq"
    assert bitwright.verify(tmp_path / "mlc", tmp_path / "folder").passed


def test_groups_along_the_output_beside_others(tiny: Checkpoints, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("float16", **WIDE), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "down_proj" in name:
            tensor[:, ::8] *= 20
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(str(model), "W4A16g128", "easyquant", outliers="0", axis="auto")
    assert 0 < bitwright.quantize(recipe, tmp_path / "folder").per_ic < 14
    with pytest.raises(RecipeError, match=r"down_proj: a 4-bit asymmetric weight .* in tiles of 128 x 1 .*--lossy"):
        bitwright.export(tmp_path / "folder", tmp_path / "mlc", format="mlc")
    found = bitwright.export(tmp_path / "folder", tmp_path / "mlc", format="mlc", lossy=True)
    assert 0 < found.codes_kept < found.linears == 14
    assert bitwright.verify(tmp_path / "mlc", tmp_path / "folder").passed
    bitwright.quantize(replace(recipe, scheme="W4A16g64"), tmp_path / "smaller")
    for format in ("gptq", "awq"):
        found = bitwright.export(tmp_path / "smaller", tmp_path / format, format=format, lossy=True)
        assert 0 < found.codes_kept < found.linears, "groups of 64 too, or they would not go into one folder"


def test_an_output_that_exists_and_a_model_that_is_not_quantized(
    folder: Folder, tiny: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists and is kept as it is"):
        bitwright.export(folder("W4A16g32"), tmp_path / "out", format="gptq")
    with pytest.raises(RecipeError, match=r"is not quantized: bitwright quantize .* --format gptq does that"):
        bitwright.export(tiny(), tmp_path / "new", format="gptq")


def test_interrupted_it_goes_on_to_the_same_bytes(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, written = folder("W4A16g32"), list[str]()
    bitwright.export(source, tmp_path / "whole", format="gptq")
    record, most = Journal.record, 2

    def recording(self: Journal, unit: str, *rest: Any) -> None:
        if len(written) == most:
            raise KeyboardInterrupt
        record(self, unit, *rest)
        written.append(unit)

    monkeypatch.setattr(Journal, "record", recording)
    with pytest.raises(KeyboardInterrupt):
        bitwright.export(source, tmp_path / "out", format="gptq")
    before, most = [*written], 10**6
    bitwright.export(source, tmp_path / "out", format="gptq")
    assert len(before) == 2 < len(written) == len(set(written)), "no unit is written twice"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_tokenizer_goes_along(folder: Folder, tmp_path: Path) -> None:
    bitwright.export(folder("W4A16g32"), tmp_path / "out", format="awq")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder("W4A16g32") / name).read_bytes()
    shutil.rmtree(tmp_path / "out")


def test_the_account_and_the_allocation_are_of_the_export(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W3A16g64", "rtn", "bitwright", exclude="*.1.mlp.up_proj")
    bitwright.quantize(recipe, tmp_path / "folder")
    result = bitwright.export(tmp_path / "folder", tmp_path / "out", format="awq", lossy=True)
    account = json.loads((tmp_path / "out/bitwright.json").read_text())
    allocation = json.loads((tmp_path / "out/allocation.json").read_text())
    shown = bitwright.inspect(tmp_path / "out")
    assert account["scheme"] == allocation["scheme"] == shown.scheme == "W4A16g64"
    assert allocation["linears"]["model.layers.1.mlp.up_proj"] is None and len(allocation["linears"]) == 15
    assert {row.scheme for row in shown.linears if row.tile} == {"W4A16g64"}
    rows = [row for block in account["blocks"] for row in block["linears"]]
    assert not any("scheme" in row for row in rows)
    assert account["totals"]["bits_per_weight"] == pytest.approx(shown.bits_per_weight)
    assert account["totals"]["bytes_out"] == result.bytes_out


def test_an_export_of_mixed_schemes_says_each(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny(num_key_value_heads=4)), "W4A16g32", "rtn", scheme_for="*.down_proj=W8A16g32")
    bitwright.quantize(recipe, tmp_path / "folder")
    bitwright.export(tmp_path / "folder", tmp_path / "out", format="gptq")
    first, second = (json.loads((tmp_path / place / "allocation.json").read_text()) for place in ("folder", "out"))
    assert first == second
    before, after = (json.loads((tmp_path / place / "bitwright.json").read_text()) for place in ("folder", "out"))
    schemes = [[row.get("scheme") for block in said["blocks"] for row in block["linears"]] for said in (before, after)]
    assert schemes[0] == schemes[1] and before["scheme"] == after["scheme"] == "W4A16g32"


@pytest.mark.parametrize("format", ["gptq", "gguf", "mlc"])
def test_sizes_are_those_of_weight_files(format: str, folder: Folder, tiny: Checkpoints, tmp_path: Path) -> None:
    source = tmp_path / "source"
    bitwright.quantize(Recipe(str(tiny(eos_token_id=0)), "W4A16g32sym", "rtn"), source)
    result = bitwright.export(source, tmp_path / "out", format=format)
    assert result.bytes_in == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    out = tmp_path / "out"
    ends = (".safetensors", ".bin")
    files = [out] if out.is_file() else [path for path in out.iterdir() if path.suffix in ends]
    assert result.bytes_out == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize(("scheme", "exclude", "says"), [
    ("W4A16g32", None, "cannot load .*experts"),
    ("W4A16g32sym", "*.1.mlp.experts.3.*", "cannot load .*experts"),
])  # fmt: skip
def test_experts_that_transformers_cannot_load(scheme: str, exclude: str | None, says: str, tmp_path: Path) -> None:
    save_original("Qwen3Moe", tmp_path / "original", torch.bfloat16)
    save_tokenizer(tmp_path / "original")
    recipe = Recipe(str(tmp_path / "original"), scheme, "rtn", "bitwright", exclude=exclude)
    bitwright.quantize(recipe, tmp_path / "folder")
    with pytest.raises(RecipeError, match=says + r".*Leave it in format bitwright .*--format dense"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format="compressed-tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "original"]
