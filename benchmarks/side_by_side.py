"""Other implementations beside Bitwright: the same model, the very same segments, the same scheme.

    python benchmarks/side_by_side.py quality MODEL --calibration VALID.txt --text TEST.txt --name rivals-en-llama \
        --python gptqmodel=ENV1/bin/python --python llmcompressor=ENV2/bin/python \
        --row gptq:W2A16g128 --row gptqmodel/gptq:W2A16g128:0:desc_act=true --row llmcompressor/gptq:W2A16g128

    python benchmarks/side_by_side.py speed MODEL --calibration VALID.txt --name rivals-speed --threads 1 \
        --python adadim=ENV3/bin/python --repository adadim=CHECKOUT \
        --row gptq:W2A16g128 --row adadim/gptq-ada:W2A16g128

A row is ``[implementation/]method:scheme[:seed[:key=value,...]]``; without an implementation it is Bitwright's. What
an implementation can do, and how its environment is made, stands in ``rivals/NAME_worker.py``; a new file there is a
new implementation. Finished rows are kept in benchmarks/results/NAME.jsonl, so a run that is stopped goes on;
NAME.md is the table, made anew.

``quality`` measures the folder that was made with ``bitwright.evaluate``: perplexity over consecutive windows, and
KL(original || quantized) in nats per token; bits per weight are of what an implementation stores, if its worker
counts them. If a rival quantizes activations too, the windows go through its own forward pass, since no folder of
its making says how. ``speed`` runs the rows in turn and counts the quantization alone, on a model that is loaded
(Bitwright reads and writes block by block, and that counts as well). Memory is the largest resident set of the whole
process, libraries included (from /proc: Linux only). ``all-heads`` copies a model into the same function without
grouped-query attention, which the authors' OmniQuant asks for if LET is trained.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from inspect import Signature, signature
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any, cast

import torch
import typer
from bench import Bench
from jaxtyping import Float, Int
from rows import OURS, Asked, Kept, Row, listed, measured_on
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitwright
from bitwright.core.progress import silent
from bitwright.core.scheme import Scheme
from bitwright.evaluation.measure import Measurement, measure
from bitwright.evaluation.windows import evaluation_windows
from bitwright.model.source import open_tokenizer

NAMES = ("implementation", "method", "scheme")
QUALITY_COLUMNS = (*NAMES, "bits per weight", "perplexity", "KL from original (nats)", "top-1 agreement")
SPEED_COLUMNS = (
    *(*NAMES, "seconds per block", "CPU seconds per block", "peak MB", "of it while quantizing"),
    *("training, ms per step", "CPU ms per step"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Run:
    """What ``quality`` and ``speed`` both ask for: rows by their names, how they are run, the name of the result."""

    bench: Bench
    asked: dict[str, Asked]
    name: str


def _run(
    *,
    model: Path,
    calibration: Annotated[str, typer.Option(help="Text to learn from.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    row: Annotated[list[str], typer.Option(help="[implementation/]method:scheme[:seed[:key=value,...]]; repeatable.")],
    python: Annotated[
        list[str] | None, typer.Option(help="IMPLEMENTATION=INTERPRETER of its environment; repeatable.")
    ] = None,
    repository: Annotated[
        list[str] | None, typer.Option(help="IMPLEMENTATION=CHECKOUT of its code; repeatable.")
    ] = None,
    samples: int = 128,
    calibration_seqlen: int = 256,
    threads: int = 1,
) -> Run:
    pythons = {OURS: sys.executable} | _paths(python)
    bench = Bench(model, calibration, samples, calibration_seqlen, pythons, _paths(repository), threads)
    return Run(bench, bench.asked(row), name)


def _with_run(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes a Run, made one that takes ``_run``'s flags before its own: typer reads the signature."""
    _, *own = signature(command).parameters.values()
    flags = signature(_run).parameters

    @wraps(command)
    def taking(**given: Any) -> None:
        run = _run(**{flag: given.pop(flag) for flag in flags})
        command(run, **given)

    together = [*flags.values(), *own]
    taking.__signature__ = Signature(together)  # type: ignore[attr-defined]
    taking.__annotations__ = {flag.name: flag.annotation for flag in together}
    return taking


@app.command()
@_with_run
def quality(
    run: Run,
    *,
    text: Annotated[str, typer.Option(help="Text to measure on; held out from calibration.")],
    seqlen: int = 512,
    windows: int = 60,
    title: str = "",
) -> None:
    """Perplexity of what each implementation made, and its KL divergence from the original."""
    bench, asked = run.bench, run.asked
    kept = Kept(run.name, bench.protocol | {"text": f"{windows} windows of {seqlen} tokens of {Path(text).name}"})
    tokens = evaluation_windows(text, open_tokenizer(bench.model), seqlen=seqlen, windows=windows).tokens
    rows = [kept.row({"row": key}, partial(_measured, bench, wanted, text, tokens)) for key, wanted in asked.items()]
    kept.write_table(
        title,
        f"Who takes text is given {kept.protocol['calibration']}, the same for all; measured on "
        f"{kept.protocol['text']}, float32 arithmetic. {measured_on(rows)}{_rivals_versions(asked, rows)}",
        QUALITY_COLUMNS,
        [_names(asked[measured["row"]]) + _quality_cells(measured) for measured in rows],
    )


@app.command()
@_with_run
def speed(run: Run, *, repetitions: int = 3, title: str = "") -> None:
    """Seconds per block and peak memory, the rows in turn, each time in a fresh process."""
    bench, asked = run.bench, run.asked
    malloc = " ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_"))
    kept = Kept(run.name, bench.protocol | {"process": f"{bench.threads} threads, {malloc or 'malloc untuned'}"})
    runs: dict[str, list[Row]] = {key: [] for key in asked}
    for repetition in range(repetitions):
        for key, wanted in asked.items():
            runs[key].append(kept.row({"row": key, "run": repetition}, partial(_timed, bench, wanted)))
    last = [measured[-1] for measured in runs.values()]
    loads = [measured["load_before"] for rows in runs.values() for measured in rows]
    kept.write_table(
        title,
        f"{kept.protocol['calibration']}; median (least to most) of {repetitions} runs, the rows in turn, each in a "
        f"process of its own; {kept.protocol['process']}; load of the machine before a run {min(loads):.1f} to "
        f"{max(loads):.1f}. Memory is the largest resident set of the whole process, and what of it came while "
        f"quantizing. {measured_on(last)}{_rivals_versions(asked, last)}",
        SPEED_COLUMNS,
        [_names(asked[key]) + _speed_cells([measured["account"] for measured in rows]) for key, rows in runs.items()],
    )


@app.command()
def all_heads(model: Path, output: Path) -> None:
    """Copy a model into the same function without grouped-query attention: every query head gets its own keys."""
    config = json.loads((model / "config.json").read_text())
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    output.mkdir()
    for path in model.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    (output / "config.json").write_text(json.dumps(config | {"num_key_value_heads": heads}, indent=2))
    tensors = {name: t for path in sorted(model.glob("*.safetensors")) for name, t in load_file(path).items()}
    for name in [name for name in tensors if ".k_proj." in name or ".v_proj." in name]:
        by_head = tensors[name].unflatten(0, (shared, -1))
        tensors[name] = by_head.repeat_interleave(heads // shared, 0).flatten(0, 1)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def _paths(given: list[str] | None) -> dict[str, str]:
    """Absolute paths by implementation. An interpreter stays the link it is: an environment is known by it."""
    for text in given or []:
        if not os.path.exists(text.partition("=")[2]):
            raise typer.BadParameter(f"'{text}' should read IMPLEMENTATION=PATH, and the path be there")
    return {name: os.path.abspath(path) for name, path in (text.split("=", 1) for text in given or [])}


def _measured(bench: Bench, asked: Asked, text: str, windows: Int[Tensor, "W T"]) -> Row:
    """What an implementation made of one row, measured, and the account of its run."""
    with TemporaryDirectory() as scratch:
        output, (count, seqlen) = Path(scratch) / "run", windows.shape
        if asked.who == OURS or Scheme.parse(asked.scheme).activations is None:
            account = bench.run(asked, output)
            where: Row = {"seqlen": seqlen, "windows": count, "reference": bench.model}
            measurement = bitwright.evaluate(output / "model", text, **where).measurement
        else:
            account = bench.run(asked, output, windows)
            measurement = _of_logits(load_file(output / "logits.safetensors")["logits"], windows, bench.model)
    measured = {
        "perplexity": measurement.perplexity,
        "kl": measurement.kl_divergence,
        "agreement": measurement.top1_agreement,
    }
    return measured | {"account": account}


def _of_logits(logits: Float[Tensor, "W T V"], windows: Int[Tensor, "W T"], original: Path) -> Measurement:
    """The measurement of a model whose logits are there already, window by window."""
    remaining = iter(logits)

    class Replay:
        device = torch.device("cpu")

        def __call__(self, *_: Any, **__: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=next(remaining)[None])

    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    return measure(cast(PreTrainedModel, Replay()), windows, reference, listener=silent)


def _timed(bench: Bench, asked: Asked) -> Row:
    """The account of one run, and the machine's load before it."""
    with TemporaryDirectory() as scratch:
        load = os.getloadavg()[0]
        return {"account": bench.run(asked, Path(scratch) / "run"), "load_before": load}


def _rivals_versions(asked: dict[str, Asked], rows: list[Row]) -> str:
    """With which versions the others ran."""
    others = {asked[row["row"]].who: listed(row["account"]["versions"]) for row in rows}
    return "".join(f" {who} with {versions}." for who, versions in others.items() if who != OURS)


def _names(asked: Asked) -> list[str]:
    return [asked.who, asked.shown, asked.scheme]


def _quality_cells(row: Row) -> list[str]:
    bits = row["account"].get("bits")
    stored = "-" if bits is None else f"{bits:.3f}"
    return [stored, f"{row['perplexity']:.2f}", f"{row['kl']:.5f}", f"{row['agreement']:.2%}"]


def _speed_cells(runs: list[Row]) -> list[str]:
    times, processor = ([run[kind] / run["blocks"] for run in runs] for kind in ("seconds", "cpu_seconds"))
    peak = median(run["peak_bytes"] for run in runs) / 1e6
    above = median(run["peak_bytes"] - run["start_bytes"] for run in runs) / 1e6
    trained = [run["training"] for run in runs if "training" in run]
    steps = [[1000 * measured[kind] / measured["steps"] for measured in trained] for kind in ("seconds", "cpu_seconds")]
    memory = f"{peak:.0f}", f"{above:.0f}"
    return [_spread(times), _spread(processor), *memory, *(_spread(values) if values else "-" for values in steps)]


def _spread(values: list[float]) -> str:
    """Median, least and most."""
    digits = 2 if max(values) < 10 else 1
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    app()
