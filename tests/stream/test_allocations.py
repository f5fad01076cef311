"""A scheme for every linear, with every method that is registered, on a tiny Llama and a tiny OPT.

Read from the written folder: each linear is what the allocation says, and the original's function is kept by all that
is not rounded.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, loaded, save_tokenizer
from transformers import OPTConfig, OPTForCausalLM

import bitwright
from bitwright.core.block import Block, Side, Site, Topology
from bitwright.core.decisions import Decision
from bitwright.core.method import Learned, Method
from bitwright.core.recipe import Recipe
from bitwright.core.registry import names
from bitwright.formats import QuantizedFolder
from bitwright.methods import compose
from bitwright.steps.apply import Folded, fold
from bitwright.steps.migration import equalized, of_weights

MODELS = ("llama", "opt")
METHODS = names("methods")
TRANSFORMS = [name for name in METHODS if Decision.TRANSFORM in compose(name).methods[name].decides]
DEFAULT = "W4A16g16"
MIXED = {"v_proj": "W8A16g32", "q_proj": "W3A16g16", "down_proj": "W8A16g32", "fc2": "W3A16g16"}
"""Linears that share an input at 3 and 8 bits, beside one in full precision, and both ends of sites between linears."""
LINEARS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}

Models = Callable[[str], Path]
Run = Callable[..., tuple[QuantizedFolder, Folded]]


@pytest.fixture(scope="module")
def models(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``models("opt")``: a model of one block in float32, with weights that make channels differ."""
    folder = tmp_path_factory.mktemp("opt") / "model"
    config = OPTConfig(
        vocab_size=256, hidden_size=64, ffn_dim=96, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return {"opt": folder, "llama": tiny("float32", num_hidden_layers=1)}.__getitem__


@pytest.fixture
def run(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("opt", "awq", exclude="*.fc1")``: the written folder, and the block before anything was rounded."""
    folded = list[Folded]()

    def kept(*args: Any) -> Folded:
        folded.append(fold(*args))
        return folded[-1]

    monkeypatch.setattr("bitwright.stream.blocks.fold", kept)

    def quantized(model: str, method: str, scheme: str = DEFAULT, **how: Any) -> tuple[QuantizedFolder, Folded]:
        out = tmp_path / f"{len(folded)}"
        recipe = Recipe(str(models(model)), scheme, method, "bitwright", "builtin", 2, 24, **how, **settings_of(method))
        bitwright.quantize(recipe, out)
        return QuantizedFolder.open(out), folded[-1]

    return quantized


def registered(name: str) -> Method:
    return compose(name).methods[name]


def settings_of(name: str) -> dict[str, Any]:
    """All sites; one epoch."""
    method = registered(name)
    sites = {"sites": "all"} if "sites" in method.declared() else {}
    return sites | ({"epochs": 1} if isinstance(method, Learned) else {})


def require_the_function(original: Path, written: QuantizedFolder, folded: Folded) -> None:
    """Require the original's logits of the written folder, its quantized linears as they were before the rounding."""
    before, after = (loaded(original, torch.float64) for _ in range(2))
    with torch.no_grad():
        for name in written.passed:
            after.get_parameter(name).copy_(written.tensor(name))
        for name in written.linears:
            full = next(full for short, full in folded.full.items() if f"{name}.weight".endswith(f".{short}"))
            after.get_parameter(f"{name}.weight").copy_(full)
        tokens = torch.arange(20)[None] * 11 % 256
        torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_each_linear_has_what_the_allocation_says(method: str, model: str, models: Models, run: Run) -> None:
    mixed = {f"*.{leaf}": scheme for leaf, scheme in MIXED.items() if leaf in LINEARS[model]}
    written, folded = run(model, method, scheme_for=mixed, exclude="*.k_proj")
    assert {name.rpartition(".")[2] for name in written.linears} == {*LINEARS[model]} - {"k_proj"}
    rows = {row.name: row for row in bitwright.inspect(written.folder).linears}
    for linear in written.linears:
        scheme, weight = MIXED.get(linear.rpartition(".")[2], DEFAULT), written.read(linear)
        assert weight.grid.bits == int(scheme[1]), linear
        assert max(weight.tile.size(weight.shape)) == int(scheme.rpartition("g")[2]), linear
        assert rows[linear].bits_per_weight > weight.grid.bits
    require_the_function(models(model), written, folded)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_one_linear_alone(method: str, model: str, models: Models, run: Run) -> None:
    """Sites that only linears in full precision read are left alone, those in front of the one linear are exact."""
    one = LINEARS[model][3]
    written, folded = run(model, method, exclude=[f"*.{leaf}" for leaf in LINEARS[model] if leaf != one])
    assert [name.rpartition(".")[2] for name in written.linears] == [one]
    original = loaded(models(model))
    moved = {n for n in written.passed if not torch.equal(original.get_parameter(n), written.tensor(n))}
    ends = ("v_proj.weight", "v_proj.bias", f"{one}.bias") if method in TRANSFORMS else ()
    assert all(name.endswith(ends) for name in moved), moved
    require_the_function(models(model), written, folded)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", TRANSFORMS)
def test_neighbours_in_full_precision_are_transformed_too(method: str, model: str, models: Models, run: Run) -> None:
    written, folded = run(model, method, exclude=f"*.q_proj,*.k_proj,*.{LINEARS[model][4]}")
    require_the_function(models(model), written, folded)
    if method not in ("equalize", "let"):  # which may find that nothing is to be gained
        assert folded.transformed


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_one_scheme_for_all_however_it_is_said(method: str, model: str, run: Run) -> None:
    plain, _ = run(model, method, "W3A16g32")
    patterns, _ = run(model, method, "W8A16g16", scheme_for="*=W3A16g32")
    files = ("model.safetensors", "config.json", "allocation.json")
    assert all((plain.folder / name).read_bytes() == (patterns.folder / name).read_bytes() for name in files)


Q, K, V, O = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"


def site_of(topology: Topology, name: str) -> Site:
    return next(site for site in topology.sites if site.name == name)


def test_a_topology_of_some_linears(block: Block) -> None:
    only = block.topology.only((Q, "mlp.up_proj"))
    assert [site.name for site in only.sites] == ["norm->qkv", "q.k", "norm->gate,up"]
    site = site_of(only, "norm->qkv")
    assert site.consumers == (Side(Q),) and site.in_full == (Side(K), Side(V))
    assert set(site.readers) == {Side(Q), Side(K), Side(V)}
    assert [s.name for s in block.topology.only((O,)).sites] == ["v->o"]
    assert [s.name for s in block.topology.only((O,), attention=True).sites] == ["q.k", "v->o"]
    assert block.topology.only(block.topology.linears) == block.topology


@torch.no_grad()
def test_weights_in_full_precision_have_no_say(block: Block) -> None:
    some = block.topology.only((Q, K))
    changed = replace(block, topology=some)
    site = site_of(some, "norm->qkv")
    before = of_weights(site, changed), equalized(site, changed, 4.0)
    value = block.weight(V).clone()
    block.weight(V)[:, :5] *= 1000
    assert torch.equal(of_weights(site, changed), before[0])
    assert torch.equal(equalized(site, changed, 4.0), before[1])
    whole = site_of(block.topology, "norm->qkv")
    assert not torch.equal(of_weights(whole, block), before[0]), "if it is quantized it has"
    block.weight(V).copy_(value)
