"""Llama 1, 2 and 3: RMSNorm, rotary positions, grouped-query attention, gated MLP, tied or untied embeddings."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from bitwright.core.block import Family, LinearGroup, Side, Site, Topology
from bitwright.core.json_values import is_count, is_flag, is_number, is_text, is_token, is_tokens, one_of
from bitwright.core.outline import Outline

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O, DOWN = "self_attn.o_proj", "mlp.down_proj"
NORMS = ("input_layernorm", "post_attention_layernorm")

STATED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""What a configuration has to say to be plain, beside ``max_position_embeddings`` and ``tie_word_embeddings``."""
ROPE = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""Numbers that go with each kind of rotary positions."""


def describe(config: Any) -> Family:
    """The family of a Llama model with this configuration."""
    groups = (
        LinearGroup(QKV, enclosing="self_attn"),
        LinearGroup((O,), enclosing=O),
        LinearGroup(GATE_UP, enclosing="mlp"),
        LinearGroup((DOWN,), enclosing=DOWN),
    )
    return Family(
        model_type="llama",
        blocks="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        attention_class="LlamaAttention",
        topology=Topology(groups, _sites(config)),
    )


def outline(config: Any) -> Outline:
    """Every parameter of a Llama model with this configuration."""
    family, hidden = describe(config), config.hidden_size
    blocks = tuple(f"{family.blocks}.{n}" for n in range(config.num_hidden_layers))
    outside = {f"{name}.weight": (config.vocab_size, hidden) for name in (family.embedding, family.head)}
    inside = {f"{block}.{name}": shape for block in blocks for name, shape in _in_a_block(config).items()}
    return Outline(family, {**outside, **inside, f"{family.final_norm}.weight": (hidden,)}, blocks, _tied(config))


def plain(config: Mapping[str, Any]) -> SimpleNamespace | None:
    """What config.json says, where it says nothing out of the ordinary; None where transformers has to judge it."""
    usual = all(key in _USUAL and _USUAL[key](value) for key, value in config.items())
    if not usual or not {*STATED, "max_position_embeddings", "tie_word_embeddings"} <= config.keys():
        return None
    heads, padding = config["num_attention_heads"], config.get("pad_token_id") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    if config["hidden_size"] % heads or heads % kv_heads or padding >= config["vocab_size"]:
        return None
    width = config.get("head_dim") or config["hidden_size"] // heads
    biases = {"attention_bias": False, "mlp_bias": False}
    return SimpleNamespace(**(biases | dict(config) | {"num_key_value_heads": kv_heads, "head_dim": width}))


def _is_rope(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    kind = value.get("rope_type", value.get("type", "default"))
    numbers = {key: number for key, number in value.items() if key not in ("rope_type", "type")}
    known = isinstance(kind, str) and kind in ROPE and numbers.keys() - {"rope_theta"} == ROPE[kind]
    return known and all(is_number(number) and number > 0 for number in numbers.values())


_USUAL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((*STATED, "max_position_embeddings", "pretraining_tp"), is_count),
    **dict.fromkeys(("head_dim", "num_key_value_heads"), lambda value: value is None or is_count(value)),
    **dict.fromkeys(("attention_dropout", "initializer_range", "rms_norm_eps", "rope_theta"), is_number),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _is_rope),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), is_tokens),
    **dict.fromkeys(("dtype", "torch_dtype"), one_of("float32", "float16", "bfloat16")),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "attention_bias", "mlp_bias"), is_flag),
    **dict.fromkeys(("_name_or_path", "transformers_version"), is_text),
    "architectures": one_of(["LlamaForCausalLM"]),
    "hidden_act": one_of("silu"),
    "model_type": one_of("llama"),
    "pad_token_id": is_token,
}
"""Keys of a configuration that are known, and values that transformers takes without a word."""


def _tied(config: Any) -> bool:
    return bool(config.tie_word_embeddings)


def _width(config: Any) -> int:
    """Features of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _in_a_block(config: Any) -> dict[str, tuple[int, ...]]:
    hidden, mlp, width = config.hidden_size, config.intermediate_size, _width(config)
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    q, k, v = QKV
    attention = {q: (queries, hidden), k: (keys, hidden), v: (keys, hidden), O: (hidden, queries)}
    dense = {**dict.fromkeys(GATE_UP, (mlp, hidden)), DOWN: (hidden, mlp)}
    biased = {**(attention if config.attention_bias else {}), **(dense if config.mlp_bias else {})}
    weights: dict[str, tuple[int, ...]] = {**attention, **dense, **dict.fromkeys(NORMS, (hidden,))}
    return {f"{name}.weight": shape for name, shape in weights.items()} | {
        f"{name}.bias": (rows,) for name, (rows, _) in biased.items()
    }


def _sites(config: Any) -> tuple[Site, ...]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, _width(config)
    return (
        Site("norm->qkv", (Side("input_layernorm"),), tuple(map(Side, QKV)), hidden),
        _query_key(heads, kv_heads, width),
        _value_output(heads, kv_heads, width, shift=bool(config.attention_bias)),
        Site("norm->gate,up", (Side("post_attention_layernorm"),), tuple(map(Side, GATE_UP)), hidden),
        Site("up->down", (Side("mlp.up_proj"),), (Side(DOWN),), mlp, paper=False),
    )


def _query_key(heads: int, kv_heads: int, width: int) -> Site:
    """q.k: rotary embedding turns channels c and c + width/2 of a head together, so they share a scale;
    the query heads of one key head share its scales."""
    half = width // 2
    keys = tuple(h * half + c % half for h in range(kv_heads) for c in range(width))
    queries = tuple((h * kv_heads // heads) * half + c % half for h in range(heads) for c in range(width))
    producers = (Side("self_attn.q_proj", queries), Side("self_attn.k_proj", keys, reciprocal=True))
    return Site("q.k", producers, (), kv_heads * half)


def _value_output(heads: int, kv_heads: int, width: int, shift: bool) -> Site:
    """v->o: every query head of a group reads the same value head. Attention rows sum to 1, so a shift passes."""
    read = tuple((h * kv_heads // heads) * width + c for h in range(heads) for c in range(width))
    return Site("v->o", (Side("self_attn.v_proj"),), (Side(O, read),), kv_heads * width, shift)
