"""Processes are started in one place, safe from the current folder, and end with this one."""

import ast
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitwright.core import child_process, child_start, import_path
from bitwright.core.errors import MachineError
from bitwright.core.import_path import HOME, PATHS, safe_path

PACKAGE = Path(HOME, "bitwright")
STARTS = {
    "subprocess": {"run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
    "os": {"fork", "forkpty", "system", "popen", "posix_spawn", "posix_spawnp", "startfile"},
    "pty": {"fork", "spawn"},
}
MODULES = {"multiprocessing", "pty", "concurrent.futures.process", "runpy"}
ALLOWED = {"core/child_process.py": {"Popen"}, "evaluation/sandbox.py": {"fork"}, "core/child_start.py": {"runpy"}}
PARENT = """
import sys, time
from bitwright.stream import worker_pool
from bitwright.stream.worker_pool import WorkerPool
for target in sys.argv[1:]:
    begin = worker_pool.python_command
    worker_pool.python_command = lambda _: begin(target)
pool = WorkerPool(2)
print(*(process.pid for process in pool._waiting), flush=True)
time.sleep(600)
"""

BUSY = """
with open("/proc/self/comm", "w") as file:
    file.write("busy")
pow(7, 10**9)
"""


def starting(source: str) -> Iterator[str]:
    """What a file calls or imports to start processes; ``subprocess.Popen`` as a type is no call."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            room, name = node.func.value.id, node.func.attr
            if name in STARTS.get(room, ()) or (room == "os" and name.startswith(("exec", "spawn"))):
                yield name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (module for module in modules if module in MODULES)
            if modules[0] in STARTS and isinstance(node, ast.ImportFrom):
                yield f"from {modules[0]}"
        if isinstance(node, ast.Attribute) and node.attr == "ProcessPoolExecutor":
            yield node.attr
        if isinstance(node, ast.Attribute) and node.attr == "executable" and ast.unparse(node) == "sys.executable":
            yield "sys.executable"


def test_one_place_starts_processes() -> None:
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE).as_posix()
        allowed = ALLOWED.get(relative, set()) | ({"sys.executable"} if "core/child_process" in relative else set())
        assert set(starting(path.read_text())) <= allowed, relative


@pytest.mark.parametrize(
    "source",
    ["subprocess.run([])", "os.fork()", "os.execv('', [])", "import multiprocessing", "from os import system"],
)
def test_another_place_is_noticed(source: str) -> None:
    assert list(starting(source))


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv(PATHS, raising=False)
    return folder


def test_safe_path(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, model, weights, link = (tmp_path / name for name in ("own", "model", "weights", "link"))
    for folder in (own, model, weights):
        folder.mkdir()
    (model / "config.json").touch()
    (weights / "a.safetensors").touch()
    link.symlink_to(stranger)
    asked = ["", ".", str(stranger), str(link), str(own), str(model), str(weights), "/nowhere.zip", HOME]
    assert safe_path(asked) == [str(own), "/nowhere.zip", HOME]
    (stranger / "lib").mkdir()
    monkeypatch.setenv(PATHS, f"lib{os.pathsep}{own}")
    assert safe_path([str(stranger / "lib"), str(own)]) == [str(own)]


def test_own_folders_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder may be the one that this package is developed in, or Python's own."""
    library = os.path.dirname(os.__file__)
    monkeypatch.setenv(PATHS, os.pathsep.join([HOME, library]))
    for folder in (HOME, library):
        monkeypatch.chdir(folder)
        assert safe_path([folder, library]) == list(dict.fromkeys([folder, library])) or folder == library


def test_a_removed_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert safe_path(["", "lib", HOME]) == [HOME]


def test_forgetting(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what Python put there goes: a package that is developed in the current folder has put itself there."""
    (stranger / "lib").mkdir()
    monkeypatch.setenv(PATHS, os.pathsep.join(["lib", "", HOME]))
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    entries = ["/script/folder", str(stranger / "lib"), str(stranger), HOME, str(tmp_path / "developed")]
    monkeypatch.setattr(sys, "path", list(entries))
    monkeypatch.setenv("PATH", os.pathsep.join(["", "bin", "/usr/bin"]))
    import_path.forget_current_folder()
    assert sys.path == ["/script/folder", HOME, str(tmp_path / "developed")]
    assert (os.environ[PATHS], os.environ["PATH"], os.environ["PYTHONSAFEPATH"]) == (HOME, "/usr/bin", "1")
    monkeypatch.delenv(PATHS)
    monkeypatch.setattr(sys, "path", ["/script/folder", str(stranger)])
    import_path.forget_current_folder()
    assert sys.path == ["/script/folder", str(stranger)]


@pytest.mark.parametrize(
    ("command", "arguments", "program"),
    [
        (["python", "/x/bin/bitwright", "a"], ["/x/bin/bitwright", "a"], True),
        (["python", "bitwright-script.py"], ["bitwright-script.py"], True),
        (["python", "-c", "pass"], ["-c"], False),
        (["python", "/x/pytest"], ["/x/pytest"], False),
        (["python", "-m", "bitwright", "-m", "a"], ["-m", "-m", "a"], True),
        (["python", "-um", "bitwright"], ["-m"], True),
        (["python", "-Pmbitwright.cli", "a"], ["-m", "a"], True),
        (["python", "-m", "theirs", "bitwright"], ["-m", "bitwright"], False),
        (["python", "-mtheirs"], ["-m"], False),
    ],
)
def test_is_program(command: list[str], arguments: list[str], program: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", command)
    assert import_path.is_program() == program


def test_environment(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", str(stranger), *sys.path])
    for name in ("PATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, os.pathsep.join(["", ".", "bin", "/usr/bin"]))
    environment = child_process.child_environment()
    assert str(stranger) not in environment[PATHS] and all(map(os.path.isabs, environment[PATHS].split(os.pathsep)))
    assert environment["PATH"] == environment["LD_LIBRARY_PATH"] == "/usr/bin"
    monkeypatch.setenv(PATHS, os.pathsep.join(["", "/their/packages"]))
    assert child_process.child_environment(other=True)[PATHS] == "/their/packages"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_no_more_processes(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(MachineError, match=f"starts no more processes or threads: .*{os.strerror(number)}.*--workers"):
        child_process.run(child_process.python_command("nothing"))


def _importing(worker: int) -> bool:
    """Whether a worker has begun to import torch."""
    try:
        return "libtorch" in Path(f"/proc/{worker}/maps").read_text()
    except OSError:
        return False


def _working(workers: list[int]) -> None:
    """Wait until workers do nothing but arithmetic; the interpreter itself does not get its turn."""
    for worker in workers:
        _wait(lambda worker=worker: Path(f"/proc/{worker}/comm").read_text() == "busy\n")  # type: ignore[misc]


def _stopped_while_importing(workers: list[int]) -> None:
    for worker in workers:
        _wait(lambda worker=worker: _importing(worker))  # type: ignore[misc]
        os.kill(worker, signal.SIGSTOP)  # as one that is busy, and looks at no pipe


def _wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _ended(worker: int) -> bool:
    try:
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends orphans")
@pytest.mark.parametrize(
    ("moment", "busy"),
    [(lambda _: None, ""), (lambda _: time.sleep(0.1), ""), (_stopped_while_importing, ""), (_working, BUSY)],
    ids=["just started", "a little later", "importing", "working"],
)
def test_no_worker_is_left(moment: Callable[[list[int]], None], busy: str, tmp_path: Path) -> None:
    environment, command = child_process.child_environment(), [sys.executable, "-P", "-c", PARENT]
    if busy:
        (tmp_path / "busy.py").write_text(busy)
        command.append(str(tmp_path / "busy.py"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(number) for number in parent.stdout.readline().split()]
        assert len(workers) == 2
        try:
            moment(workers)
            parent.kill()
            _wait(lambda: all(map(_ended, workers)), seconds=8)
        finally:
            parent.kill()
            for worker in workers:
                if not _ended(worker):
                    os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends orphans")
@pytest.mark.parametrize("alive", [True, False])
def test_a_parent_that_ended_before(alive: bool, tmp_path: Path) -> None:
    """The kernel knows nothing of a parent that ended before it was asked; then the child ends by itself."""
    (tmp_path / "target.py").write_text("print('began')")
    parent = os.getpid() if alive else 2**30
    command = [sys.executable, "-P", child_start.__file__, str(parent), str(tmp_path / "target.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == ((0, "began\n") if alive else (1, ""))
