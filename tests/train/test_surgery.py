"""What is cut together is all of it, what is zero can go without a trace, and what is cut loads again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgewise.core.errors import FormatError, InvalidValueError, collect_notices
from edgewise.models.convnets import ResNet, Stack
from edgewise.models.efficientnet_lite import EfficientNetLite
from edgewise.models.image_folder import picture_shape, read_image_net, take_shapes, write_image_net
from edgewise.models.vision_transformer import VisionTransformer
from edgewise.train.surgery import cut, fold_batch_norm, macs, parameters, remove_blocks, units_of, write_onnx_net

pytestmark = pytest.mark.slow
LENET = Stack(size=20)
VGG = Stack(((8, 3, False), (8, 3, True), (12, 3, True)), (), 5, 3, 16, norm=True, padded=True, flat=False)
RESNET = ResNet(2, (8, 12), 5, 3, 16)
VIT = VisionTransformer(16, 4, 32, 2, 4, 8, 48, 5)
LITE = EfficientNetLite(classes=7, size=64)
NETS = {"lenet": LENET, "vgg": VGG, "resnet": RESNET, "vit": VIT, "lite": LITE}


def made(config, seed=0):
    """A network of random weights whose normalisations have something to say, and pictures for it."""
    torch.manual_seed(seed)
    model = config.build()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.2)
    return model.eval(), torch.randn(2, *picture_shape(config))


def out(model, pictures):
    with torch.no_grad():
        return model(pictures).numpy()


def silence(model, unit, channels):
    """Zero everything that makes a channel: weights, biases, scale and shift of its normalisations."""
    state = model.state_dict()
    for part in unit.parts:
        if part.side == "out" and not part.tensor.endswith(("running_mean", "running_var")):
            gone = torch.from_numpy(part.places[np.isin(part.channels, channels)])
            state[part.tensor].index_fill_(part.axis, gone, 0)


def exact(model, unit):
    """Whether zero makers make a zero channel: not where a layer norm mixes the channels."""
    layers = {part.tensor.rpartition(".")[0] for part in unit.parts}
    return not any(isinstance(model.get_submodule(name), nn.LayerNorm) for name in layers if name != "position")


@pytest.mark.parametrize("name", NETS)
def test_a_silent_channel_goes_without_a_trace(name):
    model, pictures = made(NETS[name])
    units = units_of(model, pictures)
    removed = {unit.name: list(range(0, unit.size - 1, 3)) for unit in units if exact(model, unit)}
    assert removed
    for unit in units:
        if unit.name in removed:
            silence(model, unit, removed[unit.name])
    before = out(model, pictures)
    smaller = cut(model, units, removed)
    assert parameters(smaller) < parameters(model)
    assert macs(smaller, pictures) < macs(model, pictures)
    np.testing.assert_allclose(out(smaller, pictures), before, rtol=0, atol=2e-5 * max(1, abs(before).max()))
    np.testing.assert_array_equal(out(model, pictures), before)  # the source is as it was


@pytest.mark.parametrize("name", NETS)
def test_every_unit_can_be_cut_and_the_net_still_runs(name):
    model, pictures = made(NETS[name])
    units = units_of(model, pictures)
    assert len({unit.name for unit in units}) == len(units)
    smaller = cut(model, units, {unit.name: [0] for unit in units if unit.size > 1})
    assert np.isfinite(out(smaller, pictures)).all()
    assert out(smaller, pictures).shape == out(model, pictures).shape
    last = max((n for n, m in model.named_modules() if isinstance(m, nn.Linear)), key=list(
        dict(model.named_modules())).index)
    assert last not in {unit.name for unit in units}  # classes are not cut


@pytest.mark.parametrize("name", NETS)
def test_a_cut_and_folded_net_loads_in_torch_and_in_onnx_runtime(name, tmp_path):
    import onnxruntime

    model, pictures = made(NETS[name])
    units = units_of(model, pictures)
    smaller = cut(model, units, {unit.name: list(range(unit.size // 3)) for unit in units if unit.size > 2})
    for kind, net in (("cut", smaller), ("folded", fold_batch_norm(smaller))):
        expected = out(net, pictures)
        write_image_net(net, NETS[name], tmp_path / kind)
        back, config = read_image_net(tmp_path / kind)
        assert config == NETS[name]
        np.testing.assert_array_equal(out(back, pictures), expected)
    np.testing.assert_allclose(expected, out(smaller, pictures), rtol=0, atol=2e-5 * max(1, abs(expected).max()))
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in back.modules())
    assert norms == 0
    size = write_onnx_net(back, pictures, tmp_path / "net.onnx")
    assert size == (tmp_path / "net.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for some in (pictures, pictures[:1]):
        found = session.run(None, {"input": some.numpy()})[0]
        np.testing.assert_allclose(found, out(back, some), rtol=0, atol=2e-5 * max(1, abs(expected).max()))


def test_channels_that_an_addition_ties_are_one_unit():
    model, pictures = made(RESNET)
    units = {unit.name: unit for unit in units_of(model, pictures)}
    assert list(units) == ["stem", "blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1", "blocks.2.conv2",
                           "blocks.3.conv1"]
    assert set(units["stem"].makers()) == {"stem.weight", "norm.weight", "blocks.0.conv2.weight",
                                           "blocks.0.norm2.weight", "blocks.1.conv2.weight", "blocks.1.norm2.weight"}
    assert {part.tensor for part in units["stem"].parts if part.side == "in"} == {
        "blocks.0.conv1.weight", "blocks.1.conv1.weight", "blocks.2.conv1.weight", "blocks.2.conv3.weight"}


def test_a_flattened_channel_takes_all_its_places():
    model, pictures = made(LENET)
    units = {unit.name: unit for unit in units_of(model, pictures)}
    read = next(part for part in units["3"].parts if part.side == "in")
    assert read.tensor == "7.weight"
    np.testing.assert_array_equal(read.places[read.channels == 1], [4, 5, 6, 7])  # 2 x 2 positions


def test_heads_go_whole_and_unequally():
    model, pictures = made(VIT)
    units = {unit.name: unit for unit in units_of(model, pictures)}
    assert units["blocks.0.attention.query"].size == 4
    smaller = cut(model, list(units.values()), {"blocks.0.attention.query": [0, 2], "blocks.1.attention.query": [1],
                                                "blocks.1.up": range(40)})
    assert [block.attention.value.out_features for block in smaller.blocks] == [16, 24]
    assert [block.up.out_features for block in smaller.blocks] == [48, 8]
    # Slow: the second head of the first block, by itself.
    x = torch.randn(3, 16, 32)
    attention = model.blocks[0].attention
    mixed = []
    for head in (1, 3):
        rows = slice(8 * head, 8 * head + 8)
        q, k, v = ((x @ linear.weight[rows].T + linear.bias[rows])
                   for linear in (attention.query, attention.key, attention.value))
        mixed.append(torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v
                     @ attention.out.weight[:, rows].T)
    np.testing.assert_allclose(out(smaller.blocks[0].attention, x),
                               (mixed[0] + mixed[1] + attention.out.bias).detach().numpy(), rtol=0, atol=1e-5)


def test_a_block_is_removed_in_depth_and_loads(tmp_path):
    model, pictures = made(RESNET)
    with torch.no_grad():
        for layer in (model.blocks[1].norm2, model.blocks[3].norm2):
            layer.weight.zero_()
            layer.bias.zero_()
    before = out(model, pictures)
    smaller = remove_blocks(model, ["blocks.1", "blocks.3"])
    np.testing.assert_array_equal(out(smaller, pictures), before)  # relu(x + 0) of what relu made
    write_image_net(smaller, RESNET, tmp_path / "m")
    back, _ = read_image_net(tmp_path / "m")
    np.testing.assert_array_equal(out(back, pictures), before)
    assert parameters(back) < parameters(model)
    with pytest.raises(InvalidValueError, match="no block"):
        remove_blocks(model, ["blocks.2"])


def test_macs_are_those_of_the_formula():
    model, pictures = made(LENET)
    assert macs(model, pictures) == 20 * 16**2 * 25 + 50 * 4**2 * 20 * 25 + 200 * 500 + 500 * 10
    model, pictures = made(VIT)
    tokens, dim = 16, 32
    block = 4 * tokens * dim * dim + 2 * tokens * tokens * dim + 2 * tokens * dim * 48
    assert macs(model, pictures) == tokens * dim * 3 * 16 + 2 * block + dim * 5
    model, pictures = made(LITE)
    assert macs(EfficientNetLite().build(), torch.zeros(1, 3, 224, 224)) == pytest.approx(407e6, rel=0.06)  # published


def test_what_does_not_fit_is_refused(tmp_path):
    model, pictures = made(VGG)
    units = units_of(model, pictures)
    with pytest.raises(InvalidValueError, match="no unit"):
        cut(model, units, {"nowhere": [0]})
    with pytest.raises(InvalidValueError, match="keeps one"):
        cut(model, units, {"0": range(8)})
    with pytest.raises(InvalidValueError, match="keeps one"):
        cut(model, units, {"0": [8]})
    with pytest.raises(InvalidValueError, match="no layer"):
        units_of(model, pictures, keep=["nowhere"])
    assert "0" not in {unit.name for unit in units_of(model, pictures, keep=["0"])}
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    with pytest.raises(FormatError, match="no layer takes"):
        take_shapes(VGG.build(), {**state, "odd": torch.zeros(1)})
    with pytest.raises(FormatError, match="missing"):
        take_shapes(VGG.build(), {key: value for key, value in state.items() if key != "0.weight"})
    with pytest.raises(FormatError, match="dimensions"):
        take_shapes(VGG.build(), {**state, "0.weight": torch.zeros(8, 3)})
    write_image_net(model, VGG, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(FormatError, match="architectures"):
        read_image_net(tmp_path / "m")
    one_sided = {**state, "3.weight": state["3.weight"][:, :4]}  # its input was cut, what makes it was not
    other = VGG.build()
    take_shapes(other, one_sided)
    write_image_net(other, VGG, tmp_path / "n")
    with pytest.raises(FormatError, match="fit together"):
        read_image_net(tmp_path / "n")


def test_a_normalisation_without_a_convolution_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    with collect_notices() as notices:
        folded = fold_batch_norm(model)
    assert isinstance(folded[2], nn.BatchNorm2d)
    assert [item.kind for item in notices] == ["fallback"]
