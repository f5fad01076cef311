"""Llama 1, 2 and 3: RMSNorm, rotary positions, grouped-query attention, gated MLP, tied or untied embeddings.

Other architectures have the same block with biases or norms besides; their files take ``blocks`` from here.
"""

from dataclasses import replace

from bitwright.core.block import Architecture, Family, LinearGroup, Side, Site, Topology
from bitwright.core.decoder import ATTENTION_NORM, DOWN, GATE_UP, MLP_NORM, QKV, Config, Decoder, O, flag

GROUPS = (
    LinearGroup(QKV, enclosing="self_attn"),
    LinearGroup((O,), enclosing=O),
    LinearGroup(GATE_UP, enclosing="mlp"),
    LinearGroup((DOWN,), enclosing=DOWN),
)


def decoder(config: Config) -> Decoder:
    """Read a Llama's config.json: attention and MLP have biases if it asks for them."""
    attention = flag(config, "attention_bias")
    return replace(Decoder.of(config), qkv_bias=attention, o_bias=attention, mlp_bias=flag(config, "mlp_bias"))


def family(config: Config) -> Family:
    """Describe the blocks of a Llama with this config.json."""
    return blocks("LlamaAttention", decoder(config))


def blocks(attention_class: str, model: Decoder) -> Family:
    """Describe the blocks of a decoder like Llama's; ``attention_class`` is transformers' name of their attention."""
    return Family(attention_class, model.head_dim, Topology(GROUPS, sites(model)))


def sites(model: Decoder) -> tuple[Site, ...]:
    """The sites of a block like Llama's, without q.k if queries and keys are normalized: that undoes a scale."""
    return (
        Site("norm->qkv", (Side(ATTENTION_NORM),), tuple(map(Side, QKV)), model.hidden),
        *(() if model.qk_norm else (query_key(model),)),
        value_output(model),
        Site("norm->gate,up", (Side(MLP_NORM),), tuple(map(Side, GATE_UP)), model.hidden),
        Site("up->down", (Side("mlp.up_proj"),), (Side(DOWN),), model.intermediate, paper=False),
    )


def query_key(model: Decoder) -> Site:
    """The site q.k, between queries and keys.

    Rotary positions mix channels c and c + head_dim/2 of a head, so they share a scale; the query heads of one key head
    share its scales.
    """
    width, half = model.head_dim, model.head_dim // 2
    keys = tuple(h * half + c % half for h in range(model.kv_heads) for c in range(width))
    queries = tuple(_key_head(h, model) * half + c % half for h in range(model.heads) for c in range(width))
    producers = (Side("self_attn.q_proj", queries), Side("self_attn.k_proj", keys, reciprocal=True))
    return Site("q.k", producers, (), model.kv_heads * half)


def value_output(model: Decoder) -> Site:
    """The site v->o, between values and the output projection.

    Every query head of a group reads the same value head. Attention rows sum to 1, so a shift passes if there are
    biases to absorb it.
    """
    width = model.head_dim
    read = tuple(_key_head(h, model) * width + c for h in range(model.heads) for c in range(width))
    shift = model.qkv_bias and model.o_bias
    return Site("v->o", (Side("self_attn.v_proj"),), (Side(O, read),), model.kv_heads * width, shift)


def _key_head(query_head: int, model: Decoder) -> int:
    return query_head * model.kv_heads // model.heads


ARCHITECTURE = Architecture(decoder, family)
