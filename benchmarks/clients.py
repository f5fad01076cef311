"""Quantized folders in the clients that they are for: what these compute of them, beside Bitwright's own reading.

    python benchmarks/clients.py --python llamacpp=ENV1/bin/python --python gptqmodel=ENV2/bin/python
    python benchmarks/clients.py MODEL --text TEST.txt --name clients-MODEL --client vllm --python vllm=ENV3/bin/python

Without MODEL it is the embedded one. The cases stand in ``client_cases.py``; ``clients/NAME_worker.py`` runs a client
and says how its environment is made (``make clients`` does it: ``.clients/NAME``). Each case is quantized with rtn,
opened by the client, and compared with the dequantized model in float32. Finished rows are kept in
benchmarks/results/NAME.jsonl, so a run that is stopped goes on; NAME.md is the table, made anew. A case that could
not be run is in the table too, and is tried again the next time. Ends with 1 if a client was there and a case did
not pass.
"""

import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from agreement import LOGITS, PERPLEXITY, compared, expected, verdict
from client_cases import CASES, Case, make
from rows import Kept, Row, listed, measured_on
from workers import NotRun, interpreters, run

from bitwright import UserError
from bitwright.calibration.texts import BUILTIN
from bitwright.demo import MODEL_DIR
from bitwright.evaluation.windows import evaluation_windows
from bitwright.model.source import open_tokenizer

PROMPT, NEW, SEQLEN, WINDOWS = 64, 32, 512, 10
COLUMNS = (
    *("client", "format", "scheme", "exported from", "arithmetic", "greedy tokens alike", "logits apart (std)"),
    *("perplexity", "the client's", "difference", "bits per weight", "bytes on disk", "over true bits", "verdict"),
)


def main(
    model: Annotated[Path, typer.Argument(help="Full-precision model; the embedded one without.")] = MODEL_DIR,
    text: Annotated[str, typer.Option(help="Text to measure on; 'builtin' is the embedded model's.")] = BUILTIN,
    name: Annotated[str, typer.Option(help="Name of the result files.")] = "clients-demo",
    python: Annotated[list[str] | None, typer.Option(help="CLIENT=INTERPRETER; repeatable.")] = None,
    client: Annotated[list[str] | None, typer.Option(help="Run these clients alone; repeatable.")] = None,
    threads: int = 1,
) -> None:
    """Run the cases that are missing and write the table."""
    pythons, tokenizer = interpreters(python or []), open_tokenizer(model)
    config = json.loads((model / "config.json").read_text())
    seqlen = min(SEQLEN, config.get("max_position_embeddings", SEQLEN))
    windows = evaluation_windows(text, tokenizer, seqlen=seqlen, windows=WINDOWS).tokens
    asked: Row = {
        "prompt": windows[0, :PROMPT].tolist(),
        "new_tokens": NEW,
        "windows": windows.tolist(),
        "threads": threads,
    }
    kept = Kept(name, {"text": Path(text).name, "prompt": PROMPT, "new": NEW, "seqlen": seqlen, "windows": WINDOWS})
    rows = [_row(kept, case, model, asked, pythons, client) for case in CASES]
    _write(kept, rows)
    failed = [row for row in rows if row["verdict"] != "passes" and row["client"] in pythons]
    raise typer.Exit(1 if failed else 0)


def _row(kept: Kept, case: Case, model: Path, asked: Row, pythons: dict[str, str], clients: list[str] | None) -> Row:
    """The row of a case, or one that only says why there is no measurement."""
    there = {name: path for name, path in pythons.items() if not clients or name in clients}
    try:
        return kept.row(case.identity, partial(_measured, case, model, asked, there))
    except (NotRun, UserError) as error:
        print(f"{' '.join(filter(None, case.identity.values()))}: {error}", file=sys.stderr, flush=True)
        return case.identity | {"verdict": f"not run: {str(error).strip().splitlines()[-1][:160]}"}


def _measured(case: Case, model: Path, asked: Row, pythons: dict[str, str]) -> Row:
    if case.client not in pythons:
        raise NotRun("no environment for this client")
    with TemporaryDirectory() as scratch:
        case_files = make(case, model, Path(scratch))
        request = asked | {"dtype": case.dtype, "options": case.options}
        result = run(case.client, pythons[case.client], case_files.output, request, Path(scratch))
        wanted = expected(case_files.load(), asked["prompt"], asked["new_tokens"], asked["windows"])
    comparison = compared(wanted, result)
    return comparison | {
        "verdict": verdict(comparison),
        "bits_per_weight": case_files.bits_per_weight,
        "bytes_on_disk": case_files.bytes_on_disk,
        "true_bytes": case_files.true_bytes,
        "dtype": result.get("dtype", "its own"),
        "client_versions": result["versions"],
    }


def _write(kept: Kept, rows: list[Row]) -> None:
    done = [row for row in rows if "alike" in row]
    if not done:
        print("No client could be run: make clients, or --python CLIENT=INTERPRETER", file=sys.stderr)
        return
    versions = {row["client"]: listed(row["client_versions"]) for row in done}
    protocol = kept.protocol
    kept.write_table(
        "",
        f"rtn; {protocol['new']} tokens chosen greedily after a prompt of {protocol['prompt']}; perplexity over "
        f"{protocol['windows']} windows of {protocol['seqlen']} tokens of {protocol['text']}; beside it "
        "Bitwright's dequantized model in float32. A case passes where the client loads it, all tokens are alike "
        f"or logits at most {LOGITS} of their standard deviation apart, and perplexities within {PERPLEXITY}%. "
        "vLLM gives no logits: its first other token may be that much less likely. True bits are codes, scales "
        f"and zero points without padding, and all other tensors as the format holds them. {measured_on(done)} "
        + " ".join(f"{name} with {numbers}." for name, numbers in versions.items()),
        COLUMNS,
        [_cells(row) for row in rows],
    )


def _cells(row: Row) -> list[str]:
    scheme = ", ".join(filter(None, [row["scheme"], row.get("settings")]))
    named = [row["client"], row["format"], scheme, row["from"]]
    if "alike" not in row:
        return [*named, *["-"] * (len(COLUMNS) - len(named) - 1), row["verdict"].replace("|", "/")]
    tokens = f"{row['alike']} of {row['of']}"
    tokens += "" if row["behind"] is None else f", the next {row['behind']:.4f} std behind"
    return [
        *named,
        row["dtype"],
        tokens,
        "-" if row["logits"] is None else f"{row['logits']:.4f}",
        f"{row['expected_perplexity']:.4f}",
        f"{row['client_perplexity']:.4f}",
        f"{row['perplexity']:+.3f}%",
        f"{row['bits_per_weight']:.3f}",
        f"{row['bytes_on_disk']:,}",
        f"{row['bytes_on_disk'] / row['true_bytes']:.3f}",
        row["verdict"],
    ]


if __name__ == "__main__":
    typer.run(main)
