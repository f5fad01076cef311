"""OPT: LayerNorm, biases and shifts, from a folder to a folder that plain transformers loads."""

from pathlib import Path

import pytest
import torch
from tests.conftest import measured, save_tokenizer
from tests.streamed import subject_of
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import bitwright


def save(folder: Path, **changes: object) -> Path:
    config = OPTConfig(
        vocab_size=256,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.5 if "embed" in name else 0.15)
    model.bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("scheme", ["W2A16g32", "W4A4"])
def test_omniquant_on_opt(tmp_path: Path, text: Path, scheme: str) -> None:
    model = save(tmp_path / "opt")
    divergences = {}
    for method in ("rtn", "omniquant"):
        recipe = bitwright.Recipe(
            model=str(model), scheme=scheme, method=method, calibration=str(text), samples=8, seqlen=48
        )
        result = bitwright.quantize(recipe, tmp_path / method)
        assert result.method == {"rtn": "rtn", "omniquant": "let+lwc"}[method]
        lost = measured(tmp_path / method, text, seqlen=48, reference=model).kl_divergence
        assert lost is not None
        divergences[method] = lost
    assert divergences["omniquant"] < divergences["rtn"]
    original, written = (AutoModelForCausalLM.from_pretrained(f) for f in (model, tmp_path / "omniquant"))
    norm = "model.decoder.layers.0.self_attn_layer_norm.bias"
    assert not torch.equal(original.get_parameter(norm), written.get_parameter(norm))  # a shift was folded in


def test_the_opt_that_normalizes_afterwards(tmp_path: Path) -> None:
    """As opt-350m does: its residual reads what the norms make too, so no scale moves into a norm."""
    model = save(tmp_path / "opt", do_layer_norm_before=False)
    for block in subject_of(model).anatomy.blocks:
        assert [site.name for site in block.topology.sites] == ["q.k", "v->o", "fc1->fc2"]
    recipe = bitwright.Recipe(str(model), "W4A16g32", "awq+gptq", None, "builtin", 4, 32)
    assert bitwright.quantize(recipe, tmp_path / "out").linears == 12
    checked = bitwright.verify(tmp_path / "out", model)
    assert checked.passed, [check for check in checked.checks if not check.passed]


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path) -> None:
    """OPT's MLP sees all tokens as rows of one matrix; their activations still have a scale each."""
    bitwright.quantize(
        bitwright.Recipe(model=str(save(tmp_path / "opt")), scheme="W4A4", method="rtn"), tmp_path / "out"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 16:] = torch.randint(0, 256, (8,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = model(ids).logits, model(other).logits
    torch.testing.assert_close(first[0, :16], second[0, :16])
    assert not torch.equal(first[0, 16:], second[0, 16:])
