"""What methods can be told, and what it is where a recipe leaves it open."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from bitwright.core.errors import RecipeError, nearest
from bitwright.core.outlier_rule import OutlierRule
from bitwright.core.scheme import Scheme

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "float32", "bfloat16")
SITES = ("paper", "all")
AXES = ("auto", "oc", "ic")
RANGES = ("fitted", "paper")
FEW_BITS = 2
ALIGNED_BITS = 4
SMALLEST_NORM, LARGEST_NORM = 0.5, 4.0


@dataclass(frozen=True)
class Settings:
    """Settings of every method; each method says which it ``uses``.

    Of what is trained, by AdamW without weight decay: ``epochs``; ``batch_size`` segments per step; learning rates
    per step; ``schedule`` "cosine" (to zero at the last step) or "constant"; ``aug_loss`` adds the loss against the
    full-precision block on the quantized stream; ``precision`` is what a step's matrix products are computed in, "auto"
    the short dtype where the hardware is fast with it (masters, losses and what is decided by them stay in float32).

    Of transforms: ``alpha`` is SmoothQuant's migration strength, at which LET starts too; ``sites`` are those of the
    method's own "paper", or "all". Of the range: ``refine`` searches what was learned once more in closed form, where
    a method can (``lwc``); 0 epochs leave it at that. ``drift`` has closed forms (there, and ``gptq``) make good what
    the quantized blocks before have changed in a linear's input. Of AdaDim and EasyQuant: the ``axis``, "auto", "oc" or
    "ic"; None is auto for the first, the scheme's own for the second. Of GPTQ: ``damping``, the share of the mean
    diagonal that is added to the Hessian's; ``act_order``, columns by falling diagonal.

    Of EasyQuant: which weights are ``outliers`` (``core/outlier_rule.py``); ``range`` "fitted" by least squares, in
    which errors along the weights count ``alignment`` times more, or by the "paper"'s gradient descent; ``norm`` p,
    where other than 2, has it searched for the least sum of |error|^p.
    """

    epochs: int = 20
    batch_size: int = 1
    lwc_lr: float = 1e-2
    let_lr: float = 5e-3
    aug_loss: bool = False
    alpha: float = 0.5
    schedule: str = "constant"
    precision: str = "auto"
    sites: str = "paper"
    refine: bool = False
    drift: bool = False
    axis: str | None = None
    damping: float = 0.01
    act_order: bool = True
    outliers: str = "3"
    range: str = "paper"
    norm: float = 2.0
    alignment: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("lwc_lr", "let_lr"):
            if not 0 < getattr(self, key) < float("inf"):
                raise RecipeError(f"{key} is {getattr(self, key)}; a learning rate must be positive, such as 0.01")
        for key, least in (("epochs", 0), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise RecipeError(f"{key} is {getattr(self, key)}; it must be at least {least}")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha}; the migration strength is between 0 and 1")
        if not 0 < self.damping <= 1:
            raise RecipeError(f"damping is {self.damping}; it is a share of the mean diagonal, such as 0.01")
        if not 0 <= self.alignment < float("inf"):
            raise RecipeError(f"alignment is {self.alignment}; it is 0 or more, such as 16")
        if not SMALLEST_NORM <= self.norm <= LARGEST_NORM:
            raise RecipeError(f"norm is {self.norm}; it is between {SMALLEST_NORM} and {LARGEST_NORM}")
        _ = self.outlier_rule
        named = {"schedule": SCHEDULES, "precision": PRECISIONS, "sites": SITES, "axis": AXES, "range": RANGES}
        for key, known in named.items():
            if getattr(self, key) not in (known if getattr(type(self), key) else (None, *known)):
                raise RecipeError(f"there is no {key} '{getattr(self, key)}'; {nearest(getattr(self, key), known)}")

    @property
    def outlier_rule(self) -> OutlierRule | None:
        """The outliers that are asked for; None where there are to be none. Raises RecipeError."""
        return OutlierRule.parse(self.outliers)


ASKED = tuple(field.name for field in fields(Settings) if field.name != "seed")
"""The settings that are keys of a recipe under their own name."""


def paper(scheme: Scheme, closed: bool = False) -> Settings:
    """The plain settings of the methods' papers.

    OmniQuant (arXiv 2308.13137, section 4.1 and the authors' scripts): 20 epochs, batch 1, learning rates 1e-2 (LWC)
    and 5e-3 (LET), constant; 40 epochs and the augmented loss at 2 bits. Nothing in closed form, no drift made good.
    EasyQuant (arXiv 2403.02775): its gradient descent where the scheme is symmetric, as it must be for that.
    """
    few = scheme.weight.bits <= FEW_BITS
    return Settings(epochs=40 if few else 20, aug_loss=few, range="paper" if scheme.weight.symmetric else "fitted")


def ours(scheme: Scheme, closed: bool = False) -> Settings:
    """Our settings: the papers' learning rates, falling to zero along a cosine over 5 epochs, without augmented loss;
    ranges refined afterwards, drift made good. What can be found in closed form alone (``closed``) is not trained.

    Measured in docs/methods/omniquant.md.
    """
    return Settings(
        epochs=0 if closed else 5,
        schedule="cosine",
        refine=True,
        drift=True,
        range="fitted",
        alignment=alignment_at(scheme.weight.bits),
    )


def alignment_at(bits: int) -> float:
    """How many times more errors along a tile's own weights count by default; measured, docs/methods/easyquant.md."""
    return 16.0 if bits < ALIGNED_BITS else 64.0


PRESETS = {"bitwright": ours, "paper": paper}


def settle(preset: str, scheme: Scheme, seed: int, asked: Mapping[str, Any], closed: bool = False) -> Settings:
    """The preset's settings, with what a recipe asks for put in their place (None asks for nothing)."""
    if preset not in PRESETS:
        raise RecipeError(f"there are no training settings '{preset}'; {nearest(preset, PRESETS)}")
    wanted = {key: value for key, value in asked.items() if value is not None}
    if wanted.get("range") == "paper" and not scheme.weight.symmetric:
        raise RecipeError(
            f"range paper is symmetric and scheme {scheme} is not; add sym to its weights, or leave it out"
        )
    closed = closed and wanted.get("refine", True)
    settled = replace(PRESETS[preset](scheme, closed), seed=seed, **wanted)
    _refuse_idle(settled, wanted)
    return settled


def _refuse_idle(settled: Settings, wanted: Mapping[str, Any]) -> None:
    """Refuses what was asked for and what another setting leaves without effect."""
    idle = {"range paper": ["norm", "alignment"]} if settled.range == "paper" else {}
    if settled.norm != 2:
        idle |= {f"norm {settled.norm:g}": ["alignment"]}
    for other, keys in idle.items():
        for key in keys:
            if key in wanted:
                raise RecipeError(f"{key} changes nothing beside {other}; leave one of them out")
