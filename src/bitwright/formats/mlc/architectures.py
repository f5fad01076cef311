"""Which architectures MLC-LLM runs that Bitwright writes, what it calls their tensors, and what it asks of a config.

Names and fields as in mlc-llm of July 2026 (79d603f); llama has been compiled and run, the others are read from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.core.errors import CheckpointError, RecipeError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ELSEWHERE = "bitwright quantize without --format and --engine writes a folder for transformers"
BATCH, CHUNK = 128, 8192
"""What MLC itself writes: sequences at once, and tokens of a prompt at once at most."""


@dataclass(frozen=True)
class Architecture:
    """What is special about one: the name of q, k and v together, whether they may have biases, further norms of the
    attention, whether the output layer may be the embedding, whether rotary scaling of Llama 3 is known."""

    qkv: str = "qkv_proj"
    biased: bool = False
    norms: tuple[str, ...] = ()
    ties: bool = True
    llama3_rope: bool = False
    renamed: bool = False
    """Rotary base under MLC's own name, not ``rope_theta``."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(llama3_rope=True, renamed=True),
    "mistral": Architecture(ties=False, renamed=True),
    "qwen2": Architecture(qkv="c_attn", biased=True),
    "qwen3": Architecture(qkv="c_attn", biased=True, norms=("q_norm", "k_norm")),
}


@dataclass(frozen=True)
class Place:
    """A matrix of MLC's model and the linears it is made of, one below the other; ``bias`` if they have one."""

    name: str
    linears: tuple[str, ...]
    bias: bool = False


def matrices(config: Mapping[str, Any]) -> Iterator[Place]:
    """Every quantized matrix of the decoder blocks, in the order of the model."""
    architecture = ARCHITECTURES[config["model_type"]]
    biased = architecture.biased and bool(config.get("attention_bias", config["model_type"] == "qwen2"))
    for n in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        qkv = tuple(f"{attention}.{one}_proj" for one in "qkv")
        yield Place(f"{attention}.{architecture.qkv}", qkv, biased)
        yield Place(f"{attention}.o_proj", (f"{attention}.o_proj",), biased and config["model_type"] == "qwen3")
        yield Place(f"{mlp}.gate_up_proj", (f"{mlp}.gate_proj", f"{mlp}.up_proj"))
        yield Place(f"{mlp}.down_proj", (f"{mlp}.down_proj",))


def norms(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of the vectors that keep them."""
    for n in range(config["num_hidden_layers"]):
        inside = (f"self_attn.{norm}" for norm in ARCHITECTURES[config["model_type"]].norms)
        for norm in ("input_layernorm", "post_attention_layernorm", *inside):
            yield f"model.layers.{n}.{norm}.weight"
    yield "model.norm.weight"


def check(config: Mapping[str, Any]) -> None:
    """Refuses a model that MLC-LLM has no code for, or whose names there nobody has looked up. Raises RecipeError."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise RecipeError(
            f"format mlc is written for {', '.join(ARCHITECTURES)}, and this is '{kind}', whose names in MLC-LLM "
            "Bitwright does not know; mlc_llm convert_weight takes a folder in --format dense"
        )
    for what, found in _unknown(config):
        raise RecipeError(f"{what} is {found!r}, which MLC-LLM's {kind} does not compute; {ELSEWHERE}")


def _unknown(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that MLC's model would silently compute otherwise."""
    kind, rope = config["model_type"], rope_of(config)
    known = {"default", "llama3"} if ARCHITECTURES[kind].llama3_rope else {"default"}
    if rope.get("rope_type", "default") not in known:
        yield "the type of rotary scaling", rope["rope_type"]
    if config.get("hidden_act", "silu") != "silu":
        yield "hidden_act", config["hidden_act"]
    if kind in ("llama", "mistral") and (config.get("attention_bias") or config.get("mlp_bias")):
        yield "attention_bias or mlp_bias", True
    if config.get("use_sliding_window"):
        yield "use_sliding_window", True
    if kind == "qwen2" and head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        yield "head_dim", head_dim(config)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model_config`` of mlc-chat-config.json."""
    kind = config["model_type"]
    architecture, rope = ARCHITECTURES[kind], rope_of(config)
    window = config.get("sliding_window") if kind == "mistral" else None
    context = -1 if window else _needed(config, "max_position_embeddings")
    same = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    )
    found = {key: _needed(config, key) for key in same} | {
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": head_dim(config),
        "context_window_size": context,
        "prefill_chunk_size": min(size for size in (context, window or -1, CHUNK) if size > 0),
        "tensor_parallel_shards": 1,
        "max_batch_size": BATCH,
    }
    found["position_embedding_base" if architecture.renamed else "rope_theta"] = rope.get("rope_theta", 10000.0)
    if architecture.ties:
        found["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
    if kind == "llama":
        scaled = rope.get("rope_type", "default") != "default"
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None
        found |= {"rope_scaling": scaling, "pipeline_parallel_stages": 1, "disaggregation": False}
    elif kind == "mistral":
        found |= {"sliding_window_size": window or -1, "attention_sink_size": 4}
    else:
        found |= {"hidden_act": "silu", "dtype": "float32"}
        found |= {"attention_bias": bool(config.get("attention_bias"))} if kind == "qwen3" else {}
    return found


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and type of the rotary embedding, wherever this version of transformers has put them."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    if "rope_theta" in config:
        found.setdefault("rope_theta", config["rope_theta"])
    return found


def head_dim(config: Mapping[str, Any]) -> int:
    """Features of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _needed(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"config.json does not say {key}, which MLC-LLM has to know")
    return config[key]
