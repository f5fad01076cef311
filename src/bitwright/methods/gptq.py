"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323).

Later weights compensate the rounding errors of earlier ones (``steps/rounding.py``). Linears are rounded in the order
in which data flows through the block, on inputs that have passed the quantized linears before them. Linears that share
an input share its Hessian. Ranges are those that earlier methods have decided, else min-max of the weight; on per-IC
tiles (AdaDim, arXiv 2309.15531: GPTQ-ada) min-max of each column as updated so far.

Where we differ, unless ``drift`` is off: what is rounded is W + W C H^-1, C = E[(x - x') x'^T]. On the inputs x' of the
quantized stream, this weight comes nearest to the output W x of the full-precision linear. Unless ``refine`` is off,
per-IC ranges are not min-max but those that lose least of the column. Outliers (``easyquant-outliers``) keep their own
value; an error that was moved to them moves on to later columns.
"""

from dataclasses import dataclass, replace

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.method import TOO_FEW, Closed, Context
from bitwright.core.settings import setting
from bitwright.methods._shared_settings import Drift, Refine
from bitwright.steps.apply import weights_of
from bitwright.steps.rounding import Ranges, compensated, curvature, making_good


@dataclass(frozen=True)
class GPTQSettings(Drift, Refine):
    """The settings of GPTQ: ``damping`` and ``act_order`` are the paper's, ``drift`` and ``refine`` are ours."""

    damping: float = setting(
        0.01,
        "share of the Hessian's mean diagonal that is added to its diagonal",
        above=0,
        most=1,
        wants="it is a share of the mean diagonal, such as 0.01",
    )
    act_order: bool = setting(True, "round columns in the order of falling activations")


def decide(block: Block, context: Context[GPTQSettings], decisions: BlockDecisions) -> BlockDecisions:
    """Decide codes for every linear. Without calibration data (the output layer), decide nothing."""
    if context.data is None:
        return decisions
    settings, fallbacks, weights = context.settings, list[str](), weights_of(block, decisions)
    for group in block.topology.groups:
        moments = context.data.moments(group.linears[0], decisions, drift=settings.drift)
        if group.routed and moments.tokens < TOO_FEW:
            fallbacks += [f"{name}: {moments.tokens} tokens reached it, rounded to nearest" for name in group.linears]
            continue
        curved = curvature(moments.inputs, damping=settings.damping, act_order=settings.act_order)
        decided = {}
        for name in group.linears:
            so_far, tile = decisions.linear(name), decisions.tile(name, context.scheme(name))
            known = None if so_far.low is None or so_far.high is None else (so_far.low, so_far.high)
            weight, grid, stored = weights[name], context.scheme(name).weight, context.scale_dtype
            ranges = Ranges(so_far.inside(weight), known, grid, tile, stored, settings.refine)
            kept = None if so_far.outliers is None else (so_far.outliers, weight)
            codes = compensated(making_good(weight, moments, curved), ranges, curved, kept)
            decided[name] = replace(so_far, low=ranges.low, high=ranges.high, codes=codes)
            fallbacks += [f"{name}: {curved.fallback}"] if curved.fallback else []
        decisions = decisions.with_linears(decided)
    return replace(decisions, fallbacks=(*decisions.fallbacks, *fallbacks))


METHOD = Closed(
    summary="round so that later weights compensate the errors of earlier ones",
    settings=GPTQSettings,
    decides=frozenset({Decision.ROUNDING}),
    decide=decide,
    needs_text=True,
)
