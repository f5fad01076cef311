"""Perform the cases on standard input with the Bitwright of one tree, in the current folder.

    python tools/compare_child.py TREE [KILL]      with TREE/src in PYTHONPATH

It prints the name of each case when it is done. With KILL, only the first case is performed, and the process is killed
at that call of its listener. ``compare_side.py`` starts it, in the folder where the outputs of the tree lie.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_cases import LEARNED, OUTCOME, Case

if TYPE_CHECKING:
    from bitwright.api import Exported, Result

FOLDER, FILE = "out", "out.gguf"
"""The names of a case's output in the folder of the case."""


def perform(case: Case, kill: int = 0) -> dict[str, Any]:
    """Make the call of a case; return its result, or its message if it is refused.

    The process is killed at the call of the listener that has the number ``kill``; 0 is none.
    """
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
    result: Exported | Result
    try:
        if case.source:
            result = bitwright.export(f"{case.source}/{FOLDER}", output, listener=listen, **how)
        else:
            recipe = bitwright.Recipe(model=f"../models/{case.model}", **how)
            result = bitwright.quantize(recipe, output, workers=case.workers, save_parameters=saved, listener=listen)
    except bitwright.UserError as error:
        return {"refused": str(error).replace(str(Path.cwd()), "DIR")}
    return {"result": {key: value for key, value in asdict(result).items() if key not in ("seconds", "peak_bytes")}}


def output_of(case: Case) -> Path:
    """Return where the output of a case is to lie."""
    return Path(case.name, FILE if case.how.get("format") == "gguf" else FOLDER)


def outcome(case: Case) -> dict[str, Any]:
    """Perform a case. It is killed and called again as often as it says."""
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
    """Perform all cases. Whatever libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for case in _read():
        Path(case.name).mkdir(parents=True)
        Path(case.name, OUTCOME).write_text(json.dumps(outcome(case), indent=1), encoding="utf-8")
        print(case.name, file=out, flush=True)


def _require_bitwright_of(tree: Path) -> None:
    import bitwright

    if not Path(bitwright.__file__).is_relative_to(tree.resolve() / "src"):
        raise SystemExit(f"Bitwright was imported from {bitwright.__file__}, not from {tree}")


def _read() -> list[Case]:
    return [Case(**(keys | {"kills": tuple(keys["kills"])})) for keys in json.load(sys.stdin)]


if __name__ == "__main__":
    _require_bitwright_of(Path(sys.argv[1]))
    if sys.argv[2:]:
        perform(_read()[0], int(sys.argv[2]))
    else:
        main()
