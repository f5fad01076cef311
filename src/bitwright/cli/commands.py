"""The commands: each parses, calls ``api`` and shows what came of it."""

import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.console import err, out, show
from bitwright.cli.options import FORMATS, MEASURED_ENGINES, SHARDS, Base, Described, Device, Embeddings, Json
from bitwright.cli.quantize import quantize
from bitwright.cli.settings import WithSettings
from bitwright.report import engines_screen, screens
from bitwright.report.progress import ProgressReport

app = typer.Typer(
    help="Makes large language models small: 2 to 8 bits a weight, in formats that transformers loads.",
    add_completion=False,
    rich_markup_mode=None,  # square brackets in help texts are meant as they stand
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    print_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if print_version:
        out.print(f"bitwright {version('bitwright')}", highlight=False)
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command(cls=WithSettings)(quantize)


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
    show(numbers, screens.evaluation, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a model, original or quantized.")],
    linears: Annotated[bool, typer.Option("--linears", help="List every linear.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a folder holds: architecture, blocks, linears, sizes, true bits per weight."""
    from bitwright import api

    show(api.inspect(path), lambda console, result: screens.inspection(console, result, linears), as_json)


@app.command(cls=Described)
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a quantized model, whoever quantized it.")],
    format: Annotated[str, typer.Option(help=f"{FORMATS}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder or file to write; must not exist.")],
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Quantize weights that the format cannot hold once more; says what it adds.")
    ] = False,
    embeddings: Embeddings = None,
    base: Base = None,
    shard_size: Annotated[str, typer.Option(help=SHARDS)] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of continuing.")] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized folder in another format, its codes kept. Interrupted, the same command continues."""
    from bitwright import api

    with ProgressReport(err) as listener:
        result = api.export(
            folder,
            output,
            format=format,
            lossy=lossy,
            embeddings=embeddings,
            base=base,
            shard_size=shard_size,
            overwrite=overwrite,
            restart=restart,
            listener=listener,
        )
    show(result, screens.exported, as_json)


@app.command()
def engines(as_json: Json = False) -> None:
    """Show what each engine runs, and with which version of it that was looked at."""
    from bitwright import api

    result = api.engines()
    if as_json:
        print(json.dumps([asdict(engine) for engine in result], indent=2))
    else:
        engines_screen.engines(out, result)


@app.command(cls=Described)
def verify(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a quantized model, .gguf file or MLC-LLM's folder, whoever wrote it.")
    ],
    against: Annotated[
        Path | None, typer.Option(help="The original model; of a file also the quantized folder it was made of.")
    ] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits",
            help="Run the model too, as transformers loads it; of a file, its weights in the config of --against.",
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Check that a quantized folder or file is what it claims to be. Exit code 2 if it is not.

    It must be complete, sound, no larger than its bits, and compute what its codes say.
    """
    from bitwright import api

    with ProgressReport(err) as listener:
        result = api.verify(folder, against, logits=logits, listener=listener)
    show(result, screens.verification, as_json)
    if not result.passed:
        raise typer.Exit(2)


@app.command(cls=Described)
def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a model, or a .gguf file.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The original, measured in turn with it; for llama.cpp a .gguf file or a folder."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help=f"{MEASURED_ENGINES}. [default: what runs this kind of model]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate, at batch 1.")] = 512,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is read.")] = 512,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU. [default: all that it may use]")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is measured; the median counts.")] = 3,
    dtype: Annotated[
        str, typer.Option(help="transformers: bfloat16, float16, float32; auto is the checkpoint's own 16 bits.")
    ] = "auto",
    python: Annotated[
        Path | None, typer.Option(help="llama.cpp: an interpreter whose environment has xllamacpp. [default: this one]")
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="llama.cpp: the libllama.so of a build of your own, in xllamacpp's place.")
    ] = None,
    device: Annotated[str, typer.Option(help="transformers: auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed and memory, the original beside it in the same run.

    That is weights, running memory, tokens per second when generating and when reading a prompt.
    """
    from bitwright import api

    with ProgressReport(err) as listener:
        result = api.bench(
            model,
            against,
            engine=engine,
            tokens=tokens,
            prompt=prompt,
            threads=threads,
            rounds=rounds,
            device=device,
            dtype=dtype,
            python=python,
            library=library,
            listener=listener,
        )
    show(result, screens.bench, as_json)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the folders here.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model at 4, 3 and 2 bits and show what it cost. Needs no download."""
    from bitwright import api

    with ProgressReport(err) as listener:
        shown = api.demo(None if output is None else os.path.expanduser(output), listener=listener)
    show(shown, screens.demonstration, as_json)
