"""Perplexity and KL divergence of many recipes on one model, from their written folders, row by row.

    python benchmarks/quality.py MODEL --text TEST.txt --name rtn-en-llama \
        --row rtn:W8A16 --row rtn:W4A16g128 --row rtn:W2A16g128

A row is ``method:scheme[:seed[:key=value,key=value]]``, keys as in a recipe. Every finished row is kept in
benchmarks/results/NAME.jsonl, so a run that is stopped goes on with the rows that are missing; NAME.md is the
table, made anew each time. Perplexity is over consecutive windows of the text (the papers' protocol), KL divergence is
the mean of KL(original || quantized) in nats per token over the same windows.
"""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
import yaml

import bitwright

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("bitwright", "torch", "transformers", "compressed-tensors")
Row = dict[str, Any]


def main(
    model: Path,
    text: Annotated[str, typer.Option(help="Text to measure on; held out from calibration.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    row: Annotated[list[str], typer.Option(help="method:scheme[:seed[:key=value,...]]; repeatable.")],
    calibration: Annotated[str | None, typer.Option(help="Calibration text, where a method needs one.")] = None,
    samples: int = 128,
    calibration_seqlen: int = 256,
    seqlen: int = 512,
    windows: int = 60,
    title: str = "",
) -> None:
    """Measures the rows that are missing and writes the table."""
    RESULTS.mkdir(exist_ok=True)
    done = _read(RESULTS / f"{name}.jsonl")
    protocol = {"text": Path(text).name, "seqlen": seqlen, "windows": windows}
    for key in ["none:W16A16", *row]:
        if any(found["row"] == key and found["protocol"] == protocol for found in done):
            continue
        measured = _measure(key, model, text, seqlen, windows, calibration, samples, calibration_seqlen)
        measured |= {"row": key, "protocol": protocol, "date": date.today().isoformat()} | _machine()
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(measured) + "\n")
        done.append(measured)
        print(key, measured)
    wanted = ["none:W16A16", *row]
    shown = sorted((r for r in done if r["row"] in wanted), key=lambda r: wanted.index(r["row"]))
    (RESULTS / f"{name}.md").write_text(_table(title or name, shown))


def _measure(
    key: str,
    model: Path,
    text: str,
    seqlen: int,
    windows: int,
    calibration: str | None,
    samples: int,
    calibration_seqlen: int,
) -> Row:
    method, scheme, seed, settings = _parts(key)
    if method == "none":
        found = bitwright.evaluate(model, text, seqlen=seqlen, windows=windows).measurement
        return {"bits": 16.0, "perplexity": found.perplexity, "kl": 0.0, "agreement": 1.0}
    recipe = bitwright.Recipe(
        model=str(model),
        scheme=scheme,
        method=method,
        calibration=calibration,
        samples=samples,
        seqlen=calibration_seqlen,
        seed=seed,
        **settings,
    )
    with TemporaryDirectory() as folder:
        result = bitwright.quantize(recipe, Path(folder) / "out")
        found = bitwright.evaluate(result.output, text, seqlen=seqlen, windows=windows, reference=model).measurement
    return {
        "bits": result.bits_per_weight,
        "perplexity": found.perplexity,
        "kl": found.kl_divergence,
        "agreement": found.top1_agreement,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
    }


def _parts(key: str) -> tuple[str, str, int, Row]:
    """Method, scheme, seed and settings of a row."""
    method, scheme, seed, settings = (key.split(":") + ["0", ""][key.count(":") - 1 :])[:4]
    pairs = [pair.split("=") for pair in settings.split(",") if pair]
    return method, scheme, int(seed), {name: yaml.safe_load(value) for name, value in pairs}


def _machine() -> Row:
    versions = {name: version(name) for name in LIBRARIES}
    return {"hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch threads {torch.get_num_threads()}"} | {
        "versions": versions
    }


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _table(title: str, rows: list[Row]) -> str:
    protocol, newest = rows[0]["protocol"], max(row["date"] for row in rows)
    libraries = ", ".join(f"{name} {number}" for name, number in rows[-1]["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"{protocol['windows']} windows of {protocol['seqlen']} tokens of {protocol['text']}, float32 arithmetic, the "
        f"written folder as transformers loads it. Measured {newest} on {rows[-1]['hardware']}; {libraries}.",
        "",
        "| method | scheme | bits per weight | perplexity | KL from original (nats) | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        method, scheme, seed, settings = _parts(row["row"])
        name = ", ".join([method, *([f"seed {seed}"] if seed else []), *(f"{k} {v}" for k, v in settings.items())])
        lines.append(
            f"| {name} | {scheme} | {row['bits']:.3f} | {row['perplexity']:.2f} | {row['kl']:.5f} | "
            f"{row['agreement']:.2%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
