"""Settings that several methods have. Each is declared here once; methods inherit it."""

from dataclasses import dataclass

from bitwright.core.settings import Settings, setting

RATE = "a learning rate must be positive, such as 0.01"


@dataclass(frozen=True)
class Axis(Settings):
    """Along which dimension groups of weights go."""

    axis: str | None = setting(
        None,
        "how groups go: oc (along the input), ic (along the output), or auto (whichever is better for each linear). "
        "Without it adadim takes auto, and easyquant the groups of the scheme",
        choices=("auto", "oc", "ic"),
    )


@dataclass(frozen=True)
class Sites(Settings):
    """The sites at which a transform acts."""

    sites: str = setting("paper", "where to transform: paper (the sites of the paper) or all", choices=("paper", "all"))


@dataclass(frozen=True)
class Migration(Settings):
    """SmoothQuant's migration strength."""

    alpha: float = setting(
        0.5, "migration strength", least=0, most=1, wants="the migration strength is between 0 and 1"
    )


@dataclass(frozen=True)
class ClippingRate(Settings):
    """The learning rate of ranges."""

    lwc_lr: float = setting(1e-2, "learning rate of the range", above=0, wants=RATE)


@dataclass(frozen=True)
class Refine(Settings):
    """A search of ranges in closed form, beyond the paper."""

    refine: bool = setting(True, "search ranges in closed form (lwc after training, gptq per-IC)", paper=False)


@dataclass(frozen=True)
class Drift(Settings):
    """What closed forms do about the error that the quantized blocks before have left in a linear's input."""

    drift: bool = setting(True, "make good the error of the quantized blocks before", paper=False)
