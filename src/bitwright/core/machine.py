"""What this process may use of the machine: cores and memory, as affinity, cgroups and free memory bound them.

Nothing heavy is imported here. What cannot be read bounds nothing.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


def usable_cores() -> int:
    """The number of cores that this process may run on; a container's share of CPU time counts too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(ceil(share) for share in _shares())]))


def free_memory() -> int | None:
    """The bytes of memory that new processes can have: what the machine has free, less if a cgroup allows less.

    None if the system does not say.
    """
    free = [*_machine_bytes(), *_cgroup_bytes()]
    return max(0, min(free)) if free else None


def _machine_bytes() -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in (PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])


def _shares() -> Iterator[float]:
    """The cores' worth of time that each cgroup around this process allows, in both versions of cgroups."""
    for folder in _cgroups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)  # "max" is no number: no limit
        with suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)


def _cgroup_bytes() -> Iterator[int]:
    """What each cgroup around this process still has; files that are only cached give way."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _cgroups("memory"):
        for limit, used in names:
            with suppress(OSError, ValueError):
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                yield left + _cached(folder)


def _cached(folder: Path) -> int:
    with suppress(OSError, ValueError):
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
    return 0


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, from the innermost to the outermost.

    A container often sees its own cgroup as the root, whatever /proc says.
    """
    with suppress(OSError, ValueError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUPS / controller if controllers else CGROUPS
            inner = root / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))
