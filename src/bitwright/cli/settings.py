"""Options for the settings of all methods, made from their declarations.

They need the methods, and those need torch, whose import takes a second or two. So the options are made only when
``quantize`` itself is called, and its worker processes are started before that.
"""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from bitwright.cli.options import Described
from bitwright.core.errors import RecipeError
from bitwright.core.settings import Known, known_settings

SETTINGS, WORKERS = "bitwright.settings", "bitwright.workers"
"""Keys of the call's context: the settings that were given, and the worker processes that were started."""
BEFORE = "training"
"""The option after which the settings stand."""


class WithSettings(Described):
    """A command whose options are those of its function and the settings of all methods."""

    _settings: list[Any] | None = None

    def get_params(self, ctx: Any) -> list[Any]:
        """All options, with every method in the help of ``--method``."""
        params: list[Any] = super().get_params(ctx)
        if self._settings is None:
            self._settings = _options()
            _describe_methods(params)
        at = [option.name for option in params].index(BEFORE) + 1
        return [*params[:at], *self._settings, *params[at:]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Start worker processes, then parse the arguments. If the arguments are refused, the processes end."""
        from bitwright import api

        with ExitStack() as stack:
            ctx.meta[WORKERS] = stack.enter_context(api.start_workers(_workers(args)))
            rest = super().parse_args(ctx, args)
            stack.pop_all()
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and end the processes that nobody took."""
        with ctx.meta[WORKERS]:
            return super().invoke(ctx)


def _options() -> list[Any]:
    """Make an option for each setting; its value is kept in the context under ``SETTINGS``."""

    def settings(**_: Any) -> None:
        """Take every setting."""

    hints = {key: _annotation(key, known) for key, known in known_settings().items()}
    parameters = [Parameter(key, Parameter.KEYWORD_ONLY, default=None, annotation=hints[key]) for key in hints]
    settings.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    settings.__annotations__ = hints
    app = typer.Typer(add_completion=False)
    app.command()(settings)
    options: list[Any] = typer.main.get_command(app).params
    for option in options:
        option.expose_value, option.callback = False, _keep
    return options


def _annotation(key: str, known: Known) -> Any:
    """The type of a setting, with its flags and its help: its methods, its meaning, its defaults."""
    kind: Any = next(kind for kind in known.setting.kinds if kind is not type(None))
    name = key.replace("_", "-")
    default = known.setting.shown_default()
    help = f"{', '.join(known.methods)}: {known.setting.help}.{f' [default: {default}]' if default else ''}"
    return Annotated[kind | None, typer.Option(f"--{name}/--no-{name}" if kind is bool else f"--{name}", help=help)]


def _keep(context: Any, option: Any, value: Any) -> Any:
    if value is not None:
        context.meta.setdefault(SETTINGS, {})[option.name] = value
    return value


def _describe_methods(params: Sequence[Any]) -> None:
    from bitwright import api

    for option in params:
        if option.name == "method":
            option.help = api.describe_methods()


def _workers(args: Sequence[str]) -> int | None:
    """The number of worker processes that the arguments ask for; None if they ask for none.

    A run with calibration data has none, and a run that writes nothing has none.
    """
    from bitwright.cli.recipe_file import parsed

    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--workers", "--calibration", "--recipe"):
        parser.add_argument(flag)
    parser.add_argument("--dry-run", "--help", "-h", action="store_true", dest="nothing")
    with suppress(ArgumentError, RecipeError, ValueError):  # reported when all of it is parsed
        seen, _ = parser.parse_known_args(list(args))
        recipe = parsed(Path(seen.recipe)) if seen.recipe and not seen.nothing else {}
        workers = recipe.get("workers") if seen.workers is None else int(seen.workers)
        calibration = recipe.get("calibration") if seen.calibration is None else seen.calibration
        if calibration is None and not seen.nothing and type(workers) is int:
            return workers
    return None
