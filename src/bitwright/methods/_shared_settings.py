"""Settings that several methods share. Each is declared once, here, and methods inherit it."""

from dataclasses import dataclass

from bitwright.core.settings import Settings, setting

RATE = "a learning rate must be positive, such as 0.01"


@dataclass(frozen=True)
class Axis(Settings):
    """The dimension along which groups of weights go."""

    axis: str | None = setting(
        None,
        "direction of groups: oc (along the input), ic (along the output), or auto (the better for each linear). "
        "Without it, adadim takes auto, and easyquant the scheme's groups",
        choices=("auto", "oc", "ic"),
    )


@dataclass(frozen=True)
class Sites(Settings):
    """The sites at which a transform acts."""

    sites: str = setting("paper", "sites to transform: paper (those of the paper) or all", choices=("paper", "all"))


@dataclass(frozen=True)
class Migration(Settings):
    """SmoothQuant's migration strength."""

    alpha: float = setting(
        0.5,
        "migration strength: how far difficulty moves from activations (0) into weights (1)",
        least=0,
        most=1,
        wants="the migration strength is between 0 and 1",
    )


@dataclass(frozen=True)
class ClippingRate(Settings):
    """The learning rate of ranges."""

    lwc_lr: float = setting(1e-2, "learning rate of ranges", above=0, wants=RATE)


@dataclass(frozen=True)
class Refine(Settings):
    """A search of ranges in closed form, beyond the paper."""

    refine: bool = setting(
        True, "search ranges too (lwc after training, gptq if groups go along the output)", paper=False
    )


@dataclass(frozen=True)
class Drift(Settings):
    """Whether closed forms compensate the error that earlier quantized blocks left in a linear's input."""

    drift: bool = setting(True, "compensate the errors of earlier quantized blocks", paper=False)
