"""SSVI on modules that aren't ours: the loss it adds, what an update does, evaluation by draws, and what a run keeps."""

import importlib.util
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    compiled_classifier,
    kill_and_resume,
    left_behind,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.bayes.conversion import bayes_layers, to_bayes
from lit_methods.bayes.prediction import posterior_logits
from lit_methods.bayes.variational import gaussian_kl
from lit_methods.callbacks import SSVI, ExactResume, Reliability
from lit_methods.callbacks.sparsity.ssvi import core
from lit_methods.datamodules.loaders import make_loader


class Foreign(Classifier):
    """Without dropout and batch norm, so that two processes can do what one does."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 12), nn.ReLU(), nn.Linear(12, 4))
        super().__init__(network)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)}


def ssvi(**words: Any) -> SSVI:
    options = {"density": 0.2, "prior_std": 0.1, "initial_mean_std": 0.1, "interval": 2, "logits": "network", "samples": 0}
    return SSVI(**(options | words))


def loader(size: int = 24, batch: int = 6) -> DataLoader[Any]:
    return DataLoader(Images(size), batch_size=batch)


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_many_draws() -> None:
    mu, sigma = torch.tensor([0.3, -1.2, 0.0, 0.05], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.4, 0.01], dtype=torch.float64)
    draws = (mu + sigma * torch.randn(400_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).abs()
    for criterion, values in (("mean_abs", draws), ("exp_mean_abs", draws.exp())):
        mean = core.removal_score(mu, sigma, f"E_{criterion}")  # type: ignore[arg-type]
        ratio = core.removal_score(mu, sigma, f"SNR_{criterion}")  # type: ignore[arg-type]
        torch.testing.assert_close(mean, values.mean(0), rtol=5e-3, atol=0)
        torch.testing.assert_close(ratio, values.mean(0) / values.std(0), rtol=2e-2, atol=0)


@pytest.mark.parametrize("criterion", ["mean", "snr", "E_mean_abs", "SNR_mean_abs", "E_exp_mean_abs", "SNR_exp_mean_abs"])
def test_scores_stay_numbers_at_the_edges_and_in_float32(criterion: Any) -> None:
    mu, sigma = torch.tensor([0.0, 1e4, -1e3, 0.0, 1e-30]), torch.tensor([0.0, 1e-9, 10.0, 1.0, 1e-12])
    score = core.removal_score(mu, sigma, criterion)
    assert not score.isnan().any()
    assert score[0] == 0
    large = core.removal_score(torch.tensor([1e4]), torch.tensor([1.0]), "SNR_mean_abs")
    torch.testing.assert_close(large, torch.tensor([1e4], dtype=torch.float64), rtol=1e-9, atol=0)


def test_an_update_at_the_edges() -> None:
    mu, rho = torch.zeros(2, 3), torch.full((2, 3), -3.0)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    gradient = torch.tensor([[0.0, 0.0, 5.0], [4.0, 0.0, 0.0]])
    found = core.removal_addition(mu * mask, rho * mask, mask, gradient, 1.0, grow_std="mean")
    assert torch.equal(found.mask, torch.tensor([[False, False, True], [True, False, False]])), "all leave, as many join"
    assert found.rho.tolist() == [[0, 0, -3], [-3, 0, 0]]
    empty = core.removal_addition(mu, rho * 0, mask & False, gradient, 0.3)
    assert not empty.mask.any()
    full = core.removal_addition(mu, rho, mask | True, gradient, 0.5)
    assert full.mask.all()
    assert torch.equal(full.rho, rho), "those that leave a full layer return"
    eps = core.removal_addition(mu * mask, rho * mask, mask, gradient, 0.5, grow_std="eps")
    assert math.isclose(F.softplus(eps.rho.double())[0, 2], 1e-6, rel_tol=1e-4)
    assert core.active_count(100, 0.02) == 2
    assert core.active_count(10, 1.0) == 10


# ---- a run -----------------------------------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """What every optimiser step left."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        momenta = {
            f"momentum {name}": optimizer.state[parameter]["momentum_buffer"].clone()
            for name, parameter in pl_module.named_parameters()
            if optimizer.state[parameter].get("momentum_buffer") is not None
        }
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()} | momenta)


def test_what_is_not_active_is_zero_at_all_times_and_an_update_takes_the_place_of_a_step() -> None:
    callback, watch, module = ssvi(kl_scale=0.1), Watch(), Foreign()
    trainer = tiny_trainer(callbacks=[callback, watch], max_epochs=3, limit_val_batches=0)
    trainer.fit(module, loader())
    assert list(callback.updates) == [2, 4, 6, 8]
    counts = {name: int(layer.mask.sum()) for name, layer in bayes_layers(module).items()}
    assert counts == {"network.0": 162, "network.3": 2592 - int(0.8 * 2592), "network.5": 48 - int(0.8 * 48)}
    for number, state in enumerate(watch.states, 1):
        for name, count in counts.items():
            mask = state[f"{name}.mask"]
            assert mask.sum() == count
            for part in ("weight", "rho"):
                assert (state[f"{name}.{part}"][~mask] == 0).all()
                momentum = state.get(f"momentum {name}.{part}")
                assert momentum is None or (momentum[~mask] == 0).all()
        if number in callback.updates:
            before = watch.states[number - 2]
            for name in counts:
                stays = state[f"{name}.mask"] & before[f"{name}.mask"]
                assert torch.equal(state[f"{name}.weight"][stays], before[f"{name}.weight"][stays]), "the optimiser has not moved"
                new = state[f"{name}.mask"] & ~stays
                assert (state[f"{name}.weight"][new] == 0).all()
                torch.testing.assert_close(state[f"{name}.rho"][new], before[f"{name}.rho"][stays].mean().expand(int(new.sum())))
            assert torch.equal(state["network.0.bias"], before["network.0.bias"])
    assert any(not torch.equal(watch.states[0][f"{name}.mask"], watch.states[-1][f"{name}.mask"]) for name in counts)
    decays = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]
    assert decays == [1e-2, 0.0], "deviations have a group without decay"
    assert len(trainer.optimizers[0].param_groups[1]["params"]) == 3


def test_the_kl_term_is_that_of_the_prior_and_reaches_active_weights_alone() -> None:
    callback, module = ssvi(kl_scale=0.5, density=0.3, moves=False), Foreign()
    trainer = tiny_trainer(callbacks=[callback], max_epochs=2, limit_val_batches=0, log_every_n_steps=1)
    masks: list[Tensor] = []

    class Grads(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            layer = bayes_layers(pl_module)["network.3"]
            assert (layer.rho.grad[~layer.mask] == 0).all()
            masks.append(layer.mask.clone())

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            layers = bayes_layers(pl_module).values()
            self.kl = sum(gaussian_kl(layer.weight, F.softplus(layer.rho), layer.mask, 0.0, 0.1) for layer in layers)

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert torch.isclose(trainer.callback_metrics["ssvi/kl"], self.kl.detach())
            assert math.isclose(trainer.callback_metrics["ssvi/kl_factor"], 0.5 / 24, rel_tol=1e-6), "two epochs: full at once"

    trainer.callbacks.append(Grads())
    trainer.fit(module, loader())
    assert all(torch.equal(mask, masks[0]) for mask in masks), "moves=False"


def test_density_one_is_dense_inference() -> None:
    callback, module = ssvi(density=1.0), Foreign()
    tiny_trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0).fit(module, loader())
    assert all(layer.mask.all() for layer in bayes_layers(module).values())
    assert callback.updates == {}
    assert callback.sparsity_card.cost == "dense"


def test_evaluation_averages_draws_and_reliability_sees_them() -> None:
    callback, module = ssvi(samples=5, initial_std=0.3), Foreign()
    trainer = tiny_trainer(callbacks=[callback, Reliability(logits="network", fgsm_epsilon=0)], max_epochs=1)
    data = Images(24)
    trainer.fit(module, loader(), DataLoader(data, batch_size=24))
    module.eval()
    wanted = posterior_logits(lambda: module.network(data.images), 5, 0, torch.device("cpu")).detach()
    nll = F.cross_entropy(wanted, data.labels)
    assert not torch.isclose(nll, F.cross_entropy(module.network(data.images), data.labels), rtol=1e-3)
    for name in ("val_loss", "reliability/val_nll"):
        torch.testing.assert_close(trainer.callback_metrics[name], nll, rtol=1e-5, atol=1e-6)
    ece = multiclass_calibration_error(wanted.softmax(1), data.labels, 4, n_bins=15)
    torch.testing.assert_close(trainer.callback_metrics["reliability/val_ece"], ece, rtol=1e-4, atol=1e-5)
    assert isinstance(module.network, nn.Module), "nothing stands around the network any more"


def test_it_leaves_nothing_but_its_layers_behind() -> None:
    changed = left_behind(Foreign, lambda: ssvi(samples=2), loader(), limit_val_batches=0)
    assert set(changed) == {"network.0", "network.3", "network.5"}


def test_a_second_fit_goes_on_and_a_posterior_from_elsewhere_keeps_its_masks() -> None:
    callback, module = ssvi(), Foreign()
    tiny_trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0).fit(module, loader())
    masks = {name: layer.mask.clone() for name, layer in bayes_layers(module).items()}
    for again in (callback, ssvi(moves=False)):
        tiny_trainer(callbacks=[again], max_steps=1, limit_val_batches=0).fit(module, loader())
        assert all(torch.equal(layer.mask, masks[name]) for name, layer in bayes_layers(module).items())


@pytest.mark.parametrize("noise", ["outputs", "weights"])
def test_a_run_that_is_killed_between_gradients_of_an_update_ends_bit_equal(noise: str, tmp_path: Any) -> None:
    made: list[SSVI] = []

    def build() -> Any:
        made.append(ssvi(interval=4, gradient_steps=3, noise=noise))
        return Classifier(), make_loader(Images(), 6, shuffle=True, seed=0), [made[-1], ExactResume()]

    whole, resumed = kill_and_resume(build, 12, 7, tmp_path, max_epochs=-1)
    assert_state_dicts_equal(resumed, whole)
    assert list(made[0].updates) == [4, 8], "killed between the first gradient for the second update and that update"
    assert made[0].history.ever["network.5.weight"].sum() > made[0].store.masks["network.5.weight"].sum()


def test_gradients_of_several_steps_choose_what_joins() -> None:
    last, several = (ssvi(interval=4, gradient_steps=steps) for steps in (1, 4))
    for callback in (last, several):
        tiny_trainer(callbacks=[callback], max_epochs=2, limit_val_batches=0).fit(Foreign(), loader())
    name = "network.3.weight"
    assert list(last.updates) == [4]
    assert not torch.equal(last.store.masks[name], several.store.masks[name])


def _fit(devices: int, accumulate: int, noise: str) -> dict[str, Tensor]:
    module = Foreign()
    strategy: Any = DDPStrategy(process_group_backend="gloo") if devices == 2 else "auto"
    trainer = tiny_trainer(
        callbacks=[ssvi(noise=noise, train_samples=24)],
        max_steps=6,
        limit_val_batches=0,
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
    )
    rank = trainer.global_rank if devices == 2 else None
    batches = [Images(24)[torch.arange(4 * k, 4 * k + 4)] for k in range(6)] * 2
    trainer.fit(module, DataLoader(batches if rank is None else batches[rank::2], batch_size=None))  # type: ignore[arg-type]
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("noise", ["outputs", "weights"])
def test_two_processes_do_what_one_does(noise: str) -> None:
    alone = _fit(1, 2, noise)
    for state in run_two_processes(_fit, 2, 1, noise):
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_adam_clipping_and_bfloat16() -> None:
    class Adam(Foreign):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([{"params": self.network[:4].parameters(), "lr": 0.01}, {"params": self.network[4:].parameters()}])

    module = Adam()
    trainer = tiny_trainer(callbacks=[ssvi()], max_epochs=2, limit_val_batches=0, gradient_clip_val=0.1, precision="bf16-mixed")
    trainer.fit(module, loader())
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.0, 0.01, 0.0]
    for layer in bayes_layers(module).values():
        assert (layer.weight[~layer.mask] == 0).all()


def vit_classifier() -> Classifier:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return Classifier(VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4))


@pytest.mark.parametrize(
    ("build", "skip", "layers"),
    [
        pytest.param(resnet_classifier, [], 21, marks=pytest.mark.thorough),
        (vit_classifier, ["*.self_attention"], 6),
        pytest.param(compiled_classifier, [], 3, marks=pytest.mark.thorough),
    ],
)
def test_networks_of_others_train_are_evaluated_and_are_loaded_again(build: Any, skip: Any, layers: int, tmp_path: Any) -> None:
    callback, module = ssvi(density=0.3, samples=2, interval=1, end_fraction=1.0, skip=skip), build()
    trainer = tiny_trainer(callbacks=[callback], max_steps=3, limit_val_batches=1, val_check_interval=1)
    trainer.fit(module, loader(12, 4), loader(12, 4))
    found = bayes_layers(module)
    assert len(found) == layers
    for layer in list(found.values())[1:]:
        assert (layer.weight[~layer.mask] == 0).all()
        assert layer.mask.float().mean() < 0.35
    assert trainer.callback_metrics["val_loss"].isfinite()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = build()
    other = tiny_trainer(callbacks=[ssvi(density=0.3, samples=2, skip=skip)], limit_val_batches=1)
    other.validate(again, loader(12, 4), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert_state_dicts_equal(dict(again.state_dict()), dict(module.state_dict()))
    torch.testing.assert_close(other.callback_metrics["val_loss"], trainer.callback_metrics["val_loss"])


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


class Held(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([parameter for name, parameter in self.named_parameters() if "rho" not in name], lr=0.1)


class Decayed(Foreign):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.param_groups[1]["weight_decay"] = 0.1
        return optimizer


class Attentive(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield Images()[0]


class Deaf(Foreign):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network[0](batch[0])


class Odd(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        return {"nothing": 0}


@pytest.mark.parametrize(
    ("words", "module", "data", "says"),
    [
        ({"density": 1e-3}, Foreign, None, r"SSVI.*density 0.001 leaves network.5.weight of shape \(4, 12\) no weight.*give at least 0.02"),
        ({}, TwoOptimisers, None, "calls backward itself"),
        ({}, Attentive, None, "attention is a MultiheadAttention.*add the others to skip"),
        ({}, Held, None, "leaves out|no optimiser holds"),
        ({}, Decayed, None, "decays rho of network.0.weight"),
        ({}, Foreign, Endless(), "counts in epochs, and the training loader has no length"),
        ({"samples": 2, "logits": "head"}, Foreign, None, "has no 'head' that maps inputs to them"),
        ({}, Odd, None, "without a loss"),
        ({"targets": ["networks.*"]}, Foreign, None, r"SSVI: targets\[0\]='networks.\*' matches no submodule"),
    ],
)
def test_what_cannot_work_is_refused(words: Any, module: Any, data: Any, says: str) -> None:
    trainer, made = tiny_trainer(callbacks=[ssvi(**words)], max_steps=2, limit_val_batches=0), module()
    with pytest.raises((ValueError, TypeError), match=says):
        trainer.fit(made, loader() if data is None else DataLoader(data, batch_size=2))
    assert not {"training_step", "configure_optimizers", "forward"} & set(vars(made)), "nothing stands around its methods any more"


def test_pictures_are_no_logits() -> None:
    trainer = tiny_trainer(callbacks=[ssvi(samples=2, logits="network.0")], max_steps=1, num_sanity_val_steps=1)
    with pytest.raises(ValueError, match=r"came out instead of \(B, classes\) logits.*samples to 0"):
        trainer.fit(Foreign(), loader(), loader())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"criterion": "magnitude"}, "criterion is 'magnitude'"),
        ({"prior_std": 0.0}, "prior_std is 0.0"),
        ({"gradient_steps": 3, "interval": 2}, "gradient_steps is 3"),
        ({"kl_scale": -1.0}, "kl_scale is -1.0"),
        ({"samples": -1}, "samples is -1"),
        ({"noise": "inputs"}, "noise is 'inputs'"),
    ],
)
def test_arguments_outside_their_range(words: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ssvi(**words)


def test_an_evaluation_that_calls_something_else_is_told() -> None:
    with pytest.warns(UserWarning, match="'network.5', which this evaluation of Deaf didn't call"):
        tiny_trainer(callbacks=[ssvi(samples=2, logits="network.5")], max_steps=1, val_check_interval=1).fit(Deaf(), loader(), loader())


# ---- beside others ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("bayesian_torch") is None, reason="needs bayesian-torch (extra peers)")
def test_dense_layers_agree_with_bayesian_torch() -> None:
    """Output in mean and variance, and the KL divergence, for the same posterior."""
    from bayesian_torch.layers import LinearReparameterization

    torch.manual_seed(0)
    theirs = LinearReparameterization(7, 3, prior_mean=0.0, prior_variance=0.2)
    box = nn.Sequential(nn.Linear(7, 3))
    to_bayes(box)
    box[0].weight.data.copy_(theirs.mu_weight.data)
    box[0].rho.data.copy_(theirs.rho_weight.data)
    box[0].bias.data.zero_()
    theirs.bias = False
    theirs.mu_bias = None
    x = torch.randn(4, 7)
    ours = torch.stack([box(x) for _ in range(3000)]).detach()
    found = torch.stack([theirs(x, return_kl=False) for _ in range(3000)]).detach()
    torch.testing.assert_close(ours.mean(0), found.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(ours.std(0), found.std(0), rtol=0.1, atol=1e-3)
    mean_kl = theirs.kl_div(theirs.mu_weight, F.softplus(theirs.rho_weight), theirs.prior_weight_mu, theirs.prior_weight_sigma)
    torch.testing.assert_close(box[0].kl(0.0, float(theirs.prior_weight_sigma.flatten()[0])) / 21, mean_kl, rtol=1e-4, atol=1e-6)
