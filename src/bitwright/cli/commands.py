"""The commands: each calls a function of ``api`` and shows the result."""

import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.console import err, out, show
from bitwright.cli.options import FORMATS, MEASURED_ENGINES, SHARDS, Base, Described, Device, Download, Embeddings, Json
from bitwright.cli.quantize import quantize
from bitwright.cli.settings import WithSettings
from bitwright.core.progress import Listener
from bitwright.report import engines_screen, screens
from bitwright.report.progress import ProgressReport

app = typer.Typer(
    help="Quantize large language models to 2 to 8 bits per weight, in formats that transformers and other engines "
    "load.",
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


def _fetch(asked: bool, listener: Listener, *models: Path | None) -> None:
    """Download the models that are named as on the hub and are not here, if that is asked."""
    from bitwright import api

    for model in models if asked else ():
        if model is not None:
            api.download(model, listener=listener)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, original or quantized; or its name on the hub.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on: a .txt, .jsonl, .csv or .parquet file, a folder, builtin (Python source), or a "
            "dataset of the Hugging Face hub. [default: builtin, or no text with --tasks]"
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="Field of the rows to read. [default: messages, conversations or text]"),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="model: every window as the model was trained to see text, with its BOS in front; papers: one stream "
            "of tokens, cut into windows."
        ),
    ] = "model",
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. [default: 2048, or the model's maximum if shorter]")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Number of windows. [default: the whole text]")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of the original model: adds KL divergence, top-1 agreement, and its own scores."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas: mmlu,piqa,gsm8k.")] = None,
    task_files: Annotated[
        list[Path] | None, typer.Option(help="Task file of lm-eval (YAML), or a folder of them; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of documents per task. [default: all]")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Number of solved examples before each question. [default: the task's own]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of prompts at once; more is faster on a GPU.")] = 1,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that the model writes (humaneval).")
    ] = False,
    answers: Annotated[
        Path | None,
        typer.Option(help="Keep the model's answers in this file. [default: keep them until the run is done]"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Arithmetic: float32, bfloat16, float16 or auto (float32 on a CPU, the model's own dtype on a GPU)."
        ),
    ] = "auto",
    device: Device = "auto",
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, divergence from the original, and accuracy on tasks.

    The folder is loaded as transformers loads it. If the command is interrupted while tasks run, repeat it to go on.
    """
    from bitwright import api

    with ProgressReport(err) as listener:
        _fetch(download, listener, folder, reference)
        numbers = api.evaluate(
            folder,
            text,
            text_field=text_field,
            protocol=protocol,
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
    path: Annotated[Path, typer.Argument(help="Folder of a model, original or quantized; or its name on the hub.")],
    linears: Annotated[bool, typer.Option("--linears", help="List every linear.")] = False,
    sites: Annotated[
        bool,
        typer.Option(
            "--sites",
            help="Run one block of each kind of an original model, and list which linears share an input, where "
            "channels can be scaled, and which matrices stay as they are.",
        ),
    ] = False,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Show what a folder holds: architecture, blocks, linears, sizes, bits per weight."""
    from bitwright import api

    with ProgressReport(err) as listener:
        _fetch(download, listener, path)
    result = api.inspect(path, sites=sites)
    show(result, lambda console, result: screens.inspection(console, result, linears), as_json)


@app.command(cls=Described)
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a quantized model, from any tool.")],
    format: Annotated[str, typer.Option(help=f"Format to write: {FORMATS}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder or file (gguf) to write; must not exist.")],
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy", help="Quantize weights again if the format cannot hold them exactly; the added error is shown."
        ),
    ] = False,
    embeddings: Embeddings = None,
    base: Base = None,
    shard_size: Annotated[str, typer.Option(help=SHARDS)] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of continuing.")] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized folder in another format and keep its codes.

    If the command is interrupted, repeat it to go on.
    """
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
    """Show what each engine runs, and the version with which that was checked."""
    from bitwright import api

    result = api.engines()
    if as_json:
        print(json.dumps([asdict(engine) for engine in result], indent=2))
    else:
        engines_screen.engines(out, result)


@app.command(cls=Described)
def verify(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a quantized model, .gguf file or folder of MLC-LLM, from any tool.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the original model; for a .gguf file or a folder of MLC-LLM also the quantized folder that "
            "it was made of."
        ),
    ] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits",
            help="Also run the model in transformers. A .gguf file or a folder of MLC-LLM needs --against for that.",
        ),
    ] = True,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Check that a quantized folder or file is what it claims to be.

    It must be complete and sound, take no more bytes than its bits need, and compute what its codes say. The exit code
    is 2 if a check fails, or if something that matters could not be looked at.
    """
    from bitwright import api

    with ProgressReport(err) as listener:
        _fetch(download, listener, folder, against)
        result = api.verify(folder, against, logits=logits, listener=listener)
    show(result, screens.verification, as_json)
    if not result.passed:
        raise typer.Exit(2)


@app.command(cls=Described)
def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a model, or a .gguf file.")],
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of the original model, to measure it too; for llama.cpp also a .gguf file."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help=f"Engine that runs the model: {MEASURED_ENGINES}. [default: by the kind of model]"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens to generate, at batch 1.")] = 512,
    prompt: Annotated[int, typer.Option(help="Number of tokens in the prompt.")] = 512,
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads. [default: one per usable core]")] = None,
    rounds: Annotated[int, typer.Option(help="Number of measurements of each model; the median counts.")] = 3,
    dtype: Annotated[
        str,
        typer.Option(
            help="transformers: bfloat16, float16, float32 or auto (the model's own dtype if it has 16 bits, else "
            "bfloat16)."
        ),
    ] = "auto",
    python: Annotated[
        Path | None, typer.Option(help="llama.cpp: a Python interpreter that has xllamacpp. [default: this one]")
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="llama.cpp: libllama.so of your own build, used instead of xllamacpp.")
    ] = None,
    device: Annotated[str, typer.Option(help="transformers: device to run on: auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed and memory of a model, and of the original in the same run.

    Measured are the size of the weights, the memory while running, and the tokens per second when generating and when
    reading a prompt.
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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to keep the quantized models in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model to 4, 3 and 2 bits and show what is lost. This needs no download."""
    from bitwright import api

    with ProgressReport(err) as listener:
        shown = api.demo(None if output is None else os.path.expanduser(output), listener=listener)
    show(shown, screens.demonstration, as_json)
