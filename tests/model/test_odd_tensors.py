"""Checkpoints of an architecture that nobody knows, with tensors that are called, or shaped, as few are."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints
from torch import Tensor

import bitwright
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.recipe import Recipe

Odd = Callable[[dict[str, Tensor]], Path]
X = "layers.0.q"
SCALE = {f"{X}.weight_scale": torch.ones(1, dtype=torch.bfloat16)}


@pytest.fixture
def odd(tiny: Checkpoints, tmp_path: Path) -> Odd:
    """``odd(tensors)``: a folder with these, an embedding and a linear ``layers.0.k``."""

    def of(tensors: dict[str, Tensor]) -> Path:
        folder = tmp_path / "odd"
        folder.mkdir()
        for path in tiny().glob("tokenizer*.json"):
            shutil.copy(path, folder)
        config = {"model_type": "oddity", "architectures": ["OddityForCausalLM"], "hidden_size": 64, "vocab_size": 128}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"embed_tokens.weight": drawn(128, 64), "layers.0.k.weight": drawn(64, 64)} | tensors,
                  folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        return folder

    return of


def drawn(*shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 8).bfloat16()


def quantized(folder: Path, format: str | None = None, include: str | None = None, exclude: str | None = None) -> Path:
    out = folder.with_name("out")
    bitwright.quantize(Recipe(str(folder), "W4A16", "rtn", format, include=include, exclude=exclude), out)
    return out


def refused(folder: Path, says: str, kind: type[Exception] = RecipeError, include: str | None = None) -> None:
    """Before the work, by quantize and by plan."""
    with pytest.raises(kind, match=says):
        quantized(folder, include=include)
    with pytest.raises(kind, match=says):
        bitwright.plan(Recipe(str(folder), "W4A16", "rtn", include=include))
    assert [path.name for path in folder.parent.iterdir()] == ["odd"]


class TestCalledAsAPartOfAQuantizedWeight:
    @pytest.mark.parametrize("format", [None, "bitwright", "compressed-tensors", "dense"])
    @pytest.mark.parametrize("weight", [drawn(64, 64).to(torch.int8), drawn(64, 64) > 0])
    def test_kept_beside_a_kept_weight(self, weight: Tensor, format: str | None, odd: Odd) -> None:
        source = odd({f"{X}.weight": weight} | SCALE)
        out = quantized(source, format=format)
        written = Checkpoint.open(out)
        for name in (f"{X}.weight", f"{X}.weight_scale"):
            assert torch.equal(written.read(name), Checkpoint.open(source).read(name))
        if format != "dense":
            found = bitwright.verify(out, source)
            assert found.passed and found.linears == 1
            assert [row.name for row in bitwright.inspect(out).linears if row.dtype == "packed"] == ["layers.0.k"]

    def test_beside_an_excluded_one(self, odd: Odd) -> None:
        source = odd({f"{X}.weight": drawn(64, 64)} | SCALE)
        assert bitwright.verify(quantized(source, exclude=X), source).passed

    @pytest.mark.parametrize("leaf", ["weight_scale", "weight_zero_point", "weight_g_idx", "outlier_index"])
    def test_in_the_way_of_a_quantized_weight(self, leaf: str, odd: Odd) -> None:
        says = rf"{X} is partly quantized already: there is a tensor {X}.{leaf},.* --exclude '{X}'"
        refused(odd({f"{X}.weight": drawn(64, 64), f"{X}.{leaf}": torch.ones(1)}), says, CheckpointError)

    @pytest.mark.parametrize("beside", [{}, {f"{X}.weight": drawn(64, 64)}])
    def test_packed_codes(self, beside: dict[str, Tensor], odd: Odd) -> None:
        packed = {f"{X}.weight_packed": torch.ones(64, 8, dtype=torch.int32)}
        refused(odd(packed | beside), f"there is a tensor {X}.weight_packed", CheckpointError)

    def test_a_quantized_weight_without_its_codes_is_damaged(self, odd: Odd) -> None:
        out = quantized(odd({}), format="bitwright")
        tensors = load_file(out / "model.safetensors")
        del tensors["layers.0.k.weight_packed"]
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"there is no tensor layers.0.k.weight_packed"):
            bitwright.verify(out)


class TestNoWeightOfALinear:
    @pytest.mark.parametrize(("name", "shape"), [
        ("layers.0.mixer.A_log", (128, 32)), ("layers.0.experts.mlp.w1", (256, 64)),
        ("layers.0.experts.gate_up_proj_bias", (4, 192)),
    ])  # fmt: skip
    def test_a_matrix_of_another_name_is_not_included(self, name: str, shape: tuple[int, int], odd: Odd) -> None:
        says = rf"--include {re.escape(name)} fits {re.escape(name)}, which is no linear's weight.* end in \.weight"
        refused(odd({name: drawn(*shape)}), says, include=name)

    def test_nor_is_it_advised(self, odd: Odd) -> None:
        source = odd({"layers.0.mixer.A_log": drawn(128, 32)})
        weights = load_file(source / "model.safetensors")
        save_file({"layers.0.mixer.A_log": weights["layers.0.mixer.A_log"]}, source / "model.safetensors")
        refused(source, r"(?s)A_log: no linear's: its name does not end in \.weight\nnone of them can be")

    def test_experts_without_weight_are_included(self, odd: Odd) -> None:
        source = odd({"layers.0.ffn.mlp_w1": drawn(4, 96, 64)})
        assert bitwright.verify(quantized(source, include="*mlp_w1"), source).linears == 2

    def test_biases_beside_what_is_included_stay(self, odd: Odd) -> None:
        """GPT-2's matrices, stored [in, out], with their biases."""
        source = odd({f"h.0.{name}": drawn(*shape) for name, shape in
                      {"c_fc.weight": (64, 128), "c_fc.bias": (128,)}.items()})  # fmt: skip
        out = Checkpoint.open(quantized(source, include="*c_fc*"))
        assert "h.0.c_fc.weight_packed" in out and "h.0.c_fc.bias" in out


class TestEmpty:
    def test_kept(self, odd: Odd) -> None:
        source = odd({
            "layers.0.experts.gate_up_proj": drawn(0, 64, 64), "layers.0.experts.down_proj": drawn(4, 64, 0),
            "layers.0.q.weight": drawn(0, 64), "layers.0.z.weight": drawn(64, 0),
        })  # fmt: skip
        kinds = {kind.name: kind for kind in bitwright.plan(Recipe(str(source), "W4A16", "rtn")).tensors}
        assert [kind.why for kind in kinds.values() if not kind.quantized] == ["embedding", *["empty"] * 4]
        assert bitwright.verify(quantized(source), source).linears == 1

    @pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 64, 64), (4, 0, 64)])
    def test_not_included(self, shape: tuple[int, ...], odd: Odd) -> None:
        refused(odd({f"{X}.weight": drawn(*shape)}), rf"which is empty: its shape is \[{shape[0]}, ", include=X)

    def test_no_output_layer(self, odd: Odd) -> None:
        source = odd({"lm_head.weight": drawn(0, 64)})
        with pytest.raises(CheckpointError, match=r"lm_head.weight in .* is empty"):
            bitwright.plan(Recipe(str(source), "W4A16", "rtn", quantize_lm_head=True))


EXPERTS = {
    "layers.0.moe.experts.gate_up_proj": drawn(4, 192, 64), "layers.0.moe.experts.down_proj": drawn(4, 64, 96),
    "layers.0.moe.gate.weight": drawn(4, 64), "lm_head.weight": drawn(128, 64),
}  # fmt: skip


class TestOfAnArchitectureThatTransformersDoesNotKnow:
    @pytest.mark.parametrize("beside", [False, True])
    def test_verified_but_not_run(self, beside: bool, odd: Odd) -> None:
        source = odd(EXPERTS)
        found = bitwright.verify(quantized(source), source if beside else None)
        logits = next(check for check in found.checks if check.name == "logits")
        assert logits.found == "not run: transformers does not know the architecture 'oddity'"
        assert found.passed is beside and not found.failed  # alone, nobody can tell whether it is complete
        assert ("weights" in [check.name for check in found.checks]) is beside

    def test_damage_is_found_all_the_same(self, odd: Odd) -> None:
        source = odd(EXPERTS)
        out = quantized(source)
        tensors = load_file(out / "model.safetensors")
        tensors["layers.0.k.weight_packed"] ^= 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        assert not bitwright.verify(out, source).passed

    def test_no_language_model(self, odd: Odd) -> None:
        """A model that transformers knows and that gives no logits of next tokens."""
        out = quantized(odd({}))
        config = json.loads((out / "config.json").read_text()) | {"model_type": "t5"}
        (out / "config.json").write_text(json.dumps(config))
        says = "not run: transformers has no causal language model of 't5'"
        assert bitwright.verify(out).checks[-1].found == says

    def test_inspected_alike_before_and_after(self, odd: Odd) -> None:
        source = odd(EXPERTS)
        before, after = bitwright.inspect(source), bitwright.inspect(quantized(source))
        names = ["layers.0.k", "layers.0.moe.experts.down_proj", "layers.0.moe.experts.gate_up_proj", "lm_head"]
        assert [row.name for row in before.linears] == [row.name for row in after.linears] == names
        assert before.bits_per_weight == 16 and before.linears[2].shape == (4, 192, 64)
        assert before.parameters == after.parameters == 4 * 64 * (192 + 96) + 64 * (4 + 64 + 128 + 128)


def test_experts_in_one_tensor_keep_their_groups(odd: Odd) -> None:
    """Of which one would have them along its output, and the other along its input."""
    stack = drawn(2, 64, 64)
    stack[0, :, 5] *= 50
    stack[1, 5] *= 50
    folder, out = odd({"layers.0.experts.up_proj": stack}), "out"
    recipe = Recipe(str(folder), "W3A16g32", "easyquant", axis="auto", outliers="0")
    result = bitwright.quantize(recipe, folder.with_name(out))
    assert any("1 keep the groups of the scheme, as layers.0.experts.up_proj does" in note for note in result.notes)
    assert load_file(folder.with_name(out) / "model.safetensors")["layers.0.experts.up_proj.weight_scale"].shape == (
        2,
        64,
        2,
    )


@pytest.mark.parametrize("factor", [2.0**90, 2.0**-90])
def test_what_is_lost_of_weights_whose_squares_are_too_much_is_told(odd: Odd, factor: float) -> None:
    folder = odd({f"{X}.weight": drawn(64, 64).float() * factor})
    account = json.loads((quantized(folder) / "bitwright.json").read_text())
    errors = {row["name"]: row["weight_error"] for block in account["blocks"] for row in block["linears"]}
    assert errors[X] == pytest.approx(errors["layers.0.k"], rel=0.5)


def test_convolutions_are_no_experts(odd: Odd) -> None:
    refused(
        odd({"layers.0.conv1d": drawn(64, 1, 4)}), "no stack of experts, each would be a vector", include="*.conv1d"
    )
