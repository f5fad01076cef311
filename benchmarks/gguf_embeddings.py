"""What it costs to have embedding and output layer of a GGUF file in fewer bits.

    python benchmarks/gguf_embeddings.py MODEL --text TEST.txt --name NAME --python llamacpp=ENV/bin/python

Each row is quantized once with ``--embeddings``; perplexity is llama.cpp's own, over consecutive windows of the text,
and KL what ``bitwright verify --against MODEL`` finds on random tokens. Finished rows are kept in
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

CLIENT, SCHEME = "llamacpp", "rtn:W4A16g32sym"
ROWS = tuple(f"{SCHEME}:0:embeddings={kind}" for kind in ("f16", "q8_0", "q4_0"))
COLUMNS = ("embeddings", "bytes", "perplexity in llama.cpp", "KL on random tokens (nats)")


def main(
    model: Path,
    text: Annotated[str, typer.Option(help="Text to measure on, or 'builtin'.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    python: Annotated[list[str] | None, typer.Option(help="llamacpp=INTERPRETER; else .clients/llamacpp.")] = None,
    seqlen: int = 256,
    windows: int = 40,
) -> None:
    """Measure the rows that are missing and write the table."""
    kept = Kept(name, {"text": Path(text).name, "seqlen": seqlen, "windows": windows})
    cut = evaluation_windows(text, open_tokenizer(model), seqlen=seqlen, windows=windows).tokens.tolist()
    request, client = {"windows": cut, "threads": 1}, interpreters(python or [])[CLIENT]
    rows = [kept.row({"row": key}, partial(_measured, Asked.parse(key), model, request, client)) for key in ROWS]
    kept.write_table(
        "",
        f"{SCHEME}, the file as llama.cpp reads it; {windows} windows of {seqlen} tokens of {Path(text).name}. "
        f"{measured_on(rows)} llama.cpp with {listed(rows[-1]['client'])}.",
        COLUMNS,
        [_cells(Asked.parse(row["row"]), row) for row in rows],
    )


def _measured(asked: Asked, model: Path, request: Row, python: str) -> Row:
    how = {"model": str(model), "scheme": asked.scheme, "method": asked.method, "format": "gguf"}
    with TemporaryDirectory() as scratch:
        output = Path(scratch) / "out.gguf"
        bitwright.quantize(bitwright.Recipe.from_mapping(how | asked.settings), output)
        verified = bitwright.verify(output, model)
        measured = run(CLIENT, python, output, request, Path(scratch))
        size = output.stat().st_size
    return {
        "bytes": size,
        "client_perplexity": math.exp(sum(measured["nll"]) / len(measured["nll"])),
        "kl": verified.kl_divergence,
        "client": measured["versions"],
    }


def _cells(asked: Asked, row: Row) -> list[str]:
    return [
        str(asked.settings["embeddings"]),
        f"{row['bytes']:,}",
        f"{row['client_perplexity']:.3f}",
        f"{row['kl']:.4f}",
    ]


if __name__ == "__main__":
    typer.run(main)
