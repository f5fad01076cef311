"""Llama 1, 2 and 3: RMSNorm, rotary positions, grouped-query attention, gated MLP, tied or untied embeddings."""

from transformers import PretrainedConfig

from bitwright.core.block import Family, LinearGroup, Side, Site, Topology

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O, DOWN = "self_attn.o_proj", "mlp.down_proj"


def describe(config: PretrainedConfig) -> Family:
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


def _sites(config: PretrainedConfig) -> tuple[Site, ...]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or hidden // heads
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
