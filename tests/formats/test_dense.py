import pytest
import torch
from tests.conftest import Checkpoints
from transformers import AutoConfig

from bitwright.core.decisions import LinearDecision
from bitwright.core.grid import Grid, Tile
from bitwright.core.quantized import WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.families import llama
from bitwright.formats import dense
from bitwright.steps.apply import quantize_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [Tile(1, 4), Tile(2, 1)], ids=str)
def test_what_the_codes_stand_for_and_outliers_too(tile: Tile, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = quantize_linear(weight, LinearDecision(tile=tile, outliers=weight > 1), Scheme(Grid.integers(3)), dtype)
    tensors = dense.encode("a.b", q)
    assert set(tensors) == {"a.b.weight"}
    written = tensors["a.b.weight"]
    assert written.dtype == dtype
    assert torch.equal(written, q.dequantize())
    assert torch.equal(written[weight > 1], weight[weight > 1])
    assert torch.equal(dense.decode(tensors, "a.b", Grid.integers(3)), written)
    assert dense.stored_bytes((6, 8), Scheme(Grid.integers(3)), dtype) == written.numel() * written.element_size()


def test_slices_are_one_tensor_under_its_own_name() -> None:
    weights = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    slices = [quantize_linear(w, LinearDecision(), Scheme(Grid.integers(3)), torch.float32) for w in weights]
    tensors = dense.encode_stacked("a.output.weight", slices)
    assert set(tensors) == {"a.output.weight"}
    assert torch.equal(tensors["a.output.weight"][1], slices[1].dequantize())
    assert torch.equal(dense.decode_stacked(tensors, "a.output.weight", Grid.integers(3)), tensors["a.output.weight"])
    assert dense.stored_bytes((3, 6, 8), Scheme(Grid.integers(3)), torch.float32) == 3 * 6 * 8 * 4


def test_it_is_an_ordinary_model(tiny: Checkpoints) -> None:
    family = llama.family(AutoConfig.from_pretrained(tiny()).to_dict())
    written = WrittenModel(Scheme.parse("W4A16"), family, torch.bfloat16)
    assert dense.quantization_config(written) is None
