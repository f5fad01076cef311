"""Run one generated program in a child process, and report whether it came to its end.

This is a script for a fresh Python. It reads {"program", "seconds", "memory_bytes", "file_bytes", "isolate"} from
standard input, and writes {"outcome", "isolated"} to standard output. It imports only the standard library, so that the
program cannot reach our code.

A program has passed if it ran to its last line. The proof is a token that is not in its memory: it is drawn after the
fork, and waits in a pipe that is read only when the program has ended. ``sys.exit(0)``, ``os._exit(0)`` and printed
text prove nothing.
"""

import ctypes
import json
import os
import resource
import secrets
import select
import signal
import sys
import time
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

PASSED, FAILED, TOO_LONG, STARTED_OTHERS = "passed", "failed", "took too long", "started another process"
NOT_STARTED = "could not be started"
TOKEN_BYTES = 16
OPEN_FILES = 64
SECONDS_BETWEEN_LOOKS = 0.02
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)  # linux/sched.h


def main() -> None:
    """Fork the program, watch it, end it and all processes that it started, and write its outcome."""
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the program become our children, and are ended
    isolated = request["isolate"] and libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC) == 0
    token_read, token_write = os.pipe()
    proof_read, proof_write = os.pipe()
    try:
        child = os.fork()
    except OSError:
        json.dump({"outcome": NOT_STARTED, "isolated": False}, sys.stdout)
        return
    if child == 0:
        _alone(libc, isolated)
        _run(request, token_read, proof_write)
    os.close(token_read)
    os.close(proof_write)
    token = secrets.token_bytes(TOKEN_BYTES)
    with suppress(OSError):  # it may be dead already
        os.write(token_write, token)
    os.close(token_write)
    own = 2 if isolated else 1
    outcome = _watch(child, own, proof_read, token, time.monotonic() + request["seconds"])
    _end(child)
    json.dump({"outcome": outcome, "isolated": isolated}, sys.stdout)


def _alone(libc: ctypes.CDLL, isolated: bool) -> None:
    """Put the child into a session of its own, which does not outlive the watcher.

    The first process of an isolated group ignores most signals, and the others end with it. So it only waits, and the
    program runs in a process below it.
    """
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if isolated and (program := os.fork()):
        os.waitpid(program, 0)
        os._exit(0)


def _run(request: dict[str, Any], token_read: int, proof_write: int) -> NoReturn:
    """Set the limits, run the program, and hand back the proof."""
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        _limit(request)
        module = ModuleType("program")
        sys.modules["program"] = module
        exec(compile(request["program"], "program", "exec"), module.__dict__)
        os.write(proof_write, os.read(token_read, TOKEN_BYTES))
        code = 0
    finally:  # after SystemExit and MemoryError too: this process must not go on as the watcher
        os._exit(code)


def _limit(request: dict[str, Any]) -> None:
    """Set limits that the program cannot raise again. Processes are counted per user, and for root not at all."""
    limits = {
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_CPU: int(request["seconds"]) + 1,
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def _watch(child: int, own: int, proof_read: int, token: bytes, deadline: float) -> str:
    """The outcome of the program; ``own`` processes are the sandbox's.

    The end of the child decides, even if another process still holds the pipe.
    """
    while time.monotonic() < deadline:
        over = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if len(_descendants()) > own:
            return STARTED_OTHERS
        ready, _, _ = select.select([proof_read], [], [], 0 if over else SECONDS_BETWEEN_LOOKS)
        if ready:
            return PASSED if os.read(proof_read, TOKEN_BYTES) == token else FAILED
        if over:
            return FAILED
    return TOO_LONG


def _end(child: int) -> None:
    """Kill the program, its group and all processes that came from it, until none is left."""
    for _ in range(1000):
        with suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        left = _descendants()
        for process in left:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return
        time.sleep(0.001)


def _descendants() -> list[int]:
    """The ids of all processes that descend from this one, from /proc."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError, ValueError, IndexError):  # it ended meanwhile
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    descendants, ahead = [], [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        descendants += below
        ahead += below
    return descendants


if __name__ == "__main__":
    main()
