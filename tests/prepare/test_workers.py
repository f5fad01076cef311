"""The number of worker processes is bounded by cores and memory, before any of them starts."""

import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from tests.conftest import Checkpoints, contents

import bitwright
from bitwright.api import plan
from bitwright.core import machine
from bitwright.core.errors import MachineError, RecipeError
from bitwright.core.recipe import Recipe
from bitwright.stream import worker_pool
from bitwright.stream.worker_pool import start_workers

GB = 10**9


@pytest.fixture
def recipe(tiny: Checkpoints) -> Recipe:
    return Recipe(str(tiny()), "W4A16g32", "rtn")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    monkeypatch.setattr(worker_pool, "free_memory", lambda: nbytes)


@pytest.mark.parametrize("workers", [1025, 10**7, 10**5000], ids=["1025", "millions", "endless"])
def test_absurd_numbers_are_refused(
    workers: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "start", lambda *_, **__: pytest.fail("a process was started"))
    for call in (
        lambda: plan(recipe, workers=workers),
        lambda: bitwright.quantize(recipe, tmp_path / "o", workers=workers),
    ):
        with pytest.raises(RecipeError, match=r"1024 processes are the most, .* 2 usable cores"):
            call()
    with start_workers(workers):
        pass


def test_more_than_cores(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 100 * GB)
    planned, note = plan(recipe, workers=64), "--workers 64: this machine has 2 usable cores, so 2 are used"
    assert planned.workers == 2 and note in planned.notes
    assert plan(recipe, workers=2).notes == tuple(text for text in planned.notes if text != note)
    many = bitwright.quantize(recipe, tmp_path / "many", workers=64)
    bitwright.quantize(recipe, tmp_path / "one", workers=1)
    assert note in many.notes and contents(tmp_path / "many") == contents(tmp_path / "one")


def test_more_than_memory(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, GB // 2)
    planned = plan(recipe, workers=2)
    assert planned.workers == 1
    assert re.search(r"--workers 2: this machine has memory for 1 of 0\.\d GB each, so 1 is used", str(planned.notes))
    monkeypatch.setattr(worker_pool, "start", lambda *_, **__: pytest.fail("a process was started"))
    free(monkeypatch, 0)
    with start_workers(2):
        pass


def test_a_machine_that_says_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, None)
    assert plan(recipe, workers=2).workers == 2


def test_processes_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that started end."""
    started: list[subprocess.Popen[bytes]] = []
    begin = worker_pool._start

    def at_most_one() -> "subprocess.Popen[bytes]":
        if started:
            raise MachineError("no more")
        started.append(begin())
        return started[0]

    free(monkeypatch, 100 * GB)
    monkeypatch.setattr(worker_pool, "_start", at_most_one)
    with pytest.raises(MachineError):
        start_workers(2)
    assert started[0].poll() is not None


def test_threads_that_cannot_start(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    for workers in (1, 2):
        with monkeypatch.context() as patched, pytest.raises(MachineError, match="starts no more processes or threads"):
            patched.setattr(threading.Thread, "start", refuse)
            bitwright.quantize(recipe, tmp_path / "out", workers=workers)


class TestCgroups:
    """Limits of containers, in both versions of cgroups."""

    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
        monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
        write(tmp_path / "proc/meminfo", f"MemTotal: 9 kB\nMemAvailable: {10**7} kB\n")
        return tmp_path

    def test_second_version(self, root: Path) -> None:
        write(root / "proc/self/cgroup", "0::/outer/inner\n")
        write(root / "cgroup/outer/inner/memory.max", "max\n")
        write(root / "cgroup/outer/memory.max", f"{2 * GB}\n")
        write(root / "cgroup/outer/memory.current", f"{GB}\n")
        write(root / "cgroup/outer/memory.stat", f"anon 5\ninactive_file {GB // 2}\n")
        write(root / "cgroup/outer/cpu.max", "50000 100000\n")
        write(root / "cgroup/outer/inner/cpu.max", "max 100000\n")
        assert (machine.free_memory(), machine.usable_cores()) == (3 * GB // 2, 1)

    def test_first_version(self, root: Path) -> None:
        write(root / "proc/self/cgroup", "4:memory:/docker/x\n1:cpu,cpuacct:/\n1:name=systemd:/\n")
        write(root / "cgroup/memory/memory.limit_in_bytes", f"{GB}\n")  # a container sees its own group as the root
        write(root / "cgroup/memory/memory.usage_in_bytes", f"{GB // 4}\n")
        write(root / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
        write(root / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
        assert (machine.free_memory(), machine.usable_cores()) == (3 * GB // 4, 2)

    def test_none(self, root: Path) -> None:
        assert (machine.free_memory(), machine.usable_cores()) == (1024 * 10**7, 2)
        (root / "proc/meminfo").unlink()
        assert machine.free_memory() is None


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
