"""From stored weights to the interleaved rows that the kernels read, in memory or in a cache file that is mapped.

Packing is a permutation of codes and scales: no value changes, but for a codebook of at most sixteen values that are no
integers (NF4), which become multiples of 1/127 of the largest, with a notice. A weight without a kernel of its own (a
larger codebook, a group that blocks of 32 cannot carry, a factored weight of an expert, sparsity other than two of
four) runs as 16-bit floats, and a notice says so.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import EdgewiseError, FormatError, UnsupportedError, collect_notices, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, QuantFormat, float32_to_bf16
from edgewise.core.storage import Blocks, Dense, InputSparse, QuantizedTensor, Sparse, Stored, rows_of
from edgewise.core.values import dataclass
from edgewise.engine.layouts import (
    Layout,
    kept_of,
    layout_of_format,
    sparse_layout,
    sparse_layout_of_format,
    write_codes,
    write_sparse,
)
from edgewise.formats.cache import Progress, cache_root, locked, write_aside
from edgewise.formats.mapped import release_pages
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["PackedWeights", "Recipe", "in_columns", "layout_of", "pack_all", "pack_one", "packed_nbytes", "packing",
           "recipe_of"]

Bytes = NDArray[np.uint8]
LAYOUT_VERSION = 3
"""Of the packed form: part of every cache key, raised whenever packed.h changes what the bytes mean."""

_ALIGN_BYTES = 4096
_PANEL_ROWS = 16
"""Rows that are interleaved; panels follow each other."""
_SLAB_VALUES = 1 << 21
"""Codes unpacked at a time while packing."""
_FETCHED_BYTES = 16 << 20
"""Read of the cache at a time."""


@dataclass(frozen=True)
class Recipe:
    """How one weight is packed: its native format, its bytes, and the function that writes them.

    kind: names the layout, as part of a cache key.
    """

    format: Any
    rows: int
    cols: int
    nbytes: int
    write: Callable[[Bytes], None]
    kind: str


def recipe_of(name: str, stored: Stored, *, pairs: bool = False, table: bool = False) -> Recipe:
    """The packed form of a (out, in) weight. name: for notices. pairs: for bfloat16 inputs.

    table: nothing multiplies it, rows are looked up in it.
    """
    rows, cols = stored.shape
    if isinstance(stored, Blocks):
        native = _core.PackedFormat.of_blocks(stored.codec.name)

        def write_blocks(out: Bytes) -> None:
            raw = stored.raw  # not before: what an earlier start packed is not read again
            _core.pack_blocks(stored.codec.name, raw, cols, out)
            release_pages(raw)  # two copies of one weight at a time, and not of all

        return Recipe(native, rows, cols, native.nbytes(rows, cols), write_blocks, stored.codec.name)
    if isinstance(stored, QuantizedTensor | Sparse):
        if isinstance(stored, Sparse) or stored.format.n_m is not None:
            recipe = _two_of_four(stored)
        else:
            recipe = _quantised(name, stored)
        if recipe is not None:
            return recipe
        form = stored if isinstance(stored, Sparse) else stored.format
        if isinstance(stored, Sparse) and isinstance(stored.values, Dense):
            notice("info", f"{form}: kept floats run among their zeros; kernels skip zeros of quantised weights",
                   where=name)
            number = stored.values.number
            return _floats(Dense.later(lambda: _in(stored.dense(), number), number, stored.shape))
        notice("fallback", f"{form} has no integer kernel; the weight runs as 16-bit floats", where=name)
        return _floats(Dense(stored.dense().astype(np.float16), FP16))
    if isinstance(stored, Dense):
        return _floats(stored, pairs, table)
    if isinstance(stored, InputSparse):
        return _columns(recipe_of(name, stored.weight), name)
    notice("fallback", f"{stored!r} runs as 16-bit floats", where=name)
    return _floats(Dense(stored.dense().astype(np.float16), FP16))


def in_columns(name: str, stored: Stored) -> bool:
    """Whether a weight can lie input by input."""
    with collect_notices():
        recipe = recipe_of(name, stored)
    try:
        recipe.format.in_columns()
    except ValueError:
        return False
    return True


def _columns(panels: Recipe, name: str) -> Recipe:
    """The same codes and scales, input by input."""
    rows, cols = panels.rows, panels.cols
    try:
        native = panels.format.in_columns()
    except ValueError as error:
        raise UnsupportedError(f"{name}: {error}; take int4 or int8 with groups of 32 or more") from error

    def write(out: Bytes) -> None:
        whole = np.zeros(panels.nbytes, np.uint8)
        panels.write(whole)
        _core.pack_columns(native, whole, rows, cols, out)

    return Recipe(native, rows, cols, native.nbytes(rows, cols), write, f"{panels.kind} in columns")


def _in(values: NDArray[np.float32], number: NumberFormat) -> NDArray[Any]:
    if number == BF16:
        return float32_to_bf16(values)
    return values.astype(np.float16) if number == FP16 else values


def _floats(stored: Dense, pairs: bool = False, table: bool = False) -> Recipe:
    rows, cols = stored.shape
    names: dict[NumberFormat, str] = {FP32: "float32 rows" if table else "float32", FP16: "float16",
                                      BF16: "bfloat16 pairs" if pairs else "bfloat16"}
    kind = names[stored.number]
    native = _core.PackedFormat(kind)

    def write(out: Bytes) -> None:
        data = stored.data  # not before: see above
        _core.pack_floats(native, np.ascontiguousarray(data).view(np.uint8).reshape(rows, -1), cols, out)
        release_pages(data)

    return Recipe(native, rows, cols, native.nbytes(rows, cols), write, kind)


def packed_nbytes(fmt: QuantFormat, shape: tuple[int, ...]) -> int | None:
    """Bytes of a (out, in) weight in this format once packed; None where no kernel reads the format."""
    layout = sparse_layout_of_format(fmt, shape[1]) if fmt.n_m else layout_of_format(fmt, shape[1])
    return None if layout is None else int(layout.native.nbytes(shape[0], shape[1]))


def _quantised(name: str, stored: QuantizedTensor) -> Recipe | None:
    """None where no kernel fits."""
    layout = layout_of_format(stored.format, stored.shape[1])
    if layout is None:
        return None
    fits: Layout = layout
    if fits.moved:
        notice("info", f"{stored.format.element.name} runs as multiples of 1/127 of its largest value, which moves a "
               f"weight by at most {100 * fits.moved:.2f} % of its group's largest", where=name)
    return _by_slabs(stored.shape, fits, str(stored.format), lambda start, stop, out: write_codes(
        stored.rows(start, stop), fits, out))


def _two_of_four(stored: Sparse | QuantizedTensor) -> Recipe | None:
    """None where no kernel fits. Kept values are looked for when they are packed, and not before."""
    if isinstance(stored, Sparse):
        kept = kept_of(stored)
        layout = None if kept is None else sparse_layout(kept[0].format, stored.shape[1])
    else:
        layout = sparse_layout_of_format(stored.format, stored.shape[1])
    if layout is None:
        return None
    fits: Layout = layout

    def write(start: int, stop: int, out: Bytes) -> None:
        part = rows_of(stored, slice(start, stop))
        assert isinstance(part, Sparse | QuantizedTensor)
        found = kept_of(part)
        assert found is not None
        write_sparse(*found, fits, out)

    values = stored.values if isinstance(stored, Sparse) else stored
    assert isinstance(values, QuantizedTensor)
    return _by_slabs(stored.shape, fits, f"two of four {values.format}", write)


def _by_slabs(shape: tuple[int, ...], layout: Layout, kind: str,
              write_rows: Callable[[int, int, Bytes], None]) -> Recipe:
    """Packed some rows at a time. write_rows: first row, last + 1, where their panels go."""
    rows, cols = shape

    def write(out: Bytes) -> None:
        step = max(1, _SLAB_VALUES // cols // _PANEL_ROWS) * _PANEL_ROWS
        begin = 0
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            end = begin + layout.native.nbytes(stop - start, cols)
            write_rows(start, stop, out[begin:end])
            begin = end

    return Recipe(layout.native, rows, cols, layout.native.nbytes(rows, cols), write, kind)


@dataclass(frozen=True)
class PackedWeights:
    """Packed weights by name, over one buffer of nbytes. cached: it is a mapped file of the cache, namely `file`."""

    matrices: Mapping[str, Any]
    nbytes: int
    cached: bool
    buffer: Bytes
    file: Path | None = None

    def map_now(self) -> None:
        """Map every page of the file at once, which takes an eighth of the time of doing so one by one.

        Best when nothing of the source is mapped any more, since both would count.
        """
        if self.cached and self.nbytes <= _most_in_memory():
            _core.populate(self.buffer)


def layout_of(recipes: Mapping[str, Recipe]) -> tuple[dict[str, int], int]:
    """Byte offset of each packed weight, page-aligned in the order given, and the size of the whole."""
    offsets, total = {}, 0
    for name, recipe in recipes.items():
        offsets[name] = total
        total += -(-recipe.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return offsets, total


def pack_all(recipes: Mapping[str, Recipe], *, key: str | None, huge_pages: bool = True,
             progress: Progress | None = None) -> PackedWeights:
    """Pack every weight, or map what an earlier load packed.

    key: identifies the source files; None packs into memory. huge_pages: ask for them.
    """
    known = None if key is None else (lambda: key)
    with packing(recipes, key=known, huge_pages=huge_pages, progress=progress) as packed:
        return packed()


@contextmanager
def packing(recipes: Mapping[str, Recipe], *, key: Callable[[], str] | None, huge_pages: bool = True,
            progress: Progress | None = None) -> Iterator[Callable[[], PackedWeights]]:
    """As `pack_all`, beside what the block does: yields what waits for the weights.

    key is asked for in a thread, which then maps and reads what an earlier load packed, or packs. The weights are there
    before their file is: the thread syncs and names it while they are used, and a process ends after that. Leaving the
    block with an error gives up packing. A cache that cannot be written is a notice, not an error.
    """
    offsets, total = layout_of(recipes)
    beside = None if key is None else _Beside(recipes, offsets, total, key, huge_pages, progress)

    def packed() -> PackedWeights:
        file, buffer = (None, None) if beside is None else beside.wait()
        if buffer is None:
            region = mmap.mmap(-1, max(total, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if huge_pages:
                _ask_for_huge_pages(region)
            buffer = np.frombuffer(region, np.uint8)
            _fill(buffer, recipes, offsets, total, progress)
        matrices = {
            name: _core.PackedMatrix(r.format, r.rows, r.cols, buffer[offsets[name]:offsets[name] + r.nbytes])
            for name, r in recipes.items()
        }
        return PackedWeights(matrices, total, file is not None, buffer, file)

    try:
        yield packed
    except BaseException:
        if beside is not None:
            beside.given_up.set()
        raise


class _Beside:
    """Weights that a thread maps from the cache, or packs into it."""

    def __init__(self, recipes: Mapping[str, Recipe], offsets: Mapping[str, int], total: int, key: Callable[[], str],
                 huge_pages: bool, progress: Progress | None) -> None:
        self._recipes, self._offsets, self._total, self._key = recipes, offsets, total, key
        self._huge_pages, self._progress = huge_pages, progress
        self._there, self.given_up = threading.Event(), threading.Event()
        self._path: Path | None = None
        self._buffer: Bytes | None = None
        self._error: BaseException | None = None
        # With the caller's context: its notices go where the caller's go. Not a daemon: what was begun is completed.
        threading.Thread(target=copy_context().run, args=(self._run,), name="packing").start()

    def wait(self) -> tuple[Path | None, Bytes | None]:
        """The cache file and its bytes; None and None where there can be none."""
        self._there.wait()
        error = self._error
        if error is None:
            return self._path, self._buffer
        # A FormatError is of the source: packing into memory would fail as well.
        if isinstance(error, FormatError) or not isinstance(error, OSError | EdgewiseError):
            raise error
        notice("degraded", f"packed weights could not be cached ({error}); they are packed again at each start",
               where=str(self._path or "cache"))
        return None, None

    def _run(self) -> None:
        try:
            self._make()
        except BaseException as error:
            if not self._there.is_set():
                self._error = error
            elif isinstance(error, OSError | EdgewiseError):  # the weights are in use; it is their file that failed
                with suppress(EdgewiseError):
                    notice("degraded", f"packed weights could not be kept ({error}); they will be packed again",
                           where=str(self._path))
            else:
                raise
        finally:
            self._there.set()

    def _make(self) -> None:
        self._path = path = _cache_file(self._key(), self._recipes)
        if self._mapped():
            return
        with locked(path.with_suffix(".lock")):
            if not self._mapped():
                with write_aside(path) as file:
                    self._pack(file)
                    self._there.set()

    def _mapped(self) -> bool:
        """Map the cache file if it is there, and bring it into memory.

        A few pages are mapped at a time: building a tokenizer, which goes on beside this, needs memory of its own.
        """
        assert self._path is not None
        region = _mapped_file(self._path, self._total, self._huge_pages)
        if region is None:
            return False
        self._buffer = np.frombuffer(region, np.uint8)
        if self._total <= _most_in_memory():
            for start in range(0, self._total, _FETCHED_BYTES):
                _core.populate(self._buffer[start:start + _FETCHED_BYTES])
                region.madvise(mmap.MADV_DONTNEED, start, min(_FETCHED_BYTES, self._total - start))
        return True

    def _pack(self, file: IO[bytes]) -> None:
        total = self._total
        # Space is reserved before the file is mapped: a full disk is an error here, and not a signal later.
        os.posix_fallocate(file.fileno(), 0, total)
        if os.fstat(file.fileno()).st_size != total:
            raise OSError(errno.ENOSPC, "no space for the packed weights", str(self._path))
        # After an error its traceback still holds the array, and a map cannot be closed while an array looks into it.
        region = mmap.mmap(file.fileno(), total)
        _ask_for_huge_pages(region)
        buffer = np.frombuffer(region, np.uint8)

        def written() -> None:
            if self.given_up.is_set():
                raise InterruptedError("given up")
            # Pages already written go back to the file: the source is mapped as well, and both would count.
            region.madvise(mmap.MADV_DONTNEED)

        _fill(buffer, self._recipes, self._offsets, total, self._progress, written)
        _give_back()
        self._recipes = {}  # with them goes the source's mapping, whose pages would count until the file is synced
        del buffer
        region.close()
        # The pages are the file's, under whatever name: they can be used before they are on the disk.
        kept = mmap.mmap(file.fileno(), total, access=mmap.ACCESS_READ)
        if self._huge_pages:
            _ask_for_huge_pages(kept)
        self._buffer = np.frombuffer(kept, np.uint8)


def _give_back() -> None:
    """What a thread's allocator keeps for later, which a thread that ends does not need; glibc's alone knows how."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def pack_one(recipe: Recipe) -> Any:
    """One weight packed into memory of its own, as a native matrix."""
    buffer = np.zeros(recipe.nbytes, np.uint8)
    recipe.write(buffer)
    return _core.PackedMatrix(recipe.format, recipe.rows, recipe.cols, buffer)


def _cache_file(key: str, recipes: Mapping[str, Recipe]) -> Path:
    layout = "".join(f"{name}\0{r.kind}\0{r.rows}\0{r.cols}\0{r.nbytes}\n" for name, r in recipes.items())
    digest = hashlib.sha256(f"{LAYOUT_VERSION}\0{key}\0{layout}".encode()).hexdigest()
    return cache_root() / "packed" / f"{digest}.bin"


def _most_in_memory() -> int:
    """Bytes of weights that are read as a whole at the start; of more, pages come when they are used."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _ask_for_huge_pages(region: mmap.mmap) -> None:
    """A decode step reads all weights, and finds its way through 2 MiB pages a tenth faster than through 4 KiB ones.

    Anonymous memory has them where /sys/kernel/mm/transparent_hugepage/enabled allows; a file where its file system
    keeps large pieces of it together. A system without them refuses, and nothing changes.
    """
    with suppress(OSError, AttributeError):
        region.madvise(mmap.MADV_HUGEPAGE)


def _mapped_file(path: Path, nbytes: int, huge_pages: bool = True) -> mmap.mmap | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != nbytes or nbytes == 0:
                return None
            region = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    if huge_pages:
        _ask_for_huge_pages(region)
    return region


def _fill(buffer: Bytes, recipes: Mapping[str, Recipe], offsets: Mapping[str, int], total: int,
          progress: Progress | None, written: Callable[[], None] | None = None) -> None:
    for name, recipe in recipes.items():
        start = offsets[name]
        recipe.write(buffer[start:start + recipe.nbytes])
        if written is not None:
            written()
        if progress is not None:
            progress("packing weights", start + recipe.nbytes, total)


def unique(pairs: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    """Weights by name, each stored object once: a tied head keeps the name it had first."""
    seen: dict[int, str] = {}
    weights: dict[str, Stored] = {}
    for name, stored in pairs:
        if id(stored) not in seen:
            assert name not in weights, f"two weights are called {name}"
            seen[id(stored)] = name
            weights[name] = stored
    return weights
