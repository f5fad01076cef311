"""How far the types of llama.cpp's own quantizer are from a model, as ``bitwright verify`` reads them.

    python benchmarks/gguf_types.py MODEL --name gguf-types-MODEL --python ENV/bin/python

ENV is that of ``llamacpp_own_file.py``, which quantizes all linears of the blocks to one type after the other. Relative
squared errors |W - Wx|^2 / |W|^2 of each linear of the file beside the model's, W; the whole ``bitwright verify FILE
--against MODEL`` has to pass. Finished rows are kept in benchmarks/results/NAME.jsonl; NAME.md is made anew.
"""

import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rows import Kept, Row, measured_on

import bitwright
from bitwright.formats import QuantizedFolder
from bitwright.formats.gguf import opened
from bitwright.verification.engine_files import bits_per_weight, error_of, linears_of

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K", "Q2_K")
QUANTIZER = Path(__file__).parent / "llamacpp_own_file.py"
XLLAMACPP = "from importlib.metadata import version; print(version('xllamacpp'))"
COLUMNS = ("type", "bits per weight", "linears", "least error", "mean error", "largest error")


def main(
    model: Path,
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    python: Annotated[Path, typer.Option(help="Interpreter with xllamacpp and gguf.")],
) -> None:
    """Measure the types that are missing and write the table."""
    quantizer = f"xllamacpp {subprocess.check_output([python, '-c', XLLAMACPP], text=True).strip()}"
    kept = Kept(name, {"model": model.name, "quantizer": quantizer})
    rows = [kept.row({"type": kind}, partial(_measured, model, kind, python)) for kind in TYPES]
    kept.write_table(
        "",
        f"The linears of {model.name}'s blocks in the types of llama.cpp's quantizer ({quantizer}, no importance "
        f"matrix): relative squared errors of each linear, as `bitwright verify` reads the file. {measured_on(rows)}",
        COLUMNS,
        [_cells(row) for row in rows],
    )


def _measured(model: Path, kind: str, python: Path) -> Row:
    with TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "f16.gguf", Path(scratch) / "own.gguf"
        bitwright.export(model, source, format="gguf")
        subprocess.run([python, QUANTIZER, source, kind, output], check=True)
        verified = bitwright.verify(output, against=model)
        failed = [check for check in verified.checks if not check.passed]
        if failed:
            raise SystemExit(f"{kind}: {failed[0].name}: {failed[0].found}")
        file, original = opened(output), QuantizedFolder.open(model)
        errors = [error_of(file, name, original.tensor(name).__getitem__) for name in linears_of(file)]
        return {"bits": bits_per_weight(file), "errors": errors, "kl": verified.kl_divergence}


def _cells(row: Row) -> list[str]:
    errors = row["errors"]
    shown = (f"{error:.1e}".replace("e-0", "e-") for error in (min(errors), sum(errors) / len(errors), max(errors)))
    return [row["type"], f"{row['bits']:g}", str(len(errors)), *shown]


if __name__ == "__main__":
    typer.run(main)
