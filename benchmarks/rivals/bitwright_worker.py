"""Bitwright's own methods, in a process and with an account like everybody else's.

Settings are keys of a recipe. Methods that need no text are given none. The clock counts ``stream.blocks``: for
every block reading it, deciding, and writing its packed tensors; with text also the embedding of the segments and both
streams. ``training`` counts the epochs of learned methods alone, and their steps of one batch.
"""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import torch
from torch import Tensor
from worker import Clock, Task, write_account

import bitwright
from bitwright.methods import compose
from bitwright.stream.blocks import BlockDriver
from bitwright.stream.parts import Part
from bitwright.stream.train import Trainer


def main() -> None:
    """Quantize and write the folder and the account."""
    task = Task.given()
    segments = task.tokens()
    account = _time_blocks(segments)
    training = _time_training()
    samples, seqlen = segments.shape
    recipe = bitwright.Recipe.from_mapping(
        {
            "model": task.model,
            "scheme": task.scheme,
            "method": task.method,
            "calibration": task.calibration if any(method.needs_text for method in compose(task.method)) else None,
            "samples": samples,
            "seqlen": seqlen,
            "seed": task.seed,
        }
        | task.settings
    )
    result = bitwright.quantize(recipe, Path(task.output) / "model")
    more = {"bits": result.bits_per_weight} | ({"training": training} if training["steps"] else {})
    write_account(task, account["clock"], account["blocks"], "bitwright", "torch", "transformers", **more)


def _time_blocks(segments: Tensor) -> dict[str, Any]:
    """From now on counts the run through the blocks, and refuses one on other segments than these."""
    account: dict[str, Any] = {"clock": Clock(), "blocks": 0}
    parts = BlockDriver.parts

    def timed(driver: BlockDriver, *args: Any) -> Iterator[Part]:
        tokens = driver.tokens
        assert tokens is None or torch.equal(tokens, segments), "the segments are not the ones that the others get"
        account["blocks"] = len(driver.skeleton.block_names)
        with account["clock"]:
            yield from parts(driver, *args)

    BlockDriver.parts = timed  # type: ignore[method-assign]
    return account


def _time_training() -> dict[str, Any]:
    """From now on counts the trainer's steps, and the seconds of its epochs without the measuring around them."""
    clock: dict[str, Any] = {"seconds": 0.0, "cpu_seconds": 0.0, "steps": 0}
    train, step = Trainer._train, Trainer._step

    def timed(trainer: Trainer) -> None:
        start, start_cpu = monotonic(), process_time()
        train(trainer)
        clock["seconds"] += monotonic() - start
        clock["cpu_seconds"] += process_time() - start_cpu

    def counted(trainer: Trainer, *args: Any) -> Tensor:
        clock["steps"] += 1
        return step(trainer, *args)

    Trainer._train, Trainer._step = timed, counted  # type: ignore[assignment, method-assign]
    return clock


if __name__ == "__main__":
    main()
