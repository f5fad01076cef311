"""The loss when a quantized folder becomes a GGUF file that cannot hold it exactly.

    python benchmarks/gguf_exports.py MODEL --text TEST.txt --name gguf-exports-MODEL --python llamacpp=ENV/bin/python

Each row of ``ROWS`` is quantized into the bitwright format (``method:scheme[:seed[:key=value,...]]``) and exported with
--lossy. Errors are those that the export measures, |Wq - Wx|^2 / |Wq|^2 per linear; perplexities are the folder's, in
float32, and the file's in llama.cpp, embedding and its own arithmetic included. Finished rows are kept in
benchmarks/results/NAME.jsonl; NAME.md is made anew.
"""

import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rows import Asked, Kept, Row, listed, measured_on
from workers import interpreters, run

import bitwright
from bitwright.evaluation.windows import evaluation_windows
from bitwright.model.source import open_tokenizer

CLIENT = "llamacpp"
ROWS = (
    "rtn:W4A16g32",
    "rtn:W4A16g128",
    "rtn:W4A16g128ic",
    "rtn:W8A16g64",
    "easyquant:W4A16g64",
    "easyquant:W3A16g128",
)
SEQLEN, WINDOWS = 512, 10
COLUMNS = (
    *("method", "scheme", "linears", "exact", "codes kept", "mean error", "largest error"),
    *("perplexity of the folder", "of the file in llama.cpp", "difference"),
)


def main(
    model: Path,
    text: Annotated[str, typer.Option(help="Text to measure on.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    python: Annotated[list[str] | None, typer.Option(help="llamacpp=INTERPRETER; else .clients/llamacpp.")] = None,
) -> None:
    """Measure the rows that are missing and write the table."""
    kept = Kept(name, {"text": Path(text).name, "seqlen": SEQLEN, "windows": WINDOWS})
    windows = evaluation_windows(text, open_tokenizer(model), seqlen=SEQLEN, windows=WINDOWS).tokens.tolist()
    request = {"windows": windows, "threads": 1}
    client = interpreters(python or [])[CLIENT]
    rows = [kept.row({"row": key}, partial(_measured, Asked.parse(key), model, text, request, client)) for key in ROWS]
    kept.write_table(
        "",
        f"From the bitwright format, bitwright export --format gguf --lossy; {WINDOWS} windows of {SEQLEN} tokens of "
        f"{Path(text).name}. Embedding in Q8_0. {measured_on(rows)} llama.cpp with {listed(rows[-1]['client'])}.",
        COLUMNS,
        [_cells(Asked.parse(row["row"]), row) for row in rows],
    )


def _measured(asked: Asked, model: Path, text: str, request: Row, python: str) -> Row:
    how = {"model": str(model), "scheme": asked.scheme, "method": asked.method, "format": "bitwright"}
    with TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / "quantized", Path(scratch) / "out.gguf"
        bitwright.quantize(bitwright.Recipe.from_mapping(how | asked.settings), folder)
        exported = bitwright.export(folder, output, format="gguf", lossy=True)
        ours = bitwright.evaluate(folder, text, seqlen=SEQLEN, windows=WINDOWS).measurement
        measured = run(CLIENT, python, output, request, Path(scratch))
    return {
        "linears": exported.linears,
        "exact": exported.exact,
        "codes_kept": exported.codes_kept,
        "mean_error": exported.mean_error,
        "largest_error": exported.largest_error,
        "perplexity": ours.perplexity,
        "client_perplexity": math.exp(sum(measured["nll"]) / len(measured["nll"])),
        "client": measured["versions"],
    }


def _cells(asked: Asked, row: Row) -> list[str]:
    ours, theirs = row["perplexity"], row["client_perplexity"]
    counts = (str(row[key]) for key in ("linears", "exact", "codes_kept"))
    errors = (f"{row[key]:.1e}".replace("e-0", "e-") for key in ("mean_error", "largest_error"))
    perplexities = f"{ours:.4f}", f"{theirs:.4f}", f"{100 * (theirs / ours - 1):+.3f}%"
    return [asked.shown, asked.scheme, *counts, *errors, *perplexities]


if __name__ == "__main__":
    typer.run(main)
