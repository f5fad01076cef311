"""A decoder like Llama's by the numbers of its config.json: names and shapes of its tensors, stated once for everybody.

Such a decoder has RMSNorms, rotary positions, grouped-query attention and a gated MLP. A file in ``families/`` reads
the config.json of its models and says which biases and norms they have besides; formats, engines' files and the plan
ask ``decoder_of``. Names are transformers'. Shapes are [O, I] for a linear, [O] for a bias, [I] for a norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitwright.core.errors import CheckpointError
from bitwright.core.registry import architecture_of

Config = Mapping[str, Any]
"""The contents of a config.json."""
Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name, in the order in which the model uses them."""

BLOCKS, EMBEDDING, FINAL_NORM, HEAD = "model.layers", "model.embed_tokens", "model.norm", "lm_head"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O, DOWN = "self_attn.o_proj", "mlp.down_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"

THETA, EPSILON = 10000.0, 1e-6
"""What transformers takes if config.json leaves out the rotary base or the norms' epsilon."""


class OddConfigError(CheckpointError):
    """A config.json without a number that the decoder has to have, or with something else in its place."""

    def __init__(self, key: str, value: Any) -> None:
        super().__init__(f"config.json says {value!r} for {key}; compare it with the original repository's")
        self.key, self.value = key, value


@dataclass(frozen=True)
class Rope:
    """Rotary positions. ``theta`` is the base of the frequencies, ``partial`` the share of each head that is rotated.

    ``scaling`` is config.json's rope_parameters or rope_scaling without the base; ``original_context`` the number of
    tokens before the context was stretched, None if it was not.
    """

    theta: float = THETA
    partial: float = 1.0
    scaling: Config = field(default_factory=dict)
    original_context: int | None = None

    @property
    def kind(self) -> str:
        """How the frequencies are scaled: "default" if they are not."""
        return str(self.scaling.get("rope_type") or "default")

    @classmethod
    def of(cls, config: Config) -> "Rope":
        """Read rotary positions wherever a version of transformers has put them. Raises OddConfigError."""
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        stated = config.get(key) or {}
        if not isinstance(stated, Mapping):
            raise OddConfigError(key, stated)
        scaling = dict(stated)
        if "type" in scaling:
            scaling.setdefault("rope_type", scaling.pop("type"))
        theta, partial = scaling.pop("rope_theta", None), scaling.get("partial_rotary_factor")
        original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        return cls(
            theta=theta or config.get("rope_theta") or THETA,
            partial=config.get("partial_rotary_factor", 1.0) if partial is None else partial,
            scaling=scaling,
            original_context=original,
        )


@dataclass(frozen=True)
class Decoder:
    """The dimensions of a decoder like Llama's, and what else config.json says of how it computes.

    ``hidden``, ``intermediate`` and ``head_dim`` are features, ``vocabulary`` and ``context`` tokens; ``window`` is how
    many tokens attention reaches back, None if to the first. ``tied``: the output layer is the embedding. ``qkv_bias``,
    ``o_bias``, ``mlp_bias``: these linears have biases. ``qk_norm``: queries and keys of each head have an RMSNorm.
    ``context`` is None if config.json does not say it.
    """

    model_type: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    epsilon: float = EPSILON
    rope: Rope = field(default_factory=Rope)
    context: int | None = None
    window: int | None = None

    @classmethod
    def of(cls, config: Config) -> "Decoder":
        """Read what all these decoders have in common; biases, further norms and a window are the family's to add.

        Raises OddConfigError for a number that is missing or cannot be.
        """
        hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
        context, epsilon = config.get("max_position_embeddings"), config.get("rms_norm_eps", EPSILON)
        if context is not None and type(context) is not int:
            raise OddConfigError("max_position_embeddings", context)
        if type(epsilon) not in (int, float):
            raise OddConfigError("rms_norm_eps", epsilon)
        return cls(
            model_type=str(config.get("model_type")),
            blocks=count(config, "num_hidden_layers"),
            hidden=hidden,
            intermediate=count(config, "intermediate_size"),
            heads=heads,
            kv_heads=count(config, "num_key_value_heads", heads),
            head_dim=count(config, "head_dim", hidden // heads),
            vocabulary=count(config, "vocab_size"),
            tied=flag(config, "tie_word_embeddings"),
            activation=str(config.get("hidden_act", "silu")),
            epsilon=epsilon,
            rope=Rope.of(config),
            context=context,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [O, I] of the linears of a block, by their names in it."""
        q, k, v = QKV
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {q: (queries, self.hidden), k: (keys, self.hidden), v: (keys, self.hidden)}
        gated = dict.fromkeys(GATE_UP, (self.intermediate, self.hidden))
        return attention | {O: (self.hidden, queries)} | gated | {DOWN: (self.hidden, self.intermediate)}

    @property
    def block(self) -> Shapes:
        """Every parameter of a block, by its name in it."""
        linears, norms = self.linears, dict.fromkeys(QK_NORMS, (self.head_dim,)) if self.qk_norm else {}
        modules: Shapes = {ATTENTION_NORM: (self.hidden,)}
        modules |= {name: linears[name] for name in (*QKV, O)} | norms | {MLP_NORM: (self.hidden,)}
        modules |= {name: linears[name] for name in (*GATE_UP, DOWN)}
        biased = (*QKV * self.qkv_bias, *(O,) * self.o_bias, *(*GATE_UP, DOWN) * self.mlp_bias)
        return {
            f"{name}.{leaf}": shape if leaf == "weight" else shape[:1]
            for name, shape in modules.items()
            for leaf in (("weight", "bias") if name in biased else ("weight",))
        }

    @property
    def block_names(self) -> tuple[str, ...]:
        """The paths of the blocks in the model."""
        return tuple(f"{BLOCKS}.{n}" for n in range(self.blocks))

    @property
    def parameters(self) -> Shapes:
        """Every parameter of the model, a tied output layer's too."""
        outside = (self.vocabulary, self.hidden)
        inside = {f"{block}.{name}": shape for block in self.block_names for name, shape in self.block.items()}
        return {
            f"{EMBEDDING}.weight": outside,
            **inside,
            f"{FINAL_NORM}.weight": (self.hidden,),
            f"{HEAD}.weight": outside,
        }

    @property
    def tensors(self) -> Shapes:
        """What a checkpoint has to hold: every parameter, and of a tied output layer none."""
        return {name: shape for name, shape in self.parameters.items() if not (self.tied and name == f"{HEAD}.weight")}

    @property
    def biases(self) -> Shapes:
        """Every bias that linears in the blocks of such decoders may have, whether this one has it or not."""
        inside = {f"{name}.bias": shape[:1] for name, shape in self.linears.items()}
        return {f"{block}.{name}": shape for block in self.block_names for name, shape in inside.items()}


def decoder_of(config: Config) -> Decoder:
    """Read a config.json as the file of its architecture in ``families/`` does.

    Raises OddConfigError for numbers that cannot be, CheckpointError for an architecture that is no such decoder.
    """
    kind = str(config.get("model_type"))
    architecture = architecture_of(kind)
    if architecture is None or architecture.decoder is None:
        raise CheckpointError(f"config.json says model_type {kind!r}, whose tensors no file in families/ describes")
    return architecture.decoder(config)


def count(config: Config, key: str, default: int | None = None) -> int:
    """Read a whole number from 1 on, or, if ``default`` is given, one that may be left out. Raises OddConfigError."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise OddConfigError(key, value)
    return value


def flag(config: Config, key: str) -> bool:
    """Whether config.json says yes to something; no if it says nothing."""
    return bool(config.get(key))


def sliding_window(config: Config, used: bool = True) -> int | None:
    """Read how many tokens attention reaches back; None if to the first, or not ``used``. Raises OddConfigError."""
    window = config.get("sliding_window") if used else None
    if window is not None and type(window) is not int:
        raise OddConfigError("sliding_window", window)
    return window or None
