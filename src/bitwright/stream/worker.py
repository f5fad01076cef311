"""A worker process: it takes units from the process that started it, and reports what becomes of them.

A plan and then units come in on standard input, messages go out on standard output, both pickled: either end of the
pipe is our own. If the input ends before it was announced, the parent is gone, and the worker ends too: it must not go
on writing into a folder that another run may have taken over.
"""

import os
import pickle
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import torch

from bitwright.core.errors import UserError
from bitwright.stream.memory import peak_memory
from bitwright.stream.parts import Part
from bitwright.stream.tensors import TensorPlan, pipeline
from bitwright.stream.units import Unit


@dataclass(frozen=True)
class Began:
    """The worker has begun with this tensor."""

    tensor: str


@dataclass(frozen=True)
class Done:
    """The part of a unit is durable."""

    part: Part


@dataclass(frozen=True)
class Failed:
    """The worker stops: with a user's error, or with the traceback of one that is ours."""

    error: UserError | None
    text: str


@dataclass(frozen=True)
class Ended:
    """Every unit is done, and no more are to come."""


class _Channel:
    """The messages to the parent, from several threads."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.lock = stream, threading.Lock()

    def send(self, message: Began | Done | Failed | Ended) -> None:
        """Write one message whole."""
        with self.lock:
            pickle.dump(message, self.stream)
            self.stream.flush()


def main() -> None:
    """Work until the parent sends no more."""
    channel = _Channel(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whatever a library prints must not come between the messages
    torch.set_num_threads(1)
    plan = _plan(sys.stdin.buffer)
    units: queue.Queue[Unit | None] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, units), daemon=True).start()
    try:
        whole = pipeline(
            _until_none(units),
            plan,
            lambda tensor: channel.send(Began(tensor)),
            lambda part: channel.send(Done(replace(part, process=os.getpid(), peak_bytes=peak_memory()))),
        )
        deque(whole, maxlen=0)
        channel.send(Ended())
    except UserError as error:
        channel.send(Failed(error, str(error)))
    except BaseException:
        channel.send(Failed(None, traceback.format_exc()))
    os._exit(0)  # an ordinary exit would wait for standard input, which the listening thread holds


def _plan(stream: BinaryIO) -> TensorPlan:
    try:
        plan: TensorPlan = pickle.load(stream)
    except EOFError:  # there is nothing to do, or the parent is gone
        os._exit(0)
    return plan


def _listen(stream: BinaryIO, units: "queue.Queue[Unit | None]") -> None:
    try:
        while True:
            units.put(pickle.load(stream))
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(1)


def _until_none(units: "queue.Queue[Unit | None]") -> Iterator[Unit]:
    while (unit := units.get()) is not None:
        yield unit
