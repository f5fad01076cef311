"""Memory: the estimate for a run, the peak of this process, and how the allocator behaves."""

import ctypes
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import psutil

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.panels import PANEL
from bitwright.model.config import text_config_of
from bitwright.stream.forward import TOKENS_PER_PASS
from bitwright.stream.subject import Subject
from bitwright.stream.units import Unit

ARRAYS_PER_PASS = 8
TRAINED_BYTES = (
    4 + 4 + 4 + 4
)  # master, fake-quantized value, its copy for the backward pass, gradient; less in a short dtype
PANEL_BYTES = 96
"""The temporaries per weight of a panel, in bytes, while its ranges are searched."""
RUNTIME_BYTES = 560 * 2**20
"""The size of Python, torch and transformers themselves, before any weight (measured on Linux with a CPU build)."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Budget:
    """The bytes of memory that a run needs at its largest moment, by their use."""

    block: int
    activations: int
    outside: int

    @property
    def total(self) -> int:
        """All bytes, the runtime's too."""
        return RUNTIME_BYTES + self.block + self.activations + self.outside


def estimate(subject: Subject, tokens: int, step_tokens: int = 0, aug_loss: bool = False) -> Budget:
    """The memory that a run over ``tokens`` calibration tokens needs; 0 stands for no forward passes.

    A block is held as stored, in the compute dtype, as codes, dequantized, and as one float32 temporary of its largest
    linear. There are also the two streams and the outputs of one pass (in the first block one stream and two outputs),
    and the activations of a pass. Training, on ``step_tokens`` at a time, adds the block's float32 masters, their
    fake-quantized values and their copies for the backward pass, their gradients, and the activations of a step with
    their gradients. The outputs are its targets; the augmented loss has a second target.
    """
    blocks = [subject.skeleton.model.get_submodule(block.path) for block in subject.anatomy.blocks]
    numel = [sum(p.numel() for p in block.parameters()) for block in blocks]
    shapes = [tuple(p.shape[-2:]) for block in blocks for p in block.parameters()]
    largest, widest = max(map(prod, shapes)), max(map(max, filter(None, shapes)))
    checkpoint, compute = subject.skeleton.checkpoint, subject.skeleton.dtype.itemsize
    stored = checkpoint.dtype_of_weights.itemsize
    block = max(numel) * (compute + stored + 1 + stored + (2 * compute if tokens else 0)) + largest * 12
    hidden = text_config_of(subject.skeleton.model.config).hidden_size
    outside = max(checkpoint.nbytes(name) for name in checkpoint.names)
    streams = (6 + bool(step_tokens) + bool(step_tokens and aug_loss)) * tokens * hidden * compute
    within = ARRAYS_PER_PASS * min(tokens, TOKENS_PER_PASS) * widest * compute
    if step_tokens:
        block += max(numel) * TRAINED_BYTES
        within = max(within, 2 * ARRAYS_PER_PASS * step_tokens * widest * 4)
    return Budget(block, streams + within, outside * (compute // stored + 1 if tokens else 1))


def estimate_tensors(units: Iterable[Unit], checkpoint: Checkpoint) -> Budget:
    """The memory that one process needs to go through tensors.

    It holds the largest slice as stored, the next slice, read ahead, and the codes of all panels; the temporaries of a
    panel; and the parts of two units, one being made and one being written, in at most their stored dtype.
    """
    largest = parts = 0
    for unit in units:
        for weight in unit.weights:
            rows, columns = weight.slice
            largest = max(largest, rows * columns)
        parts = max(parts, sum(checkpoint.nbytes(weight.tensor) for weight in unit.weights))
    stored = checkpoint.dtype_of_weights.itemsize
    return Budget(largest * (2 * stored + 2), PANEL * PANEL_BYTES, 2 * parts)


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory instead of giving it back; other C libraries are left as they are.

    A training step asks for the same temporaries again. Getting them from the kernel each time, page by page, can cost
    as much as the arithmetic. Blocks above 32 MiB still go back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
