"""A worker process: takes units from the process that started it, and tells it what becomes of them.

A plan and then units come in on standard input, messages go out on standard output, pickled by our own two ends of the
pipe. When the input ends before it was said to, the one who started us is gone, and so are we: nobody must go on
writing into a folder that another run may have taken over.
"""

import os
import pickle
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from bitwright.core.errors import UserError
from bitwright.core.quantized import BlockReport
from bitwright.stream.memory import peak_memory
from bitwright.stream.tensors import TensorPlan, work
from bitwright.stream.units import Unit


@dataclass(frozen=True)
class At:
    """The worker has begun with this tensor."""

    tensor: str


@dataclass(frozen=True)
class Done:
    """The part of this unit is durable."""

    unit: Unit
    report: BlockReport | None
    peak_bytes: int


@dataclass(frozen=True)
class Failed:
    """The worker stops: a user's error, or the text of one that is ours."""

    error: UserError | None
    text: str


@dataclass(frozen=True)
class Ended:
    """Every unit is done, and no more are to come."""


class _Channel:
    """Messages to the parent, from several threads."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.lock = stream, threading.Lock()

    def send(self, message: At | Done | Failed | Ended) -> None:
        """Writes one message whole."""
        with self.lock:
            pickle.dump(message, self.stream)
            self.stream.flush()


def main() -> None:
    """Works until the parent says that there is no more."""
    channel = _Channel(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whatever a library prints must not come between the messages
    torch.set_num_threads(1)
    plan = _plan(sys.stdin.buffer)
    coming: queue.Queue[Unit | None] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, coming), daemon=True).start()
    try:
        work(
            _until_none(coming),
            plan,
            lambda tensor: channel.send(At(tensor)),
            lambda unit, report: channel.send(Done(unit, report, peak_memory())),
        )
        channel.send(Ended())
    except UserError as error:
        channel.send(Failed(error, str(error)))
    except BaseException:
        channel.send(Failed(None, traceback.format_exc()))
    os._exit(0)  # the listening thread holds on to standard input, which an ordinary exit would wait for


def _plan(stream: BinaryIO) -> TensorPlan:
    try:
        plan: TensorPlan = pickle.load(stream)
    except EOFError:  # there was nothing to do, or no one is left who would say it
        os._exit(0)
    return plan


def _listen(stream: BinaryIO, coming: "queue.Queue[Unit | None]") -> None:
    try:
        while True:
            found: Any = pickle.load(stream)
            coming.put(found)
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(1)


def _until_none(coming: "queue.Queue[Unit | None]") -> Iterator[Unit]:
    while (unit := coming.get()) is not None:
        yield unit
