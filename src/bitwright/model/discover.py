"""Discovery: which tensors of a checkpoint are linears, from names and shapes alone.

This is for architectures without a file in ``families``. A linear is a floating ``*.weight`` [O, I] inside a numbered
block (``model.layers.3.``), unless a rule below excludes it. Experts in one tensor [E, ., .] are recognized by their
names. The hidden size tells whether a slice is stored [O, I] or [I, O]: it is the input of gate and up, and the output
of down.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bitwright.core.weight import Division, Kept, Weight

SMALLEST = 32
"""The least number of features of a linear; a matrix with fewer is a router or a gate."""
SMALL = f"small: fewer than {SMALLEST} features"
UNUSED = "no linear of the model that transformers makes"
EMPTY, UNNAMED = "empty", "no linear's: its name does not end in .weight"
IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
EMBEDDING, OUTPUT_LAYER = "embedding", "output layer"
EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "tok_embeddings", "embeddings", "wte")
HEADS = ("lm_head", "embed_out", "output")
INTO, OUT_OF = ("gate_up", "gate", "up", "w1", "w3", "w13", "input_linear"), ("down", "w2", "output_linear")
"""The beginnings of the last names of experts' matrices: of those that read the hidden state, and that produce it."""
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
"""The reasons to keep a tensor, each with a pattern in its name; the first pattern that fits gives the reason."""
_KEPT = tuple((reason, re.compile(pattern)) for reason, pattern in KEPT)
Shapes = Mapping[str, tuple[int, ...]]


def discover(shapes: Shapes, floating: Iterable[str], config: Mapping[str, Any]) -> Division:
    """Divide the tensors of a checkpoint into weights and kept tensors; ``floating`` are the names of floating ones."""
    real, hidden = set(floating), hidden_size(config)
    transposed = _matrices_are_transposed(shapes)
    weights, kept, orders = [], [], dict[str, bool]()
    for name in in_order(shapes):
        reason = _reason_to_keep(name, shapes, transposed) if name in real else "not floating point"
        if reason is None:
            weights.append(weight(name, shapes, hidden, orders))
        else:
            kept.append(Kept(name, reason))
    return Division(tuple(weights), tuple(kept))


def weight(name: str, shapes: Shapes, hidden: int | None, orders: dict[str, bool] | None = None) -> Weight:
    """Make the weight of a tensor; for a stack of experts, the tensors beside it also tell how it is stored.

    What they tell is kept in ``orders``, by the name of the experts.
    """
    shape = shapes[name]
    transposed = len(shape) > 2 and _slices_are_transposed(name, shapes, hidden, {} if orders is None else orders)
    return Weight(name, name.removesuffix(".weight"), shape, transposed)


def is_router(name: str) -> bool:
    """Whether a name is that of the matrix that chooses experts, or that weighs them."""
    return dict(_KEPT)[ROUTER].search(name) is not None


def head(names: Iterable[str]) -> str | None:
    """Find the output layer's weight; None if the checkpoint has none."""
    return _outside(names, HEADS)


def embedding(names: Iterable[str]) -> str | None:
    """Find the weight of the embedding; None if no name says so."""
    return _outside(names, EMBEDDINGS)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names by blocks: tensors outside of them first, numbers as numbers."""
    return sorted(names, key=lambda name: (IN_A_BLOCK.search(name) is not None, _numbered(name)))


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Read the width of the hidden states (of the text model if there are several models); None if it is not stated."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("hidden_size", "n_embd", "d_model", "dim"):
                if isinstance(part.get(key), int):
                    return int(part[key])
    return None


def _reason_to_keep(name: str, shapes: Shapes, transposed: bool) -> str | None:
    shape = shapes[name]
    if 0 in shape:
        return EMPTY
    if _holds_experts(name, shape):
        return None if min(shape[1:]) >= SMALLEST else SMALL
    if len(shape) != 2 or not name.endswith(".weight"):
        return "not a matrix" if len(shape) != 2 else UNNAMED
    if not IN_A_BLOCK.search(name):
        outer = {HEADS: OUTPUT_LAYER, EMBEDDINGS: EMBEDDING}
        return next((reason for modules, reason in outer.items() if _is(name, modules)), "outside of the blocks")
    for reason, pattern in _KEPT:
        if pattern.search(name):
            return reason
    if min(shape) < SMALLEST:
        return SMALL
    if transposed and f"{name.removesuffix('weight')}bias" in shapes:
        return "stored [in, out]: no linear"
    return None


def _holds_experts(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and _side(name) is not None and ("expert" in name or name.endswith("put_linear.weight"))


def _matrices_are_transposed(shapes: Shapes) -> bool:
    """Whether biases show that matrices are stored [in, out], as in GPT-2: a bias is as long as a row, not a column."""
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('weight')}bias", ())
        if name.endswith(".weight") and len(shape) == 2 and len(bias) == 1 and shape[0] != bias[0] == shape[1]:
            return True
    return False


def _slices_are_transposed(name: str, shapes: Shapes, hidden: int | None, orders: dict[str, bool]) -> bool:
    """Whether slices are stored [in, out]; square slices are stored as other matrices of their experts are."""
    own, experts = _transposed_by_shape(name, shapes[name], hidden), _parent(name)
    if own is not None:
        return own
    if not orders:  # once for all experts: looking at every tensor for each of them would take for ever
        for other, shape in shapes.items():
            order = None if len(shape) < 2 or other.endswith("bias") else _transposed_by_shape(other, shape, hidden)
            if order is not None:
                orders.setdefault(_parent(other), order)
        orders.setdefault("", False)
    return orders.get(experts, False)


def _transposed_by_shape(name: str, shape: tuple[int, ...], hidden: int | None) -> bool | None:
    rows, columns = shape[-2:]
    side = _side(name)
    if side is None or rows == columns or hidden not in (rows, columns):
        return None
    return (columns if side in INTO else rows) != hidden


def _parent(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def _side(name: str) -> str | None:
    """The kind of an experts' matrix, by its last name."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return next((side for side in (*INTO, *OUT_OF) if last.startswith(side)), None)


def _outside(names: Iterable[str], modules: tuple[str, ...]) -> str | None:
    return next((name for name in sorted(names) if _is(name, modules) and not IN_A_BLOCK.search(name)), None)


def _is(name: str, modules: tuple[str, ...]) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in modules


def _numbered(name: str) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))
