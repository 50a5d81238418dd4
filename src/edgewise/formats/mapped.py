"""Pages of mapped files: a tensor that has been read need not stay in memory, one that will be can come early."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_ahead", "release_pages"]


def release_pages(array: NDArray[Any]) -> None:
    """Take the pages under an array out of this process, if it is a read-only view of a mapped file.

    The array stays valid: what is read again comes from the file. Anything else is left alone.
    """
    _advise(array, mmap.MADV_DONTNEED)


def read_ahead(array: NDArray[Any]) -> None:
    """Let the system start to read the pages under an array, if it is a read-only view of a mapped file."""
    _advise(array, mmap.MADV_WILLNEED)


def _advise(array: NDArray[Any], advice: int) -> None:
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
    base.madvise(advice, start, stop - start)
