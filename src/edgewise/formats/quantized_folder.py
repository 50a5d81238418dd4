"""Our storage forms inside a Hugging Face folder: how each Stored becomes safetensors entries, and back to the bit.

A tensor `name` that is not dense becomes several entries, described in config.json under
quantization_config = {"quant_method": "edgewise", "version": 1, "formats": {name: description}}:

    quantized  name.codes   uint8 (rows, ceil(inputs * bits / 8)): codes of `bits` bits, two's complement when signed,
                            packed along each row from the lowest bit of the first byte up; rows end on a byte
               name.scales  (out, groups), (out, 1) or (1, 1) in the scale's own number format (8-bit floats: codes)
               name.minima  as scales, when the format has minima
               name.zeros   uint8, when it has integer zero points: `bits` bits each, packed as one row
    blocks     name.blocks  uint8 (rows, bytes per row): a file's own blocks, such as GGUF's Q4_1
    factored   name.left, name.right: each in any form
    sum        name.part0, name.part1, ...: each in any form
    sparse     name.values in any form; name.index (n:m: places in a group, packed as one row; csr: columns);
               name.row_starts (csr)
    input_sparse  name.weight in any form; name.threshold (in,) float32; name.low_rank factored, where there is one

The other keys of quantization_config say how the model runs and stay in Checkpoint.config["quantization_config"]:

    activations  {site: {"bits", "scale", "zero"}}: static rounding of activations; sites as in core/activation.py

With n:m sparsity in the format itself, a row of codes holds the kept codes, then their places in their groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.errors import FormatError, InvalidValueError, UnsupportedError
from edgewise.core.numbers import BF16, E8M0, FP16, FP32, Granularity, NumberFormat, QuantFormat
from edgewise.core.storage import BlockCodec, Blocks, Dense, Factored, InputSparse, QuantizedTensor, Sparse, Stored, Sum
from edgewise.formats.safetensors import TensorFiles, dtype_name

__all__ = ["Part", "decode", "encode", "format_from_json", "format_to_json", "pack_bits", "part_names", "unpack_bits"]

Array = NDArray[Any]
_NESTING = 4
_MOST_PARTS = 8
_DENSE_DTYPE = {FP32: "F32", FP16: "F16", BF16: "BF16"}
CodecOf = Callable[[str], BlockCodec]


@dataclass(frozen=True, eq=False)
class Part:
    """One safetensors entry: raw values, and the dtype that says what they are."""

    dtype: str
    values: Array


def pack_bits(codes: Array, bits: int) -> NDArray[np.uint8]:
    """codes: (rows, n) integers, of which the low `bits` (1 to 16) are kept -> (rows, ceil(n * bits / 8)) uint8."""
    rows, count = codes.shape
    if bits == 8:
        return np.ascontiguousarray(codes if codes.itemsize == 1 else codes.astype(np.uint8)).view(np.uint8).reshape(
            rows, count)
    width = (count * bits + 7) // 8
    if bits > 8:
        words = codes.astype(np.uint16).astype("<u2").view(np.uint8).reshape(rows, count, 2)
        planes = np.unpackbits(words, axis=2, bitorder="little")[:, :, :bits]
        return np.packbits(planes.reshape(rows, count * bits), axis=1, bitorder="little")
    # Eight codes of b bits fill b bytes exactly, and fit one 64-bit word.
    padded = np.zeros((rows, -(-count // 8) * 8), np.uint8)
    padded[:, :count] = codes.astype(np.uint8) & np.uint8((1 << bits) - 1)
    lanes = padded.reshape(rows, -1, 8)
    word = np.zeros(lanes.shape[:2], "<u8")
    for lane in range(8):
        word |= lanes[:, :, lane].astype(np.uint64) << np.uint64(bits * lane)
    packed = word.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return np.ascontiguousarray(packed[:, :width])


def unpack_bits(packed: NDArray[np.uint8], count: int, bits: int, *, signed: bool = False) -> Array:
    """The inverse of pack_bits: (rows, count) uint8 or int8, uint16 or int16 above 8 bits."""
    rows = packed.shape[0]
    if bits > 8:
        planes = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(rows, count, bits)
        words = np.zeros((rows, count, 16), np.uint8)
        words[:, :, :bits] = planes
        if signed:
            words[:, :, bits:] = planes[:, :, -1:]
        values: Array = np.packbits(words, axis=2, bitorder="little").view("<u2")[:, :, 0]
        return values.astype(np.uint16).view(np.int16) if signed else values.astype(np.uint16)
    if bits == 8:
        codes = np.ascontiguousarray(packed[:, :count])
    else:
        groups = -(-count // 8)
        padded = np.zeros((rows, groups * bits), np.uint8)
        padded[:, :packed.shape[1]] = packed
        word_bytes = np.zeros((rows, groups, 8), np.uint8)
        word_bytes[:, :, :bits] = padded.reshape(rows, groups, bits)
        word = word_bytes.view("<u8")[:, :, 0]
        lanes = np.empty((rows, groups, 8), np.uint8)
        mask = np.uint64((1 << bits) - 1)
        for lane in range(8):
            lanes[:, :, lane] = (word >> np.uint64(bits * lane)) & mask
        codes = np.ascontiguousarray(lanes.reshape(rows, groups * 8)[:, :count])
    if not signed:
        return codes
    shift = np.uint8(8 - bits)
    return np.left_shift(codes, shift).view(np.int8) >> shift.astype(np.int8)


def number_to_json(number: NumberFormat) -> str | dict[str, Any]:
    """A short name where QuantFormat.parse knows it, else every field."""
    try:
        if QuantFormat.parse(number.name).element == number:
            return number.name
    except InvalidValueError:
        pass
    return {"kind": number.kind, "bits": number.bits, "signed": number.signed, "restricted": number.restricted,
            "exponent_bits": number.exponent_bits, "mantissa_bits": number.mantissa_bits,
            "finite_only": number.finite_only, "es": number.es, "codebook": list(number.codebook),
            "label": number.label, **({} if number.rounding == "nearest" else {"rounding": number.rounding})}


def number_from_json(data: Any) -> NumberFormat:
    """The inverse of number_to_json. Raises InvalidValueError."""
    if isinstance(data, str):
        return QuantFormat.parse(data).element
    _expect(isinstance(data, Mapping) and set(data) <= set(NumberFormat.__dataclass_fields__), "a number format", data)
    kind, bits, codebook = data.get("kind"), data.get("bits"), data.get("codebook", [])
    _expect(kind in ("int", "float", "posit", "codebook") and type(bits) is int and 1 <= bits <= 32, "kind, bits", data)
    _expect(all(type(data.get(key, 0)) is int and 0 <= data.get(key, 0) <= 16
                for key in ("exponent_bits", "mantissa_bits", "es")), "small integers", data)
    _expect(kind in ("int", "codebook") or bits <= 16, "at most 16 bits", data)
    _expect(kind != "int" or bits <= 16, "at most 16 bits", data)
    _expect(kind != "float" or data.get("exponent_bits", 0) + data.get("mantissa_bits", 0) + data.get("signed", True)
            == bits, "bits that add up", data)
    _expect(isinstance(codebook, list) and len(codebook) == (2**bits if kind == "codebook" and bits <= 16 else 0)
            and all(type(value) in (int, float) and math.isfinite(value) for value in codebook),
            "a codebook of 2^bits finite values", data)
    _expect(isinstance(data.get("label", ""), str), "a text label", data)
    return NumberFormat(**{**data, "codebook": tuple(float(value) for value in codebook)})


def format_to_json(fmt: QuantFormat) -> str | dict[str, Any]:
    """A QuantFormat as "int4/g32/fp16/min" where that says everything, else as an object."""
    if isinstance(fmt.scale, QuantFormat):
        raise UnsupportedError(f"{fmt} has scales that are themselves quantised; a folder holds those as blocks only")
    try:
        if QuantFormat.parse(str(fmt)) == fmt:
            return str(fmt)
    except InvalidValueError:
        pass
    return {"element": number_to_json(fmt.element), "granularity": str(fmt.granularity),
            "scale": number_to_json(fmt.scale), "zero": fmt.zero, "prefixes": list(fmt.prefixes),
            "n_m": list(fmt.n_m) if fmt.n_m else None, **({"peak": fmt.peak} if fmt.peak else {})}


def format_from_json(data: Any) -> QuantFormat:
    """The inverse of format_to_json. Raises InvalidValueError."""
    if isinstance(data, str):
        return QuantFormat.parse(data)
    keys = {"element", "granularity", "scale", "zero", "prefixes", "n_m"}
    _expect(isinstance(data, Mapping) and set(data) - {"peak"} == keys, f"the fields {sorted(keys)}", data)
    place, zero, n_m, prefixes = data["granularity"], data["zero"], data["n_m"], data["prefixes"]
    peak = data.get("peak", 0.0)
    _expect(type(peak) in (int, float), "a peak as a number", data)
    _expect(isinstance(place, str) and zero in ("none", "int", "min"), "granularity and zero", data)
    _expect(n_m is None or (isinstance(n_m, list) and len(n_m) == 2 and all(type(v) is int for v in n_m)
                            and 1 <= n_m[0] <= n_m[1] <= 256), "n_m as [n, m]", data)
    _expect(isinstance(prefixes, list) and all(type(v) is int and 0 < v <= 16 for v in prefixes), "prefixes", data)
    granularity: Granularity = QuantFormat.parse(f"int8/{place}").granularity
    return QuantFormat(number_from_json(data["element"]), granularity, number_from_json(data["scale"]), zero,
                       tuple(prefixes), tuple(n_m) if n_m else None, float(peak))


def _expect(condition: bool, expected: str, given: Any) -> None:
    if not condition:
        raise InvalidValueError(f"expected {expected}; given {str(given)[:120]}")


def encode(tensor: Stored, name: str) -> tuple[dict[str, Any], dict[str, Part]]:
    """A Stored as its description and its safetensors entries; a dense one is a single entry called `name`."""
    if isinstance(tensor, Dense):
        return {"storage": "dense"}, {name: Part(_DENSE_DTYPE[tensor.number], tensor.data)}
    if isinstance(tensor, QuantizedTensor):
        return _encode_quantized(tensor, name)
    if isinstance(tensor, Blocks):
        return ({"storage": "blocks", "codec": tensor.codec.name, "shape": list(tensor.shape)},
                {f"{name}.blocks": Part("U8", tensor.raw)})
    if isinstance(tensor, Factored):
        left, left_parts = encode(tensor.left, f"{name}.left")
        right, right_parts = encode(tensor.right, f"{name}.right")
        return {"storage": "factored", "left": left, "right": right}, {**left_parts, **right_parts}
    if isinstance(tensor, Sum):
        encoded = [encode(part, f"{name}.part{place}") for place, part in enumerate(tensor.parts)]
        return ({"storage": "sum", "parts": [each for each, _ in encoded]},
                {entry: part for _, parts in encoded for entry, part in parts.items()})
    if isinstance(tensor, InputSparse):
        inner, entries = encode(tensor.weight, f"{name}.weight")
        whole: dict[str, Any] = {"storage": "input_sparse", "weight": inner}
        entries[f"{name}.threshold"] = Part("F32", tensor.threshold)
        if tensor.low_rank is not None:
            whole["low_rank"], more = encode(tensor.low_rank, f"{name}.low_rank")
            entries |= more
        return whole, entries
    if isinstance(tensor, Sparse):
        values, parts = encode(tensor.values, f"{name}.values")
        described: dict[str, Any] = {"storage": "sparse", "encoding": tensor.encoding, "values": values,
                                     "shape": list(tensor.shape)}
        if tensor.encoding == "n_m":
            assert tensor.n_m is not None
            described["n_m"] = list(tensor.n_m)
            parts[f"{name}.index"] = Part("U8", pack_bits(tensor.index.reshape(1, -1), _place_bits(tensor.n_m[1]))[0])
            return described, parts
        assert tensor.row_starts is not None
        parts[f"{name}.index"] = Part(dtype_name(tensor.index), tensor.index)
        parts[f"{name}.row_starts"] = Part(dtype_name(tensor.row_starts), tensor.row_starts)
        return described, parts
    raise UnsupportedError(f"tensor {name!r} is stored as {type(tensor).__name__}, which a folder cannot hold; "
                           "expected Dense, QuantizedTensor, Blocks, Factored, Sparse, InputSparse or Sum")


def _place_bits(group: int) -> int:
    return max(1, (group - 1).bit_length())


def _code_signed(element: NumberFormat) -> bool:
    return element.kind == "int" and element.signed


def _encode_quantized(tensor: QuantizedTensor, name: str) -> tuple[dict[str, Any], dict[str, Part]]:
    fmt, codes = tensor.format, tensor.codes
    element = fmt.element
    if codes.ndim != 2:
        raise InvalidValueError(f"tensor {name!r}: codes are (out, in); given shape {codes.shape}")
    signed = _code_signed(element)
    low, high = (-(1 << (element.bits - 1)), (1 << (element.bits - 1)) - 1) if signed else (0, (1 << element.bits) - 1)
    if codes.size and (int(codes.min()) < low or int(codes.max()) > high):
        raise InvalidValueError(f"tensor {name!r}: codes run from {codes.min()} to {codes.max()}, "
                                f"but {fmt} has {low} to {high}")
    described = {"storage": "quantized", "format": format_to_json(fmt), "shape": list(tensor.shape)}
    _scale_shaped(tensor.scales, fmt, codes.shape, name, "scales")
    packed = _pack_n_m(codes, fmt, name) if fmt.n_m else pack_bits(codes, element.bits)
    parts = {f"{name}.codes": Part("U8", packed), f"{name}.scales": _encode_scales(tensor.scales, fmt, name, "scales")}
    if fmt.zero == "min":
        _scale_shaped(tensor.minima, fmt, codes.shape, name, "minima")
        parts[f"{name}.minima"] = _encode_scales(tensor.minima, fmt, name, "minima")
    elif fmt.zero == "int":
        zeros = _scale_shaped(tensor.zeros, fmt, codes.shape, name, "zeros")
        whole = np.clip(np.rint(zeros), 0, (1 << element.bits) - 1)
        if not np.array_equal(whole, zeros):
            raise InvalidValueError(f"tensor {name!r}: zeros must be integers of {element.bits} bits")
        parts[f"{name}.zeros"] = Part("U8", pack_bits(whole.astype(np.uint16).reshape(1, -1), element.bits)[0])
    return described, parts


def _scales_shape(fmt: QuantFormat, shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, 1) if fmt.granularity.kind == "tensor" else (shape[0], fmt.granularity.groups(shape[1]))


def _scale_shaped(values: Array | None, fmt: QuantFormat, shape: tuple[int, ...], name: str, what: str) -> Array:
    if values is None or values.shape != _scales_shape(fmt, shape):
        raise InvalidValueError(f"tensor {name!r}: {what} of {fmt} for shape {shape} have shape "
                                f"{_scales_shape(fmt, shape)}; given {None if values is None else values.shape}")
    return values


def _encode_scales(values: Array | None, fmt: QuantFormat, name: str, what: str) -> Part:
    if values is None:
        raise InvalidValueError(f"tensor {name!r}: {fmt} needs {what}")
    number, exact = fmt.scale, np.asarray(values, np.float32)
    assert isinstance(number, NumberFormat)  # format_to_json, called first, refuses others
    if number == FP32:
        return Part("F32", exact)
    codes = number.encode(exact)
    if not np.array_equal(number.decode(codes), exact):
        raise InvalidValueError(f"tensor {name!r}: {what} are not values of {number}; round them when quantising")
    if number == FP16:
        return Part("F16", exact.astype(np.float16))  # keeps the sign of a zero, as `encode` does
    return Part("BF16" if number == BF16 else "F8_E8M0" if number == E8M0 else dtype_name(codes), codes)


def _pack_n_m(codes: Array, fmt: QuantFormat, name: str) -> NDArray[np.uint8]:
    assert fmt.n_m is not None
    kept, group = fmt.n_m
    rows, inputs = codes.shape
    if fmt.zero != "none" or fmt.element.kind != "int" or inputs % group:
        raise UnsupportedError(f"tensor {name!r}: {kept}:{group} sparsity inside a format needs integer elements "
                               f"without zero points and rows that are a multiple of {group}; given {fmt}, {inputs}")
    grouped = codes.reshape(rows, -1, group)
    if (np.count_nonzero(grouped, axis=2) > kept).any():
        raise InvalidValueError(f"tensor {name!r}: a group of {group} holds more than {kept} codes that are not zero")
    places = np.sort(np.argsort(grouped == 0, axis=2, kind="stable")[:, :, :kept], axis=2)
    values = np.take_along_axis(grouped, places, axis=2)
    bits = [_bits_of(part.reshape(rows, -1), width)
            for part, width in ((values, fmt.element.bits), (places, _place_bits(group)))]
    return np.packbits(np.concatenate(bits, axis=1), axis=1, bitorder="little")


def _bits_of(codes: Array, width: int) -> NDArray[np.uint8]:
    return np.unpackbits(pack_bits(codes, width), axis=1, count=codes.shape[1] * width, bitorder="little")


def _unpack_n_m(packed: NDArray[np.uint8], shape: tuple[int, int], fmt: QuantFormat) -> Array:
    assert fmt.n_m is not None
    kept, group = fmt.n_m
    rows, inputs = shape
    count, bits, place = inputs // group * kept, fmt.element.bits, _place_bits(group)
    planes = np.unpackbits(packed, axis=1, count=count * (bits + place), bitorder="little")
    values, places = (
        unpack_bits(np.packbits(part, axis=1, bitorder="little"), count, width, signed=signed).reshape(rows, -1, kept)
        for part, width, signed in ((planes[:, :count * bits], bits, _code_signed(fmt.element)),
                                    (planes[:, count * bits:], place, False)))
    if places.size and int(places.max()) >= group:
        raise InvalidValueError(f"a place in a group of {group} is {places.max()}")
    codes = np.zeros((rows, inputs // group, group), values.dtype)
    np.put_along_axis(codes, places.astype(np.int64), values, axis=2)
    return codes.reshape(shape)


def part_names(name: str, description: Any) -> list[str]:
    """The entries that a described tensor is made of. Raises InvalidValueError for a malformed description."""
    return _part_names(name, description, _NESTING)


def _part_names(name: str, description: Any, depth: int) -> list[str]:
    _expect(isinstance(description, Mapping) and depth > 0, "a description, not nested deeply", description)
    storage = description.get("storage")
    if storage == "dense":
        return [name]
    if storage == "blocks":
        return [f"{name}.blocks"]
    if storage == "quantized":
        zero = {"none": [], "int": [f"{name}.zeros"], "min": [f"{name}.minima"]}
        return [f"{name}.codes", f"{name}.scales", *zero[format_from_json(description.get("format")).zero]]
    if storage == "factored":
        return [part for side in ("left", "right")
                for part in _part_names(f"{name}.{side}", description.get(side), depth - 1)]
    if storage == "input_sparse":
        inner = _part_names(f"{name}.weight", description.get("weight"), depth - 1)
        low = description.get("low_rank")
        if low is not None:
            _expect(isinstance(low, Mapping) and low.get("storage") == "factored", "a factored low_rank", low)
            inner += _part_names(f"{name}.low_rank", low, depth - 1)
        return [*inner, f"{name}.threshold"]
    if storage == "sum":
        parts = description.get("parts")
        _expect(isinstance(parts, list) and 1 <= len(parts) <= _MOST_PARTS, f"1 to {_MOST_PARTS} parts", parts)
        return [entry for place, part in enumerate(parts)
                for entry in _part_names(f"{name}.part{place}", part, depth - 1)]
    _expect(storage == "sparse", "storage dense, quantized, blocks, factored, sparse, input_sparse or sum",
            storage)
    _expect(description.get("encoding") in ("n_m", "csr"), "encoding n_m or csr", description.get("encoding"))
    rows = [f"{name}.row_starts"] if description["encoding"] == "csr" else []
    return [f"{name}.index", *rows, *_part_names(f"{name}.values", description.get("values"), depth - 1)]


def decode(name: str, description: Mapping[str, Any], files: TensorFiles, codec_of: CodecOf) -> Stored:
    """A described tensor from its entries. codec_of: a block codec by its name. Raises FormatError."""
    for part in part_names(name, description):
        if part not in files:
            raise FormatError(f"entry {part!r} is missing from the safetensors files", path=_first(files), tensor=name)
    try:
        return _decode(name, description, files, codec_of)
    except InvalidValueError as error:
        raise FormatError(str(error), path=_first(files), tensor=name) from error


def _first(files: TensorFiles) -> str | None:
    return files.files[0] if files.files else None


def _decode(name: str, description: Mapping[str, Any], files: TensorFiles, codec_of: CodecOf) -> Stored:
    storage = description["storage"]
    if storage == "dense":
        return files.dense(name, aligned=False)  # parts of a tensor lie side by side, whatever their sizes
    if storage == "factored":
        return Factored(_decode(f"{name}.left", description["left"], files, codec_of),
                        _decode(f"{name}.right", description["right"], files, codec_of))
    if storage == "sum":
        return Sum(tuple(_decode(f"{name}.part{place}", part, files, codec_of)
                         for place, part in enumerate(description["parts"])))
    if storage == "input_sparse":
        weight = _decode(f"{name}.weight", description["weight"], files, codec_of)
        low_rank = None if description.get("low_rank") is None else _decode(f"{name}.low_rank", description["low_rank"],
                                                                            files, codec_of)
        assert low_rank is None or isinstance(low_rank, Factored)
        return InputSparse(weight, _raw(files, f"{name}.threshold", "F32", (weight.shape[1],)).astype(np.float32),
                           low_rank)
    shape: Any = description.get("shape")
    _expect(isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in shape),
            "a shape", shape)
    if storage == "blocks":
        codec = codec_of(str(description.get("codec")))
        _expect(len(shape) >= 1 and shape[-1] % codec.block == 0, f"rows of whole blocks of {codec.block}", shape)
        width = shape[-1] // codec.block * codec.block_nbytes
        raw = _raw(files, f"{name}.blocks", "U8", (math.prod(shape[:-1]), width))
        return Blocks(raw, codec, tuple(shape))
    _expect(len(shape) == 2, "a shape of two sizes", shape)
    if storage == "quantized":
        return _decode_quantized(name, format_from_json(description["format"]), (shape[0], shape[1]), files)
    values = _decode(f"{name}.values", description["values"], files, codec_of)
    if description["encoding"] == "n_m":
        return _decode_n_m(name, description.get("n_m"), (shape[0], shape[1]), values, files)
    return _decode_csr(name, (shape[0], shape[1]), values, files)


class PackedTensor(QuantizedTensor):
    """A QuantizedTensor that stays packed in its file: its fields are unpacked anew each time they are asked for.

    Codes take a byte each once unpacked, so that a model of 4 bits held as arrays would take twice its file.
    fields: from a range of rows to the values of a field; one that the format does not have is None.
    """

    def __init__(self, fmt: QuantFormat, shape: tuple[int, int],
                 fields: Mapping[str, Callable[[int, int], Array]]) -> None:
        object.__setattr__(self, "format", fmt)
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "_fields", fields)

    def __getattribute__(self, name: str) -> Any:
        if name in ("codes", "scales", "zeros", "minima"):
            field = self._fields.get(name)
            return None if field is None else field(0, self._shape[0])
        return object.__getattribute__(self, name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._shape)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """These rows, packed like the whole."""
        def part(field: Callable[[int, int], Array]) -> Callable[[int, int], Array]:
            return lambda first, last: field(start + first, start + last)

        return PackedTensor(self.format, (stop - start, self._shape[1]),
                            {name: part(field) for name, field in self._fields.items()})


def _decode_quantized(name: str, fmt: QuantFormat, shape: tuple[int, int], files: TensorFiles) -> QuantizedTensor:
    rows, inputs = shape
    bits = fmt.element.bits
    _expect(bits <= 16, "elements of at most 16 bits", fmt)
    if fmt.n_m:
        kept, group = fmt.n_m
        _expect(inputs % group == 0, f"rows that are a multiple of {group}", shape)
        width = (inputs // group * kept * (bits + _place_bits(group)) + 7) // 8
        codes = _unpack_n_m(_raw(files, f"{name}.codes", "U8", (rows, width)), shape, fmt)
        return QuantizedTensor(codes, _decode_scales(files, f"{name}.scales", fmt, shape), fmt)
    packed = _raw(files, f"{name}.codes", "U8", (rows, (inputs * bits + 7) // 8))

    fields: dict[str, Callable[[int, int], Array]] = {
        "codes": lambda start, stop: unpack_bits(packed[start:stop], inputs, bits, signed=_code_signed(fmt.element)),
        "scales": lambda start, stop: _decode_scales(files, f"{name}.scales", fmt, shape, start, stop)}
    if fmt.zero == "min":
        fields["minima"] = lambda start, stop: _decode_scales(files, f"{name}.minima", fmt, shape, start, stop)
    elif fmt.zero == "int":
        places = _scales_shape(fmt, shape)
        count = math.prod(places)
        zeros = _raw(files, f"{name}.zeros", "U8", ((count * bits + 7) // 8,)).reshape(1, -1)

        def zeros_of(start: int, stop: int) -> Array:
            every = unpack_bits(zeros, count, bits).astype(np.float32).reshape(places)
            return every if places == (1, 1) else every[start:stop]

        fields["zeros"] = zeros_of
    # What is wrong with a file is said when a tensor is opened, not when it is used.
    for field in fields.keys() - {"codes"}:
        fields[field](0, rows)
    return PackedTensor(fmt, shape, fields)


def _decode_scales(files: TensorFiles, entry: str, fmt: QuantFormat, shape: tuple[int, int],
                   start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """start, stop: the rows wanted, where rows have scales of their own."""
    number = fmt.scale
    assert isinstance(number, NumberFormat)  # format_from_json makes no other
    dtype = _DENSE_DTYPE.get(number) or ("F8_E8M0" if number == E8M0 else "U8" if number.bits <= 8 else "U16")
    raw = _raw(files, entry, dtype, _scales_shape(fmt, shape))
    if fmt.granularity.kind != "tensor":
        raw = raw[start:stop]
    values = raw.astype(np.float32) if number in (FP32, FP16) else number.decode(raw)
    if not np.isfinite(values).all():
        row, group = np.argwhere(~np.isfinite(values))[0] + np.array([start, 0])
        raise FormatError(f"{entry.rsplit('.', 1)[1]}[{row}, {group}] is {values[row - start, group]}",
                          path=files.home(entry).path, tensor=entry, offset=files[entry].begin)
    return values


def _raw(files: TensorFiles, entry: str, dtype: str, shape: tuple[int, ...]) -> Array:
    found = files[entry]
    if found.dtype != dtype or found.shape != shape:
        raise FormatError(f"expected {dtype} of shape {list(shape)}; found {found.dtype} of shape {list(found.shape)}",
                          path=files.home(entry).path, tensor=entry, offset=found.begin)
    return files.array(entry, aligned=False)


def _decode_n_m(name: str, n_m: Any, shape: tuple[int, int], values: Stored, files: TensorFiles) -> Sparse:
    _expect(isinstance(n_m, list) and len(n_m) == 2 and all(type(v) is int for v in n_m)
            and 1 <= n_m[0] <= n_m[1] <= 256 and shape[1] % n_m[1] == 0, "n_m as [n, m] that divides a row", n_m)
    kept, group = n_m
    places = (shape[0], shape[1] // group * kept)
    _expect(values.shape == places, f"values of shape {places}", values.shape)
    count, bits = math.prod(places), _place_bits(group)
    packed = _raw(files, f"{name}.index", "U8", ((count * bits + 7) // 8,)).reshape(1, -1)
    index = unpack_bits(packed, count, bits).reshape(places)
    _expect(not index.size or int(index.max()) < group, f"places below {group}", index.max() if index.size else 0)
    return Sparse("n_m", index, values, shape, n_m=(kept, group))


def _decode_csr(name: str, shape: tuple[int, int], values: Stored, files: TensorFiles) -> Sparse:
    index, starts = (files.array(f"{name}.{part}", aligned=False).copy() for part in ("index", "row_starts"))
    _expect(index.dtype.kind in "iu" and index.ndim == 1, "integer columns", index.dtype)
    _expect(starts.dtype.kind in "iu" and starts.shape == (shape[0] + 1,), "a start per row and an end", starts.shape)
    _expect(math.prod(values.shape) == index.size, f"{index.size} values", values.shape)
    bounded = not index.size or (int(index.min()) >= 0 and int(index.max()) < shape[1])
    _expect(bounded, f"columns from 0 to {shape[1] - 1}", "columns outside")
    wide = starts.astype(np.int64)
    _expect(int(wide[0]) == 0 and int(wide[-1]) == index.size and bool((np.diff(wide) >= 0).all()),
            "row starts that rise from 0 to the number of values", "others")
    return Sparse("csr", index, values, shape, row_starts=starts)
