"""Options for the settings of all methods, derived from their declarations.

To derive them takes the methods, and they take torch, which is imported for a second or two. So the options are made
when ``quantize`` itself is called, and worker processes that it asks for are started before.
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
"""Keys under which a call of the command keeps the settings that were given, and the processes that were started."""
BEFORE = "training"
"""The option that the settings come after."""


class WithSettings(Described):
    """A command that takes the settings of all methods, beside the options of its function."""

    _settings: list[Any] | None = None

    def get_params(self, ctx: Any) -> list[Any]:
        """All options; ``--method`` tells of every method."""
        params: list[Any] = super().get_params(ctx)
        if self._settings is None:
            self._settings = _options()
            _describe_methods(params)
        at = [option.name for option in params].index(BEFORE) + 1
        return [*params[:at], *self._settings, *params[at:]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Start worker processes, then parse the arguments. The processes end if the arguments are refused."""
        from bitwright import api

        with ExitStack() as stack:
            ctx.meta[WORKERS] = stack.enter_context(api.start_workers(_workers(args)))
            rest = super().parse_args(ctx, args)
            stack.pop_all()
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Processes that nobody needed end with it."""
        with ctx.meta[WORKERS]:
            return super().invoke(ctx)


def _options() -> list[Any]:
    """An option for each setting, which keeps what it is given for ``SETTINGS``."""

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
    """The type of a setting, with its flags and its help: the methods that have it, what it is, its defaults."""
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
    """The worker processes that a run will need, as far as the arguments tell; None if they ask for none.

    A run with calibration data has none, and neither has one that writes nothing.
    """
    from bitwright.cli.recipe_file import parsed

    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--workers", "--calibration", "--recipe"):
        parser.add_argument(flag)
    parser.add_argument("--dry-run", "--help", "-h", action="store_true", dest="nothing")
    with suppress(ArgumentError, RecipeError, ValueError):  # said by whoever parses all of it
        seen, _ = parser.parse_known_args(list(args))
        recipe = parsed(Path(seen.recipe)) if seen.recipe and not seen.nothing else {}
        workers = recipe.get("workers") if seen.workers is None else int(seen.workers)
        calibration = recipe.get("calibration") if seen.calibration is None else seen.calibration
        if calibration is None and not seen.nothing and type(workers) is int:
            return workers
    return None
