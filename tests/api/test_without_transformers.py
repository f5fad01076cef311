"""What needs no text needs no transformers: it takes longer to import than a small model takes to quantize."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Checkpoints

SCRIPT = """
import sys
from bitwright.cli import main
try:
    main()
finally:
    print(sorted({"transformers", "compressed_tensors", "datasets"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(("flags", "imported"), [
    (("--method", "easyquant", "--workers", "2"), "[]"),
    (("--method", "easyquant", "--outliers", "0", "--quantize-lm-head"), "[]"),
    (("--method", "rtn", "--format", "compressed-tensors"), "[]"),
    (("--method", "rtn", "--dry-run"), "[]"),
    (("--method", "rtn", "--calibration", "builtin", "--samples", "1"), "['transformers']"),
])  # fmt: skip
def test_what_a_run_imports(flags: tuple[str, ...], imported: str, tiny: Checkpoints, tmp_path: Path) -> None:
    command = ["quantize", str(tiny(tied=True)), "--scheme", "W4A16", "-o", str(tmp_path / "out"), *flags]
    ran = subprocess.run([sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[-1] == imported
