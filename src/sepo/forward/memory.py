"""The memory of this process: the most that it held, and freed blocks, which glibc can keep for the next tensor."""

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
    """Let glibc keep large freed blocks for the next tensor instead of returning them; True where it could be set.

    A training step allocates and frees the same sizes row after row. By default each such tensor is mapped and its
    pages are zeroed by the kernel anew, which took up to 10 % of a step.
    """
    if not _with_glibc():
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_threshold, 2**31 - 1) and libc.mallopt(trim_threshold, 2**31 - 1))


class PeakMemory:
    """The most memory that this process held since it was made, or since `restart`: to stand beside seconds.

    On a GPU of the tensors that PyTorch allocated there; else of the resident set, as Linux counts it, all that was
    loaded before included. Blocks that were freed before are given back first, or they would count. Several may run at
    a time: a stage of a run, and the training in it.
    """

    _running: ClassVar[WeakSet[PeakMemory]] = WeakSet()

    def __init__(self) -> None:
        self._most = (False, 0)
        self._known = False
        self._running.add(self)
        self.restart()

    def restart(self) -> None:
        for one in self._running:  # the system's mark is about to be lowered for all of them
            one._most = max(one._most, _high_water_mark())
        self._most = (False, 0)
        self._known = _lower_high_water_mark()

    def gb(self) -> float | None:
        """In units of 1e9 bytes; None where the system does not say."""
        return round(max(self._most, _high_water_mark())[1] / 1e9, 3) if self._known else None


def _with_glibc() -> bool:
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def _high_water_mark() -> tuple[bool, int]:
    """On a GPU? And the most bytes since the mark was lowered, 0 where the system does not say.

    A process that turns to a GPU on its way counts what it held there, which is the larger of two such marks.
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
    """Set the mark to what is held now; False where that cannot be done."""
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
