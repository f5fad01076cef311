"""The result of ``verify``: the checks of a folder or a file, and findings in words."""

from collections.abc import Sequence
from dataclasses import dataclass

MOVED = 1e-4
"""The relative squared error above which vectors (norms) were changed on purpose."""
SCALES_MOVED = "norms are not the original's: scales were moved between tensors"


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed (None if it was not looked at), and what was found.

    ``matters``: without it, nobody can tell that all is well.
    """

    name: str
    passed: bool | None
    found: str
    matters: bool = True


@dataclass(frozen=True)
class Verification:
    """The checks of a folder, or of an engine's file, and its errors.

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
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(check.passed is False for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether no check failed, and all that matters was looked at."""
        return all(check.passed or (check.passed is None and not check.matters) for check in self.checks)


def undecided(errors: str) -> Check:
    """The failed check of weights that tell nothing, if logits are left out."""
    return Check(
        "weights",
        False,
        f"not decided: {errors}; {SCALES_MOVED}, or it is another model, and logits alone tell: leave --no-logits out",
    )


def lacking(missing: Sequence[str]) -> str:
    """The missing tensors in words; "" if there are none."""
    return _and_others(f"{missing[0]} is not there", len(missing)) if missing else ""


def first(texts: Sequence[str]) -> str:
    """The first of several findings, and how many more there are; "" if there are none."""
    return _and_others(texts[0], len(texts)) if texts else ""


def _and_others(text: str, count: int) -> str:
    others = count - 1
    return f"{text}, and {others} other{'s' if others > 1 else ''}" if others else text
