"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323).

Rounding that lets later weights make good what earlier ones lost (``steps/rounding.py``). Linears go in the order
data flows through the block, each on the inputs that the quantized linears before it leave; linears that share an
input share its Hessian. Ranges are what methods before have decided, min-max where none has.

Where we differ, unless ``drift`` is off: what is rounded is W + W C H^-1, C = E[(x - x') x'^T], the weight that on the
inputs x' of the quantized stream comes nearest to what the full-precision linear makes of x.
"""

from dataclasses import replace

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.method import Closed, Context
from bitwright.core.qtensor import affine
from bitwright.steps.apply import weights_of
from bitwright.steps.ranges import minmax
from bitwright.steps.rounding import compensated, making_good


def decide(block: Block, context: Context, decisions: BlockDecisions) -> BlockDecisions:
    """Codes for every linear; rounding to nearest where there are no activations to learn from (the output layer)."""
    if context.moments is None:
        return decisions
    grid, fallbacks, weights = context.scheme.weight, list[str](), weights_of(block, decisions)
    for group in block.topology.groups:
        found = context.moments(group.linears[0], decisions)
        decided = {}
        for name in group.linears:
            so_far, weight = decisions.linear(name), weights[name]
            tile = so_far.tile or context.scheme.tile
            low, high = so_far.low, so_far.high
            if low is None or high is None:
                low, high = minmax(weight, tile)
            scale, zero = affine(low, high, grid, context.scale_dtype)
            codes, fallback = compensated(making_good(weight, found), scale, zero, grid, tile, found.inputs)
            decided[name] = replace(so_far, low=low, high=high, codes=codes)
            fallbacks += [f"{name}: {fallback}"] if fallback else []
        decisions = decisions.with_linears(decided)
    return replace(decisions, fallbacks=(*decisions.fallbacks, *fallbacks))


METHOD = Closed(decides=frozenset({Decision.ROUNDING}), decide=decide, needs_text=True)
