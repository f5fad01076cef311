"""What ``verify`` says of a folder or a file: the checks that were made, and findings in words."""

from collections.abc import Sequence
from dataclasses import dataclass

MOVED = 1e-4
"""Vectors (norms) with a larger relative squared error than that were changed on purpose."""
SCALES_MOVED = "norms are not the original's: scales were moved between tensors"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, whether it is as it should be, and what was found."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Verification:
    """What is true of a folder, or of an engine's file.

    ``kl_divergence`` (nats per token, on random tokens) is None without an original; so are ``largest_error``, the
    tensor that it is in, and ``mean_error``: ``|W - Wx|^2 / |W|^2`` of every quantized linear of a folder, of every
    tensor of an engine's file.
    """

    folder: str
    format: str
    against: str | None
    linears: int
    bits_per_weight: float
    kl_divergence: float | None
    checks: tuple[Check, ...]
    largest_error: float | None = None
    largest_in: str | None = None
    mean_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def undecided(said: str) -> Check:
    """The check of weights that tell nothing, where logits are left out: nobody is told yes."""
    return Check(
        "weights",
        False,
        f"not decided: {said}; {SCALES_MOVED}, or it is another model, and logits alone tell: leave --no-logits out",
    )


def lacking(missing: Sequence[str]) -> str:
    """In words what is not there, "" for nothing."""
    return _and_others(f"{missing[0]} is not there", len(missing)) if missing else ""


def first(texts: Sequence[str]) -> str:
    """The first of several findings, and how many more there are."""
    return _and_others(texts[0], len(texts)) if texts else ""


def _and_others(text: str, count: int) -> str:
    others = count - 1
    return f"{text}, and {others} other{'s' if others > 1 else ''}" if others else text
