"""Worker processes start before the methods, and torch with them, are imported; and they end whatever happens."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import SCHEME, Run

from bitwright import cli
from bitwright.cli import entry
from bitwright.cli.settings import _workers
from bitwright.core.child_process import child_environment
from bitwright.stream import worker_pool
from bitwright.stream.worker_pool import start_workers

WITHOUT_TORCH = """
import sys
from bitwright import api, cli

def start_workers(workers):
    heavy = {"torch", "transformers", "bitwright.methods"} & set(sys.modules)
    raise SystemExit(f"{workers} workers, {sorted(heavy)}")

api.start_workers = start_workers
sys.argv = ["bitwright", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("arguments", "recipe", "workers"),
    [
        (["m", "--workers", "2"], None, 2),
        (["m", "--scheme", "W4A16", "--workers=3", "-o", "x"], None, 3),
        (["m"], None, None),
        (["m", "--workers", "2", "--calibration", "builtin"], None, None),
        (["m", "--workers", "2", "--dry-run"], None, None),
        (["--workers", "2", "--help"], None, None),
        (["m", "--workers", "two"], None, None),
        (["m", "--workers"], None, None),
        (["m"], "workers: 4", 4),
        (["m", "--workers", "2"], "workers: 4", 2),
        (["m"], "workers: 4\ncalibration: builtin", None),
        (["m"], "workers: true", None),
        (["m", "--workers", "2"], "[", None),
    ],
)
def test_what_the_arguments_tell(arguments: list[str], recipe: str | None, workers: int | None, tmp_path: Path) -> None:
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
        arguments = [*arguments, "--recipe", str(tmp_path / "recipe.yaml")]
    assert _workers(arguments) == workers


def test_they_come_first() -> None:
    arguments = ["quantize", "m", "--workers", "2"]
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False)
    assert ran.stderr.strip() == "2 workers, []"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom bitwright import cli\nsys.argv = ['bitwright', '--help']\ntry:\n    cli.main()\nfinally:\n"
    )
    script += "    assert not {'torch', 'transformers', 'bitwright.methods'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[bytes]"]:
    """The processes that are started while a test runs."""
    processes: list[subprocess.Popen[bytes]] = []
    start: Callable[[], subprocess.Popen[bytes]] = worker_pool._start

    def noted() -> "subprocess.Popen[bytes]":
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(worker_pool, "_start", noted)
    return processes


def test_no_more_than_cores(started: list["subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for asked, expected in ((1000, 2), (1, 0), (None, 0)):
        started.clear()
        with start_workers(asked):
            assert len(started) == expected


@pytest.mark.parametrize("wrong", [["--sheme", "W4A16"], ["--scheme", "W4A17"], ["--halvings", "x"]])
def test_none_is_left(
    wrong: list[str], run: Run, model: Path, tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    ran = run("quantize", model, *wrong, "--workers", 2, "-o", tmp_path / "out")
    assert ran.code == 2 and len(started) == min(2, len(os.sched_getaffinity(0)))
    assert all(process.poll() is not None for process in started)


def test_they_are_the_ones_that_work(
    run: Run, model: Path, tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    ran = run("quantize", model, "--scheme", SCHEME, "--workers", 2, "-o", tmp_path / "out")
    assert ran.code == 0 and len(started) == 2


def _without_processes() -> None:
    """Give this process no children; for root, to whom the limit is nothing, as another user."""
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    if os.getuid() == 0:
        os.setuid(65534)


def test_no_process_left_to_start() -> None:
    command = [sys.executable, "-P", "-m", "bitwright"]
    environment = child_environment() | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = [
            subprocess.run(
                [*command, *arguments],
                env=environment,
                preexec_fn=_without_processes,
                capture_output=True,
                text=True,
                check=False,
            )
            for arguments in (["--version"], ["quantize", "m", "--workers", "2"])
        ]
    except PermissionError:
        ran = []
    if not ran or ran[0].returncode != 0:
        pytest.skip("another user cannot run this Python")
    assert ran[1].returncode == 2 and ran[1].stderr.startswith("error: the machine starts no more processes or threads")


def test_an_interrupt_for_want_of_threads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS, which numpy brings, interrupts its process if it gets no thread."""

    def interrupt() -> None:
        raise cli.Interrupted

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(entry, "app", interrupt)
    assert run("engines").code == 130
    monkeypatch.setattr(threading.Thread, "start", refuse)
    ran = run("engines")
    assert ran.code == 2 and "starts no more processes or threads" in ran.error
