"""Perform the cases on standard input with the Bitwright of one tree, in the current folder.

    python tools/compare_child.py TREE [KILL]      with TREE/src in PYTHONPATH

Says the name of each case that is done. With KILL, the call of the first one kills this process at that call of its
listener. ``compare_trees.py`` starts it, in DIR/before and in DIR/after.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare_cases import LEARNED, OUTCOME, Case

FOLDER, FILE = "out", "out.gguf"
"""What the output of a case is called, in the case's folder."""


def perform(case: Case, kill: int = 0) -> dict[str, Any]:
    """Make the call of a case. Return its result or its message; the process is killed at this call of the listener."""
    import bitwright

    calls = 0

    def listen(_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    how, output = dict(case.how), output_of(case)
    if case.base:
        how["base"] = f"{case.base}/{FILE}"
    if case.loads:
        how["load_parameters"] = f"{case.loads}/{LEARNED}"
    saved = f"{case.name}/{LEARNED}" if case.saves else None
    made: Any
    try:
        if case.source:
            made = bitwright.export(f"{case.source}/{FOLDER}", output, listener=listen, **how)
        else:
            recipe = bitwright.Recipe(model=f"../models/{case.model}", **how)
            made = bitwright.quantize(recipe, output, workers=case.workers, save_parameters=saved, listener=listen)
    except bitwright.UserError as error:
        return {"refused": str(error).replace(str(Path.cwd()), "DIR")}
    return {"result": {key: value for key, value in asdict(made).items() if key not in ("seconds", "peak_bytes")}}


def output_of(case: Case) -> Path:
    """Return where the output of a case is to lie."""
    return Path(case.name, FILE if case.how.get("format") == "gguf" else FOLDER)


def outcome(case: Case) -> dict[str, Any]:
    """Perform a case, killed as often as it says and called again."""
    for kill in case.kills:
        command = [sys.executable, __file__, sys.argv[1], str(kill)]
        ended = subprocess.run(command, input=json.dumps([asdict(case)]), text=True, check=False).returncode
        if ended != -signal.SIGKILL or output_of(case).exists():
            return {"failed": f"not killed at call {kill} of the listener: exit code {ended}"}
    try:
        return perform(case)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Perform all cases; what libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for case in _read():
        Path(case.name).mkdir(parents=True)
        found = outcome(case)
        Path(case.name, OUTCOME).write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(case.name, file=out, flush=True)


def _require_bitwright_of(tree: Path) -> None:
    import bitwright

    if not Path(bitwright.__file__).is_relative_to(tree.resolve() / "src"):
        raise SystemExit(f"Bitwright was imported from {bitwright.__file__}, not from {tree}")


def _read() -> list[Case]:
    return [Case(**(one | {"kills": tuple(one["kills"])})) for one in json.load(sys.stdin)]


if __name__ == "__main__":
    _require_bitwright_of(Path(sys.argv[1]))
    if sys.argv[2:]:
        perform(_read()[0], int(sys.argv[2]))
    else:
        main()
