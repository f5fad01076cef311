"""The rule for which weights are outliers, as a user writes it."""

import re
from dataclasses import dataclass

from bitwright.core.errors import RecipeError

MOST = 0.05
FEWEST_DEVIATIONS = 2.0
"""Beyond two standard deviations lie 4.6 % of normally distributed weights."""
_USAGE = "write 3 (standard deviations from the mean), 0.5% (of the weights), or 0 to keep none"
_RULE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,9})?) *(%?)")


@dataclass(frozen=True)
class Bounds:
    """The bounds that a rule gives for one weight: outliers are at least ``distance`` from the ``mean``."""

    mean: float
    distance: float


@dataclass(frozen=True)
class OutlierRule:
    """The weights at least ``deviations`` standard deviations from the mean, or else the ``share`` furthest from it.

    Exactly one of the two counts: ``share`` (a fraction of a linear's weights) if ``deviations`` is None.
    """

    deviations: float | None
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "OutlierRule | None":
        """Read ``3``, ``0.5%``, or ``0``, which gives None. Raises RecipeError.

        >>> OutlierRule.parse("0.5%")
        OutlierRule(deviations=None, share=0.005)
        """
        match = _RULE.fullmatch(text.strip())
        if match is None:
            raise RecipeError(f"outliers '{text}' is no rule; {_USAGE}")
        number = float(match[1])
        if not number:
            return None
        if match[2] and number / 100 > MOST:
            raise RecipeError(
                f"outliers {text}: an outlier takes 48 bits, so more than {MOST:.0%} make no sense; {_USAGE}"
            )
        if not match[2] and number < FEWEST_DEVIATIONS:
            raise RecipeError(
                f"outliers {text}: within {number:g} standard deviations lie too few weights, and more than {MOST:.0%} "
                f"outliers make no sense at 48 bits each; {_USAGE}"
            )
        return cls(None, number / 100) if match[2] else cls(number)

    def __str__(self) -> str:
        return f"{100 * self.share:g}%" if self.deviations is None else f"{self.deviations:g}"
