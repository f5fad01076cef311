"""MLC-LLM's architectures that Bitwright writes: their names of tensors, and their settings.

Names and fields as in mlc-llm of July 2026 (79d603f); llama has been compiled and run, the others are read from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.core.decoder import (
    DOWN,
    FINAL_NORM,
    GATE_UP,
    QK_NORMS,
    QKV,
    Config,
    Decoder,
    O,
    OddConfigError,
    decoder_of,
)
from bitwright.core.errors import CheckpointError, RecipeError

ELSEWHERE = "bitwright quantize without --format and --engine writes a folder for transformers"
BATCH, CHUNK = 128, 8192
"""The numbers that MLC itself writes: sequences at once, and the most tokens of a prompt at once."""


@dataclass(frozen=True)
class Architecture:
    """The ways in which one of MLC's models differs from the others.

    ``qkv`` is its name of q, k and v together, ``base`` that of the rotary base. ``biased``: its attention may have
    biases. ``ties``: its output layer may be the embedding. ``windowed``: its attention may have a window.
    ``rope_types`` are the kinds of rotary scaling that it computes.
    """

    qkv: str = "qkv_proj"
    base: str = "rope_theta"
    biased: bool = False
    ties: bool = True
    windowed: bool = False
    rope_types: tuple[str, ...] = ("default",)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(base="position_embedding_base", rope_types=("default", "llama3")),
    "mistral": Architecture(base="position_embedding_base", ties=False, windowed=True),
    "qwen2": Architecture(qkv="c_attn", biased=True),
    "qwen3": Architecture(qkv="c_attn", biased=True),
}
"""MLC's models by the ``model_type`` of config.json."""


@dataclass(frozen=True)
class Place:
    """A matrix of MLC's model and the linears it is made of, one below the other; ``bias`` if they have one."""

    name: str
    linears: tuple[str, ...]
    bias: bool = False


def architecture(decoder: Decoder) -> Architecture:
    """MLC's model of a decoder."""
    return ARCHITECTURES[decoder.model_type]


def shares_embedding(decoder: Decoder) -> bool:
    """Whether the output layer is the embedding in MLC's model too, so that nothing is stored for it."""
    return decoder.tied and architecture(decoder).ties


def matrices(decoder: Decoder) -> Iterator[Place]:
    """Yield every matrix of the decoder blocks, in the order of MLC's model."""
    attention, mlp = (linear.rpartition(".")[0] for linear in (O, DOWN))
    for block in decoder.block_names:
        qkv, gate_up = (tuple(f"{block}.{linear}" for linear in linears) for linears in (QKV, GATE_UP))
        yield Place(f"{block}.{attention}.{architecture(decoder).qkv}", qkv, decoder.qkv_bias)
        yield Place(f"{block}.{O}", (f"{block}.{O}",), decoder.o_bias)
        yield Place(f"{block}.{mlp}.gate_up_proj", gate_up)
        yield Place(f"{block}.{DOWN}", (f"{block}.{DOWN}",))


def norms(decoder: Decoder) -> list[str]:
    """The names of the norms' weights, those within the attention of a block last."""
    tensors = ((name, len(shape)) for name, shape in decoder.block.items() if name.endswith(".weight"))
    within = {f"{norm}.weight" for norm in QK_NORMS}
    inside = sorted((name for name, dimensions in tensors if dimensions == 1), key=lambda name: name in within)
    return [*(f"{block}.{name}" for block in decoder.block_names for name in inside), f"{FINAL_NORM}.weight"]


def checked(config: Config) -> Decoder:
    """Read a config.json.

    Raises RecipeError for a model that MLC-LLM has no code for, whose names there nobody has looked up, or that it
    would compute in another way; CheckpointError if config.json leaves something out.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise RecipeError(
            f"format mlc is written for {', '.join(ARCHITECTURES)}, and this is '{kind}', whose names in MLC-LLM "
            "Bitwright does not know; mlc_llm convert_weight takes a folder in --format dense"
        )
    try:
        decoder = decoder_of(config)
    except OddConfigError as error:
        raise _not_said(error.key, error.value) from None
    for what, value in _unknown(decoder):
        raise RecipeError(f"{what} is {value!r}, which MLC-LLM's {kind} does not compute; {ELSEWHERE}")
    if decoder.context is None:
        raise _not_said("max_position_embeddings", None)
    return decoder


def _not_said(key: str, value: Any) -> CheckpointError:
    what = f"does not say {key}" if value is None else f"says {value!r} for {key}"
    return CheckpointError(f"config.json {what}, which MLC-LLM has to know")


def _unknown(decoder: Decoder) -> Iterator[tuple[str, Any]]:
    """Yield the settings that MLC's model would silently compute in another way, with their values."""
    ours = architecture(decoder)
    if decoder.rope.kind not in ours.rope_types:
        yield "the type of rotary scaling", decoder.rope.kind
    if decoder.rope.partial != 1:
        yield "partial_rotary_factor", decoder.rope.partial
    if decoder.activation != "silu":
        yield "hidden_act", decoder.activation
    if not ours.biased and (decoder.qkv_bias or decoder.o_bias or decoder.mlp_bias):
        yield "attention_bias or mlp_bias", True
    if not ours.windowed and decoder.window is not None:
        yield "use_sliding_window", True
    if decoder.model_type == "qwen2" and decoder.head_dim * decoder.heads != decoder.hidden:
        yield "head_dim", decoder.head_dim


def model_config(decoder: Decoder) -> dict[str, Any]:
    """Build the ``model_config`` of mlc-chat-config.json."""
    ours, kind, window, rope = architecture(decoder), decoder.model_type, decoder.window, decoder.rope
    context = -1 if window else decoder.context or -1
    settings: dict[str, Any] = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.blocks,
        "rms_norm_eps": decoder.epsilon,
        "vocab_size": decoder.vocabulary,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "context_window_size": context,
        "prefill_chunk_size": min(size for size in (context, window or -1, CHUNK) if size > 0),
        "tensor_parallel_shards": 1,
        "max_batch_size": BATCH,
        ours.base: rope.theta,
    }
    if ours.ties:
        settings["tie_word_embeddings"] = decoder.tied
    if kind == "llama":
        scaling = None if rope.kind == "default" else dict(rope.scaling)
        settings |= {"rope_scaling": scaling, "pipeline_parallel_stages": 1, "disaggregation": False}
    elif kind == "mistral":
        settings |= {"sliding_window_size": window or -1, "attention_sink_size": 4}
    else:
        settings |= {"hidden_act": "silu", "dtype": "float32"}
        settings |= {"attention_bias": decoder.qkv_bias} if kind == "qwen3" else {}
    return settings
