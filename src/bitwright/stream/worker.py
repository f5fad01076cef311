"""A worker process: it takes units from the process that started it, and reports what becomes of them.

It receives a plan and then units on standard input, and sends messages on standard output. Both are pickled, because
both ends of the pipe are our own. If the parent ends, the worker ends too: it must not write into a folder that another
run may have taken over. On Linux the kernel sees to that (``core/child_start.py``); elsewhere the input ends.
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

from bitwright.core.errors import UserError, blaming_the_machine
from bitwright.stream.memory import peak_memory
from bitwright.stream.parts import Part
from bitwright.stream.pipeline import TensorPlan, pipeline
from bitwright.stream.units import Unit


@dataclass(frozen=True)
class Began:
    """The message that the worker has begun with a tensor."""

    tensor: str


@dataclass(frozen=True)
class Done:
    """The message that the part of a unit is durable."""

    part: Part


@dataclass(frozen=True)
class Failed:
    """The message that the worker stops: with a UserError, or with the traceback of a bug."""

    error: UserError | None
    text: str


@dataclass(frozen=True)
class Ended:
    """The message that every unit is done and no more will come."""


class _Channel:
    """The channel for messages to the parent; several threads use it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.lock = stream, threading.Lock()

    def send(self, message: Began | Done | Failed | Ended) -> None:
        """Write one message, which no other thread interrupts."""
        with self.lock:
            pickle.dump(message, self.stream)
            self.stream.flush()


def main() -> None:
    """Work until the parent sends no more."""
    channel = _Channel(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # so that nothing a library prints comes between the messages
    torch.set_num_threads(1)
    plan = _plan(sys.stdin.buffer)
    units: queue.Queue[Unit | None] = queue.Queue()
    try:
        with blaming_the_machine():
            threading.Thread(target=_listen, args=(sys.stdin.buffer, units), daemon=True).start()
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
    os._exit(0)  # an ordinary exit would wait for the thread that reads standard input


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
