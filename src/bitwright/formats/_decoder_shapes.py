"""The tensors of a Llama-like decoder and their shapes, from the dimensions of a config.json alone."""

from collections.abc import Iterator, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def outer(config: Mapping[str, Any]) -> Shapes:
    """What lies outside of the blocks."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    return {EMBEDDING: (vocabulary, hidden), HEAD: (vocabulary, hidden), NORM: (hidden,)}


def block(config: Mapping[str, Any], n: int) -> Shapes:
    """The weights of block ``n``: linears [O, I], norms [I]."""
    return {f"model.layers.{n}.{module}.weight": shape for module, shape in _modules(config)}


def biases(config: Mapping[str, Any], n: int) -> Shapes:
    """What biases the linears of block ``n`` can have [O]."""
    linears = ((module, shape) for module, shape in _modules(config) if len(shape) == 2)
    return {f"model.layers.{n}.{module}.bias": shape[:1] for module, shape in linears}


def _modules(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, between, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "input_layernorm", (hidden,)
    yield "self_attn.q_proj", (queries, hidden)
    yield "self_attn.k_proj", (keys, hidden)
    yield "self_attn.v_proj", (keys, hidden)
    yield "self_attn.o_proj", (hidden, queries)
    if config["model_type"] == "qwen3":
        yield "self_attn.q_norm", (head,)
        yield "self_attn.k_norm", (head,)
    yield "post_attention_layernorm", (hidden,)
    yield "mlp.gate_proj", (between, hidden)
    yield "mlp.up_proj", (between, hidden)
    yield "mlp.down_proj", (hidden, between)
