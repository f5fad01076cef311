"""Memory: what a run will need, and what it has needed so far."""

import ctypes
import sys
from dataclasses import dataclass

import psutil

from bitwright.stream.forward import TOKENS_PER_PASS
from bitwright.stream.skeleton import Skeleton

ARRAYS_PER_PASS = 8
TRAINED_BYTES = 4 + 4 + (4 + 1) + 4  # master, fake-quantized, slope and mask, gradient
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
RUNTIME_BYTES = 560 * 2**20
"""Python, torch and transformers themselves, before any weight (measured on Linux with a CPU build)."""


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Budget:
    """Bytes of memory that a run needs at its largest moment, by what they are for."""

    block: int
    activations: int
    outside: int

    @property
    def total(self) -> int:
        """All of it, with the runtime."""
        return RUNTIME_BYTES + self.block + self.activations + self.outside


def estimate(skeleton: Skeleton, tokens: int, step_tokens: int = 0, aug_loss: bool = False) -> Budget:
    """The memory that a run over so many calibration tokens (0: no forward passes) needs.

    A block is there as stored, in the compute dtype, as codes, dequantized, and as one float32 temporary of its
    largest linear; the two streams hold their inputs and outputs at once, and one pass its own activations. Training,
    on ``step_tokens`` at a time, adds the block's float32 masters, their fake-quantized values, what those keep for
    their backward pass and their gradients, the targets, and the activations of a step with their gradients.
    """
    numel = [
        sum(p.numel() for p in skeleton.meta_block(i).module.parameters()) for i in range(len(skeleton.block_names))
    ]
    largest = max(p.numel() for p in skeleton.meta_block(0).module.parameters())
    compute = skeleton.dtype.itemsize
    stored = skeleton.checkpoint.dtype_of_weights.itemsize
    block = max(numel) * (compute + stored + 1 + stored + (2 * compute if tokens else 0)) + largest * 12
    hidden = skeleton.model.config.hidden_size
    widest = max(max(p.shape) for p in skeleton.meta_block(0).module.parameters())
    outside = max(skeleton.checkpoint.nbytes(name) for name in skeleton.checkpoint.names)
    streams = 4 * tokens * hidden * compute
    within = ARRAYS_PER_PASS * min(tokens, TOKENS_PER_PASS) * widest * compute
    if step_tokens:
        block += max(numel) * TRAINED_BYTES
        streams += (2 if aug_loss else 1) * tokens * hidden * compute
        within = max(within, 2 * ARRAYS_PER_PASS * step_tokens * widest * 4)
    return Budget(block, streams + within, outside * (compute // stored + 1 if tokens else 1))


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed: a training step asks for the same temporaries again, and to get them from
    the kernel each time, page by page, can cost as much as the arithmetic. Larger ones than 32 MiB still go back.

    Does nothing where the C library knows no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
