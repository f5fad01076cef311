"""Perplexity and KL divergence of many recipes on one model, from their written folders, row by row.

    python benchmarks/quality.py MODEL --text TEST.txt --name rtn-en-llama \
        --row rtn:W8A16 --row rtn:W4A16g128 --row rtn:W2A16g128

A row is ``method:scheme[:seed[:key=value,key=value]]``, keys as in a recipe; ``mlc-llm/own:mlc:q4f16_1`` is that
grid as MLC-LLM's own quantizer would use it. Every finished row is kept in
benchmarks/results/NAME.jsonl, so a run that is stopped goes on with the rows that are missing; NAME.md is the
table, made anew each time. Perplexity is over consecutive windows of the text (the papers' protocol), KL divergence is
the mean of KL(original || quantized) in nats per token over the same windows.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from mlc_quantizer import as_mlc_quantizes
from rows import Asked, Kept, Row, measured_on

import bitwright

ORIGINAL = "none:W16A16"
COLUMNS = ("method", "scheme", "bits per weight", "perplexity", "KL from original (nats)", "top-1 agreement")


def main(
    model: Path,
    text: Annotated[str, typer.Option(help="Text to measure on; held out from calibration.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    row: Annotated[list[str], typer.Option(help="method:scheme[:seed[:key=value,...]]; repeatable.")],
    calibration: Annotated[str | None, typer.Option(help="Calibration data, if a method needs it.")] = None,
    samples: int = 128,
    calibration_seqlen: int = 256,
    seqlen: int = 512,
    windows: int = 60,
    title: str = "",
) -> None:
    """Measure the rows that are missing and write the table."""
    kept = Kept(name, {"text": Path(text).name, "seqlen": seqlen, "windows": windows})
    asked = {key: Asked.parse(key) for key in (ORIGINAL, *row)}
    texts: Row = {"calibration": calibration, "samples": samples, "seqlen": calibration_seqlen}
    where: Row = {"text": text, "seqlen": seqlen, "windows": windows}
    rows = [kept.row({"row": key}, partial(_measure, wanted, model, texts, where)) for key, wanted in asked.items()]
    kept.write_table(
        title,
        f"{windows} windows of {seqlen} tokens of {Path(text).name}, float32 arithmetic, the written folder as "
        f"transformers loads it. {measured_on(rows)}",
        COLUMNS,
        [_cells(asked[measured["row"]], measured) for measured in rows],
    )


def _measure(asked: Asked, model: Path, texts: Row, where: Row) -> Row:
    if asked.method == "none":
        measurement = bitwright.evaluate(model, **where).measurement
        return {"bits": 16.0, "perplexity": measurement.perplexity, "kl": 0.0, "agreement": 1.0}
    if asked.who == "mlc-llm":
        with TemporaryDirectory() as folder:
            bits = as_mlc_quantizes(model, asked.scheme, Path(folder) / "out")
            measurement = bitwright.evaluate(Path(folder) / "out", reference=model, **where).measurement
        return {
            "bits": bits,
            "perplexity": measurement.perplexity,
            "kl": measurement.kl_divergence,
            "agreement": measurement.top1_agreement,
        }
    how: Row = {"scheme": asked.scheme, "method": asked.method, "seed": asked.seed} | texts | asked.settings
    with TemporaryDirectory() as folder:
        result = bitwright.quantize(bitwright.Recipe.from_mapping({"model": str(model)} | how), Path(folder) / "out")
        measurement = bitwright.evaluate(result.output, reference=model, **where).measurement
    return {
        "bits": result.bits_per_weight,
        "perplexity": measurement.perplexity,
        "kl": measurement.kl_divergence,
        "agreement": measurement.top1_agreement,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
    }


def _cells(asked: Asked, row: Row) -> list[str]:
    numbers = f"{row['bits']:.3f}", f"{row['perplexity']:.2f}", f"{row['kl']:.5f}", f"{row['agreement']:.2%}"
    return ["MLC-LLM's quantizer" if asked.who == "mlc-llm" else asked.shown, asked.scheme, *numbers]


if __name__ == "__main__":
    typer.run(main)
