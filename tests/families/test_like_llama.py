"""Mistral, Qwen2 and Qwen3: blocks like Llama's, in transformers' own classes, through methods that need sites."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import save_tokenizer
from tests.families.test_equivalence import apply, scales
from tests.streamed import subject_of
from tests.tiny_models import linears_in
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.core.registry import architecture_of

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "attn_implementation": "sdpa",
}  # fmt: skip
WINDOWED: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
KINDS = ("mistral", "qwen2", "qwen3")


def random_model(kind: str, **changes: Any) -> nn.Module:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            width = parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 5
            parameter.copy_(drawn / width + ("norm" in name))
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model: Any = random_model(request.param, sliding_window=None)
    model.bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_formats_ask_is_what_transformers_has(kind: str) -> None:
    architecture = architecture_of(kind)
    assert architecture is not None and architecture.family is not None
    family = architecture.family({"model_type": kind, **SIZES})
    attention = random_model(kind).get_submodule("model.layers.0.self_attn")
    assert type(attention).__name__ == family.attention_class
    assert family.head_dim == attention.head_dim == SIZES["head_dim"]


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, WINDOWED], ids=["plain", "biased", "windowed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_leaves_the_logits_alone(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model: Any = random_model(kind, **changes)
    model.save_pretrained(tmp_path)
    blocks, double = subject_of(tmp_path).anatomy.blocks, model.double()
    start = deepcopy(double.state_dict())
    before = logits(double)
    for block in blocks:
        assert set(block.topology.linears) == linears_in(double.get_submodule(block.path))
    for number, site in enumerate(blocks[0].topology.sites):
        assert site.name == ("norm->qkv", "q.k", "v->o", "norm->gate,up", "up->down")[number]
        for index, block in enumerate(blocks):
            assert block.topology.sites[number] == site
            shift = torch.linspace(-1, 1, site.channels, dtype=torch.float64) if site.shift else None
            apply(double.get_submodule(block.path), site, scales(site.channels, index), shift)
        assert float((logits(double) - before).abs().max()) < 1e-4 * float(before.abs().max()), site.name
        double.load_state_dict(start)
    keys = blocks[0].topology.sites[1].producers[1].module
    assert keys == ("self_attn.k_norm" if kind == "qwen3" else "self_attn.k_proj"), "a norm of keys undoes their scale"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(torch.arange(40)[None]).logits
    return found


@pytest.mark.parametrize(("method", "scheme", "more"), [
    ("gptq", "W4A16g32sym", {}),
    ("lwc", "W4A16g32sym", {"epochs": 1}),
    ("omniquant", "W4A16g32sym", {"epochs": 1, "sites": "all"}),
    ("smoothquant", "W8A8", {}),
    ("omniquant", "W4A8KV4", {"epochs": 1}),
])  # fmt: skip
def test_methods_that_work_on_whole_blocks(
    method: str, scheme: str, more: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    recipe = bitwright.Recipe(str(folder), scheme, method, None, "builtin", 4, 32, **more)
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert result.linears == 14
    checked = bitwright.verify(tmp_path / "out", folder)
    assert checked.passed, [check for check in checked.checks if not check.passed]
    if scheme.startswith("W4A16"):  # GGUF has no place for activations
        bitwright.export(tmp_path / "out", tmp_path / "out.gguf", format="gguf")
        assert bitwright.verify(tmp_path / "out.gguf", tmp_path / "out").passed
