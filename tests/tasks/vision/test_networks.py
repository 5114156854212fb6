"""Networks: shapes, names, published weights."""

import numpy as np
import pytest
import torch
from torch import nn

from lit_methods import MLP, CifarResNet, CifarResNet18, SmallConvNet, TimmNetwork, WideResNet
from lit_methods.runs.checkpoints import read_state_dict


def test_mlp_names_its_layers_and_applies_relu_between_them():
    network = MLP([6, 5, 4], bias=False)
    assert list(network.state_dict()) == ["layers.0.weight", "layers.1.weight"]
    images = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    first, second = (layer.weight for layer in network.layers)
    torch.testing.assert_close(network(images), (images.reshape(3, 6) @ first.T).clamp(min=0) @ second.T)
    with pytest.raises(ValueError, match="widths"):
        MLP([64])


@pytest.mark.parametrize(
    ("network", "shape", "convolutions", "parameters"),
    [
        (CifarResNet(20), (2, 3, 32, 32), 19, 269_722),  # 0.27 million in the paper's table 6
        (CifarResNet(8, width=4, num_classes=7, in_channels=1), (2, 1, 8, 8), 7, None),
        (CifarResNet18(num_classes=100), (2, 3, 32, 32), 20, 11_220_132),
        (CifarResNet18(width_factor=2**0.5, num_classes=5), (1, 3, 16, 16), 20, None),
        (SmallConvNet(), (2, 1, 8, 8), 3, None),
        (TimmNetwork("resnet18", num_classes=4), (2, 3, 32, 32), 20, None),
        (WideResNet(28, 2), (2, 3, 32, 32), 28, 1_467_610),  # 1.5 million in the paper's table 4
        (WideResNet(37, 2, stages=4), (2, 3, 48, 48), 37, None),
    ],
    ids=["resnet20", "resnet8-grey", "resnet18", "resnet18-wide", "small", "timm", "wrn-28-2", "wrn-37-2"],
)
def test_shapes_and_sizes(network, shape, convolutions, parameters):
    outputs = network.eval()(torch.zeros(shape))
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    assert outputs.shape == (shape[0], last.out_features)
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == convolutions
    if parameters is not None:
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_widths_are_truncated():
    network = CifarResNet18(width_factor=2**0.5)
    assert [network.get_submodule(f"layer{k}.1.conv2").out_channels for k in (1, 2, 3, 4)] == [90, 181, 362, 724]


def test_an_option_a_shortcut_is_every_second_pixel_between_zeros():
    block = CifarResNet(8, width=2).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # the branch adds nothing
    x = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_wrong_depth_and_unknown_timm_network_are_refused():
    with pytest.raises(ValueError, match="6n"):
        CifarResNet(18)
    with pytest.raises(ValueError, match="resnet50"):
        TimmNetwork("resnet_50")


def test_timm_options_reach_the_network():
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    network = TimmNetwork("vit_tiny_patch16_224", num_classes=3, options=options)
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert {"model.cls_token", "model.pos_embed"} <= network.no_weight_decay()


@pytest.mark.parametrize(("depth", "file"), [(20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")])
def test_published_weights_load_and_classify(depth, file, test_data):
    folder = test_data / "models" / "cifar_resnet"
    sample = np.load(test_data / "cifar10" / "exact_first100_test.npz")
    network, weights = CifarResNet(depth).eval(), read_state_dict(folder / file, "module.")
    own = network.state_dict()
    assert {name for name in own if "num_batches_tracked" not in name} == set(weights), "saved before PyTorch counted batches"
    network.load_state_dict(own | weights)
    images = torch.from_numpy(sample["data"]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        predicted = network((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).argmax(1)
    assert (predicted.numpy() == sample["labels"]).sum() >= 90


def test_a_network_without_a_head_gives_features():
    for network, width in ((SmallConvNet((4, 6), num_classes=0), 6), (WideResNet(10, 1, num_classes=0, in_channels=1), 64)):
        assert network(torch.zeros(2, 1, 8, 8)).shape == (2, width)
    with pytest.raises(ValueError, match="6n"):
        WideResNet(20)
    with pytest.raises(ValueError, match="8n"):
        WideResNet(28, stages=4)


def test_features_of_an_mlp_are_above_zero_with_a_relu_at_the_end():
    torch.manual_seed(0)
    plain, ending = MLP([6, 5, 4]), MLP([6, 5, 4], relu_last=True)
    ending.load_state_dict(plain.state_dict())
    x = torch.randn(8, 6)
    assert plain(x).min() < 0
    assert torch.equal(ending(x), plain(x).clamp(min=0))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda **kwargs: MLP([64, 32, 10], **kwargs), (8, 64)),
        (SmallConvNet, (8, 1, 8, 8)),
        (lambda **kwargs: CifarResNet(8, width=4, **kwargs), (8, 3, 8, 8)),
        (lambda **kwargs: CifarResNet18(width_factor=1 / 16, **kwargs), (8, 3, 8, 8)),
        (lambda **kwargs: WideResNet(10, 1, **kwargs), (8, 3, 8, 8)),
    ],
    ids=["MLP", "SmallConvNet", "CifarResNet", "CifarResNet18", "WideResNet"],
)
def test_dropout_acts_in_training_alone_and_changes_no_name(build, shape):
    torch.manual_seed(0)
    plain, dropping = build(), build(dropout=0.5)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in dropping.named_modules()]
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(shape)
    state = torch.get_rng_state()
    plain.train()(images)
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"
    assert not torch.equal(dropping.train()(images), dropping(images)), "two passes draw two masks"
    dropping.load_state_dict(plain.state_dict())  # batch norms have counted
    torch.testing.assert_close(dropping.eval()(images), plain.eval()(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"dropout is 1\.5"):
        build(dropout=1.5)
