"""encodings.json: the ranges are those that codes span, and they are written where activations are static."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgewise.core.activation import StaticActivation, activations_to_config
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.formats import read_folder, write_folder
from edgewise.formats.encodings import encodings_of


@pytest.mark.parametrize("text", ["int8/tensor/fp32/int", "int4/axis/fp32/int", "int4/axis/fp32", "int8/axis/fp32"])
def test_ranges_are_those_of_the_codes(text, tmp_path):
    fmt = QuantFormat.parse(text)
    codes, scales, zeros = quantize(np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32), fmt)
    tensors: dict[str, Stored] = {"a.weight": QuantizedTensor(codes, scales, fmt, zeros=zeros),
                                  "b.weight": Dense(np.ones((2, 2), np.float32))}
    sites = {"a.input": StaticActivation.from_range(-1.0, 3.0, 8)}
    made = Checkpoint("llama", {"quantization_config": activations_to_config({}, sites)}, tensors)
    found = encodings_of(made)
    first, last = fmt.element.code_range
    rows = found["param_encodings"]["a.weight"]
    assert len(rows["min"]) == len(rows["max"]) == (1 if "tensor" in text else 6)
    for row, (low, high) in enumerate(zip(rows["min"], rows["max"], strict=True)):
        scale, zero = scales[row, 0], 0.0 if zeros is None else zeros[row, 0]
        assert (low, high) == pytest.approx(((first - zero) * scale, (last - zero) * scale))
    assert rows["is_symmetric"] == (zeros is None)
    item = found["activation_encodings"]["a.input"]
    assert (item["min"], item["max"]) == pytest.approx((sites["a.input"].low, sites["a.input"].high))
    assert item["bitwidth"] == 8
    folder = write_folder(made, tmp_path / "m")
    assert json.loads((folder / "encodings.json").read_text()) == found
    assert encodings_of(read_folder(folder)) == found
    write_folder(made, folder)  # ours, and so replaced
    plain = Checkpoint("llama", {}, tensors)
    assert not (write_folder(plain, tmp_path / "plain") / "encodings.json").exists()
