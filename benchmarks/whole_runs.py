"""Whole runs of methods that need no text, on a checkpoint of any size: time, and memory of all processes.

    python tools/make_random_checkpoint.py 3B --size 3B
    python benchmarks/whole_runs.py 3B --work FOLDER --name data-free-3b --rounds 3 \
        --row rtn:W4A16 --row easyquant:W4A16 --workers 1 --workers 2

Every row is ``bitwright quantize`` as a user runs it, reading and writing and importing included, with so many
``--workers`` of one thread each; rounds are run in turn, row after row. Memory is sampled every 0.2 seconds: the sum of
the anonymous pages of the process and its workers (what files lend is left out; Linux only), at its largest. What
other processes took of the processors meanwhile is noted, the table says the most of it, and a run that they disturbed
more than ``--disturbance`` is made again. Rows
[method:scheme[:seed[:key=value,...]]] are those of ``quality.py``; finished ones are kept in results/NAME.jsonl.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Annotated

import psutil
import typer
from rows import Asked, Kept, Row, measured_on

SECONDS_BETWEEN_SAMPLES = 0.5
COLUMNS = ("method", "scheme", "workers", "seconds", "CPU seconds", "ns per weight", "times rtn", "peak anonymous MB")


def main(
    model: Path,
    work: Annotated[Path, typer.Option(help="Folder for what is written; emptied after each run.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    row: Annotated[list[str], typer.Option(help="method:scheme[:seed[:key=value,...]]; repeatable.")],
    workers: Annotated[list[int], typer.Option(help="Worker processes; repeatable.")],
    rounds: int = 3,
    disturbance: Annotated[float, typer.Option(help="Of one processor, what others may take during a run.")] = 1.0,
    title: str = "",
) -> None:
    """Measure the rows that are missing and write the table: the median of the rounds."""
    kept = Kept(name, {"model": model.name})
    measured = []
    for number in range(rounds):
        for key in row:
            for count in workers:
                asked = {"row": key, "workers": count, "round": number}
                measured.append(
                    kept.row(asked, partial(_undisturbed, disturbance, Asked.parse(key), model, work, count))
                )
    kept.write_table(
        title,
        f"{model.name}: {measured[0]['weights']:,} weights in linears; the median of {rounds} rounds, in turn; other "
        f"processes took at most {max(r['elsewhere_seconds'] / r['seconds'] for r in measured):.0%} of one processor. "
        + measured_on(measured),
        COLUMNS,
        [_cells(key, count, measured) for key in row for count in workers],
    )


def _undisturbed(disturbance: float, asked: Asked, model: Path, work: Path, workers: int) -> Row:
    while True:
        row = _measured(asked, model, work, workers)
        if row["elsewhere_seconds"] <= disturbance * row["seconds"]:
            return row
        print(f"again: others took {row['elsewhere_seconds']:.1f} s of {row['seconds']:.1f}", file=sys.stderr)


def _measured(asked: Asked, model: Path, work: Path, workers: int) -> Row:
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    flags = [text for key, value in asked.settings.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    what = ["--scheme", asked.scheme, "--method", asked.method, "--workers", str(workers), "--json", *flags]
    command = [sys.executable, "-m", "bitwright", "quantize", str(model), "--output", str(output), *what]
    start, before, busy = monotonic(), os.times(), _busy()
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    peak = _peak_anonymous(running)
    seconds, after, busy = monotonic() - start, os.times(), _busy() - busy
    own = sum(after[:4]) - sum(before[:4])
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {running.returncode}")
    result = json.loads(running.stdout.read() if running.stdout else "")
    account = json.loads((output / "bitwright.json").read_text())
    shutil.rmtree(output)
    return {
        "seconds": seconds,
        "cpu_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "elsewhere_seconds": busy - own,
        "peak_anonymous_bytes": peak,
        "weights": account["totals"]["quantized_weights"],
        "bits": result["bits_per_weight"],
    }


def _peak_anonymous(running: "subprocess.Popen[str]") -> int:
    """Bytes, sampled until the process ends."""
    peak, first = 0, psutil.Process(running.pid)
    while running.poll() is None:
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(map(_anonymous, [first, *first.children(recursive=True)])))
        sleep(SECONDS_BETWEEN_SAMPLES)
    return peak


def _busy() -> float:
    """Seconds that all processors together have worked, for whomever."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq")))


def _anonymous(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()  # counted already; smaps would be slow
    except (OSError, ProcessLookupError):  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _cells(key: str, workers: int, measured: list[Row]) -> list[str]:
    asked = Asked.parse(key)
    seconds, processor = (_median(measured, field, row=key, workers=workers) for field in ("seconds", "cpu_seconds"))
    plain = [r for r in measured if r["row"].startswith(f"rtn:{asked.scheme}")]
    times = seconds / _median(plain, "seconds", workers=workers) if plain else 0.0
    weights = measured[0]["weights"]
    peak = max(r["peak_anonymous_bytes"] for r in measured if (r["row"], r["workers"]) == (key, workers))
    return [
        asked.shown,
        asked.scheme,
        str(workers),
        f"{seconds:.0f}",
        f"{processor:.0f}",
        f"{processor / weights * 1e9:.1f}",
        f"{times:.2f}" if times else "",
        f"{peak / 1e6:.0f}",
    ]


def _median(measured: list[Row], field: str, **of: object) -> float:
    return median(r[field] for r in measured if all(r[key] == value for key, value in of.items()))


if __name__ == "__main__":
    typer.run(main)
