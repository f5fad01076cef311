"""Memory as the system sees it: what was needed so far, and what is not to be given back."""

import ctypes
import sys

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
