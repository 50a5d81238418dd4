"""Memory of an ONNX file is that of the file and its tensors, not of the runtime."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.errors import EdgewiseError
from edgewise.measure.onnx_runtime import onnx_peak_bytes, onnx_runner, onnx_seconds


def written(path, width):
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.full((8, width), 0.5, np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [
        helper.make_tensor_value_info("x", kind, ["batch", 8])], [
        helper.make_tensor_value_info("y", kind, ["batch", width])], [weight])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)],
                                       ir_version=10).SerializeToString())
    return path


@pytest.mark.slow
def test_a_larger_file_takes_more(tmp_path):
    small, large = written(tmp_path / "small.onnx", 16), written(tmp_path / "large.onnx", 1_000_000)
    np.testing.assert_array_equal(onnx_runner(small)(np.ones((2, 8), np.float32)), np.full((2, 16), 4.0))
    found = onnx_peak_bytes(small, (1, 8)), onnx_peak_bytes(large, (1, 8))
    assert found[0] < 20e6
    assert found[1] - found[0] > 32e6  # its weights
    times = onnx_seconds({"small": small, "large": large}, np.ones((1, 8), np.float32), repeats=6)
    assert times["small"].interval is not None
    assert set(times) == {"small", "large"}


@pytest.mark.slow
def test_what_is_no_model_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "odd.onnx").write_bytes(b"odd")
    with pytest.raises(EdgewiseError, match="did not run it"):
        onnx_peak_bytes(tmp_path / "odd.onnx", (1, 8))
