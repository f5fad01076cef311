"""The command line: parses, calls ``api``, shows progress. Results go to standard output, everything else to error."""

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from bitwright.core.errors import RecipeError, UserError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import GRAMMAR
from bitwright.report import screens
from bitwright.report.plain import plain
from bitwright.report.progress import ProgressReport

MENDABLE, BUG, INTERRUPTED = 2, 1, 130
PLACES = ("model", "output", "calibration", "save_parameters", "load_parameters")
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE}
ISSUES = "Please report it with the lines above."

app = typer.Typer(
    help="Makes large language models small: 2 to 8 bits a weight, in formats that transformers loads.",
    add_completion=False,
    rich_markup_mode=None,  # square brackets in help texts are meant as they stand
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
WIDE = 1000  # characters; in a pipe or a file no path is to be broken into lines
out, err = Console(width=None if Console().is_terminal else WIDE), Console(stderr=True)

METHODS = (
    "omniquant, or methods joined by +, in this order: smoothquant, osplus, awq, let; adadim; lwc, pact, lsq; rtn, "
    "gptq (awq, which clips too, goes with these two alone). For example awq, adadim+gptq, let+lwc+gptq. "
    "[default: omniquant with text, else rtn]"
)
KEYS = {field.name for field in fields(Recipe)} | {"output", "save_parameters"}

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON (keys: docs/reference/json.md).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show:
        out.print(f"bitwright {version('bitwright')}", highlight=False)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def quantize(
    context: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="Folder of the full-precision model.")] = None,
    scheme: Annotated[str | None, typer.Option(help=GRAMMAR)] = None,
    method: Annotated[
        str | None,
        typer.Option(help=METHODS),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors, bitwright, dense. [default: compressed-tensors, bitwright where it must]"
        ),
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
    shard_size: Annotated[str | None, typer.Option(help="Largest weight file. [default: 5GB]")] = None,
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
        str | None, typer.Option(help="Groups of adadim: auto, oc (along the input), ic. [default: auto]")
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="gptq: share of the mean diagonal added to the Hessian. [default: 0.01]")
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option("--act-order/--no-act-order", help="gptq: columns by falling activations. [default: on]"),
    ] = None,
    save_parameters: Annotated[
        Path | None, typer.Option(help="Also write what was learned to this .safetensors file.")
    ] = None,
    load_parameters: Annotated[
        Path | None, typer.Option(help="Quantize with parameters saved before, without training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a model folder. Interrupted, the same command continues.

    Without --method, omniquant where --calibration names text and rtn where it does not. The preset omniquant is
    let+lwc with quantized activations or LayerNorms, and lwc alone for 16-bit activations on RMSNorm architectures.
    """
    from bitwright import api
    from bitwright.api.recipe_file import read_recipe

    # The parameters of this command that are keys of a recipe, as they were given.
    flags = {key: value for key, value in context.params.items() if key in KEYS}
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    written = read_recipe(recipe) if recipe else {}
    asked = _at_home(written | {key: value for key, value in flags.items() if value is not None})
    target, saved = asked.pop("output", None), asked.pop("save_parameters", None)
    if asked.get("model") is None:
        raise RecipeError("which model? Name its folder: bitwright quantize MODEL, or the key 'model' in the recipe")
    wanted = Recipe.from_mapping(asked)
    if dry_run:
        _show(api.plan(wanted, device), screens.plan, as_json)
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
            listener=listener,
        )
    _show(result, screens.result, as_json)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, original or quantized.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text to measure on: a file, a folder, or builtin. [default: builtin, none with --tasks]"),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. [default: 2048, or the model's maximum if shorter]")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows. [default: the whole text]")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The original model: adds KL divergence, top-1 agreement, and its own scores.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas: mmlu,piqa,gsm8k.")] = None,
    task_files: Annotated[
        list[Path] | None, typer.Option(help="A task file of lm-eval (YAML), or a folder of them; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task. [default: all]")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Solved examples before each question. [default: the task's own number]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once; more is faster on a GPU.")] = 1,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that the model writes (humaneval).")
    ] = False,
    answers: Annotated[
        Path | None, typer.Option(help="Keep the model's answers in this file. [default: until the run is done]")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic: float32, bfloat16, float16; auto is float32 on a CPU.")
    ] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a written folder as transformers loads it: perplexity, divergence from the original, accuracy on tasks.

    Interrupted while tasks run, the same command goes on.
    """
    from bitwright import api

    with ProgressReport(err) as listener:
        numbers = api.evaluate(
            folder,
            text,
            seqlen=seqlen,
            windows=windows,
            reference=reference,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()] if tasks else (),
            task_files=task_files or (),
            limit=limit,
            shots=shots,
            batch_size=batch_size,
            allow_code_execution=allow_code_execution,
            answers=answers,
            device=device,
            dtype=dtype,
            listener=listener,
        )
    _show(numbers, screens.evaluation, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a model, original or quantized.")],
    linears: Annotated[bool, typer.Option("--linears", help="List every linear.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a folder holds: architecture, blocks, linears, sizes, true bits per weight."""
    from bitwright import api

    _show(api.inspect(path), lambda console, found: screens.inspection(console, found, linears), as_json)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the folders here.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model at 4, 3 and 2 bits and show what it cost. Needs no download."""
    from bitwright import api

    with ProgressReport(err) as listener:
        shown = api.demo(None if output is None else os.path.expanduser(output), listener=listener)
    _show(shown, screens.demonstration, as_json)


def _at_home(asked: dict[str, Any]) -> dict[str, Any]:
    """``~`` in paths, which no shell has replaced in a recipe or in ``--output=~/x``."""
    places = {key: value for key in PLACES if isinstance(value := asked.get(key), str)}
    return asked | {key: os.path.expanduser(value) for key, value in places.items()}


def _show(found: Any, screen: Callable[[Console, Any], None], as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(asdict(found)), indent=2))  # ASCII: a path of any bytes can be printed anywhere
    else:
        screen(out, found)


class Interrupted(BaseException):
    """Ctrl-C, past the libraries that would make something else of a KeyboardInterrupt."""


def main() -> NoReturn:
    """Runs the command line: exit code 0, 2 for what a user can mend, 1 for a bug, 130 when interrupted."""
    signal.signal(signal.SIGINT, _interrupt)
    # compressed-tensors draws a bar per loaded model with tqdm, which reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show is no reason to fail
    try:
        app()
    except Interrupted:
        _fail("interrupted; quantize and evaluate --tasks, when repeated, continue where they stopped", INTERRUPTED)
    except Exception as error:
        message = _mendable(error)
        if message is not None:
            _fail(message, MENDABLE)
        traceback.print_exc()
        _fail(f"this is a bug in Bitwright {version('bitwright')}. {ISSUES}", BUG)
    sys.exit(0)


def _mendable(error: Exception) -> str | None:
    """What to tell a user who can do something about an error; None for what is ours to mend."""
    if isinstance(error, UserError):
        return str(error)
    # torch says it with a RuntimeError of its own on a GPU, and with a plain one on a CPU.
    signs = ("MemoryError", "OutOfMemoryError", "can't allocate memory")
    if any(sign in f"{type(error).__name__}: {error}" for sign in signs):
        return "out of memory; bitwright quantize --dry-run says how much a run needs"
    if isinstance(error, OSError) and error.errno in MACHINE:
        return f"the machine did not allow it: {error}; make room or check permissions, then try again"
    return None


def _interrupt(*_: object) -> NoReturn:
    raise Interrupted


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
