"""Generated programs: what passes, what does not, and that nothing of one is left behind."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bitwright.core.errors import MachineError
from bitwright.evaluation import sandbox
from bitwright.evaluation.code_execution import FILE_BYTES, run_program

CHECK = "\ndef check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n\ncheck(add)"
RIGHT = "def add(a, b):\n    return a + b\n"


Runs = Callable[..., str]


@pytest.fixture(params=[True, False], ids=["isolated", "plain"])
def isolate(request: pytest.FixtureRequest) -> bool:
    """Every test also as on a kernel that refuses isolation; where this one does, both are the same."""
    return bool(request.param)


@pytest.fixture
def outcome(isolate: bool) -> Runs:
    """``outcome(program, seconds=10)``"""
    return lambda program, seconds=10.0: run_program(program, seconds, isolate).outcome


@pytest.mark.parametrize(
    "program",
    [
        RIGHT + CHECK,
        "import math\nfrom typing import List\nassert math.gcd(4, 6) == 2",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1",
        "print('much\\n' * 1000000)\nprint('more', file=__import__('sys').stderr)",
        "import os\nassert os.listdir('.') == []\nopen('file', 'w').write('x')",
        "assert __import__('sys').stdin.read() == ''",
    ],
)
def test_a_program_that_ends_has_passed(program: str, outcome: Runs) -> None:
    assert outcome(program) == sandbox.PASSED


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a - b\n" + CHECK,
        "def add(a, b) return a + b" + CHECK,
        "import sys\nsys.exit(0)\n" + RIGHT + CHECK,
        "import os\nos._exit(0)\n" + RIGHT + CHECK,
        "raise SystemExit\n" + CHECK,
        "raise KeyboardInterrupt\n" + CHECK,
        'print(\'passed\')\nprint(\'{"outcome": "passed", "isolated": true}\')\nimport os\nos._exit(0)',
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'0' * 16)\n except OSError: pass\nos._exit(0)",
        "import atexit, sys\natexit.register(print, 'passed')\nsys.exit(0)",
        "import threading\nthreading.Thread(target=print).start()\nassert False",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "def f(): f()\nf()",
        "\0",
    ],
)
def test_a_program_that_does_not_come_to_its_end_has_failed(program: str, outcome: Runs) -> None:
    assert outcome(program) == sandbox.FAILED


def test_time_ends(outcome: Runs) -> None:
    begun = time.monotonic()
    assert outcome("while True:\n    pass", seconds=1) == sandbox.TOO_LONG
    assert outcome("import time\ntime.sleep(60)", seconds=1) == sandbox.TOO_LONG
    assert (
        outcome("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", 1) == sandbox.TOO_LONG
    )
    assert time.monotonic() - begun < 15


def test_memory_ends(outcome: Runs) -> None:
    assert outcome("held = bytearray(3 * 2**30)") == sandbox.FAILED
    assert outcome("held = []\nwhile True:\n    held.append(bytearray(2**24))") == sandbox.FAILED
    assert outcome("held = bytearray(2**28)") == sandbox.PASSED


def test_a_file_ends(outcome: Runs) -> None:
    assert outcome(f"open('big', 'wb').write(bytes({FILE_BYTES} * 4))") == sandbox.FAILED
    assert outcome("files = [open(str(n), 'w') for n in range(1000)]") == sandbox.FAILED


def test_nothing_of_ours_is_in_the_environment(monkeypatch: pytest.MonkeyPatch, outcome: Runs) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert outcome("import os\nassert 'HF_TOKEN' not in os.environ") == sandbox.PASSED
    assert outcome("import os\nassert os.environ['HOME'] == os.getcwd()") == sandbox.PASSED


@pytest.mark.parametrize("escape", ["pass", "os.setsid()"])
def test_another_process_does_not_stay(escape: str, outcome: Runs) -> None:
    mark = f"sleeper{os.getpid()}{len(escape)}"
    program = f"""
import os, sys, time
if os.fork() == 0:
    {escape}
    os.execv(sys.executable, [{mark!r}, "-c", "import time; time.sleep(60)"])
time.sleep(5)
"""
    assert outcome(program) in (sandbox.STARTED_OTHERS, sandbox.FAILED)
    assert [p.pid for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])] == []


def test_many_processes_end(outcome: Runs) -> None:
    """Where nothing limits a user's processes (root's), 64 of them, not as many as the machine holds."""
    program = "import os, time\nfor _ in range(6):\n    os.fork()\ntime.sleep(60)"
    assert outcome(program, seconds=5) in (sandbox.STARTED_OTHERS, sandbox.FAILED)


@pytest.mark.parametrize("after", ["while True: pass", "os._exit(0)"])
def test_killing_the_parent_is_no_success(after: str, outcome: Runs) -> None:
    begun = time.monotonic()
    program = f"import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n{after}"
    assert outcome(program, seconds=2) != sandbox.PASSED
    assert time.monotonic() - begun < 10


def test_the_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Runs) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert outcome("open('file', 'w').write('x')") == sandbox.PASSED
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_a_set_is_the_same_each_time(outcome: Runs) -> None:
    """A program that fails by the hash of one of these letters fails again: by chance, once in 256 times."""
    first, again = ([outcome(f"assert hash({letter!r}) % 2") for letter in "abcdefgh"] for _ in range(2))
    assert first == again and set(first) == {sandbox.PASSED, sandbox.FAILED}


def test_without_isolation_there_is_network_and_with_it_there_is_none(isolate: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = run_program(
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)", isolate=isolate
        )
    assert found.passed is not found.isolated
    assert isolate or not found.isolated


def test_a_program_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That says nothing about the program, so it does not count as failed."""
    script = tmp_path / "sandbox.py"
    refusal = "def refuse():\n    raise BlockingIOError(11, 'Resource temporarily unavailable')\n\n\nos.fork = refuse\n"
    source = Path(sandbox.__file__).read_text().replace("def main()", f"{refusal}\n\ndef main()")
    script.write_text(source)
    monkeypatch.setattr(sandbox, "__file__", str(script))
    with pytest.raises(MachineError, match="starts no more processes"):
        run_program("pass")
