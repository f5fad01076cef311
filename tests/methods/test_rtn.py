"""What round to nearest decides; the codes that come of it stand in tests/golden."""

import torch
from torch import nn

from bitwright.core.block import Block, LinearGroup, Topology
from bitwright.core.decisions import BlockDecisions, LinearDecision
from bitwright.core.method import Context
from bitwright.core.scheme import Grid, Scheme, Tile
from bitwright.methods.rtn import decide

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-5.0, -6.0, 0.0, 8.0]])
CONTEXT = Context(Scheme(Grid(4), Tile(1, 2)), torch.float32)


def block() -> Block:
    modules = nn.ModuleDict({name: nn.Linear(4, 2, bias=False) for name in ("a", "b", "other")})
    for name in ("a", "b"):
        modules.get_submodule(name).weight = nn.Parameter(WEIGHT * (1 if name == "a" else 2))
    return Block(0, "", modules, Topology((LinearGroup(("a",), "a"), LinearGroup(("b",), "b"))))


def ends(decision: LinearDecision) -> tuple[list[list[float]], list[list[float]]]:
    assert decision.low is not None and decision.high is not None
    return decision.low.tolist(), decision.high.tolist()


def test_ranges_are_the_smallest_and_the_largest_weight_of_each_tile() -> None:
    decided = decide(block(), CONTEXT, BlockDecisions())
    assert set(decided.linears) == {"a", "b"}
    assert ends(decided.linear("a")) == ([[-2.0, 3.0], [-6.0, 0.0]], [[1.0, 4.0], [-5.0, 8.0]])
    assert ends(decided.linear("b")) == ([[-4.0, 6.0], [-12.0, 0.0]], [[2.0, 8.0], [-10.0, 16.0]])
    assert decided.linear("a").codes is None


def test_an_axis_decided_before_is_kept() -> None:
    outliers = WEIGHT > 7
    before = BlockDecisions({}, {"a": LinearDecision(tile=Tile(2, 1), outliers=outliers)}, ("a fallback",))
    decided = decide(block(), CONTEXT, before)
    assert ends(decided.linear("a")) == ([[-5.0, -6.0, 0.0, 4.0]], [[1.0, -2.0, 3.0, 8.0]])
    assert decided.linear("a").tile == Tile(2, 1)
    assert decided.linear("a").outliers is outliers
    assert decided.fallbacks == ("a fallback",)
    assert before.linear("a").low is None, "what is handed in is not changed"
