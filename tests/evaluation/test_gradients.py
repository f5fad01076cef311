"""A loaded model outside of ``no_grad``: gradients reach the inputs of packed and of dequantized linears, for LoRA."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization.utils import helpers
from torch import nn

import bitwright
from bitwright.core.recipe import Recipe


@pytest.mark.parametrize("format", ["compressed-tensors", "bitwright"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A4"])
def test_gradients_reach_what_is_added_to_a_loaded_model(
    scheme: str, format: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """W4A4 from compressed-tensors ended in an error: its weights were tensors of inference mode."""
    helpers._calculate_range.cache_clear()  # the library keeps tensors, perhaps of the inference mode of another test
    bitwright.quantize(Recipe(str(tiny()), scheme, method="rtn", format=format), tmp_path / "out")
    bitwright.evaluate(tmp_path / "out", "builtin", windows=1, seqlen=16)  # nor does ours leave such tensors
    model = bitwright.load(tmp_path / "out", device="cpu", dtype="float32")
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    inner, outer = (nn.Linear(192, 4, bias=False), nn.Linear(4, 64, bias=False))  # LoRA beside a linear
    linear.register_forward_hook(lambda _, args, output: output + outer(inner(args[0])))
    embedded = model.get_input_embeddings()(torch.arange(16)[None]).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    for parameter in (embedded, inner.weight, outer.weight):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
