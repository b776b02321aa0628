"""This process's memory: freed blocks kept for the next tensor, and peak memory."""

from __future__ import annotations

import ctypes
import platform
import re
from functools import lru_cache
from typing import ClassVar
from weakref import WeakSet

import torch


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks for the next tensor instead of returning them to the system.

    A training step allocates and frees the same sizes for every row. By default the kernel maps and zeroes the pages of
    each such tensor again, which took up to 10 % of a step.

    Returns:
        True where glibc accepted the setting.
    """
    if not _with_glibc():
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_threshold, 2**31 - 1) and libc.mallopt(trim_threshold, 2**31 - 1))


class PeakMemory:
    """Peak memory of this process since the object was created, or since `restart`.

    On a GPU: the tensors that PyTorch allocated there. Else: the resident set as Linux counts it, with everything that
    was loaded before. Freed blocks are returned to the system first, since they would count. Several objects may
    measure at a time: a stage of a run, and the training in it.
    """

    _running: ClassVar[WeakSet[PeakMemory]] = WeakSet()

    def __init__(self) -> None:
        self._most = (False, 0)
        self._known = False
        self._running.add(self)
        self.restart()

    def restart(self) -> None:
        for running in self._running:  # lowering the system's mark affects all of them
            running._most = max(running._most, _high_water_mark())
        self._most = (False, 0)
        self._known = _lower_high_water_mark()

    def gb(self) -> float | None:
        """Peak memory in 1e9 bytes; None where the system does not report it."""
        return round(max(self._most, _high_water_mark())[1] / 1e9, 3) if self._known else None


def _with_glibc() -> bool:
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def _high_water_mark() -> tuple[bool, int]:
    """(whether it is of a GPU, most bytes since the mark was lowered; 0 where the system does not report them).

    The larger of two marks is a GPU's: a process that starts to use a GPU on its way reports its GPU memory.
    """
    if torch.cuda.is_initialized():
        return True, torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = re.search(r"^VmHWM:\s*(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return False, 0
    return False, int(found[1]) * 1024 if found else 0


def _lower_high_water_mark() -> bool:
    """Set the mark to the present usage; False where the system does not allow it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return True
    if _with_glibc():
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # proc(5): reset the peak resident set size
    except OSError:
        return False
    return True
