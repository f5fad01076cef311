"""What round to nearest decides; the codes that come of it stand in tests/golden."""

import torch
from torch import nn

from bitwright.core.block import Block, Layout, LinearGroup, Topology
from bitwright.core.decisions import BlockDecisions, LinearDecision
from bitwright.core.grid import Grid, Tile
from bitwright.core.method import WeightContext
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.settings import Settings
from bitwright.methods.rtn import METHOD
from bitwright.steps.apply import fold, quantize_linear

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-5.0, -6.0, 0.0, 8.0]])
DTYPE = torch.float32
CONTEXT = WeightContext(Settings(), Scheme(Grid.integers(4), Tile(1, 2)), DTYPE)


def block() -> Block:
    modules = nn.ModuleDict({name: nn.Linear(4, 2, bias=False) for name in ("a", "b", "other")})
    for name in ("a", "b"):
        modules.get_submodule(name).weight = nn.Parameter(WEIGHT * (1 if name == "a" else 2))
    topology = Topology((LinearGroup(("a",), "a"), LinearGroup(("b",), "b")))
    return Block(0, "", modules, topology, Layout({name: name for name, _ in modules.named_parameters()}))


def test_it_decides_no_more_than_what_undecided_weights_get() -> None:
    before = LinearDecision(tile=Tile(2, 1))
    assert METHOD.decide(WEIGHT, CONTEXT, before) == before


def test_ranges_are_the_smallest_and_the_largest_weight_of_each_tile() -> None:
    found = fold(block().tensors, block().topology, BlockDecisions(), Allocation(CONTEXT.scheme), DTYPE)
    steps = torch.tensor([[3.0, 4.0], [6.0, 8.0]]) / 15  # a range reaches zero
    assert set(found.linears) == {"a", "b"}
    torch.testing.assert_close(found.linears["a"].scale, steps)
    torch.testing.assert_close(found.linears["b"].scale, 2 * steps)
    assert found.linears["a"].codes.tolist() == [[15, 0, 11, 15], [3, 0, 0, 15]]  # -5 / 0.4 is a tie, to even


def test_ranges_and_tiles_decided_before_are_kept() -> None:
    decided = LinearDecision(tile=Tile(2, 1), low=torch.full((1, 4), -1.0), high=torch.full((1, 4), 2.0))
    q = quantize_linear(WEIGHT, METHOD.decide(WEIGHT, CONTEXT, decided), CONTEXT.scheme, DTYPE)
    assert q.tile == Tile(2, 1) and torch.allclose(q.scale, torch.full((1, 4), 0.2))
