"""The authors' OmniQuant beside Bitwright: the same model, the same segments, the same settings.

    python benchmarks/omniquant_reference.py speed MODEL --calibration VALID.txt --threads 2 \
        --repository CHECKOUT --python REFERENCE/bin/python --name omniquant-reference-speed \
        --row lwc:W2A16g128:0:epochs=2 --row let+lwc:W4A4:0:epochs=2

    python benchmarks/omniquant_reference.py quality MODEL --calibration VALID.txt --text TEST.txt \
        --repository CHECKOUT --python REFERENCE/bin/python --name omniquant-reference-en-llama \
        --row lwc:W2A16g128 --row lwc:W3A16 --row lwc:W3A16g128:0:epochs=10

CHECKOUT is a clone of github.com/OpenGVLab/OmniQuant, REFERENCE an environment for it; its decoder layers fit
transformers 4.31 and not much newer ones:

    python3.11 -m venv REFERENCE
    REFERENCE/bin/pip install torch==2.13.0 transformers==4.31.0 "numpy<2" safetensors termcolor tqdm

A row is ``method:scheme[:seed[:key=value,key=value]]`` as in quality.py; where it says nothing, the settings are the
paper's (``core/settings.py``). The reference cannot do LET under grouped-query attention: for rows with LET there is a
copy of the model in which every query head has a key-value head of its own, which is the same function. Every finished
row is kept in benchmarks/results/NAME.jsonl, so a run that is stopped goes on; NAME.md is the table, made anew.

``speed`` runs both sides in turn, each time in a fresh process, and counts training alone: the epoch loops, divided by
blocks x segments x epochs. Memory is the whole process's, libraries included (from /proc: Linux only). ``quality``
measures the reference; Bitwright with the same settings is ``quality.py --row lwc:W2A16g128:0:training=paper``. Weights
alone are measured from the folder that is written; where activations are quantized too, from the logits of the
reference's own forward pass, since no folder of its making says how. It keeps scales in float32, Bitwright in the
model's dtype.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic, process_time
from types import SimpleNamespace
from typing import Annotated, Any, cast

import torch
import typer
import yaml
from jaxtyping import Float, Int
from rivals import omniquant_worker
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitwright
from bitwright.api.job import Job, prepare
from bitwright.api.source import text_of, tokenize
from bitwright.core.progress import silent
from bitwright.core.scheme import FULL, UNQUANTIZED_BITS, Grid
from bitwright.evaluation.measure import Measurement, measure
from bitwright.evaluation.windows import consecutive
from bitwright.stream.train import Trainer

RESULTS = Path(__file__).parent / "results"
REFERENCE, BITWRIGHT = "reference", "bitwright"
METHODS = ("lwc", "let+lwc")
LIBRARIES = ("bitwright", "torch", "transformers")
SPEED_COLUMNS = (
    *("reference, ms", "Bitwright, ms", "ratio"),
    *("reference, CPU ms", "Bitwright, CPU ms", "ratio"),
    *("reference, peak MB", "Bitwright, peak MB"),
)
Row = dict[str, Any]
Calibration = Annotated[str, typer.Option(help="Text to learn from.")]
Checkout = Annotated[Path, typer.Option(help="Clone of the authors' repository.")]
Interpreter = Annotated[Path, typer.Option(help="Interpreter of the reference's environment.")]
Name = Annotated[str, typer.Option(help="Name of the result files.")]
Rows = Annotated[list[str], typer.Option(help="method:scheme[:seed[:key=value,...]]; repeatable.")]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Bench:
    """What all runs have in common. ``threads`` are torch's in the processes that are started."""

    model: Path
    calibration: str
    samples: int
    calibration_seqlen: int
    repository: Path
    python: Path
    threads: int

    def job(self, key: str, scratch: Path) -> Job:
        """A row made ready to run, with the paper's settings where it says nothing else."""
        method, scheme, seed, settings = _parts(key)
        job = prepare(
            bitwright.Recipe(
                model=str(_with_all_heads(self.model, scratch / "expanded") if "let" in method else self.model),
                scheme=scheme,
                method=method,
                calibration=self.calibration,
                samples=self.samples,
                seqlen=self.calibration_seqlen,
                seed=seed,
                training="paper",
                **settings,
            )
        )
        _refuse_what_the_reference_cannot(job)
        return job

    def run(self, side: str, job: Job, output: Path, windows: Int[Tensor, "W T"] | None = None) -> Row:
        """One run in a process of its own, and its account. OUTPUT/model is what it made."""
        output.mkdir()
        command = self._reference(job, output, windows) if side == REFERENCE else self._bitwright(job, output)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([str(part) for part in command], check=True, env=environment, stdout=subprocess.DEVNULL)
        account: Row = json.loads((output / "account.json").read_text())
        return account

    def _reference(self, job: Job, output: Path, windows: Int[Tensor, "W T"] | None) -> list[object]:
        """The worker's command line, with the very segments that Bitwright draws."""
        command = [self.python, omniquant_worker.__file__, "--repository", self.repository, *_flags(job)]
        for name, tokens in (("segments", job.tokens), ("windows", windows)):
            if tokens is not None:
                save_file({"tokens": tokens.contiguous()}, output / f"{name}.safetensors")
                command += [f"--{name}", output / f"{name}.safetensors"]
        return [*command, "--model", job.recipe.model, "--output", output]

    def _bitwright(self, job: Job, output: Path) -> list[object]:
        """This script's own command line for one run of Bitwright."""
        (output / "recipe.json").write_text(json.dumps(job.recipe.as_dict()))
        return [sys.executable, __file__, "run-bitwright", output / "recipe.json", output]


@app.command()
def speed(
    model: Path,
    calibration: Calibration,
    repository: Checkout,
    python: Interpreter,
    name: Name,
    row: Rows,
    samples: int = 64,
    calibration_seqlen: int = 256,
    threads: int = 2,
    repetitions: int = 3,
) -> None:
    """Milliseconds of training and peak memory, both sides in turn."""
    bench = Bench(model, calibration, samples, calibration_seqlen, repository, python, threads)
    malloc = " ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_"))
    protocol = {
        "calibration": f"{samples} segments of {calibration_seqlen} tokens of {Path(calibration).name}",
        "runs": f"{repetitions} runs of each side, {threads} threads, {malloc or 'malloc untuned'}",
    }
    done = _measure_missing(name, protocol, row, lambda key: _timed(bench, key, repetitions))
    _write_table(
        name,
        f"{protocol['calibration']}; median (least to most) of {protocol['runs']}. Training alone, in milliseconds per "
        "block, segment and epoch, on the clock and of processor time; memory is the largest resident set of the whole "
        "process.",
        ("row", *SPEED_COLUMNS),
        done,
        _speed_cells,
    )


@app.command()
def quality(
    model: Path,
    text: Annotated[str, typer.Option(help="Text to measure on; held out from calibration.")],
    calibration: Calibration,
    repository: Checkout,
    python: Interpreter,
    name: Name,
    row: Rows,
    samples: int = 128,
    calibration_seqlen: int = 256,
    seqlen: int = 512,
    windows: int = 60,
    threads: int = 1,
) -> None:
    """Perplexity of what the reference made, and its KL divergence from the original."""
    bench = Bench(model, calibration, samples, calibration_seqlen, repository, python, threads)
    protocol = {
        "calibration": f"{samples} segments of {calibration_seqlen} tokens of {Path(calibration).name}",
        "text": f"{windows} windows of {seqlen} tokens of {Path(text).name}",
    }
    tokens = consecutive(tokenize(model, text_of(text, "evaluation")), seqlen, windows, text)
    done = _measure_missing(name, protocol, row, lambda key: _measured(bench, key, text, tokens))
    _write_table(
        name,
        f"The authors' code, trained on {protocol['calibration']}, measured on {protocol['text']}, float32 arithmetic.",
        ("row", "perplexity", "KL from original (nats)", "top-1 agreement"),
        done,
        _quality_cells,
    )


@app.command(hidden=True)
def run_bitwright(recipe: Path, output: Path) -> None:
    """One run of Bitwright, timed: the process that ``Bench.run`` starts."""
    clock = _time_training()
    bitwright.quantize(bitwright.Recipe(**json.loads(recipe.read_text())), output / "model")
    account = clock | {"peak_bytes": omniquant_worker.peak_bytes(), "threads": torch.get_num_threads()}
    (output / "account.json").write_text(json.dumps(account))


def _time_training() -> Row:
    """From now on counts the trainer's steps, and the seconds of its epochs without the measuring around them."""
    clock: Row = {"seconds": 0.0, "cpu_seconds": 0.0, "steps": 0}
    train, step = Trainer._train, Trainer._step

    def timed(trainer: Trainer) -> None:
        start, start_cpu = monotonic(), process_time()
        train(trainer)
        clock["seconds"] += monotonic() - start
        clock["cpu_seconds"] += process_time() - start_cpu

    def counted(trainer: Trainer, *args: Any) -> Tensor:
        clock["steps"] += 1
        return step(trainer, *args)

    Trainer._train, Trainer._step = timed, counted  # type: ignore[assignment, method-assign]
    return clock


def _parts(key: str) -> tuple[str, str, int, Row]:
    """Method, scheme, seed and settings of a row."""
    method, scheme, seed, settings = (key.split(":") + ["0", ""][key.count(":") - 1 :])[:4]
    pairs = [pair.split("=") for pair in settings.split(",") if pair]
    return method, scheme, int(seed), {name: yaml.safe_load(value) for name, value in pairs}


def _flags(job: Job) -> list[object]:
    """A job's settings as the worker takes them."""
    training, scheme = job.settings, job.scheme
    flags: list[object] = ["--wbits", scheme.weight.bits, "--abits", scheme.activation_bits or UNQUANTIZED_BITS]
    for key in ("epochs", "lwc_lr", "let_lr", "alpha", "seed"):
        flags += [f"--{key.replace('_', '-')}", getattr(training, key)]
    if scheme.tile.in_ != FULL:
        flags += ["--group-size", scheme.tile.in_]
    return flags + ["--aug-loss"] * training.aug_loss + ["--let"] * ("let" in job.method)


def _refuse_what_the_reference_cannot(job: Job) -> None:
    training, scheme = job.settings, job.scheme
    plain = replace(training, schedule="constant", sites="paper", batch_size=1, refine=False)
    possible = plain, replace(scheme, weight=Grid(scheme.weight.bits), kv_bits=None)
    if job.method not in METHODS or training.epochs < 1 or (training, scheme) != possible:
        raise typer.BadParameter(
            f"{job.method} {scheme}, {training}: what both sides can do is lwc or let+lwc, asymmetric weights, keys "
            "and values of the activations' bits, a constant schedule, the paper's sites, batch 1, and training alone"
        )


def _with_all_heads(model: Path, output: Path) -> Path:
    """The same function without grouped-query attention: every query head gets a copy of its key-value head."""
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
    return output


def _timed(bench: Bench, key: str, repetitions: int) -> Row:
    """The accounts of all runs, and the machine's load before the first."""
    runs: dict[str, list[Row]] = {REFERENCE: [], BITWRIGHT: []}
    load = os.getloadavg()[0]
    with TemporaryDirectory() as scratch:
        job = bench.job(key, Path(scratch))
        for repetition in range(repetitions):
            for side, accounts in runs.items():
                accounts.append(bench.run(side, job, Path(scratch) / f"{side}-{repetition}"))
    return runs | {"load_before": load}


def _measured(bench: Bench, key: str, text: str, windows: Int[Tensor, "W T"]) -> Row:
    """What the reference made of one row, measured, and the account of its run."""
    with TemporaryDirectory() as scratch:
        output, job = Path(scratch) / REFERENCE, bench.job(key, Path(scratch))
        count, seqlen = windows.shape
        if job.scheme.activations is None:
            account = bench.run(REFERENCE, job, output)
            where: Row = {"seqlen": seqlen, "windows": count, "reference": bench.model}
            found = bitwright.evaluate(output / "model", text, **where).measurement
        else:
            account = bench.run(REFERENCE, job, output, windows)
            found = _of_logits(load_file(output / "logits.safetensors")["logits"], windows, bench.model)
    measured = {"perplexity": found.perplexity, "kl": found.kl_divergence, "agreement": found.top1_agreement}
    return measured | {REFERENCE: [account]}


def _of_logits(logits: Float[Tensor, "W T V"], windows: Int[Tensor, "W T"], original: Path) -> Measurement:
    """The measurement of a model whose logits are there already, window by window."""
    remaining = iter(logits)

    class Replay:
        device = torch.device("cpu")

        def __call__(self, *_: Any, **__: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=next(remaining)[None])

    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    return measure(cast(PreTrainedModel, Replay()), windows, reference, listener=silent)


def _measure_missing(name: str, protocol: Row, keys: list[str], measured: Callable[[str], Row]) -> list[Row]:
    """The rows asked for, in order; each new one is written down at once."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["row"]: row for row in found if row["protocol"] == protocol}
    for key in keys:
        if key not in done:
            done[key] = {"row": key, "protocol": protocol} | measured(key) | _machine()
            with path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(done[key])
    return [done[key] for key in keys]


def _machine() -> Row:
    return {
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _write_table(
    name: str, protocol: str, columns: tuple[str, ...], rows: list[Row], cells: Callable[[Row], list[str]]
) -> None:
    newest = max(rows, key=lambda row: row["date"])
    ours, theirs = (
        ", ".join(f"{library} {number}" for library, number in versions.items())
        for versions in (newest["versions"], newest[REFERENCE][0]["versions"])
    )
    lines = [
        f"# {name}",
        "",
        f"{protocol} Measured {newest['date']} on {newest['hardware']}; {ours}; the reference with {theirs}.",
        "",
        *("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns))),
        *("| " + " | ".join([_shown(row["row"]), *cells(row)]) + " |" for row in rows),
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def _shown(key: str) -> str:
    method, scheme, seed, settings = _parts(key)
    return ", ".join([f"{method} {scheme}", f"seed {seed}", *(f"{name} {value}" for name, value in settings.items())])


def _speed_cells(row: Row) -> list[str]:
    sides = [row[side] for side in (REFERENCE, BITWRIGHT)]
    times, processor = (
        [[1000 * run[kind] / run["steps"] for run in runs] for runs in sides] for kind in ("seconds", "cpu_seconds")
    )
    peaks = [median(run["peak_bytes"] for run in runs) / 1e6 for runs in sides]
    return [*_compared(times), *_compared(processor), *(f"{peak:.0f}" for peak in peaks)]


def _compared(times: list[list[float]]) -> list[str]:
    """Both sides' milliseconds, and how many times as many the reference takes."""
    shown = [f"{median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})" for ms in times]
    return [*shown, f"{median(times[0]) / median(times[1]):.2f}"]


def _quality_cells(row: Row) -> list[str]:
    return [f"{row['perplexity']:.2f}", f"{row['kl']:.5f}", f"{row['agreement']:.2%}"]


if __name__ == "__main__":
    app()
