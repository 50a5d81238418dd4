"""From stored weights to the interleaved rows that the kernels read, in memory or in a cache file that is mapped.

Packing is a permutation of codes and scales: no value changes, but for a codebook of at most sixteen values that are no
integers (NF4), which become multiples of 1/127 of the largest, with a notice. A weight without a kernel of its own (a
larger codebook, a group that blocks of 32 cannot carry, a factored weight, sparsity other than two of four) runs as
16-bit floats, and a notice says so.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import EdgewiseError, FormatError, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, QuantFormat
from edgewise.core.storage import Blocks, Dense, QuantizedTensor, Sparse, Stored, rows_of
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
from edgewise.formats.cache import cache_root, locked, write_aside
from edgewise.formats.mapped import release_pages
from edgewise.native import _core  # type: ignore[attr-defined]

__all__ = ["PackedWeights", "Recipe", "layout_of", "pack_all", "pack_one", "packed_nbytes", "read_ahead",
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
"""Read ahead at a time."""


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
        notice("fallback", f"{form} has no integer kernel; the weight runs as 16-bit floats", where=name)
        return _floats(Dense(stored.dense().astype(np.float16), FP16))
    if isinstance(stored, Dense):
        return _floats(stored, pairs, table)
    notice("fallback", f"{stored!r} runs as 16-bit floats", where=name)
    return _floats(Dense(stored.dense().astype(np.float16), FP16))


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
    """Packed weights by name, over one buffer. nbytes: of the buffer; cached: it is a mapped file of the cache."""

    matrices: Mapping[str, Any]
    nbytes: int
    cached: bool
    buffer: Bytes

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
             progress: Callable[[str, int, int], None] | None = None) -> PackedWeights:
    """Pack every weight, or map what an earlier load packed.

    key: identifies the source files; None packs into memory. A cache that cannot be written is a notice, not an error.
    huge_pages: ask for them.
    """
    offsets, total = layout_of(recipes)
    buffer: Bytes | None = None
    if key is not None:
        path = _cache_file(key, recipes)
        try:
            buffer = _mapped(path, total, huge_pages)
            if buffer is None:
                with locked(path.with_suffix(".lock")):
                    buffer = _mapped(path, total, huge_pages)
                    if buffer is None:
                        _write_cache(path, recipes, offsets, total, progress)
                        buffer = _mapped(path, total, huge_pages)
        except FormatError:  # of the source: packing into memory would fail as well
            raise
        except (OSError, EdgewiseError) as error:
            notice("degraded", f"packed weights could not be cached ({error}); they are packed again at each start",
                   where=str(path))
    cached = buffer is not None
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
    return PackedWeights(matrices, total, cached, buffer)


def pack_one(recipe: Recipe) -> Any:
    """One weight packed into memory of its own, as a native matrix."""
    buffer = np.zeros(recipe.nbytes, np.uint8)
    recipe.write(buffer)
    return _core.PackedMatrix(recipe.format, recipe.rows, recipe.cols, buffer)


def read_ahead(recipes: Mapping[str, Recipe], key: str | None) -> Callable[[], None]:
    """Bring what an earlier start packed into the page cache, while this process does something else.

    Returns what waits for the end. A few pages are mapped at a time: building a tokenizer needs memory of its own.
    """
    if key is None or layout_of(recipes)[1] > _most_in_memory():
        return lambda: None

    def fetch() -> None:
        with suppress(OSError, EdgewiseError):  # pack_all says what is wrong
            region = _mapped_file(_cache_file(key, recipes), layout_of(recipes)[1])
            if region is None:
                return
            for start in range(0, len(region), _FETCHED_BYTES):
                _core.populate(np.frombuffer(region, np.uint8)[start:start + _FETCHED_BYTES])
                region.madvise(mmap.MADV_DONTNEED, start, min(_FETCHED_BYTES, len(region) - start))

    thread = threading.Thread(target=fetch, name="read ahead")
    thread.start()
    return thread.join


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


def _mapped(path: Path, nbytes: int, huge_pages: bool) -> Bytes | None:
    region = _mapped_file(path, nbytes, huge_pages)
    if region is None:
        return None
    return np.frombuffer(region, np.uint8)


def _write_cache(path: Path, recipes: Mapping[str, Recipe], offsets: Mapping[str, int], total: int,
                 progress: Callable[[str, int, int], None] | None) -> None:
    with write_aside(path) as file:
        # Space is reserved before the file is mapped: a full disk is an error here, and not a signal later.
        os.posix_fallocate(file.fileno(), 0, total)
        if os.fstat(file.fileno()).st_size != total:
            raise OSError(errno.ENOSPC, "no space for the packed weights", str(path))
        # After an error its traceback still holds the array, and a map cannot be closed while an array looks into it.
        region = mmap.mmap(file.fileno(), total)
        _ask_for_huge_pages(region)
        buffer = np.frombuffer(region, np.uint8)
        # Pages already written go back to the file: the source is mapped as well, and both would count.
        _fill(buffer, recipes, offsets, total, progress, lambda: region.madvise(mmap.MADV_DONTNEED))
        del buffer
        region.close()


def _fill(buffer: Bytes, recipes: Mapping[str, Recipe], offsets: Mapping[str, int], total: int,
          progress: Callable[[str, int, int], None] | None, written: Callable[[], None] | None = None) -> None:
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
