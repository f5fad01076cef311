"""Mistral, Qwen2 and Qwen3: blocks like Llama's, in transformers' own classes, through methods that need sites."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import save_tokenizer
from tests.families.test_equivalence import apply, scales
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.core.block import Family
from bitwright.core.registry import architecture_of

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "attn_implementation": "sdpa",
}  # fmt: skip
WINDOWED: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
KINDS = ("mistral", "qwen2", "qwen3")


def family_of(kind: str, config: dict[str, Any]) -> Family:
    architecture = architecture_of(kind)
    assert architecture is not None and architecture.family is not None
    return architecture.family(config)


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
def test_the_places_are_those_of_transformers(kind: str) -> None:
    model = random_model(kind)
    family = family_of(kind, {"model_type": kind, **SIZES})
    block = model.get_submodule(f"{family.blocks}.0")
    assert type(block.get_submodule("self_attn")).__name__ == family.attention_class
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert set(family.topology.linears) == linears and family.head_dim == SIZES["head_dim"]
    for group in family.topology.groups:
        block.get_submodule(group.enclosing)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, WINDOWED], ids=["plain", "biased", "windowed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_leaves_the_logits_alone(kind: str, changes: dict[str, Any]) -> None:
    family = family_of(kind, {"model_type": kind, **SIZES, **changes})
    names = [site.name for site in family.topology.sites]
    between = () if kind == "qwen3" else ("q.k",)
    assert names == ["norm->qkv", *between, "v->o", "norm->gate,up", "up->down"]
    for site in family.topology.sites:
        model = random_model(kind, **changes).double()
        before = logits(model)
        for index in range(SIZES["num_hidden_layers"]):
            block = model.get_submodule(f"{family.blocks}.{index}")
            shift = torch.linspace(-1, 1, site.channels, dtype=torch.float64) if site.shift else None
            apply(block, site, scales(site.channels, index), shift)
        assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max()), site.name


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
