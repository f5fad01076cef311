"""``bitwright quantize``: the flags and the recipe file become one recipe, which is planned or run."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli.console import err, show
from bitwright.cli.options import ENGINES, FORMATS, SHARDS, Base, Device, Embeddings, Json
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import GRAMMAR
from bitwright.report import screens
from bitwright.report.progress import ProgressReport

PLACES = ("model", "output", "calibration", "save_parameters", "load_parameters", "base")
METHODS = (
    "omniquant, or methods joined by +, in this order: equalize, smoothquant, osplus, awq, let; easyquant-outliers; "
    "adadim; easyquant, lwc, pact, lsq; rtn, gptq. lwc starts from the ranges of easyquant or awq; easyquant decides "
    "outliers and axis too. For example easyquant, awq, adadim+gptq, let+lwc+gptq. "
    "[default: omniquant with text, else rtn]"
)
BESIDE = ("output", "save_parameters", "workers", "max_memory")
KEYS = {field.name for field in fields(Recipe)} | set(BESIDE)


def quantize(
    context: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="Folder of the full-precision model.")] = None,
    scheme: Annotated[str | None, typer.Option(help=GRAMMAR)] = None,
    method: Annotated[
        str | None,
        typer.Option(help=METHODS),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder or file (gguf) to write; must not exist.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help=f"{FORMATS} [default: compressed-tensors, bitwright where it must]"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text: a .txt, .jsonl or .parquet file, a folder, builtin, or a dataset of the hub."),
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
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of training. [default: 5, 0 for lwc alone, which is refined; paper: 20, 40 at 2 bits]"
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Segments per step. [default: 1]")] = None,
    lwc_lr: Annotated[
        float | None, typer.Option(help="Learning rate of clipping (lwc, pact, lsq). [default: 0.01]")
    ] = None,
    let_lr: Annotated[float | None, typer.Option(help="Learning rate of let. [default: 0.005]")] = None,
    aug_loss: Annotated[
        bool | None, typer.Option("--aug-loss/--no-aug-loss", help="Augmented loss. [default: off; paper: at 2 bits]")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Migration strength of smoothquant, and where let starts. [default: 0.5]")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, or constant. [default: cosine; paper: constant]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Products of training steps: float32, bfloat16, or auto: bfloat16 where the CPU has instructions "
            "for it, the model's dtype on a GPU. [default: auto]"
        ),
    ] = None,
    sites: Annotated[
        str | None, typer.Option(help="Where let, smoothquant and osplus act: paper, or all. [default: paper]")
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine", help="Search ranges (lwc; gptq per-IC) once more. [default: on; paper: off]"
        ),
    ] = None,
    drift: Annotated[
        bool | None,
        typer.Option(
            "--drift/--no-drift", help="Make good the error of earlier blocks (refine, gptq). [default: on; paper: off]"
        ),
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option(help="Groups of adadim, easyquant: auto, oc (along the input), ic. [default: auto; oc]"),
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="gptq: share of the mean diagonal added to the Hessian. [default: 0.01]")
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option("--act-order/--no-act-order", help="gptq: columns by falling activations. [default: on]"),
    ] = None,
    outliers: Annotated[
        str | None,
        typer.Option(help="easyquant: weights kept exactly: 3 (standard deviations), 0.5%, or 0. [default: 3]"),
    ] = None,
    range: Annotated[
        str | None, typer.Option(help="easyquant: fitted, or paper (symmetric schemes). [default: fitted]")
    ] = None,
    norm: Annotated[float | None, typer.Option(help="easyquant: p, the range of least |error|^p. [default: 2]")] = None,
    alignment: Annotated[
        float | None,
        typer.Option(
            help="easyquant: errors along the weights count so much more. [default: 64; 2-3 bits: 16; paper: 0]"
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Quantize these tensors too: names with * and ?, repeatable or with commas. Methods without text."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave these tensors as they are; repeatable. Methods without text.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that share the tensors, for methods without text. [default: as many as pay]"),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="What all processes together may take, 4GB: fewer workers. Methods without text.")
    ] = None,
    save_parameters: Annotated[
        Path | None, typer.Option(help="Also write what was learned to this .safetensors file.")
    ] = None,
    load_parameters: Annotated[
        Path | None, typer.Option(help="Quantize with parameters saved before, without training.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help=f"Runs on this: {', '.join(ENGINES)}; repeatable; chooses --format."),
    ] = None,
    embeddings: Embeddings = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Quantize a model folder. Interrupted, the same command continues.

    Without --method, omniquant where --calibration names text and rtn where it does not. The preset omniquant is
    let+lwc with quantized activations or LayerNorms, and lwc alone for 16-bit activations on RMSNorm architectures.
    """
    from bitwright import api
    from bitwright.cli.recipe_file import read_recipe

    # The parameters of this command that are keys of a recipe, as they were given.
    flags = {key: value or None for key, value in context.params.items() if key in ("include", "exclude")}
    flags |= {key: value for key, value in context.params.items() if key in KEYS - flags.keys()}
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    flags["engines"] = ",".join(engine) if engine else None
    written = read_recipe(recipe) if recipe else {}
    asked = _at_home(written | {key: value for key, value in flags.items() if value is not None})
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
    with api.start_workers(wanted, workers) as pool, ProgressReport(err) as listener:
        result = api.quantize(
            wanted,
            Path(target),
            overwrite=overwrite,
            restart=restart,
            save_parameters=None if saved is None else Path(saved),
            device=device,
            workers=workers,
            max_memory=max_memory,
            pool=pool,
            listener=listener,
        )
    if api.speaks():
        show(result, screens.result, as_json)


def _at_home(asked: dict[str, Any]) -> dict[str, Any]:
    """``~`` in paths, which no shell has replaced in a recipe or in ``--output=~/x``."""
    places = {key: value for key in PLACES if isinstance(value := asked.get(key), str)}
    return asked | {key: os.path.expanduser(value) for key, value in places.items()}
