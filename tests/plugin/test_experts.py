"""Mixture-of-experts models in the bitwright format: one linear per expert on disk, and weights fused over experts."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import loaded
from tests.plugin.experts import MODELS, Folders, quantized
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

import bitwright
from bitwright.core.errors import CheckpointError
from bitwright.kernels.reference import PackedLinear
from bitwright.plugin.dense_loading import FromPacked
from bitwright.plugin.quantizer import BitwrightQuantizer

TOKENS = torch.arange(0, 250, 5)[None]


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(TOKENS).logits
    assert found.isfinite().all()
    return found


def packed(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("outliers", [False, True], ids=["", "outliers"])
@pytest.mark.parametrize("scheme", ["W3A16g32", "W4A16g32sym"])
@pytest.mark.parametrize("model", MODELS)
def test_it_computes_what_the_dense_model_does(model: str, scheme: str, outliers: bool, tmp_path: Path) -> None:
    folders = quantized(model, scheme, outliers, tmp_path)
    assert outliers == any("outlier" in name for name in folders.tensors)
    found, plain = loaded(folders.packed), loaded(folders.dense)
    state, want = found.state_dict(), plain.state_dict()
    shared = state.keys() & want.keys()
    assert all(torch.equal(state[name], want[name]) for name in shared), "experts, norms, embeddings: bit for bit"
    assert {name.removesuffix(".weight") for name in want.keys() - shared} == {*packed(found)}
    assert sum("experts" in name and want[name].dim() == 3 for name in shared) == 4, "two in each of two layers"
    assert len(packed(found)) == {"Llama4": 14}.get(model, 8), "linears stay packed, shared experts too"
    assert torch.equal(logits(found), logits(plain)), "bit for bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("model", ["Qwen3Moe", "GraniteMoe"])
def test_weights_are_computed_in_the_dtype_of_the_folder(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folders = quantized(model, "W3A16g32", True, tmp_path, torch.bfloat16)
    state, want = loaded(folders.packed, dtype).state_dict(), loaded(folders.dense, dtype).state_dict()
    experts = [name for name in state if "experts" in name]
    assert len(experts) == 4
    assert all(state[name].dtype == dtype and torch.equal(state[name], want[name]) for name in experts)


def test_experts_are_in_order_where_there_are_more_than_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "Qwen3Moe", MODELS["Qwen3Moe"] | {"num_experts": 12})
    folders = quantized("Qwen3Moe", "W2A16g32", True, tmp_path)
    assert torch.equal(logits(bitwright.load(folders.packed, dtype="float32")), logits(loaded(folders.dense)))


W3 = "model.layers.1.block_sparse_moe.experts.2.w3"
W1 = "model.layers.0.block_sparse_moe.experts.3.w1"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
GRANITE = "model.layers.1.block_sparse_moe.input_linear"


def test_an_expert_that_was_not_quantized(tmp_path: Path) -> None:
    folders = quantized("Mixtral", "W3A16g32", True, tmp_path)
    (weight,) = folders.weights[f"{W3}.weight"]

    def leave(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(W3)]:
            del tensors[name]
        tensors[f"{W3}.weight"] = weight.dequantize()
        del config["exceptions"][W3]
        config["modules_to_not_convert"].append(W3)

    folders.change(leave)
    assert torch.equal(logits(loaded(folders.packed)), logits(loaded(folders.dense)))


@pytest.mark.parametrize("model", ["Qwen3Moe", "GptOss"])
def test_experts_that_are_not_quantized_at_all(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.plugin.experts.LINEAR", re.compile(r"self_attn.*_proj\.weight$"))
    folders = quantized(model, "W3A16g32", True, tmp_path)
    assert not any("experts" in name for name in folders.config["exceptions"])
    found = loaded(folders.packed)
    assert len(packed(found)) == 8 and torch.equal(logits(found), logits(loaded(folders.dense)))


def test_a_linear_that_the_model_calls_otherwise_stays_packed(tmp_path: Path) -> None:
    folders = quantized("GPTNeoX", "W4A16g32", True, tmp_path)
    assert "embed_out.weight_packed" in folders.tensors
    found = loaded(folders.packed)
    assert "lm_head" in packed(found) and len(packed(found)) == 9
    assert torch.equal(logits(found), logits(loaded(folders.dense)))


def test_a_router_that_is_no_common_linear_is_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed on disk, it keeps the forward pass of its own."""
    monkeypatch.setattr("tests.plugin.experts.LINEAR", re.compile(r"(_proj|router)(\.weight)?$"))
    folders = quantized("Llama4", "W4A16g32", False, tmp_path)
    assert "model.layers.0.feed_forward.router.weight_packed" in folders.tensors
    found = loaded(folders.packed)
    assert not any("router" in name for name in packed(found))
    assert torch.equal(logits(found), logits(loaded(folders.dense)))


@pytest.mark.parametrize("model", ["Mixtral", "GptOss"])
def test_inspect_counts_all_that_is_stored(model: str, tmp_path: Path) -> None:
    folders = quantized(model, "W3A16g32", True, tmp_path)
    rows = {row.name: row for row in bitwright.inspect(folders.packed).linears if row.dtype == "packed"}
    assert rows.keys() == {name.removesuffix(".weight") for name in folders.weights}
    for name, slices in folders.weights.items():
        row, size = rows[name.removesuffix(".weight")], slices[0].codes.numel() * len(slices)
        counts = 64 * len(slices) if len(slices) > 1 else 0
        assert row.bits_per_weight * size == pytest.approx(sum(q.storage_bits for q in slices) + counts)
        assert row.shape[-2:] == slices[0].shape and row.tile == slices[0].tile.size(slices[0].shape)


def test_a_model_with_experts_is_not_saved_again(tmp_path: Path) -> None:
    model = loaded(quantized("Mixtral", "W3A16g32", False, tmp_path).packed)
    with pytest.raises(ValueError, match="bitwright and is not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_what_a_quantizer_did_not_get_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that never asks, and one that does not take our word: no random weights."""
    folder = quantized("GraniteMoe", "W3A16g32", False, tmp_path).packed
    with monkeypatch.context() as patched:
        patched.delattr(HfQuantizer, "update_weight_conversions")
        with pytest.raises(CheckpointError, match=r"does not load model\.layers\.0\.block_sparse_moe\.input_linear"):
            loaded(folder)
    real = BitwrightQuantizer.update_weight_conversions
    with monkeypatch.context() as patched:
        patched.setattr(BitwrightQuantizer, "update_weight_conversions", lambda self, ours, model=None: ours)
        with pytest.raises(CheckpointError, match="does not load anything for the bitwright format; update"):
            loaded(folder)
        patched.setattr(BitwrightQuantizer, "update_weight_conversions", lambda *given: real(*given)[1:])
        with pytest.raises(CheckpointError, match=r"does not load model\.layers\.0\..*down_proj for the"):
            loaded(folder)


def test_experts_that_come_in_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors do that are loaded for one of several devices."""
    folder, real = quantized("GptOss", "W3A16g32", False, tmp_path).packed, FromPacked.materialize_tensors

    def cut(self: FromPacked) -> dict[str, list[Tensor]]:
        return {name: [tensors[0][:2]] for name, tensors in real(self).items()}

    monkeypatch.setattr(FromPacked, "materialize_tensors", cut)
    with pytest.raises(CheckpointError, match=r"came as \[2, .*load the model without tensor or expert parallelism"):
        loaded(folder)


def test_without_the_hook_a_model_without_experts_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = quantized("Llama", "W4A16g32", True, tmp_path)
    monkeypatch.delattr(HfQuantizer, "update_weight_conversions")
    assert torch.equal(logits(loaded(folders.packed)), logits(loaded(folders.dense)))


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def without(*names: str) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def dropped(start: str) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        without(*(name for name in tensors if name.startswith(start)))(tensors, config)
        for name in [name for name in config["exceptions"] if name.startswith(start)]:
            del config["exceptions"][name]

    return change


def changed(name: str, to: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[name] = to(tensors[name]).contiguous()

    return change


def excepted(name: str, **said: Any) -> Change:
    return lambda tensors, config: config["exceptions"][name].update(said)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


ACTIVATIONS = {"bits": 8, "symmetric": False}
DAMAGE: dict[str, tuple[str, Change, str]] = {
    "no codes": ("Mixtral", without(f"{W1}.weight_packed"), f"names {W1}, which is no linear of this model, nor in"),
    "no scales": ("Mixtral", without(f"{W1}.weight_scale"), f"no tensor {W1}.weight_scale"),
    "no zero points": ("Mixtral", without(f"{W1}.weight_zero_point"), f"no tensor {W1}.weight_zero_point"),
    "no outliers": ("Mixtral", without(f"{W1}.outlier_value"), f"no tensor {W1}.outlier_value"),
    "no expert": ("Mixtral", dropped(W1), r"experts.gate_up_proj do not go together: .* size"),
    "one expert less": ("Mixtral", dropped("model.layers.0.block_sparse_moe.experts.3."), r"make \[3, 192, 64\], and"),
    "none at all": ("Mixtral", dropped("model.layers.0.block_sparse_moe.experts."), "no weights for model.layers.0."),
    "no norm": ("Mixtral", without("model.norm.weight"), "no weights for model.norm.weight"),
    "a shape that lies": ("Mixtral", changed(f"{W1}.weight_shape", filled(32)), r"calls for int32 \[32, 3\]"),
    "a shape of nothing": ("Mixtral", changed(f"{W1}.weight_shape", filled(-1)), r"weight_shape says \[-1, -1\]"),
    "another expert's": ("Mixtral", changed(f"{W1}.weight_packed", lambda t: t[:64]), r"is int32 \[64, 6\], and"),
    "scales that are none": ("Mixtral", changed(f"{W1}.weight_scale", lambda t: t / 0), "scale holds NaN or infinity"),
    "other scales": ("Mixtral", changed(f"{W1}.weight_scale", lambda t: t.half()), "weight_scale is float16"),
    "outliers outside": ("Mixtral", changed(f"{W1}.outlier_index", lambda t: t + 6144), f"{W1}: outliers outside"),
    "outliers that are none": ("Mixtral", changed(f"{W1}.outlier_value", filled(torch.nan)), "or no numbers"),
    "fewer outliers": ("Mixtral", excepted(W1, outliers=1), r"calls for int32 \[1\]"),
    "another tile": ("Mixtral", excepted(W1, tile=[1, 32]), r"weight_scale is float32 \[3, 64\], and .* \[96, 2\]"),
    "a tile that does not divide": ("Mixtral", excepted(W1, tile=[7, 1]), "do not divide into groups of 7"),
    "activations": ("Mixtral", lambda t, config: config.update(activations=ACTIVATIONS), "again with A16"),
    "fused, no counts": ("GptOss", without(f"{FUSED}.outlier_count"), f"no tensor {FUSED}.outlier_count"),
    "fused, other counts": ("GptOss", changed(f"{FUSED}.outlier_count", lambda t: t + 1), "is not the number of its"),
    "fused, below zero": ("GptOss", changed(f"{FUSED}.outlier_count", lambda t: t - t.max()), "is not the number of"),
    "fused, moved": ("GptOss", changed(f"{FUSED}.outlier_count", lambda t: t.roll(1)), "outside the weight, out of"),
    "fused, outside": ("GptOss", changed(f"{FUSED}.outlier_index", lambda t: t + 12288), f"{FUSED}: outliers outside"),
    "fused, scales": ("GptOss", changed(f"{FUSED}.weight_scale", lambda t: t * torch.nan), "weight_scale holds NaN"),
    "fused, a slice less": ("GptOss", changed(f"{FUSED}.weight_packed", lambda t: t[1:]), r"is int32 \[3, 64, 18\], a"),
    "fused, flat": ("GptOss", changed(f"{FUSED}.weight_shape", lambda t: t[1:]), r"is int64 \[2\], .* int64 \[3\]"),
    "fused, renamed": ("GraniteMoe", without(f"{GRANITE}.weight_zero_point"), f"no tensor {GRANITE}.weight_zero_point"),
    "fused, gone": ("GraniteMoe", dropped(GRANITE), "no weights for model.layers.1.block_sparse_moe.experts"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folders]:
    """Folders with experts, to be damaged in copies."""
    made = {model: tmp_path_factory.mktemp(model) for model in ("Mixtral", "GptOss", "GraniteMoe")}
    return {model: quantized(model, "W3A16g32", True, folder) for model, folder in made.items()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(damage: str, whole: dict[str, Folders], tmp_path: Path) -> None:
    model, change, says = DAMAGE[damage]
    folders = replace(whole[model], packed=Path(shutil.copytree(whole[model].packed, tmp_path / "out")))
    folders.change(change)
    with pytest.raises(CheckpointError, match=says):
        loaded(folders.packed)
