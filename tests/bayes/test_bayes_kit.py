"""Bayes layers on modules that aren't ours: conversion, noise, prediction of several draws, sparse files."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers import small_network
from lit_methods.bayes.conversion import bayes_layers, mean_state, to_bayes
from lit_methods.bayes.layers import BayesConv2d, BayesEmbedding, BayesLinear, drawing
from lit_methods.bayes.prediction import posterior_logits
from lit_methods.bayes.stored import ThinLayer, load_sparse, predictor, save_sparse, sparse_state, stored_bytes
from lit_methods.bayes.variational import gaussian_kl, mixture_log_probabilities, posterior_std, rho_of_std
from lit_methods.tasks.vision.networks import CifarResNet, CifarResNet18


def sparse(network: nn.Module, density: float = 0.1, std: float = 0.1) -> nn.Module:
    """Converted, with random masks."""
    to_bayes(network, std=std)
    generator = torch.Generator().manual_seed(1)
    for layer in bayes_layers(network).values():
        layer.mask.copy_(torch.rand(layer.mask.shape, generator=generator) < density)
        layer.weight.data.mul_(layer.mask)
        layer.rho.data.mul_(layer.mask)
    return network


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(image_size=16, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


class Foreign(nn.Module):
    """A table, a convolution over sequences and a head, in a module of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.mix = nn.ModuleDict({"conv": nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular")})
        self.out = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, words):
        return self.out(self.mix["conv"](self.table(words).transpose(1, 2)).mean(2))


CASES = {
    "resnet18": (lambda: CifarResNet18(num_classes=5), (), torch.rand(2, 3, 8, 8), 21),
    "vit": (vit, ("*.self_attention",), torch.rand(3, 3, 16, 16), 4),
    "foreign": (Foreign, (), torch.randint(11, (3, 7)), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_a_converted_module_has_the_same_mean_and_noise_in_training(case):
    build, skip, inputs, layers = CASES[case]
    torch.manual_seed(0)
    plain = build()
    module = copy.deepcopy(plain)
    names = to_bayes(module, skip=skip, std=0.1)
    assert len(names) == layers
    assert sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()) == sum(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in plain.modules()
    )
    torch.testing.assert_close(module.eval()(inputs), plain.eval()(inputs), rtol=0, atol=0)
    assert set(mean_state(module)) == set(plain.state_dict()), "the means load into the ordinary module"
    plain.load_state_dict(mean_state(module))
    module.train()
    assert not torch.equal(module(inputs), module(inputs))
    with drawing("weights"):
        module(inputs).sum().backward()
    assert all(layer.rho.grad is not None and layer.rho.grad.abs().sum() > 0 for layer in bayes_layers(module).values())


def test_noise_at_the_outputs_is_that_of_the_weights_in_mean_and_variance():
    torch.manual_seed(0)
    for layer, inputs in (
        (nn.Linear(6, 3), torch.randn(2, 6)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1), torch.randn(2, 2, 5, 5)),
        (nn.Embedding(5, 4), torch.tensor([[1, 3]])),
    ):
        box = nn.Sequential(layer)
        sparse(box, 0.6, std=0.3)
        found = {}
        for how in ("outputs", "weights"):
            with drawing(how), torch.no_grad():
                found[how] = torch.stack([box(inputs) for _ in range(2000)])
        torch.testing.assert_close(found["outputs"].mean(0), found["weights"].mean(0), rtol=0, atol=0.12)
        torch.testing.assert_close(found["outputs"].std(0), found["weights"].std(0), rtol=0.15, atol=1e-3)


def test_padding_has_no_noise_and_moves_by_no_gradient():
    box = nn.Sequential(nn.Embedding(5, 3, padding_idx=0))
    to_bayes(box, std=0.5)
    with drawing("outputs"):
        out = box(torch.tensor([0, 2]))
    out.sum().backward()
    assert (out[0] - box[0].weight[0]).abs().max() < 1e-3
    assert (out[1] - box[0].weight[2]).abs().max() > 1e-2
    assert (box[0].rho.grad[0] == 0).all()


@pytest.mark.parametrize("spread", ["softplus", "exp", "abs"])
def test_deviations_come_back(spread):
    sigma = torch.tensor([1e-6, 6e-4, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(posterior_std(rho_of_std(sigma, spread), None, spread), sigma)


def test_kl_is_torchs():
    mu, sigma = torch.randn(20, dtype=torch.float64), torch.rand(20, dtype=torch.float64) + 0.1
    mask = torch.arange(20) % 3 > 0
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mu, sigma), normal(torch.full_like(mu, 0.3), 0.7))[mask].sum()
    torch.testing.assert_close(gaussian_kl(mu, sigma, mask, 0.3, 0.7), wanted)
    assert gaussian_kl(mu, sigma, torch.zeros_like(mask)) == 0


def test_layers_can_be_built_without_a_conversion():
    layer = BayesConv2d(2, 3, 3)
    assert layer.mask.all()
    assert 0 < layer.sigma().mean() < 1e-2
    assert {"weight", "rho", "mask", "bias"} == set(layer.state_dict())
    assert BayesLinear(2, 3, bias=False).bias is None
    assert BayesEmbedding(4, 2)(torch.tensor([1])).shape == (1, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.outside.weight = self.inside.weight


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 3)), {}, r"1 is a LSTM.*add the others to skip"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), {}, "0 is a MultiheadAttention"),
        (nn.Sequential(nn.ConvTranspose2d(2, 2, 2)), {}, "0 is a ConvTranspose2d"),
        (Tied(), {}, "inside shares its weight"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), {}, "0 is a ParametrizedLinear"),
        (nn.Sequential(nn.LazyLinear(2)), {}, "0 has no shape yet"),
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), {}, "0 is an Embedding with sparse"),
        (nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), {"targets": ["0"]}, "0 is frozen"),
        (nn.Sequential(nn.ReLU()), {}, "no trained layer"),
        (nn.Sequential(nn.Linear(2, 2)), {"skip": ["hed"]}, "skip pattern 'hed' matches no submodule"),
        (nn.Sequential(nn.Linear(2, 2)), {"targets": ["hed"]}, "matches no submodule"),
    ],
)
def test_what_cannot_be_converted_is_named(module, options, says):
    with pytest.raises(ValueError, match=says):
        to_bayes(module, **options)
    assert not bayes_layers(module), "a refusal changes nothing"


def test_a_prediction_is_the_mean_softmax_of_draws_that_are_the_same_for_every_batch():
    torch.manual_seed(0)
    network = sparse(small_network(), 0.5).eval()
    images = torch.randn(6, 3, 8, 8)
    device = torch.device("cpu")
    before = torch.get_rng_state()
    whole = posterior_logits(lambda: network(images), 10, 3, device)
    assert torch.equal(torch.get_rng_state(), before), "the global generator goes on as before"
    halves = torch.cat([posterior_logits(lambda part=part: network(part), 10, 3, device) for part in images.split(3)])
    torch.testing.assert_close(whole, halves)
    torch.testing.assert_close(whole.exp().sum(1), torch.ones(6))
    assert not torch.allclose(whole.softmax(1), network(images).softmax(1), atol=1e-4)
    logits = torch.randn(4, 5, 3)
    torch.testing.assert_close(mixture_log_probabilities(logits).softmax(1), logits.softmax(2).mean(0))
    with pytest.raises(ValueError, match="instead of"):
        posterior_logits(lambda: images, 2, 0, device)


def test_fused_attention_does_not_pass_the_draws_by():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    to_bayes(block, skip=["self_attn"], std=0.5)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        mean = block(x)
        with drawing("weights"):
            assert not torch.allclose(block(x), mean, atol=1e-2)
        torch.testing.assert_close(block(x), mean)


def test_a_sparse_file_is_small_and_predicts_without_dense_weights(tmp_path):
    torch.manual_seed(0)
    trained = sparse(CifarResNet(depth=8, width=16, num_classes=5), 0.05).eval()
    size = save_sparse(trained, tmp_path / "thin.pt")
    torch.save(trained.state_dict(), tmp_path / "dense.pt")
    dense = (tmp_path / "dense.pt").stat().st_size
    assert size < 0.1 * dense, f"{size:,} of {dense:,} bytes"
    assert abs(size - stored_bytes(trained)) < 60_000
    again, thin = (
        CifarResNet(depth=8, width=16, num_classes=5),
        predictor(CifarResNet(depth=8, width=16, num_classes=5), tmp_path / "thin.pt"),
    )
    load_sparse(again, tmp_path / "thin.pt")
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(thin(images), trained(images), rtol=1e-5, atol=1e-5)
    held = sum(value.numel() * value.element_size() for value in (*thin.parameters(), *thin.buffers()))
    assert held < 0.2 * dense
    draws = [posterior_logits(lambda net=net: net(images), 20, 0, torch.device("cpu")) for net in (thin, trained)]
    torch.testing.assert_close(draws[0].exp(), draws[1].exp(), rtol=0, atol=0.1)
    plain = CifarResNet(depth=8, width=16, num_classes=5)
    plain.load_state_dict(mean_state(trained))
    torch.testing.assert_close(plain.eval()(images), trained(images))


def test_thin_layers_draw_as_dense_ones_do():
    torch.manual_seed(0)
    for layer, inputs in ((nn.Linear(5, 2), torch.randn(3, 5)), (nn.Embedding(5, 3, padding_idx=1), torch.tensor([1, 2]))):
        box = sparse(nn.Sequential(layer), 0.7, std=0.5)
        thin = predictor(nn.Sequential(copy.deepcopy(layer)), sparse_state(box))
        assert isinstance(thin[0], ThinLayer)
        with drawing("weights"), torch.no_grad():
            ours, theirs = (torch.stack([net(inputs) for _ in range(2000)]) for net in (thin, box))
        torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.15, atol=1e-3)


def test_files_of_other_modules_are_refused(tmp_path):
    save_sparse(sparse(nn.Sequential(nn.Linear(4, 3))), tmp_path / "thin.pt")
    with pytest.raises(ValueError, match=r"0 of shape \[3, 4\], this Sequential \[4, 4\]"):
        load_sparse(nn.Sequential(nn.Linear(4, 4)), tmp_path / "thin.pt")
    with pytest.raises(ValueError, match=r"of another module: 1\.weight"):
        load_sparse(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), tmp_path / "thin.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is no sparse posterior"):
        load_sparse(nn.Sequential(nn.Linear(4, 3)), tmp_path / "other.pt")


def test_half_precision_keeps_the_noise():
    torch.manual_seed(0)
    box = nn.Sequential(nn.Linear(64, 64))
    to_bayes(box, std=6e-4)
    x = torch.randn(128, 64)
    wide = (box(x) - box[0].product(x, box[0].weight, box[0].bias)).std()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out = box(x)
        assert math.isclose((out.float() - torch.nn.functional.linear(x, box[0].weight, box[0].bias)).std(), wide, rel_tol=0.6)
