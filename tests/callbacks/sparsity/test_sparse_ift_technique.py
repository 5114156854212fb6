"""Sparse-IFT: sizes, layers, surgery on networks that aren't ours, iso-FLOP, checkpoints."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    compiled_classifier,
    kill_and_resume,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.callbacks import EMATeacher, ExactResume, SparseIFT, SparsityReport
from lit_methods.callbacks.sparsity.drop_grow import target_count
from lit_methods.callbacks.sparsity.sparse_ift.core import (
    base_scaling,
    doped_rank,
    drop_schedule,
    factorized_width,
    folded_frobenius,
    spectral_gap,
    wide_width,
)
from lit_methods.callbacks.sparsity.sparse_ift.surgery import (
    Parallel,
    Transformation,
    dope,
    factorize,
    iso_flop_transform,
    parallelize,
    transformation_of,
)
from lit_methods.tasks.vision.networks import MLP, CifarResNet, CifarResNet18

FAMILIES = ("wide", "parallel", "factorized", "doped")


def loader(batch_size: int = 6) -> DataLoader:
    return DataLoader(Images(24), batch_size=batch_size)


def ift(family: str = "wide", **kwargs: Any) -> SparseIFT:
    return SparseIFT(**{"sparsity": 0.75, "family": family, "interval": 1, "end_fraction": 1.0, "flops_tolerance": 0.15, **kwargs})


def fit(callback: pl.Callback, module: pl.LightningModule | None = None, **kwargs: Any) -> pl.Trainer:
    trainer = tiny_trainer(**{"max_steps": 3, "callbacks": [callback], **kwargs})
    trainer.fit(module or Classifier(), loader())
    return trainer


# ---- sizes and other maths -------------------------------------------------------------------------------------------------------------


def test_scaling_is_rounded_and_widths_are_truncated():
    assert [base_scaling(s) for s in (0.0, 0.5, 0.75, 0.9, 0.99)] == [1, 2, 4, 10, 100]
    assert [wide_width(64, s) for s in (0.5, 0.75, 0.9)] == [90, 128, 202]
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="give a share of removed weights from 0 to below 1"):
            base_scaling(wrong)


@pytest.mark.parametrize("kernel", [(), (1,), (3, 3), (5, 3)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_sizes_are_the_nearest_to_equal_flops(kernel, sparsity):
    inputs, outputs, positions = 24, 40, math.prod(kernel)
    dense, per_unit = positions * inputs * outputs, positions * inputs + outputs
    width = factorized_width(inputs, outputs, sparsity, kernel)
    assert (1 - sparsity) * (width - 1) * per_unit < dense <= (1 - sparsity) * width * per_unit * (1 + 1e-12)
    width = factorized_width(inputs, outputs, sparsity, kernel, sparse_u_only=True)
    sparse_u = (1 - sparsity) * positions * inputs + outputs
    assert (width - 1) * sparse_u < dense <= width * sparse_u * (1 + 1e-12)
    rank = doped_rank(inputs, outputs, sparsity, kernel)
    assert rank * per_unit <= sparsity * dense * (1 + 1e-12) < (rank + 1) * per_unit


@pytest.mark.parametrize("shape", [(), (3, 3)])
def test_the_folded_norm_is_that_of_the_one_layer_that_does_the_same(shape):
    torch.manual_seed(1)
    u = torch.randn(5, 3, *shape, dtype=torch.float64)
    v = torch.randn(7, 5, *[1] * len(shape), dtype=torch.float64)
    if shape:  # the impulse response of both layers
        impulse = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1)
        response = F.conv2d(F.conv2d(impulse, u, padding=2), v)
    else:
        response = torch.eye(3, dtype=torch.float64) @ u.T @ v.T
    torch.testing.assert_close(folded_frobenius(u, v), response.square().sum())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(folded_frobenius(u.float(), v.float()), response.square().sum().float())


def test_spectral_gap_of_known_graphs():
    full = torch.ones(6, 4, 3, 3, dtype=torch.bool)  # complete: sigma_2 is 0
    assert float(spectral_gap(full)) == pytest.approx(math.sqrt(35) + math.sqrt(5), abs=2e-3)
    blocks = torch.block_diag(torch.ones(4, 6), torch.ones(4, 6)).bool()  # falls apart: sigma_2 is sigma_1
    assert float(spectral_gap(blocks)) == pytest.approx(math.sqrt(5) + math.sqrt(3) - math.sqrt(24), abs=1e-3)
    assert float(spectral_gap(blocks)) < 0 < float(spectral_gap(full))
    mask = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    sigma = torch.linalg.svdvals(mask.double())[1]
    bound = sum(math.sqrt(float(mask.sum()) / size - 1) for size in mask.shape)
    assert float(spectral_gap(mask)) == pytest.approx(bound - float(sigma), abs=1e-4)
    assert float(spectral_gap(torch.zeros(3, 4, dtype=torch.bool))) == 0


@pytest.mark.parametrize("anneal", ["cosine", "constant", "exponential"])
def test_the_callback_follows_the_schedule(anneal):
    callback = ift(interval=3, begin=3, end_fraction=0.75, drop_fraction=0.4, anneal=anneal, rate=2.0)
    updates = []

    class Note(pl.Callback):
        def on_mask_updated(self, trainer, pl_module, source):
            updates.append(trainer.global_step)

    fit(callback, callbacks=[callback, Note()], max_steps=24)
    steps, fractions = drop_schedule(24, 3, 3, 0.75, 0.4, anneal, 2.0)
    assert steps == [6, 9, 12, 15]
    assert updates == [0, *steps]
    assert [callback.fraction(step) for step in steps] == fractions
    with pytest.raises(ValueError, match="anneal is 'linear'"):
        drop_schedule(100, 10, anneal="linear")  # type: ignore[arg-type]


def test_active_weights_are_counted_in_single_precision():
    assert [target_count(150, 0.22), target_count(75, 0.16)] == [117, 63]  # (1 - s) * n, rounded to float32 as a whole
    assert target_count(10, 0.85) == 1


# ---- layers ----------------------------------------------------------------------------------------------------------------------------


def test_layers_keep_shapes_strides_and_biases():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, (3, 5), stride=2, padding=(1, 2), dilation=1, padding_mode="reflect")
    image = torch.randn(2, 6, 9, 9)
    for layer in (factorize(conv, 0.5), dope(conv, 0.5), parallelize(conv, 0.5), parallelize(conv, 0.5, nn.BatchNorm2d(8, eps=0.1))):
        assert layer(image).shape == conv(image).shape
    linear = nn.Linear(12, 10)
    for x in (torch.randn(4, 12), torch.randn(4, 5, 12)):
        for layer in (factorize(linear, 0.5), dope(linear, 0.5), parallelize(linear, 0.5)):
            assert layer(x).shape == linear(x).shape
    assert factorize(linear, 0.5).v.bias is not None
    assert dope(linear, 0.5).sparse.bias is not None
    assert dope(nn.Linear(12, 10, bias=False), 0.5).sparse.bias is None
    half = parallelize(nn.Linear(12, 10).bfloat16(), 0.5)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_nothing_stands_between_linear_factors_and_norms_are_per_branch():
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 10), torch.randn(6, 12)
    layer = factorize(linear, 0.5, "linear")
    torch.testing.assert_close(layer(x), x @ (layer.v.weight @ layer.u.weight).T + layer.v.bias)
    with_norm = factorize(linear, 0.5, "nonlinear_norelu")
    hidden = F.batch_norm(x @ with_norm.u.weight.T, None, None, training=True)
    torch.testing.assert_close(with_norm(x), hidden @ with_norm.v.weight.T + with_norm.v.bias)
    with_relu = factorize(linear, 0.5)
    hidden = F.batch_norm(x @ with_relu.u.weight.T, None, None, training=True).relu()
    torch.testing.assert_close(with_relu(x), hidden @ with_relu.v.weight.T + with_relu.v.bias)
    branches = parallelize(linear, 0.75)
    assert len(branches.branches) == 4
    expected = sum(F.batch_norm(x @ branch.weight.T, None, None, training=True) for branch in branches.branches)
    torch.testing.assert_close(branches(x), expected)
    doped = dope(linear, 0.5)
    folded = doped.sparse.weight + doped.v.weight @ doped.u.weight
    torch.testing.assert_close(doped(x), x @ folded.T + doped.sparse.bias)


# ---- surgery and FLOPs -----------------------------------------------------------------------------------------------------------------


def flops(network: nn.Module, images: Tensor) -> int:
    """Dense ones, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).eval()(images)
    return counter.get_total_flops()


def sparse_flops(network: nn.Module, images: Tensor, masks: dict[str, Tensor]) -> float:
    """Of a forward pass, each layer at the density of its mask, by hooks."""
    total = 0.0

    def note(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal total
            mask = masks.get(f"{name}.weight")
            active = float(mask.sum()) if mask is not None else layer.weight.numel()
            outputs = layer.weight.shape[0]
            total += 2 * active * output.numel() / outputs

        return hook

    twin = copy.deepcopy(network).eval()
    for name, layer in twin.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(note(name, layer))
    with torch.no_grad():
        twin(images)
    return total


def networks() -> dict[str, Any]:
    return {
        "mlp": lambda: MLP([192, 32, 32, 32, 4]),
        "cifar": lambda: CifarResNet(8, 16, 4),  # shortcuts without weights
        "cifar18": lambda: CifarResNet18(0.25, 4),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["mlp", "cifar", "cifar18"])
def test_flops_equal_the_dense_networks(name, family):
    network = networks()[name]()
    images = torch.stack([Images(24)[i][0] for i in range(6)])
    dense = flops(network, images)
    module, callback = Classifier(network), ift(family, network="network")
    trainer = fit(callback, module, max_steps=1)
    masks = {key.removeprefix("network."): mask for key, mask in callback.sparsity_masks().items()}
    ratio = sparse_flops(module.network, images, masks) / dense
    assert float(trainer.callback_metrics["sparse_ift/flops_ratio"]) == pytest.approx(ratio, rel=1e-5)
    layers = float(trainer.callback_metrics["sparse_ift/flops_ratio_layers"])
    assert layers == pytest.approx(1, abs=0.15)
    assert ratio == pytest.approx(1, abs=0.1 if family != "wide" else 1.5)
    assert ratio > 1.02 or family != "wide" or name == "cifar18", "a wide network's stem and head cost more, and that is counted"
    assert float(trainer.callback_metrics["sparse_ift/weights_ratio"]) == pytest.approx(1, abs=0.15)
    stored = float(trainer.callback_metrics["sparse_ift/stored_ratio"])
    assert stored == pytest.approx(4 if family != "doped" else 1.75, rel=0.1)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_wide_scales_all_hidden_widths_alike(sparsity):
    network = CifarResNet18(0.25, 100)
    iso_flop_transform(network, "wide", sparsity)
    base = wide_width(16, sparsity)
    assert network.conv1.weight.shape == (base, 3, 3, 3)
    assert network.bn1.num_features == base == len(network.bn1.running_var) == len(network.bn1.weight)
    assert network.layer3[0].downsample[0].weight.shape == (4 * base, 2 * base, 1, 1)
    assert network.layer4[1].conv2.in_channels == 8 * base
    assert network.fc.weight.shape == (100, 8 * base)
    assert network.fc.in_features == 8 * base
    assert network.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 100)
    fan_out = 9 * base
    assert float(network.layer1[0].conv1.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def test_stem_head_and_shortcuts_are_dense_where_the_card_says():
    def sparse(family: str, **kwargs: Any) -> set[str]:
        done = iso_flop_transform(CifarResNet18(0.125, 4), family, 0.75, **kwargs)
        return {name for layer in done.layers for name in layer.sparse}

    wide = sparse("wide")
    assert not wide & {"conv1.weight", "fc.weight"}
    assert {"layer1.0.conv1.weight", "layer2.0.downsample.0.weight"} <= wide
    assert "layer2.0.downsample.0.weight" not in sparse("wide", sparse_shortcuts=False)
    for family in ("parallel", "factorized", "doped"):
        assert not any("downsample" in name or name in ("conv1.weight", "fc.weight") for name in sparse(family))
        assert "layer2.0.downsample.0.weight" in sparse(family, sparse_shortcuts=True)
    doped = iso_flop_transform(CifarResNet18(0.125, 4), "doped", 0.75)
    assert all(name.endswith((".u.weight", ".v.weight")) for layer in doped.layers for name in layer.dense)
    assert all(name.endswith(".sparse.weight") for layer in doped.layers for name in layer.sparse)
    only_u = sparse("factorized", sparse_u_only=True)
    assert all(name.endswith(".u.weight") for name in only_u)
    assert not any("layer1.0.conv1" in name for name in sparse("parallel", skip=["layer1.*"]))
    assert sparse("factorized", targets=["layer1.0.conv1", "fc"]) == {
        *("layer1.0.conv1.u.weight", "layer1.0.conv1.v.weight", "fc.u.weight", "fc.v.weight")
    }


def test_branches_take_over_the_norm_and_the_old_one_is_gone():
    network = CifarResNet18(0.125, 4)
    with torch.no_grad():
        network.layer1[0].bn1.weight.fill_(3.0)
    iso_flop_transform(network, "parallel", 0.5)
    block = network.layer1[0]
    assert isinstance(block.conv1, Parallel)
    assert isinstance(block.bn1, nn.Identity)
    assert all(bool((norm.weight == 3.0).all()) for norm in block.conv1.norms)
    assert block.conv1.norms[0].weight is not block.conv1.norms[1].weight
    assert not torch.equal(block.conv1.branches[0].weight, block.conv1.branches[1].weight)
    assert isinstance(network.layer2[0].downsample[1], nn.BatchNorm2d)


@pytest.mark.parametrize("family", ["wide", "parallel", "doped"])
def test_last_norms_can_start_at_zero(family):
    network = CifarResNet18(0.125, 4)
    iso_flop_transform(network, family, 0.75, zero_init_last=True)
    block = network.layer2[1].eval()
    x = torch.rand(2, 32 if family == "wide" else 16, 4, 4)
    assert torch.equal(block(x), x), "the block is the identity"
    with pytest.raises(ValueError, match="zero_init_last finds no residual block"):
        iso_flop_transform(MLP([8, 8, 8, 8]), family, 0.75, zero_init_last=True)


def test_new_weights_follow_the_seed_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    drawn = []
    for seed in (0, 1, 0):
        network = MLP([8, 16, 16, 4])
        torch.set_rng_state(state)
        iso_flop_transform(network, "factorized", 0.5, seed=seed, init="default" if seed else "kaiming_normal")
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(network.layers[1].u.weight.detach())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert float(drawn[0].std()) == pytest.approx(math.sqrt(2 / drawn[0].shape[0]), rel=0.2)


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))


def tied() -> nn.Module:
    network = MLP([8, 8, 8, 8, 4])
    network.layers[2].weight = network.layers[1].weight
    return network


def frozen() -> nn.Module:
    network = MLP([8, 8, 8, 4])
    network.layers[1].requires_grad_(False)
    return network


def normed() -> nn.Module:
    network = MLP([8, 8, 8, 4])
    parametrizations.weight_norm(network.layers[1])
    return network


def hooked() -> nn.Module:
    network = MLP([8, 8, 8, 4])
    network.layers[1].register_forward_hook(lambda *_: None)
    return network


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "family", "message"),
    [
        (Grouped, "wide", r"can't transform 1 of Grouped: it is a convolution in groups.*; transform a submodule that it can"),
        (Grouped, "doped", r"can't transform 1 of Grouped: a convolution in 4 groups.*; name other layers by targets"),
        (tied, "wide", "its weight is shared with another layer"),
        (tied, "parallel", "its weight is shared with another layer"),
        (frozen, "factorized", "it is frozen, and would be drawn anew"),
        (normed, "doped", "its weight is parametrised"),
        (hooked, "parallel", "it has hooks, which would be lost: put SparseIFT before"),
        (encoder, "wide", r"1\.self_attn of Sequential.*MultiheadAttention holds weights of its own"),
        (encoder, "factorized", r"1\.self_attn of Sequential \(and 3 more\): MultiheadAttention is none of Linear"),
        (lambda: MLP([8, 8, 4]), "wide", r"no hidden layer to transform beside stem 'layers\.0' and head 'layers\.1'"),
        (lambda: nn.Sequential(nn.ReLU()), "wide", "call iso_flop_transform at the end of its configure_model"),
        (lambda: MLP([4, 2, 2, 4]), "doped", "has no FLOPs left for rank 1"),
    ],
)
def test_what_cannot_be_transformed_is_refused_and_left_as_it_was(make, family, message):
    network = make()
    before = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        iso_flop_transform(network, family, 0.5 if "rank" in message else 0.75)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == before
    assert transformation_of(network) is None


def test_layers_of_a_transformer_by_name():
    network = encoder()
    with pytest.raises(ValueError, match="fast path of TransformerEncoderLayer"):
        iso_flop_transform(network, "doped", 0.75, targets=["1.linear*"])
    decoder = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), nn.Linear(8, 4))
    iso_flop_transform(decoder, "factorized", 0.75, targets=["1.*"])
    assert decoder(torch.randn(2, 5, 8)).shape == (2, 5, 4)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="family is 'tall'"):
        ift("tall")
    with pytest.raises(ValueError, match="sparsity is 1: give a share"):
        ift(sparsity=1)
    with pytest.raises(ValueError, match="distribution is 'snip'"):
        ift(distribution="snip")
    with pytest.raises(ValueError, match="flops_tolerance is -1"):
        ift(flops_tolerance=-1)
    with pytest.raises(ValueError, match="fold_weight_decay needs a linear map"):
        ift("factorized", fold_weight_decay=True)
    with pytest.raises(ValueError, match="stem is 'first', no linear layer or convolution"):
        fit(ift(stem="first"))
    with pytest.raises(ValueError, match="network is 'net', no submodule of Classifier: give one such as network"):
        fit(ift(network="net"))
    with pytest.raises(ValueError, match="uv_layer is 'gelu'"):
        factorize(nn.Linear(4, 4), 0.5, "gelu")  # type: ignore[arg-type]


def test_unequal_flops_stop_the_run():
    with pytest.raises(ValueError, match=r"gives the transformed layers 0\.800 of the dense layers' FLOPs, not 1 within 0\.05"):
        fit(SparseIFT(0.6, "parallel"))
    fit(SparseIFT(0.6, "parallel", flops_tolerance=0.3))
    fit(SparseIFT(0.75, "wide", distribution="erk"))  # equal weights, not equal FLOPs: logged alone


class Counting(nn.Module):
    """A forward that knows its width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x.flatten(1)).view(-1, 8).relu()))


def test_a_widened_network_that_cannot_run_is_named():
    with pytest.raises(ValueError, match=r"the widened Classifier can't run on a training batch \(.*give it larger widths yourself"):
        fit(ift(), Classifier(Counting()))


# ---- masks -----------------------------------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """Keeps the masks of every moment, and checks that dead weights are 0."""

    def __init__(self, callback: SparseIFT) -> None:
        self.callback, self.seen = callback, []

    def on_mask_updated(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: Any) -> None:
        self.seen.append({name: mask.clone() for name, mask in self.callback.sparsity_masks().items()})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, weight in self.callback.chosen(pl_module).items():
            assert not weight[~self.callback.sparsity_masks()[name]].any()


@pytest.mark.parametrize("family", [*FAMILIES, "none"])
@pytest.mark.parametrize("make", [Classifier, TwoOptimisers, compiled_classifier])
def test_masks_move_and_exploration_is_counted(make, family):
    callback = ift(family, method="set" if family == "doped" else "rigl", start="random_exact", drop_fraction=0.5)
    watch = Watch(callback)
    trainer = fit(callback, make(), callbacks=[callback, watch], max_steps=8)
    assert len(watch.seen) > 3
    ever = {name: torch.stack([masks[name] for masks in watch.seen]).any(0) for name in watch.seen[0]}
    always = {name: torch.stack([masks[name] for masks in watch.seen]).all(0) for name in watch.seen[0]}
    size = sum(mask.numel() for mask in ever.values())
    for metric, masks in (("itop", ever), ("doc", always)):
        expected = sum(int(mask.sum()) for mask in masks.values()) / size
        assert float(trainer.callback_metrics[f"sparse_ift/{metric}"]) == pytest.approx(expected)
    assert trainer.callback_metrics["sparse_ift/doc"] < trainer.callback_metrics["sparse_ift/density"]
    assert trainer.callback_metrics["sparse_ift/itop"] > trainer.callback_metrics["sparse_ift/density"]
    assert float(trainer.callback_metrics["sparse_ift/density"]) == pytest.approx(0.25, abs=0.01)


def test_static_masks_stay_and_the_first_ones_are_bernoulli():
    callback = ift(method="static", start="random")
    trainer = fit(callback, max_steps=4)
    density = float(trainer.callback_metrics["sparse_ift/density"])
    assert density != 0.25
    assert density == pytest.approx(0.25, abs=0.05)
    assert trainer.callback_metrics["sparse_ift/itop"] == trainer.callback_metrics["sparse_ift/doc"] == density
    assert "sparse_ift/drop_fraction" not in trainer.callback_metrics
    assert callback.sparsity_card.mask == "static"


def test_zero_sparsity_without_enlargement_is_the_dense_network():
    modules = [Classifier(), Classifier()]
    torch.manual_seed(0)
    fit(pl.Callback(), modules[0])
    torch.manual_seed(0)
    trainer = fit(ift("none", sparsity=0.0, method="static"), modules[1])
    assert_state_dicts_equal(modules[1].state_dict(), modules[0].state_dict())
    assert float(trainer.callback_metrics["sparse_ift/flops_ratio"]) == 1


def test_plus_rules_cap_the_output_layer():
    def densities(rule: str, **kwargs: Any) -> dict[str, float]:
        callback = ift("none", sparsity=0.9, distribution=rule, targets=["network.5", "network.7"], method="static", **kwargs)
        fit(callback, max_steps=1)
        return callback.layer_densities

    assert densities("uniform") == pytest.approx({"network.5.weight": 0.1, "network.7.weight": 0.1})
    assert densities("uniform_plus") == pytest.approx({"network.5.weight": 0.1, "network.7.weight": 0.2})
    erk, plus = densities("erk"), densities("erk_plus")
    assert plus == {**erk, "network.7.weight": max(0.2, erk["network.7.weight"])}
    assert densities("uniform_plus", head="network.5")["network.5.weight"] == 0.2


# ---- folded weight decay ---------------------------------------------------------------------------------------------------------------


class Decayed(Classifier):
    """One step of plain SGD with weight decay."""

    def __init__(self, kind: Any = torch.optim.SGD) -> None:
        torch.manual_seed(3)
        super().__init__(MLP([192, 12, 12, 4]))
        self.kind = kind

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind(self.parameters(), lr=0.1, weight_decay=0.3)


@pytest.mark.parametrize("family", ["doped", "factorized"])
def test_folded_weight_decay_is_the_penalty_on_the_product(family):
    options = {"network": "network", "method": "static", "uv_layer": "linear", "fold_weight_decay": True}
    callback, module = ift(family, **options), Decayed()
    fit(callback, module, max_steps=1)
    twin = Decayed()
    iso_flop_transform(twin.network, family, 0.75, uv_layer="linear")
    masks = {name: mask for name, mask in callback.sparsity_masks().items()}
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
    images, labels = next(iter(loader()))
    layer = twin.network.layers[1]
    penalty = 0.5 * 0.3 * (layer.v.weight @ layer.u.weight).square().sum()
    (F.cross_entropy(twin.network(images), labels) + penalty).backward()
    trained = dict(module.named_parameters())
    for name, weight in parameters.items():
        own = 0.0 if ".u." in name or ".v.weight" in name else 0.3 * weight.detach()
        expected = weight.detach() - 0.1 * (weight.grad + own)
        torch.testing.assert_close(trained[name].detach(), expected * masks.get(name, 1), rtol=1e-5, atol=1e-6)


def test_decoupled_weight_decay_cannot_be_folded():
    with pytest.raises(ValueError, match="AdamW decays weights by itself"):
        fit(ift("doped", fold_weight_decay=True), Decayed(torch.optim.AdamW))


# ---- checkpoints and neighbours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), [("wide", "set"), ("parallel", "rigl"), ("factorized", "rigl"), ("doped", "set")])
def test_a_killed_run_ends_like_an_uninterrupted_one(family, method, tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            from lit_methods.datamodules.loaders import make_loader

            return make_loader(Images(24), batch_size=6, seed=0, shuffle=True, with_epoch=False)

    built = []

    def make():
        built.append(ift(family, method=method))
        return Classifier(), Data(), [built[-1], ExactResume()]

    whole, resumed = kill_and_resume(make, 6, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)
    first, _, last = built
    assert_state_dicts_equal(last.history.ever, first.history.ever)
    assert_state_dicts_equal(last.history.always, first.history.always)
    assert last._macs == first._macs


def test_a_checkpoint_loads_into_a_fresh_module_with_the_callback_or_the_function(tmp_path):
    module, callback = Classifier(), ift("factorized")
    trainer = fit(callback, module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    images = next(iter(loader()))[0]
    expected = module.eval().network(images)

    again = Classifier()
    tiny_trainer(callbacks=[ift("factorized")]).validate(again, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    torch.testing.assert_close(again.eval().network(images), expected, rtol=0, atol=0)
    plain = Classifier()
    iso_flop_transform(plain, "factorized", 0.75)
    plain.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(plain.eval().network(images), expected, rtol=0, atol=0)

    tiny_trainer(callbacks=[callback]).validate(module, loader(), verbose=False)  # transformed already
    tiny_trainer(callbacks=[ift("factorized")], max_steps=1).fit(module, loader())
    with pytest.raises(ValueError, match=r"Classifier is transformed already, with .*'factorized'.*use the same settings"):
        tiny_trainer(callbacks=[ift("doped")]).validate(module, loader(), verbose=False)
    with pytest.raises(ValueError, match=r"the checkpoint's module is transformed, with .*0\.75"):
        ift("none", sparsity=0.5).load_state_dict(callback.state_dict() | {"settings": {"family": "none", "sparsity": 0.75}})
    with pytest.raises(ValueError, match="transformed already: transform a dense module"):
        iso_flop_transform(module, "wide", 0.75)


class Late(Classifier):
    """Makes its network in configure_model."""

    careful = True

    def __init__(self) -> None:
        super().__init__()
        self.network = None

    def configure_model(self) -> None:
        if self.network is None or not self.careful:
            torch.manual_seed(7)
            self.network = MLP([192, 8, 8, 8, 4])


class Careless(Late):
    careful = False


class Own(Late):
    """Transforms itself."""

    def configure_model(self) -> None:
        if self.network is None:
            super().configure_model()
            iso_flop_transform(self.network, "doped", 0.75)


def test_networks_that_are_made_late():
    module = Late()
    fit(ift("parallel"), module)
    assert isinstance(module.network.layers[1], Parallel)
    with pytest.raises(ValueError, match=r"network\.layers\.1\.branches\.0\.weight is gone: Careless has made its layers anew"):
        fit(ift("parallel"), Careless())
    own = Own()
    trainer = fit(ift("doped"), own)
    assert float(trainer.callback_metrics["sparse_ift/weights_ratio"]) == pytest.approx(1, abs=0.15)
    assert transformation_of(own).layers[0].name == "network.layers.1"


def test_parts_that_are_transformed_one_by_one_are_one():
    module = nn.ModuleDict({"a": MLP([8, 8, 8, 4]), "b": MLP([8, 8, 8, 4]), "c": MLP([8, 8, 8, 4])})
    for name in "ab":
        iso_flop_transform(module[name], "wide", 0.75)
    done = transformation_of(module)
    assert isinstance(done, Transformation)
    assert [name for layer in done.layers for name in layer.sparse] == ["a.layers.1.weight", "b.layers.1.weight"]
    iso_flop_transform(module["c"], "doped", 0.75)
    with pytest.raises(ValueError, match="two parts of ModuleDict are transformed differently"):
        transformation_of(module)


def train_in_two_processes(family: str) -> tuple[dict, dict, float]:
    module, callback = Classifier(), ift(family, start="random_exact")
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback], devices=2, strategy="ddp", accelerator="cpu")
    trainer.fit(module, loader(3))
    state = {name: p.detach().clone() for name, p in module.named_parameters()}
    return state, dict(callback.sparsity_masks()), float(trainer.callback_metrics["sparse_ift/itop"])


@pytest.mark.parametrize("family", ["wide", "parallel"])
def test_two_processes_have_the_same_weights_and_masks(family):
    (state, masks, itop), (other_state, other_masks, _) = run_two_processes(train_in_two_processes, family)
    assert_state_dicts_equal(state, other_state)
    assert_state_dicts_equal(masks, other_masks)
    assert itop > 0.25


@pytest.mark.parametrize("family", FAMILIES)
def test_reduced_precision_accumulation_clipping_and_neighbours(family):
    callback, teacher, report = ift(family, start="random_exact"), EMATeacher(decay=0.5), SparsityReport(strict=True, mask_check_every_n=1)
    watch = Watch(callback)
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    trainer = fit(callback, callbacks=[teacher, report, callback, watch], max_steps=6, **options)
    assert not torch.equal(*[torch.cat([mask.flatten() for mask in masks.values()]) for masks in (watch.seen[0], watch.seen[-1])])
    for name, mask in callback.sparsity_masks().items():
        assert not teacher.averaged()[name][~mask].any()
    assert float(trainer.callback_metrics["sparsity/itop"]) == pytest.approx(float(trainer.callback_metrics["sparse_ift/itop"]))


def test_averages_are_made_of_the_transformed_module():
    average, callback = EMAWeightAveraging(decay=0.5, update_starting_at_step=0), ift("wide")
    fit(callback, callbacks=[callback, average])
    with pytest.raises(ValueError, match="EMAWeightAveraging has copied the dense module: put SparseIFT before it"):
        fit(ift("wide"), callbacks=[EMAWeightAveraging(decay=0.5), ift("wide")])


@pytest.mark.parametrize("family", ["parallel", *(pytest.param(one, marks=pytest.mark.slow) for one in ("wide", "factorized", "doped"))])
def test_a_torchvision_resnet(family):
    module, callback = resnet_classifier(), ift(family, network="network", flops_tolerance=0.01)
    trainer = fit(callback, module, max_steps=1)
    assert float(trainer.callback_metrics["sparse_ift/flops_ratio_layers"]) == pytest.approx(1, abs=0.005)
    assert float(trainer.callback_metrics["sparse_ift/flops_ratio"]) == pytest.approx(1, abs=0.02)


def test_a_run_that_cannot_be_counted_goes_on_with_a_warning():
    class Odd(Classifier):
        def training_step(self, batch, batch_idx):
            if self.trainer.training and not torch.is_grad_enabled():
                raise RuntimeError("not on a copy")
            return super().training_step(batch, batch_idx)

        validation_step = test_step = predict_step = pl.LightningModule.predict_step

    with pytest.warns(UserWarning, match="SparseIFT can't count FLOPs"):
        trainer = fit(ift("parallel"), Odd())
    assert "sparse_ift/flops_ratio" not in trainer.callback_metrics
    assert "sparse_ift/itop" in trainer.callback_metrics


def test_the_table_has_active_and_stored_weights():
    callback = ift("factorized", start="random_exact", measure_spectral_gap=True)
    trainer = fit(callback)
    (table,) = callback.dashboard_media().values()
    ((name, shape, dense, stored, active, kind, ratio),) = table.rows
    assert (name, shape, dense, kind) == ("network.5", "8 x 144", 1152, "sparse")
    assert stored == sum(mask.numel() for mask in callback.sparsity_masks().values())
    assert active == sum(int(mask.sum()) for mask in callback.sparsity_masks().values())
    assert ratio == pytest.approx(active / dense, rel=1e-6)
    gaps = [float(spectral_gap(mask)) for mask in callback.sparsity_masks().values()]
    assert float(trainer.callback_metrics["sparse_ift/spectral_gap"]) == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert set(callback.dashboard_artifacts()) == {"sparse_ift_masks"}


class Adversarial(pl.LightningModule):
    """Two networks that are stepped by hand; the second sees data, and what the first one makes of noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 192))
        self.critic = nn.Sequential(nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        made = self.maker(torch.randn(len(batch[0]), 8))
        for optimiser, loss in (
            (first, lambda: -self.critic(made).mean()),
            (second, lambda: (self.critic(made.detach()) - self.critic(batch[0].flatten(1))).mean()),
        ):
            self.toggle_optimizer(optimiser)
            optimiser.zero_grad()
            self.manual_backward(loss())
            self.clip_gradients(optimiser, 1.0, "norm")
            optimiser.step()
            self.untoggle_optimizer(optimiser)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.maker, self.critic)]


@pytest.mark.parametrize("tolerance", [None, 0.5])
def test_several_networks_are_not_widened_as_one(tolerance):
    module, stepped = Adversarial(), []

    class Watches(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            stepped.append(True)

    def train(**kwargs: Any) -> pl.Trainer:
        trainer = tiny_trainer(max_steps=2, callbacks=[ift(total_steps=2, **kwargs), Watches()])
        trainer.fit(module, loader())
        return trainer

    with pytest.raises(ValueError, match=r"SparseIFT: the widened Adversarial can't run on a training batch \(critic.0 has .* by network"):
        train(flops_tolerance=tolerance)
    assert not stepped
    module = Adversarial()
    assert train(network="critic", flops_tolerance=None).global_step == 2
    assert module.critic[2].in_features > 16
    assert module.maker[2].in_features == 16
