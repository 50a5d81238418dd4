"""Pages of mapped files: a tensor that has been read need not stay in memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["release_pages"]


def release_pages(array: NDArray[Any]) -> None:
    """Take the pages under an array out of this process, if it is a read-only view of a mapped file.

    The array stays valid: what is read again comes from the file. Anything else is left alone.
    """
    if array.flags.writeable or array.nbytes == 0 or not array.flags.c_contiguous:
        return
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if not isinstance(base, mmap.mmap):
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    stop = start + array.nbytes
    start -= start % mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, start, stop - start)
