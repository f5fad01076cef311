"""``bitwright quantize``: the flags and the recipe file become one recipe, which is planned or run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli.console import err, show
from bitwright.cli.options import BESIDE, ENGINES, FORMATS, SHARDS, Base, Device, Embeddings, Json
from bitwright.cli.settings import SETTINGS, WORKERS
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import GRAMMAR
from bitwright.report import screens
from bitwright.report.progress import ProgressReport

PLACES = ("model", "output", "calibration", "save_parameters", "load_parameters", "allocation", "base")
ALONE = "For methods without calibration data."


def quantize(
    context: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="Folder of the full-precision model.")] = None,
    scheme: Annotated[str | None, typer.Option(help=GRAMMAR)] = None,
    method: Annotated[str | None, typer.Option(help="The methods.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder or file (gguf) to write; must not exist.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help=f"{FORMATS}. [default: compressed-tensors, bitwright if it must]"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: a .txt, .jsonl or .parquet file, a folder, builtin, or a dataset of the hub."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration segments. [default: 128]")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per segment. [default: 2048, or the model's maximum if shorter]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn. [default: 0]")] = None,
    quantize_lm_head: Annotated[
        bool | None,
        typer.Option("--quantize-lm-head/--no-quantize-lm-head", help="Quantize the output layer too. [default: no]"),
    ] = None,
    shard_size: Annotated[str | None, typer.Option(help=f"{SHARDS} [default: 5GB]")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with the same keys as these flags; flags win.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of continuing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    device: Device = "auto",
    training: Annotated[
        str | None, typer.Option(help="bitwright, or paper: the plain settings of the papers. [default: bitwright]")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help=f"Quantize these tensors too: names with * and ?, repeatable or with commas. {ALONE}"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave these tensors in full precision; repeatable or with commas.")
    ] = None,
    scheme_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="A scheme of their own for the linears that a pattern fits, '*.down_proj=W8A16g128'; repeatable.",
        ),
    ] = None,
    allocation: Annotated[
        Path | None,
        typer.Option(help="The scheme of every linear from this file, the allocation.json of a run for instance."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help=f"Processes that share the tensors. {ALONE} [default: as many as pay]")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help=f"What all processes together may take, 4GB: fewer workers. {ALONE}")
    ] = None,
    save_parameters: Annotated[
        Path | None, typer.Option(help="Also write what was learned to this .safetensors file.")
    ] = None,
    load_parameters: Annotated[
        Path | None, typer.Option(help="Quantize with parameters saved before, without training.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help=f"Runs on this: {ENGINES}; repeatable; chooses --format."),
    ] = None,
    embeddings: Embeddings = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Quantize a model folder. Interrupted, the same command continues."""
    from bitwright import api

    asked = _asked(context.params, context.meta.get(SETTINGS, {}))
    target, saved, workers, max_memory = (asked.pop(key, None) for key in BESIDE)
    if not isinstance(workers, int | None) or isinstance(workers, bool):
        raise RecipeError(f"workers is {workers!r}; it takes a whole number")
    max_memory = None if max_memory is None else str(max_memory)
    if asked.get("model") is None:
        raise RecipeError("which model? Name its folder: bitwright quantize MODEL, or the key 'model' in the recipe")
    wanted = Recipe.from_mapping(asked)
    if dry_run:
        planned = api.plan(wanted, device, workers, max_memory)
        if api.speaks():
            show(planned, screens.plan, as_json)
        return
    if target is None:
        raise RecipeError("where should the result go? Give --output DIR, or the key 'output' in the recipe")
    with ProgressReport(err) as listener:
        result = api.quantize(
            wanted,
            Path(target),
            overwrite=overwrite,
            restart=restart,
            save_parameters=None if saved is None else Path(saved),
            device=device,
            workers=workers,
            max_memory=max_memory,
            pool=context.meta[WORKERS],
            listener=listener,
        )
    if api.speaks():
        show(result, screens.result, as_json)


def _asked(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the recipe file and of the flags, which win."""
    keys = (*Recipe.keys(), *BESIDE)
    flags = {key: value for key, value in options.items() if key in keys} | dict(settings)
    flags |= {key: options[key] or None for key in ("include", "exclude", "scheme_for")}
    flags["engines"] = ",".join(options["engine"]) if options["engine"] else None
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    written = _written(options["recipe"]) if options["recipe"] else {}
    return _at_home(written | {key: value for key, value in flags.items() if value is not None})


def _written(path: Path) -> dict[str, Any]:
    from bitwright.cli.recipe_file import read_recipe  # with a parser that most calls do without

    return read_recipe(path)


def _at_home(asked: dict[str, Any]) -> dict[str, Any]:
    """Replace ``~`` in paths, which no shell has done in a recipe or in ``--output=~/x``."""
    places = {key: value for key in PLACES if isinstance(value := asked.get(key), str)}
    return asked | {key: os.path.expanduser(value) for key, value in places.items()}
