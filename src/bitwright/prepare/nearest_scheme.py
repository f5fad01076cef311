"""Schemes that can stand in for one that an engine does not run, the most like it first."""

from collections.abc import Iterable
from itertools import product

from bitwright.core.engine import EVERY_BITS
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.scheme import NAMED, Scheme

GROUPS = (32, 64, 128)
"""Sizes of groups that are proposed beside the scheme's own, those that an engine names, and whole channels."""
CHANNEL = 2**16
"""What a channel counts as beside groups."""


def nearest_first(scheme: Scheme, sizes: Iterable[int]) -> list[Scheme]:
    """Sort a scheme and all that can stand in for it by how unlike it they are; ``sizes`` are more sizes of groups."""
    groups = sorted({*GROUPS, *sizes, FULL, _group(scheme.tile)})
    schemes = [scheme]
    for bits, symmetric, group in product(EVERY_BITS, (False, True), groups):
        for activations in dict.fromkeys([(scheme.activation_bits, scheme.kv_bits), (None, None)]):
            schemes.append(Scheme(Grid.integers(bits, symmetric), Tile(1, group), *activations))
    return sorted([*schemes, *NAMED.values()], key=lambda other: _unlikeness(scheme, other))


def _unlikeness(scheme: Scheme, other: Scheme) -> tuple[float, ...]:
    """How much two schemes differ, what matters most first: activations, bits, the sign of scales, groups, symmetry.

    More bits are nearer than fewer.
    """
    bits = other.weight.bits - scheme.weight.bits
    group, other_group = (size if size > 0 else CHANNEL for size in (_group(scheme.tile), _group(other.tile)))
    return (
        (scheme.activation_bits, scheme.kv_bits) != (other.activation_bits, other.kv_bits),
        abs(bits) + (0.5 if bits < 0 else 0),
        other.weight.signed_scale != scheme.weight.signed_scale,
        abs(group - other_group),
        other.weight.symmetric != scheme.weight.symmetric,
    )


def _group(tile: Tile) -> int:
    """The number of weights that share a scale, along whichever dimension; FULL for a channel."""
    return FULL if tile.in_ == FULL else max(tile.out, tile.in_)
