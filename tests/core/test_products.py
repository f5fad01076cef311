"""Products with parameters: which rows are read and how they are stored, whatever function of torch multiplies."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bitwright.core.products import Factor, Products, factor_of

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
BATCH = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
BIAS = torch.arange(6.0)
P = {
    "out_in": torch.randn(6, 4, generator=torch.Generator().manual_seed(2)),
    "in_out": torch.randn(4, 6, generator=torch.Generator().manual_seed(3)),
    "experts": torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(4)),
    "turned_experts": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5)),
}
W, V, E, F = P.values()
CASES: dict[str, tuple[Callable[[], Tensor], Factor, Tensor]] = {
    "linear": (lambda: linear(X, W), Factor("out_in", None, (0, 6), False), X @ W.T),
    "linear with a bias": (lambda: linear(X, W, BIAS), Factor("out_in", None, (0, 6), False), X @ W.T),
    "bias by name": (lambda: linear(X, W, bias=BIAS), Factor("out_in", None, (0, 6), False), X @ W.T),
    "some rows": (lambda: linear(X, W[2:5]), Factor("out_in", None, (2, 5), False), X @ W[2:5].T),
    "a half": (lambda: linear(X, W.chunk(2)[1]), Factor("out_in", None, (3, 6), False), X @ W[3:].T),
    "one row": (lambda: linear(X, W[5:]), Factor("out_in", None, (5, 6), False), X @ W[5:].T),
    "as GPT-2's": (lambda: torch.addmm(BIAS, X, V), Factor("in_out", None, (0, 6), True), X @ V),
    "matmul": (lambda: X @ V, Factor("in_out", None, (0, 6), True), X @ V),
    "matmul of the transpose": (lambda: torch.matmul(X, W.T), Factor("out_in", None, (0, 6), False), X @ W.T),
    "columns that are outputs": (lambda: X @ V[:, 2:4], Factor("in_out", None, (2, 4), True), X @ V[:, 2:4]),
    "an expert": (lambda: linear(X, E[1]), Factor("experts", 1, (0, 6), False), X @ E[1].T),
    "rows of an expert": (lambda: linear(X, E[2, 3:]), Factor("experts", 2, (3, 6), False), X @ E[2, 3:].T),
    "a turned expert": (lambda: X @ F[2], Factor("turned_experts", 2, (0, 6), True), X @ F[2]),
    "all experts": (lambda: torch.bmm(BATCH, F), Factor("turned_experts", None, (0, 6), True), BATCH @ F),
    "their transposes": (lambda: torch.bmm(BATCH, E.mT), Factor("experts", None, (0, 6), False), BATCH @ E.mT),
    "with biases": (
        lambda: torch.baddbmm(BIAS, BATCH, F),
        Factor("turned_experts", None, (0, 6), True),
        BATCH @ F,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_product_is_noticed(name: str) -> None:
    run, factor, result = CASES[name]
    before, after = list[tuple[Factor, Tensor]](), list[tuple[Factor, Tensor, Tensor]]()
    wanted = run()
    with Products(P, lambda *seen: before.append(seen), lambda *seen: after.append(seen)):
        assert torch.equal(run(), wanted)
    assert [seen[0] for seen in before] == [seen[0] for seen in after] == [factor]
    x = BATCH if wanted.dim() == 3 else X
    assert before[0][1] is x and after[0][1] is x
    torch.testing.assert_close(after[0][2], result)


def test_inputs_are_replaced() -> None:
    with Products(P, lambda factor, x: 2 * x):
        results = linear(X, W, BIAS), torch.addmm(BIAS, X, V), linear(X, torch.ones(6, 4))
    for result, wanted in zip(results, (2 * X @ W.T + BIAS, 2 * X @ V + BIAS, X @ torch.ones(4, 6)), strict=True):
        torch.testing.assert_close(result, wanted)


OTHERS: dict[str, tuple[Callable[[], object], set[str]]] = {
    "views": (lambda: (W.T, W[1:], E[2].mT, W.view(4, 6), W.shape), set()),
    "a product": (lambda: linear(X, W[1:3]), set()),
    "a sum": (lambda: W.sum(), {"out_in"}),
    "an elementwise product": (lambda: W * V.T, {"out_in", "in_out"}),
    "in a list": (lambda: torch.cat([W, X]), {"out_in"}),
    "every second row": (lambda: linear(X, W[::2]), {"out_in"}),
    "some inputs": (lambda: linear(X[:, :2], W[:, :2]), {"out_in"}),
    "a copy": (lambda: linear(X, W.clone()), {"out_in"}),
    "the first factor": (lambda: W @ X.T, {"out_in"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_reads_a_parameter_in_another_way(name: str) -> None:
    run, wanted = OTHERS[name]
    others, products = set[str](), list[Factor]()
    with Products(P, lambda factor, _: products.append(factor), other=others.add):
        run()
    assert others == wanted and bool(products) == (name == "a product")


def test_a_matrix_of_one_row_or_column_has_one_way_to_be_read() -> None:
    for shape in ((1, 4), (4, 1), (4, 4)):
        matrix = torch.zeros(shape)
        assert factor_of("p", matrix, matrix) == Factor("p", None, (0, shape[0]), False)
