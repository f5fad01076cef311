"""Activations, queries, keys and values as plain transformers quantizes them at run time from what was written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints
from tests.formats.conftest import LINEARS, Case, Quantized, expected, tensors_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import bitwright

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
SCHEMES = {
    "W8A8": (8, 8),
    "W4A4": (4, 4),
    "W4A4KV4": (4, 4),
    "W4A16KV4": (None, 4),
    "W6A6g32sym": (6, 6),
    "W4A8KV4": (8, 4),
    "W4A4KV16": (4, None),
}
LEFT_OUT = ("W4A8KV4", "W4A4KV16")
"""Schemes whose queries no config can say; bitwright.load does."""


def load(folder: Path, plain: bool = False) -> PreTrainedModel:
    """As a user would: by transformers alone, except where the config leaves the queries out."""
    account = folder / "bitwright.json"
    if not plain and account.exists() and json.loads(account.read_text())["scheme"] in LEFT_OUT:
        return bitwright.load(folder, dtype="float32")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model(tokens, use_cache=False).logits
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_later_tokens_change_nothing_before_them(scheme: str, quantized: Quantized) -> None:
    model = load(quantized(scheme, "float32"))
    before, keep = logits(model), 10
    changed = TOKENS.clone()
    changed[:, keep:] = (changed[:, keep:] + 101) % 256
    after = logits(model, changed)
    assert torch.equal(after[:, :keep], before[:, :keep])
    assert not torch.equal(after[:, keep:], before[:, keep:])


@pytest.mark.parametrize("scheme", ["W4A4", "W4A16KV4", *LEFT_OUT])
@torch.inference_mode()
def test_token_by_token_through_the_cache_is_the_same(scheme: str, quantized: Quantized) -> None:
    model = load(quantized(scheme, "float32"))
    cache, found = None, []
    for at in range(TOKENS.shape[1]):
        step = model(TOKENS[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_are_really_quantized(scheme: str, quantized: Quantized) -> None:
    weights_alone = re.sub(r"A\d+(KV\d+)?", "A16", scheme)
    difference = (logits(load(quantized(scheme, "float32"))) - logits(load(quantized(weights_alone, "float32")))).abs()
    assert difference.mean() > 1e-3


def test_keys_and_values_follow_the_activations(quantized: Quantized) -> None:
    assert torch.equal(logits(load(quantized("W4A4", "float32"))), logits(load(quantized("W4A4KV4", "float32"))))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_equal_those_of_a_plain_model_with_rounded_activations(
    scheme: str, tiny: Checkpoints, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain model has the weights that the formula gives, and every linear's input rounded per token; queries, keys
    and values, after the rotary embedding, per token and head. All of it is written here, a second time."""
    activations, cache = SCHEMES[scheme]
    want = logits_of_a_plain_model(scheme, activations, activations, cache, tiny, quantized, monkeypatch)
    torch.testing.assert_close(logits(load(quantized(scheme, "float32"))), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", LEFT_OUT)
def test_what_the_config_leaves_out_are_the_queries_alone(
    scheme: str, tiny: Checkpoints, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers alone does everything else; bitwright.json and the plan say so."""
    activations, cache = SCHEMES[scheme]
    folder = quantized(scheme, "float32")
    want = logits_of_a_plain_model(scheme, activations, None, cache, tiny, quantized, monkeypatch)
    found, whole = logits(load(folder, plain=True)), logits(load(folder))
    # Not element by element: a value halfway between two steps may go either way, and is seen by all that follow.
    assert (found - want).abs().mean() < 0.2 * (whole - want).abs().mean()
    said = f"has no place for queries at {activations} bits"
    assert any(said in note for note in json.loads((folder / "bitwright.json").read_text())["notes"])
    assert any(said in note for note in bitwright.plan(bitwright.Recipe(str(tiny("float32")), scheme)).notes)


def test_evaluate_measures_the_whole_scheme_and_says_who_loaded_it(
    tiny: Checkpoints, quantized: Quantized, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line about nothing much; " * 40)
    whole, parts = (
        bitwright.evaluate(quantized(scheme, "float32"), str(text), seqlen=32, windows=4, reference=tiny("float32"))
        for scheme in ("W4A4KV16", "W4A16")
    )
    assert (whole.loader, parts.loader) == ("bitwright", "transformers")
    assert whole.measurement is not None and parts.measurement is not None
    assert whole.measurement.kl_divergence is not None and parts.measurement.kl_divergence is not None
    assert whole.measurement.kl_divergence > parts.measurement.kl_divergence > 0


def logits_of_a_plain_model(
    scheme: str,
    activations: int | None,
    queries: int | None,
    cache: int | None,
    tiny: Checkpoints,
    quantized: Quantized,
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:
    packed = tensors_of(quantized(scheme, "float32"))
    group = 32 if "g32" in scheme else -1
    case = Case(scheme, "float32", bits=int(scheme[1]), symmetric=scheme.endswith("sym"), group=group)
    plain = load(tiny("float32"))
    for name in LINEARS:
        linear = plain.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = expected(linear.weight.data, case, packed[f"{name}.weight_scale"])
        if activations is not None:
            linear.register_forward_pre_hook(lambda _, args: (rounded(args[0], activations),))
    with monkeypatch.context() as patched:
        patched.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention(queries, cache))
        return logits(plain)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Each vector of the last dimension on 2**bits - 1 steps, from its smallest to its largest element and zero."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    steps = int(2**bits) - 1
    h = (high - low) / steps
    z = -(low / h).round()
    return ((x / h).round() + z).clamp(0, steps).sub(z) * h


def attention(queries: int | None, cache: int | None) -> Callable[..., Any]:
    """transformers' own attention, on rounded queries, keys and values."""
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def with_rounding(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        q = q if queries is None else rounded(q, queries)
        k, v = (k, v) if cache is None else (rounded(k, cache), rounded(v, cache))
        return original(module, q, k, v, *args, **kwargs)

    return with_rounding
