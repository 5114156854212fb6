"""The counter against torch's own, on modules of many kinds."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from lit_methods.callbacks.sparsity.cost import theoretical_cost
from lit_methods.callbacks.sparsity.flops import attention_macs, count_macs, training_flops
from lit_methods.callbacks.sparsity.scores import kept_shares
from lit_methods.callbacks.sparsity.store import prunable_weights


def resnet():
    from torchvision.models import resnet18

    return resnet18(num_classes=5), torch.randn(2, 3, 32, 32)


def vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2), torch.randn(2, 3, 32, 32)


def encoder():
    return torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)


def grouped():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, dilation=2), torch.nn.ConvTranspose2d(8, 4, 2))
    return net, torch.randn(3, 4, 9, 9)


@pytest.mark.parametrize("make", [resnet, vit, encoder, grouped])
def test_the_total_is_that_of_torch(make):
    module, example = make()
    module.eval()
    weights = prunable_weights(module)
    macs = count_macs(module, lambda: module(example), weights)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            module(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    cost = theoretical_cost(macs, {})
    assert cost.flops_dense == counter.get_total_flops()
    assert all(macs.per_weight[name] > 0 for name in weights)
    assert cost.flops_sparse == cost.flops_dense
    assert theoretical_cost(macs, dict.fromkeys(weights, 0.0)).flops_sparse == 2 * macs.other
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_is_what_no_weight_takes_part_in():
    module, example = encoder()
    module.eval()
    assert count_macs(module, lambda: module(example), prunable_weights(module)).other == 2 * attention_macs(5, 16)


def test_a_tied_weight_counts_each_use_and_a_parametrised_one_is_known():
    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    layer = torch.nn.Linear(6, 6, bias=False)
    parametrize.register_parametrization(layer, "weight", Half())
    net = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    original = layer.parametrizations.weight.original
    assert count_macs(net, lambda: net(torch.randn(4, 6)), {"0.weight": original}).per_weight == {"0.weight": 2 * 4 * 36}


def test_compiled_parts_count_like_others():
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    net = torch.nn.Sequential(torch.compile(inner, backend="eager"))
    macs = count_macs(net, lambda: net(torch.randn(3, 6)), prunable_weights(net))
    assert sorted(macs.per_weight.values()) == [3 * 16, 3 * 48]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="regime is 'rigel'"):
        training_flops("rigel", 1, 1)
    with pytest.raises(ValueError, match="remove is 'low'"):
        kept_shares([torch.ones(2)], 0.5, "low")
    with pytest.raises(ValueError, match="keeps none"):
        kept_shares([torch.ones(2)], 0.1)
    assert kept_shares([torch.ones(4)], 1.0, "highest") == [1.0]
