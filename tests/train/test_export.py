"""What is trained runs in ONNX Runtime: the same numbers, from codes."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.core.elements import FP4, INT4, INT8, POSIT4, POSIT8, POSIT16
from edgewise.core.errors import UnsupportedError
from edgewise.core.graph import Graph, Node, TensorInfo
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import Dense, Factored, QuantizedTensor
from edgewise.formats.onnx_writer import write_onnx

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
from torch import nn  # noqa: E402

from edgewise.train.export import graph_of  # noqa: E402
from edgewise.train.qat import calibrate, prepare, quantisable  # noqa: E402

pytestmark = pytest.mark.slow


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 9), nn.ReLU(),
                          nn.Linear(9, 3))
    model.train()
    model(torch.randn(32, 2, 10, 10) * 2 + 1)
    return model.eval()


def ran(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


@pytest.mark.parametrize("elements", [
    [FP4] * 4, [POSIT4] * 4, [POSIT8] * 4, [POSIT8, FP4, INT4, INT8], [None, FP4, POSIT8, None], [None] * 4],
    ids=lambda elements: " ".join(map(str, elements)))
def test_onnx_runtime_agrees(tmp_path, elements):
    model = net()
    x = torch.randn(16, 2, 10, 10, generator=torch.Generator().manual_seed(1))
    made = prepare(model, dict(zip(quantisable(model), elements, strict=True)))
    calibrate(made, [(x,)])
    size = write_onnx(graph_of(made, (2, 10, 10)), tmp_path / "net.onnx")
    assert size == (tmp_path / "net.onnx").stat().st_size
    with torch.no_grad():
        expected = made(x).numpy()
    found = ran(tmp_path / "net.onnx", x.numpy())
    # A sum in another order may fall on the other side of a boundary: rarely, and by one step.
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.9
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("element", [FP4, POSIT4, POSIT8, POSIT16, INT4, INT8], ids=str)
def test_a_weight_is_its_dense_form_exactly(tmp_path, element):
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    fmt = QuantFormat.parse(f"{element}/axis/fp32")
    codes, scales, _ = quantize(x, fmt)
    stored = QuantizedTensor(codes, scales, fmt)
    graph = Graph("w", (Node("add", "Add", ("input", "w"), ("out",)),), {
        "input": TensorInfo("input", (5, 7)), "w": TensorInfo("w", (5, 7)), "out": TensorInfo("out", (5, 7))},
        ("input",), ("out",), {"w": stored})
    write_onnx(graph, tmp_path / "w.onnx")
    assert np.array_equal(ran(tmp_path / "w.onnx", np.zeros((5, 7), np.float32)), stored.dense())


def test_four_bits_take_half_a_byte(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))

    def size(element):
        made = prepare(model, {"0": element})
        if element is not None:
            calibrate(made, [(torch.randn(4, 256),)])
        return write_onnx(graph_of(made, (256,)), tmp_path / "net.onnx")

    assert size(None) > 4 * 256 * 256
    assert 0.5 * 256 * 256 < size(FP4) < 0.6 * 256 * 256
    assert 256 * 256 < size(POSIT8) < 1.1 * 256 * 256


def test_what_it_refuses(tmp_path):
    with pytest.raises(UnsupportedError, match="'0' is a GELU"):
        graph_of(nn.Sequential(nn.GELU()), (3,))
    with pytest.raises(UnsupportedError, match="Sequential of plain layers"):
        graph_of(nn.Linear(2, 2), (2,))
    info = {name: TensorInfo(name, (2, 32)) for name in ("input", "w", "out")}
    node = (Node("add", "Add", ("input", "w"), ("out",)),)
    codes, scales, _ = quantize(np.ones((2, 32), np.float32), QuantFormat.parse("int4/g32"))
    grouped = QuantizedTensor(codes, scales, QuantFormat.parse("int4/g32"))
    with pytest.raises(UnsupportedError, match="one scale per row"):
        write_onnx(Graph("w", node, info, ("input",), ("out",), {"w": grouped}), tmp_path / "w.onnx")
    factors = Factored(Dense(np.ones((2, 1), np.float32)), Dense(np.ones((1, 32), np.float32)))
    with pytest.raises(UnsupportedError, match="Factored"):
        write_onnx(Graph("w", node, info, ("input",), ("out",), {"w": factors}), tmp_path / "w.onnx")
    assert not (tmp_path / "w.onnx").exists()
