"""``bitwright quantize``: make one recipe of the flags and the recipe file, and plan or run it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli.console import err, show
from bitwright.cli.options import BESIDE, ENGINES, FORMATS, SHARDS, Base, Device, Download, Embeddings, Json
from bitwright.cli.settings import SETTINGS, WORKERS
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import GRAMMAR
from bitwright.report import screens
from bitwright.report.progress import ProgressReport

PLACES = ("model", "output", "calibration", "save_parameters", "load_parameters", "allocation", "base")
ALONE = "Only without calibration data."


def quantize(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(help="Folder of the original model, or its name on the Hugging Face hub.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help=f"Bits of weights, activations and KV cache, and groups: {GRAMMAR}")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Methods.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder or file (gguf) to write; must not exist.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help=f"Format to write: {FORMATS}. [default: compressed-tensors if it fits, else bitwright]"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: a .txt, .jsonl, .csv or .parquet file, a folder, mix (comes with Bitwright: chats, "
            "code, prose, several languages), builtin (Python source), or a dataset of the Hugging Face hub. Several "
            "with their shares: a.jsonl:2,b.txt:1. Rows with messages or conversations are rendered with the model's "
            "chat template."
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="Field of the rows to read. [default: messages, conversations or text]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of calibration segments. [default: 128]")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per segment. [default: 2048, or the model's maximum if shorter]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is random. [default: 0]")] = None,
    all_experts: Annotated[
        bool | None,
        typer.Option(
            "--all-experts/--no-all-experts",
            help="Show every calibration token to every expert, not only to those that it is routed to. [default: no]",
        ),
    ] = None,
    quantize_lm_head: Annotated[
        bool | None,
        typer.Option("--quantize-lm-head/--no-quantize-lm-head", help="Quantize the output layer too. [default: no]"),
    ] = None,
    shard_size: Annotated[str | None, typer.Option(help=f"{SHARDS} [default: 5GB]")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with these flags as keys; flags on the command line win.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of continuing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    device: Device = "auto",
    training: Annotated[
        str | None,
        typer.Option(
            help="Defaults of the methods' settings: bitwright, or paper (as in the papers). [default: bitwright]"
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Quantize these tensors too: names, also with * and ?, separated by commas; repeatable. {ALONE}"
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave these tensors in full precision: names, also with * and ?, separated by commas; repeatable."
        ),
    ] = None,
    scheme_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="Give the linears that fit a pattern their own scheme, such as '*.down_proj=W8A16g128'; repeatable.",
        ),
    ] = None,
    allocation: Annotated[
        list[Path] | None,
        typer.Option(help="Take the schemes of linears from this file, such as the allocation.json of another run."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help=f"Number of processes. {ALONE} [default: one per core; fewer for small models]"),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help=f"Memory limit of all processes together, such as 4GB. {ALONE}")
    ] = None,
    save_parameters: Annotated[
        Path | None, typer.Option(help="Also write the learned parameters to this .safetensors file.")
    ] = None,
    load_parameters: Annotated[
        Path | None, typer.Option(help="Quantize with the parameters in this file, without training.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help=f"Engine that will run the result: {ENGINES}; repeatable. It chooses the format."),
    ] = None,
    embeddings: Embeddings = None,
    base: Base = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Quantize a model folder. If the command is interrupted, repeat it to go on."""
    from bitwright import api

    asked = _asked(context.params, context.meta.get(SETTINGS, {}))
    target, saved, workers, max_memory = (asked.pop(key, None) for key in BESIDE)
    if not isinstance(workers, int | None) or isinstance(workers, bool):
        raise RecipeError(f"workers is {workers!r}; it takes a whole number")
    max_memory = None if max_memory is None else str(max_memory)
    if asked.get("model") is None:
        raise RecipeError("which model? Name its folder: bitwright quantize MODEL, or the key 'model' in the recipe")
    wanted = Recipe.from_mapping(asked)
    if download:
        with ProgressReport(err) as listener:
            api.download(wanted.model, listener=listener)
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
    """The keys of the recipe file and of the flags; a flag takes precedence over the file."""
    keys = (*Recipe.keys(), *BESIDE)
    flags = {key: value for key, value in options.items() if key in keys} | dict(settings)
    flags |= {key: options[key] or None for key in ("include", "exclude", "scheme_for")}
    flags["engines"] = ",".join(options["engine"]) if options["engine"] else None
    flags["allocation"] = _one_file(options["allocation"] or [])
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    written = _written(options["recipe"]) if options["recipe"] else {}
    return _at_home(written | {key: value for key, value in flags.items() if value is not None})


def _one_file(allocations: Sequence[Path]) -> Path | None:
    """The file of --allocation. Raises RecipeError if there are several."""
    if len(allocations) > 1:
        raise RecipeError(
            f"--allocation is given {len(allocations)} times ({', '.join(map(str, allocations))}) and takes one file; "
            "say the schemes of further linears with --scheme-for"
        )
    return allocations[0] if allocations else None


def _written(path: Path) -> dict[str, Any]:
    from bitwright.cli.recipe_file import read_recipe  # it imports a YAML parser, which most calls do not need

    return read_recipe(path)


def _at_home(asked: dict[str, Any]) -> dict[str, Any]:
    """Replace ``~`` in paths; a shell does not do so in a recipe or in ``--output=~/x``."""
    places = {key: value for key in PLACES if isinstance(value := asked.get(key), str)}
    return asked | {key: os.path.expanduser(value) for key, value in places.items()}
