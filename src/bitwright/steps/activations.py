"""Quantize activations while the model runs: inputs of linears per token; queries, keys and values per token and head.

Nothing of this is folded into weights. It happens in training, in the quantized stream, and in a loaded model if its
format cannot ask transformers for it. Queries, keys and values are quantized in transformers' own attention interface,
after the rotary embedding; the softmax output stays as it is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bitwright.core.block import Block
from bitwright.core.fake_quant import fake_quantize_tokens
from bitwright.core.grid import Grid
from bitwright.core.scheme import Scheme

QUANTIZED_ATTENTION = "bitwright_quantized"
GRIDS = "_bitwright_grids"


@contextmanager
def quantized_activations(block: Block, scheme: Scheme) -> Iterator[None]:
    """A context in which the block runs with activations and KV cache quantized by the scheme."""
    taps = [] if scheme.activations is None else [_InputQuantizer(scheme.activations)]
    block.taps.extend(taps)
    undo = quantize_attention(block.module, scheme.activations, scheme.kv)
    try:
        yield
    finally:
        undo()
        for tap in taps:
            block.taps.remove(tap)


class _InputQuantizer:
    """A tap that quantizes what linears read."""

    def __init__(self, grid: Grid) -> None:
        self.quantize = _quantizer(grid)

    def inputs(self, linears: Sequence[str], x: Tensor) -> Tensor | None:
        """Quantize the inputs of linears."""
        return self.quantize(x) if linears else None

    def outputs(self, linear: str, rows: slice, x: Tensor, y: Tensor) -> None:
        """Nothing to see."""


def quantize_activations(model: nn.Module, inputs: Grid | None, cache: Grid | None, linears: Iterable[str]) -> None:
    """Make a model quantize the inputs of these linears, and its queries, keys and values, from now on."""
    quantize_inputs(model, inputs, linears)
    quantize_attention(model, inputs, cache)


def quantize_inputs(model: nn.Module, grid: Grid | None, linears: Iterable[str]) -> None:
    """Make a model quantize the inputs of these linears from now on."""
    if grid is None:
        return
    hook, wanted = _input_hook(grid), set(linears)
    for name, module in model.named_modules():
        if name in wanted:
            module.register_forward_pre_hook(hook)


def quantize_attention(module: nn.Module, queries: Grid | None, cache: Grid | None) -> Callable[[], None]:
    """Make every attention in a module quantize its queries, keys and values; return a function that undoes it.

    Every attention module stores its grids, and its configuration names our attention function, which calls the one
    that was named before.
    """
    attention = [m for m in module.modules() if hasattr(m, "config") and hasattr(m, "scaling")]
    if (queries is None and cache is None) or not attention:
        return lambda: None
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = attention[0].config
    original = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(QUANTIZED_ATTENTION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(QUANTIZED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[original])
    for m in attention:
        setattr(m, GRIDS, (queries, cache, original))
    config._attn_implementation = QUANTIZED_ATTENTION

    def undo() -> None:
        config._attn_implementation = original
        for m in attention:
            delattr(m, GRIDS)

    return undo


def _input_hook(grid: Grid) -> Any:
    """A hook that quantizes a linear's input."""
    quantize = _quantizer(grid)
    return lambda _, args: (quantize(args[0]),)


def _quantizer(grid: Grid) -> Callable[[Tensor], Tensor]:
    """A function that quantizes inputs; linears that share an input tensor share the result."""
    last: list[Tensor] = []

    def quantize(x: Tensor) -> Tensor:
        if not (last and last[0] is x):
            last[:] = [x, fake_quantize_tokens(x, grid)]
        return last[1]

    return quantize


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    of_query, of_cache, original = getattr(module, GRIDS)
    if of_query is not None:
        query = fake_quantize_tokens(query, of_query)
    if of_cache is not None:
        key, value = fake_quantize_tokens(key, of_cache), fake_quantize_tokens(value, of_cache)
    return ALL_ATTENTION_FUNCTIONS[original](module, query, key, value, *args, **kwargs)
