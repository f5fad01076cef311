"""Which tensors of a checkpoint are linears, told from names and shapes alone: for architectures nobody has described.

A linear is a floating ``*.weight`` [O, I] inside a numbered block (``model.layers.3.``), unless a rule below speaks
against it. Experts in one tensor [E, ., .] are told by their names; whether a slice is stored [O, I] or [I, O] follows
from the hidden size, which is what gate and up read and down gives.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bitwright.core.weight import Division, Kept, Weight

SMALLEST = 32
"""Features. Fewer are a router's or a gate's."""
SMALL = f"small: fewer than {SMALLEST} features"
EMPTY, UNNAMED = "empty", "no linear's: its name does not end in .weight"
IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
EMBEDDING = "embedding"
EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "tok_embeddings", "embeddings", "wte")
HEADS = ("lm_head", "embed_out", "output")
INTO, OUT_OF = ("gate_up", "gate", "up", "w1", "w3", "w13", "input_linear"), ("down", "w2", "output_linear")
"""Beginnings of experts' last names: those that read the hidden state, and those that give it."""
ROUTER = "router or gate of experts"
KEPT = (
    ("norm or scale", r"norm|(^|[._])ln_"),
    (EMBEDDING, r"emb(ed|edding)s?([._]|$)|(^|\.)w[tp]e\.|rotary|position|relative_attention_bias"),
    (ROUTER, r"(^|\.)(gate|router|shared_expert_gate|expert_gate|wg)\.|router"),
    ("of vision or audio", r"vision|visual|image|audio|speech|patch|multi_modal|mm_projector"),
    ("convolution", r"conv"),
    ("of a state space mixer, read without its linear", r"(^|\.)(mixer|mamba|ssm)\.(in|out|x|dt)_proj\."),
    ("adapter", r"lora_"),
)
"""Why a tensor is kept, and what its name then holds; the first that fits is said."""
Shapes = Mapping[str, tuple[int, ...]]


def discover(shapes: Shapes, floating: Iterable[str], config: Mapping[str, Any]) -> Division:
    """The weights of a checkpoint with tensors of these shapes; ``floating`` names those of real numbers."""
    real, hidden = set(floating), hidden_size(config)
    turned = _stored_turned(shapes)
    weights, kept = [], []
    for name in in_order(shapes):
        why = _why_kept(name, shapes, turned) if name in real else "not floating point"
        if why is None:
            weights.append(weight(name, shapes, hidden))
        else:
            kept.append(Kept(name, why))
    return Division(tuple(weights), tuple(kept))


def weight(name: str, shapes: Shapes, hidden: int | None) -> Weight:
    """A tensor as a weight; a stack of experts is looked at beside the tensors of its block."""
    shape = shapes[name]
    return Weight(name, name.removesuffix(".weight"), shape, len(shape) > 2 and _is_turned(name, shapes, hidden))


def head(names: Iterable[str]) -> str | None:
    """The output layer's weight, where the checkpoint has one."""
    return next((n for n in sorted(names) if _is(n, HEADS) and not IN_A_BLOCK.search(n)), None)


def embedding(names: Iterable[str]) -> str | None:
    """The weight that turns tokens into vectors, where its name tells it."""
    return next((n for n in sorted(names) if _is(n, EMBEDDINGS) and not IN_A_BLOCK.search(n)), None)


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of blocks: outside of them first, numbers as numbers."""
    return sorted(names, key=lambda name: (IN_A_BLOCK.search(name) is not None, _numbered(name)))


def _why_kept(name: str, shapes: Shapes, turned: bool) -> str | None:
    shape = shapes[name]
    if 0 in shape:
        return EMPTY
    if _holds_experts(name, shape):
        return None if min(shape[1:]) >= SMALLEST else SMALL
    if len(shape) != 2 or not name.endswith(".weight"):
        return "not a matrix" if len(shape) != 2 else UNNAMED
    if not IN_A_BLOCK.search(name):
        return "output layer" if _is(name, HEADS) else EMBEDDING if _is(name, EMBEDDINGS) else "outside of the blocks"
    for why, pattern in KEPT:
        if re.search(pattern, name):
            return why
    if min(shape) < SMALLEST:
        return SMALL
    if turned and f"{name.removesuffix('weight')}bias" in shapes:
        return "stored [in, out]: no linear"
    return None


def _holds_experts(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and _side(name) is not None and ("expert" in name or name.endswith("put_linear.weight"))


def _stored_turned(shapes: Shapes) -> bool:
    """Whether biases show that matrices are stored [in, out] (GPT-2): longer than rows, as long as columns."""
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('weight')}bias", ())
        if name.endswith(".weight") and len(shape) == 2 and len(bias) == 1 and shape[0] != bias[0] == shape[1]:
            return True
    return False


def _is_turned(name: str, shapes: Shapes, hidden: int | None) -> bool:
    """Whether slices are stored [in, out]; square ones as the others of their experts; else [out, in]."""
    others = [other for other in shapes if _same_experts(other, name)]
    told = [found for one in (name, *others) if (found := _turned_by_shape(one, shapes[one], hidden)) is not None]
    return bool(told and told[0])


def _turned_by_shape(name: str, shape: tuple[int, ...], hidden: int | None) -> bool | None:
    rows, columns = shape[-2:]
    side = _side(name)
    if side is None or rows == columns or hidden not in (rows, columns):
        return None
    return (columns if side in INTO else rows) != hidden


def _same_experts(one: str, other: str) -> bool:
    """Whether two tensors stand side by side, both matrices of experts."""
    return one != other and _around(one) == _around(other) and _side(one) is not None and not one.endswith("bias")


def _around(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def _side(name: str) -> str | None:
    """Which of the experts' matrices this is, by its last name."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return next((side for side in (*INTO, *OUT_OF) if last.startswith(side)), None)


def _is(name: str, modules: tuple[str, ...]) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in modules


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """The width of the hidden states, of the text model where there are several."""
    for where in (config, config.get("text_config")):
        if isinstance(where, Mapping):
            for key in ("hidden_size", "n_embd", "d_model", "dim"):
                if isinstance(where.get(key), int):
                    return int(where[key])
    return None


def _numbered(name: str) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))
