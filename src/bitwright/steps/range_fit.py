"""The range decision without data: the range of each tile whose quantized weights are nearest to the weights.

With e = W_q - W and W_q = (code - z) h, over a tile:

    minimise  sum e^2 + lambda (sum e W)^2 / sum W^2

At lambda = 0 this is the squared error (EasyQuant, arXiv 2403.02775). The second term is ours. A range that clips makes
the large weights of a tile smaller, so e points against W. And the inputs of a linear vary more along its own weights
than in other directions (``benchmarks/alignment.py``). So errors along W count 1 + lambda times.

For fixed codes, the best h, or h and z, solves a linear least-squares problem in closed form. Then the codes are
computed again, and so on. This ends in a local minimum near its start. So it starts from the best few of many shrunken
min-max ranges, and the best result is kept; min-max is among them.

Every trial passes over the weights, in parts that fit in the processor's cache, and leaves a few sums for each tile,
with q = code - z. The rest is arithmetic on these sums, in float64.
"""

from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.method import Range
from bitwright.core.qtensor import affine, span, tiled

ALIGNED_BITS = 4
POLISHED, PASSES = 2, 4
TOGETHER, PART = 2**21, 2**17
"""The number of weights whose tiles are decided at a time, and the number that a CPU thread passes over at a time."""
PIECE = 2**12
"""The least length of the pieces into which tiles are halved, if they can be.

A piece is summed in float32, and the pieces of a tile in float64. That is exact enough, and does not depend on the
number of threads.
"""
FEW, MANY = 3, 4
"""Numbers of bits: up to FEW, starts cut the two ends independently; above MANY, they hardly cut them."""
Steps = tuple[Float[Tensor, "S M"], Float[Tensor, "S M"]]
"""The steps h and z, S for each of M tiles; z is 0 on a symmetric grid."""


def alignment_at(bits: int) -> float:
    """The default lambda: how much more errors along a tile's own weights count.

    Measured in docs/methods/easyquant.md.
    """
    return 16.0 if bits < ALIGNED_BITS else 64.0


@torch.no_grad()
def fitted(
    weight: Float[Tensor, "O I"], grid: Grid, tile: Tile, scale_dtype: torch.dtype, *, alignment: float
) -> Range:
    """Fit the low and the high end of each tile's range [P, Q], float32; ``alignment`` is lambda.

    The result is never worse than min-max on the objective.
    """
    tiles = tiled(weight, tile).transpose(1, 2)
    integers = (
        replace(grid, zero=Zero.CODE) if grid.zero is Zero.REAL else grid
    )  # a real minimum is searched for as z h
    (p, q), flat = tiles.shape[:2], tiles.flatten(2).flatten(0, 1)
    low, high = torch.empty(2, len(flat), device=flat.device)
    at_once = max(1, TOGETHER // flat.shape[1])
    for start in range(0, len(flat), at_once):
        here = slice(start, start + at_once)
        h, z = _Fit(flat[here].float().contiguous(), integers, scale_dtype, alignment).best()
        low[here], high[here] = span(h, None if grid.symmetric else z, integers)
    return low.view(p, q), high.view(p, q)


class _Fit:
    """The search over some tiles, one row of weights each."""

    def __init__(self, weights: Float[Tensor, "M n"], grid: Grid, dtype: torch.dtype, alignment: float) -> None:
        self.weights, self.grid, self.dtype, self.alignment = weights, grid, dtype, alignment
        self.n, self.piece = weights.shape[1], _piece(weights.shape[1])
        rows = max(1, (PART * torch.get_num_threads() if weights.device.type == "cpu" else TOGETHER) // self.n)
        self.room = weights.new_empty(2, min(rows, len(weights)), self.n)
        self.parts = [slice(start, start + rows) for start in range(0, len(weights), rows)]
        self.low, self.high = weights.amin(1), weights.amax(1)
        most = torch.maximum(self.high, -self.low)
        self.most = most.where(most > 0, torch.ones_like(most))
        ww, self.total = self._whole([self._own(part) for part in self.parts])
        self.ww = (ww * self.most.double().square()).clamp(min=torch.finfo(torch.float64).tiny)

    def best(self) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        """The best h and z that were tried."""
        h, z = self._starts()
        losses = self._loss(h, self._sums(h, z, polishing=False))
        exact, tried = (losses[-1:], h[-1:], z[-1:]), []
        h, z = _first(POLISHED, losses[:-1], h[:-1], z[:-1])
        for _ in range(PASSES):
            sums = self._sums(h, z, polishing=True)
            tried.append((self._loss(h, sums), h, z))
            h, z = self._polished(h, z, sums)
        h, z = _first(1, *(torch.cat(trials) for trials in zip(*tried, exact, strict=True)))
        return h[0], z[0]

    def _own(self, part: slice) -> Float[Tensor, "2 m*pieces"]:
        """For each piece, the norm of W divided by the tile's largest magnitude, and the sum of W."""
        w = self.weights[part]
        return torch.stack([self._norm(w / self.most[part, None]), self._by_piece(w)])

    def _starts(self) -> Steps:
        """The starts: shares of min-max, with both signs if the scale has a sign; the last h is the largest magnitude.

        With the last, a tile of one value, or of one value and zeros, is exact.
        """
        shares = torch.tensor(_shares(self.grid), device=self.low.device).T[:, :, None]
        h, z = affine(shares[0] * self.low, shares[1] * self.high, self.grid, self.dtype)
        h = torch.cat([h, *([-h] if self.grid.signed_scale else []), self.most[None].to(self.dtype)]).float()
        return h, torch.zeros_like(h) if z is None else torch.cat([z, (-self.low > self.high)[None]]).float()

    def _sums(self, h: Float[Tensor, "S M"], z: Float[Tensor, "S M"], *, polishing: bool) -> Float[Tensor, "K S M"]:
        """For each tile, the sums of (e / h)^2, of q W if needed, and for polishing of q^2 and of q."""
        sums, ends = [], (self.grid.qmin - z, self.grid.qmax - z)
        for part in self.parts:
            w = self.weights[part]
            room = self.room[0, : len(w)], self.room[1, : len(w)]
            trials = zip(*(steps[:, part, None] for steps in (h, *ends)), strict=True)
            sums.append(torch.stack([self._trial(w, room, trial, polishing) for trial in trials], dim=1))
        return self._whole(sums)

    def _whole(self, parts: list[Float[Tensor, "K *S m*pieces"]]) -> Float[Tensor, "K *S M"]:
        """Join the pieces of each tile; norms and sums alternate, and norms become sums of squares."""
        sums = torch.cat(parts, dim=-1).double()
        sums[::2] *= sums[::2]
        return sums.view(*sums.shape[:-1], len(self.weights), -1).sum(-1)

    def _trial(
        self, w: Float[Tensor, "m n"], room: tuple[Tensor, Tensor], trial: tuple[Tensor, ...], polishing: bool
    ) -> Float[Tensor, "K m*pieces"]:
        """The terms of ``_sums`` for each piece, with norms in the place of sums of squares."""
        (h, lowest, highest), (q, spare) = trial, room
        torch.round(torch.div(w, h, out=spare), out=q)
        torch.minimum(torch.maximum(q, lowest, out=q), highest, out=q)
        sums = [self._norm(spare.sub_(q))]
        if polishing or self.alignment:
            sums.append(self._by_piece(torch.mul(q, w, out=spare)))
        if polishing:
            sums += [self._norm(q), self._by_piece(q)]
        return torch.stack(sums)

    def _by_piece(self, values: Tensor) -> Tensor:
        return values.view(-1, self.piece).sum(1)

    def _norm(self, values: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(values.view(-1, self.piece), dim=1)
        return norms

    def _loss(self, h: Float[Tensor, "S M"], sums: Float[Tensor, "K S M"]) -> Float[Tensor, "S M"]:
        lost = h.double().square() * sums[0]
        if self.alignment:
            lost += self.alignment * (h * sums[1] - self.ww).square() / self.ww
        return lost.nan_to_num(torch.inf, torch.inf)

    def _polished(self, h: Float[Tensor, "S M"], z: Float[Tensor, "S M"], sums: Float[Tensor, "4 S M"]) -> Steps:
        """The best h and z for fixed codes: fit W ~ h q + b, then move z by the whole number nearest to b / h."""
        _, qw, qq, q = sums
        k = self.alignment / self.ww
        if not self.grid.symmetric:
            a, b, c = qq + k * qw.square(), q + k * qw * self.total, self.n + k * self.total.square()
            of_q, of_one = (1 + self.alignment) * qw, (1 + self.alignment) * self.total
            shift = (of_one * a - of_q * b) / (of_q * c - of_one * b)
            to = (z - shift).nan_to_num(0.0, 0.0, 0.0).round().clamp(self.grid.qmin, self.grid.qmax)
            by, z = z - to, to.float()
            qq, qw = qq + by * (2 * q + by * self.n), qw + by * self.total
        best = ((1 + self.alignment) * qw / (qq + k * qw.square())).to(self.dtype).float()
        return best.where(best.isfinite() & (best * h > 0), h), z


def _first(
    count: int, losses: Float[Tensor, "S M"], h: Float[Tensor, "S M"], z: Float[Tensor, "S M"]
) -> tuple[Float[Tensor, "count M"], Float[Tensor, "count M"]]:
    """The ``count`` steps of each tile with the least loss."""
    indices = []
    for _ in range(count):
        indices.append(losses.min(0, keepdim=True).indices)
        losses = losses.scatter(0, indices[-1], torch.inf)
    at = torch.cat(indices)
    return h.gather(0, at), z.gather(0, at)


def _piece(n: int) -> int:
    """The length of the pieces of a tile of n weights."""
    while n >= 2 * PIECE and n % 2 == 0:
        n //= 2
    return n


def _shares(grid: Grid) -> list[tuple[float, float]]:
    """The shares of the two ends to start from: cut independently at few bits, hardly cut at many.

    If the scale is signed, the ends are half a step beyond the outermost codes; wider ranges make them codes.
    """
    if grid.bits <= FEW and not grid.symmetric:
        return list(product(torch.linspace(1.0, 0.3, 6).tolist(), repeat=2))
    least = 1 - 0.2 * 2.0 ** (MANY + 1 - grid.bits)
    both = torch.linspace(1.0, 0.3, 16) if grid.bits <= MANY else torch.linspace(1.0, least, 8)
    wider = torch.linspace(1.3, 1.05, 6).tolist() if grid.signed_scale else []
    return [(share, share) for share in (*both.tolist(), *wider)]
