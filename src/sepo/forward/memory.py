"""glibc returns large freed tensors to the system and pages them in anew a moment later; it can keep them."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next tensor instead of returning them; True where it could be set.

    A training step allocates and frees the same sizes row after row. By default each such tensor is mapped and its
    pages are zeroed by the kernel anew, which took up to 10 % of a step.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_threshold, 2**31 - 1) and libc.mallopt(trim_threshold, 2**31 - 1))
