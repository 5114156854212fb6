"""Removing channels: the smaller network computes what the masked one does, and what can't be removed is left alone."""

import copy
import re
import sys

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_state_dicts_equal, cloned_state, resnet_classifier
from lit_methods.callbacks.sparsity import channels
from lit_methods.callbacks.sparsity.channels import (
    ChannelGroup,
    agree,
    apply_plan,
    channel_groups,
    compose,
    load_pruned,
    make_plan,
    merge_keep_masks,
    plan_from_shapes,
    prune_channels,
)
from lit_methods.tasks.vision.networks import CifarResNet, CifarResNet18, SmallConvNet


class Mixed(nn.Module):
    """A transposed convolution, a depthwise one, PReLU, a concatenation, flattened maps, a linear layer with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)  # one input channel is not depthwise
        self.prelu = nn.PReLU(6)
        self.up, self.up_bn = nn.ConvTranspose2d(6, 5, 2, 2), nn.BatchNorm2d(5)
        self.depthwise, self.depthwise_bn = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.BatchNorm2d(5)
        self.side, self.side_bn = nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
        self.both, self.both_bn = nn.Conv2d(9, 6, 1), nn.BatchNorm2d(6)
        self.hidden, self.hidden_bn = nn.Linear(6 * 64, 7), nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_bn(self.up(self.prelu(self.bn(self.conv(x))))).relu()
        x = self.depthwise_bn(self.depthwise(x)).relu()
        x = torch.cat([self.side_bn(self.side(x)).relu(), x], dim=1)
        x = self.both_bn(self.both(x)).relu()
        return self.head(self.hidden_bn(self.hidden(x.flatten(1))).relu())


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with batch norms that aren't as new."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((layer.weight, 0.5), (layer.bias, 0.1), (layer.running_mean, -0.5), (layer.running_var, 0.5)):
                tensor.data.copy_(torch.rand(layer.num_features, generator=generator) + low)
    return module.eval()


def random_keep(module: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    norms = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    masks = {name: torch.rand(norm.num_features, generator=generator) < 0.6 for name, norm in norms.items()}
    for mask in masks.values():
        mask[0] = True
    return masks


def zeroed(module: nn.Module, keep: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(module)
    for name, mask in keep.items():
        norm = twin.get_submodule(name)
        norm.weight.data[~mask], norm.bias.data[~mask] = 0.0, 0.0
    return twin


NETWORKS = {
    "small": (SmallConvNet, (3, 1, 8, 8)),
    "mixed": (Mixed, (3, 1, 4, 4)),
    "resnet18": (lambda: CifarResNet18(0.125), (3, 3, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pruned_network_equals_the_one_with_zeros(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = shaken(make()).double()
    x = torch.randn(shape, dtype=torch.float64)
    groups, left = channel_groups(network, x)
    assert not left
    agreed = agree(groups, random_keep(network))
    assert all(int(mask.sum()) > 0 for mask in agreed.values())
    assert any(not mask.all() for mask in agreed.values())
    expected = zeroed(network, agreed)(x)
    fresh, before = copy.deepcopy(network), sum(p.numel() for p in network.parameters())
    plan = prune_channels(network, random_keep(network), x)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-12)
    assert sum(p.numel() for p in network.parameters()) < 0.8 * before
    for norm, mask in agreed.items():
        assert network.get_submodule(norm).num_features == int(mask.sum())
    network.train()(x).sum().backward()  # a whole network, fit for training
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())
    apply_plan(fresh, plan)
    fresh.load_state_dict(network.state_dict())
    torch.testing.assert_close(fresh.eval()(x), network.eval()(x), rtol=0, atol=0)


def test_modules_know_their_new_widths():
    network = Mixed().eval()
    keep = {"bn": torch.tensor([1, 0, 1, 0, 0, 1]).bool(), "up_bn": torch.tensor([0, 1, 1, 0, 1]).bool()}
    keep |= {"side_bn": torch.tensor([1, 0, 0, 0]).bool(), "hidden_bn": torch.tensor([1, 1, 0, 0, 0, 0, 0]).bool()}
    keep["both_bn"] = torch.tensor([0, 1, 0, 1, 1, 0]).bool()
    weight, both, wide = (layer.weight.detach().clone() for layer in (network.up, network.both, network.hidden))
    prune_channels(network, keep, torch.randn(2, 1, 4, 4))
    assert torch.equal(network.up.weight, weight[keep["bn"]][:, keep["up_bn"]]), "transposed: inputs come first"
    assert (network.up.in_channels, network.up.out_channels, network.prelu.num_parameters) == (3, 3, 3)
    assert (network.depthwise.in_channels, network.depthwise.out_channels, network.depthwise.groups) == (3, 3, 3)
    assert torch.equal(network.both.weight, both[keep["both_bn"]][:, torch.cat([keep["side_bn"], keep["up_bn"]])])
    columns = keep["both_bn"].repeat_interleave(64)
    assert torch.equal(network.hidden.weight, wide[keep["hidden_bn"]][:, columns]), "a flattened channel is 64 columns"
    assert (network.hidden.in_features, network.hidden.out_features, network.head.in_features) == (3 * 64, 2, 2)


def test_depthwise_convolutions_take_over_the_mask_of_their_input():
    network = Mixed().eval()
    groups, _ = channel_groups(network, torch.randn(2, 1, 4, 4))
    (group,) = [group for group in groups if "up_bn" in group.norms]
    assert group.norms == ("up_bn", "depthwise_bn")
    assert group.voters == ("up_bn",)
    first = torch.tensor([True, False, True, False, True])
    agreed = agree([group], {"up_bn": first, "depthwise_bn": ~first})
    assert torch.equal(agreed["depthwise_bn"], first)


def test_a_layer_of_one_channel_is_not_taken_for_a_depthwise_one():
    network = SmallConvNet((6, 8, 8)).eval()
    x = torch.randn(2, 1, 8, 8)
    keep = {"norms.0": torch.arange(6) == 2}
    prune_channels(network, keep, x)
    assert network.convs[1].weight.shape == (8, 1, 3, 3)
    prune_channels(network, {"norms.1": torch.arange(8) < 5}, x)
    assert network.convs[1].weight.shape == (5, 1, 3, 3)
    assert (network.convs[1].in_channels, network.convs[1].groups) == (1, 1)


# ---- residual groups -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_merged_masks_take_the_channels_with_the_most_votes(seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(4, 12, generator=generator) < 0.4 + 0.1 * seed
    least = min(12 - int(mask.sum()) for mask in keep)
    for level in (4, 3, 2, 1):
        chosen = [c for c in range(12) if sum(not bool(mask[c]) for mask in keep) >= level]
        if len(chosen) >= least:
            break
    assert (~merge_keep_masks(keep)).nonzero()[:, 0].tolist() == chosen


def test_a_member_that_keeps_all_keeps_the_group():
    group = ChannelGroup(("a", "b"), 4, (), ("a", "b"))
    some = torch.tensor([True, False, False, True])
    assert agree([group], {"a": some})["b"].all(), "b has no mask, so it keeps all"
    assert torch.equal(agree([group], {"a": some, "b": some})["b"], some)


def test_a_group_never_loses_all_channels():
    group = ChannelGroup(("a", "b"), 2, (), ("a", "b"))
    torn = {"a": torch.tensor([False, True]), "b": torch.tensor([True, False])}
    assert not merge_keep_masks(torch.stack(list(torn.values()))).any()
    scores = {"a": torch.tensor([0.1, 0.5]), "b": torch.tensor([0.2, -0.1])}
    assert agree([group], torn, scores)["a"].tolist() == [False, True]
    assert agree([group], torn, scores, min_channels=2)["a"].all()


# ---- what is left alone ----------------------------------------------------------------------------------------------------------------


class Doubtful(nn.Module):
    """Batch norms that can't be pruned, each for another reason, and one that can."""

    def __init__(self, forward: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last, self.last_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.good, self.good_bn = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)
        self.kind = forward

    def forward(self, x: Tensor) -> Tensor:
        found = self.bn(self.conv(x))
        if self.kind == "sum":
            found = found + self.other(x)  # no batch norm on this side
        elif self.kind == "sigmoid":
            found = found.sigmoid()
        elif self.kind == "grouped":
            found = self.grouped(found.relu())
        elif self.kind == "rolled":
            found = torch.cat([found[:, 1:], found[:, :1]], dim=1).relu()
        found = self.head(self.good_bn(self.good(found)).relu())
        return torch.cat([found, self.last_bn(self.last(self.bn(self.conv(x))))], 1) if self.kind == "output" else found


@pytest.mark.parametrize(
    ("kind", "norm", "why"),
    [
        ("sum", "bn", "isn't the same as setting them to 0"),
        ("sigmoid", "bn", "isn't the same as setting them to 0"),
        ("grouped", "bn", "grouped .Conv2d with 2 groups. stands on its channels"),
        ("output", "last_bn", "an output of the network"),
        ("plain", "last_bn", "doesn't use it"),
    ],
)
def test_what_cant_be_removed_is_left_alone_with_its_reason(kind, norm, why):
    torch.manual_seed(0)
    network, x = Doubtful(kind).eval(), torch.randn(3, 3, 6, 6)
    groups, left = channel_groups(network, x)
    assert ("good_bn",) in [group.norms for group in groups]
    assert norm in left
    assert re.search(why, left[norm]), left[norm]
    before = network(x)
    with pytest.warns(UserWarning, match=f"left alone: {norm}"):
        plan = prune_channels(network, {norm: torch.tensor([True, False, True, False])}, x)
    assert plan == {}
    assert torch.equal(network(x), before)


def test_channels_that_change_places_are_not_cut_wrongly():
    torch.manual_seed(0)
    network, x = shaken(Doubtful("rolled")), torch.randn(3, 3, 6, 6)
    keep = {"bn": torch.tensor([True, False, True, True])}
    expected = zeroed(network, keep)(x), network(x)
    with pytest.warns(UserWarning, match="left alone: bn"):
        prune_channels(network, keep, x)
    assert any(torch.allclose(network(x), one, atol=1e-6) for one in expected)


def test_padded_shortcuts_keep_their_sums():
    groups, left = channel_groups(CifarResNet(8), torch.randn(2, 3, 8, 8))
    assert [group.norms for group in groups] == [("layer1.0.bn1",), ("layer2.0.bn1",), ("layer3.0.bn1",)]
    assert set(left) == {"bn1", "layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"}


def test_shared_weights_are_left_alone():
    network = SmallConvNet((4, 4, 4))
    network.convs[2].weight = network.convs[1].weight
    groups, left = channel_groups(network, torch.randn(2, 1, 8, 8))
    assert not groups
    assert "shares its weight" in left["norms.1"]


def test_a_member_of_a_sum_cut_alone_is_refused_and_nothing_is_changed(monkeypatch):
    network = shaken(CifarResNet18(0.125))
    x = torch.randn(2, 3, 16, 16)
    groups, left = channel_groups(network, x)
    whole = next(group for group in groups if "layer2.0.bn2" in group.norms)
    alone = ChannelGroup(("layer2.0.bn2",), 16, tuple(part for part in whole.parts if "downsample" not in part.module), ("layer2.0.bn2",))
    monkeypatch.setattr(channels, "channel_groups", lambda *_: ([alone], left))
    before = cloned_state(network)
    with pytest.raises(RuntimeError, match="the network was not cut"):
        prune_channels(network, {"layer2.0.bn2": torch.arange(16) % 2 == 0}, x)
    assert_state_dicts_equal(network.state_dict(), before)


def test_tracing_leaves_the_module_and_the_generator_alone():
    network = SmallConvNet().train()
    network.convs[0].weight.requires_grad_(False)
    before, state = cloned_state(network), torch.get_rng_state()
    channel_groups(network, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert_state_dicts_equal(network.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert not network.convs[0].weight.requires_grad
    assert not any(layer._forward_hooks for layer in network.modules())


def test_single_samples_and_several_inputs_are_traced():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallConvNet()

        def forward(self, first: Tensor, scale: Tensor) -> dict[str, list[Tensor]]:
            return {"logits": [self.net(first) * scale]}

    one = torch.randn(1, 1, 8, 8)
    for inputs in ([one, torch.ones(1)], {"first": one, "scale": torch.ones(1)}):
        groups, left = channel_groups(Two(), inputs)
        assert len(groups) == 3
        assert not left


# ---- errors ----------------------------------------------------------------------------------------------------------------------------


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-methods\[sparsity\]'"):
        channel_groups(SmallConvNet(), torch.randn(1, 1, 8, 8))
    plan = {"norms.0": {"out": {"size": 12, "kept": [0, 3]}}}  # cutting needs no tracing
    network = SmallConvNet()
    apply_plan(network, plan)
    assert network.norms[0].num_features == 2


def test_wrong_masks_and_names_are_refused():
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"keep has 'convs.0', which is no batch norm of SmallConvNet: it has norms.0, norms.1, norms.2"):
        prune_channels(SmallConvNet(), {"convs.0": torch.ones(12, dtype=torch.bool)}, x)
    with pytest.raises(ValueError, match=r"mask of 'norms.1' is \(12,\) torch.bool, but the layer has 16 channels"):
        prune_channels(SmallConvNet(), {"norms.1.weight": torch.ones(12, dtype=torch.bool)}, x)
    with pytest.raises(ValueError, match=r"mask of 'norms.1' is \(16,\) torch.float32"):
        prune_channels(SmallConvNet(), {"norms.1": torch.ones(16)}, x)
    with pytest.raises(ValueError, match="keeps 0 of 12 channels"):
        prune_channels(SmallConvNet(), {"norms.0": torch.zeros(12, dtype=torch.bool)}, x)
    with pytest.raises(ValueError, match="Linear has no batch norm with scale and shift"):
        channel_groups(nn.Linear(2, 2), torch.randn(1, 2))
    group = ChannelGroup(("a", "b"), 2, (), ("a", "b"))
    with pytest.raises(ValueError, match="a, b are tied and need one mask"):
        make_plan([group], {"a": torch.tensor([True, False]), "b": torch.tensor([True, True])})


# ---- plans and files -------------------------------------------------------------------------------------------------------------------


def cut_twice() -> tuple[nn.Module, dict]:
    torch.manual_seed(3)
    network, x = shaken(SmallConvNet()), torch.randn(2, 1, 8, 8)
    original = copy.deepcopy(network)
    first = prune_channels(network, random_keep(network, 1), x)
    second = prune_channels(network, random_keep(network, 2), x)
    both = compose(first, second)
    apply_plan(original, both)
    torch.testing.assert_close(original(x), network(x), rtol=0, atol=0)
    return network, both


def test_two_prunings_are_one():
    network, plan = cut_twice()
    assert plan["norms.0"]["out"]["size"] == 12
    assert len(plan["norms.0"]["out"]["kept"]) == network.norms[0].num_features


@pytest.mark.parametrize("kind", ["plan", "plain", "compiled"])
def test_a_pruned_network_comes_back_from_a_file(kind, tmp_path):
    network, plan = cut_twice()
    inside = "network._orig_mod." if kind == "compiled" else "network."
    state = {inside + name: value for name, value in network.state_dict().items()}
    named = {f"network.{name}": sides for name, sides in plan.items()}
    torch.save({"state_dict": state, "channel_plan": named} if kind == "plan" else state, tmp_path / "pruned.ckpt")
    fresh = SmallConvNet()
    found = load_pruned(torch.compile(fresh) if kind == "compiled" else fresh, tmp_path / "pruned.ckpt", prefix="network.")
    assert {n: {s: len(c["kept"]) for s, c in sides.items()} for n, sides in found.items()} == {
        n: {s: len(c["kept"]) for s, c in sides.items()} for n, sides in plan.items()
    }
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fresh.eval()(x), network(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="another architecture" if kind != "plan" else "has 12 output channels, but SmallConvNet has 2"):
        load_pruned(SmallConvNet((2, 16, 16)), tmp_path / "pruned.ckpt", prefix="network.")


def test_a_plan_of_another_network_changes_nothing():
    _, plan = cut_twice()
    network = SmallConvNet((12, 16, 15))
    before = cloned_state(network)
    with pytest.raises(ValueError, match=r"has 16 output channels, but SmallConvNet has 15 there: build the module as it was"):
        apply_plan(network, plan)
    assert_state_dicts_equal(network.state_dict(), before)


def test_torchvision_resnet18_gets_smaller():
    network = resnet_classifier().network
    x = torch.randn(2, 3, 32, 32)
    masks = {name: torch.arange(len(norm.weight)) % 2 == 0 for name, norm in network.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    assert len(masks) == 20
    before = sum(parameter.numel() for parameter in network.parameters())
    plan = prune_channels(network, masks, x)
    assert sum(parameter.numel() for parameter in network.parameters()) / before == pytest.approx(0.25, abs=0.01)
    assert plan["fc"] == {"in": {"size": 512, "kept": list(range(0, 512, 2))}}
    assert network(x).shape == (2, 4)


def test_widths_are_read_from_shapes():
    network = Mixed().eval()
    plan = prune_channels(network, random_keep(network), torch.randn(2, 1, 4, 4))
    found = plan_from_shapes(Mixed(), network.state_dict())
    assert {(n, s): len(c["kept"]) for n, sides in found.items() for s, c in sides.items()} == {
        (n, s): len(c["kept"]) for n, sides in plan.items() for s, c in sides.items()
    }
    assert plan_from_shapes(Mixed(), Mixed().state_dict()) == {}


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds weights of another architecture than SmallConvNet"):
        load_pruned(SmallConvNet(), tmp_path / "other.pt")
