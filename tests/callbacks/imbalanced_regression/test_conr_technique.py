"""ConR and FDS: pairs by hand, on modules that aren't ours, over ranks, precision, accumulation, resume; the losses and metrics."""

import json
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import (
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    fingerprint,
    kill_and_resume,
    run_two_processes,
    tiny_trainer,
)
from lit_methods import MLP, ImbalancedRegression, ShotMetrics
from lit_methods.callbacks import FDS, ConR, ExactResume
from lit_methods.callbacks.batch import find_in_batch
from lit_methods.callbacks.imbalanced_regression.conr.core import conr_dense_loss, conr_loss
from lit_methods.callbacks.imbalanced_regression.fds.core import Buckets, Moments, moments, pooled
from lit_methods.cli.main import main
from lit_methods.datamodules import BarsDataModule
from lit_methods.tasks.imbalanced_regression.losses import regression_loss
from lit_methods.tasks.imbalanced_regression.metrics import label_counts, shot_metrics
from lit_methods.tasks.imbalanced_regression.weights import label_weights, smoothing_kernel

TINY = {"num_train": 48, "num_val": 61, "batch_size": 8, "views": 2}
VIEWS = ["view_1", "view_2"]


def batch_of(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 6, (rows,), generator=generator).double()
    guesses = torch.randint(0, 4, (rows,), generator=generator).double()
    return (part.to(dtype) for part in (features, targets, guesses, 0.5 + torch.rand(rows, generator=generator, dtype=torch.float64)))


def by_hand(z, y, guess, s, window, t, eta, strict):
    """Anchor by anchor."""
    unit, losses = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        similarity = [float(unit[i] @ unit[j]) / t for j in range(len(z))]
        near = [j != i and abs(float(y[i] - y[j])) <= window for j in range(len(z))]
        far = [abs(float(y[i] - y[j])) > window and abs(float(guess[i] - guess[j])) <= window for j in range(len(z))]
        if not any(near) or not any(far):
            losses.append(0.0)
            continue
        below = sum(math.exp(similarity[j]) for j in range(len(z)) if near[j]) + (0 if strict else len(z) - sum(near))
        below += sum(float(s[i]) * math.exp(eta * abs(float(y[i] - y[j])) + similarity[j]) for j in range(len(z)) if far[j])
        own = [math.log(below) - similarity[j] for j in range(len(z)) if near[j]]
        losses.append(float(s[i]) * sum(own) / len(own))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_pulls_near_labels_and_pushes_confusions(dtype, strict):
    z, y, guess, s = batch_of(14, dtype)
    found = conr_loss(z, y, guess, s, 1.0, 0.2, 0.05, strict)
    assert found.loss.dtype == dtype
    assert float(found.loss) == pytest.approx(by_hand(z, y, guess, s, 1.0, 0.2, 0.05, strict), rel=1e-5)
    assert float(found.loss) > 0


def test_an_anchor_without_a_partner_has_no_loss_and_a_finite_gradient():
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for strict in (False, True):
        found = conr_loss(z, torch.tensor([0.0, 10.0, 20.0]), torch.zeros(3), strict=strict)  # only negatives
        assert found.loss == 0
        assert found.negatives.tolist() == [2, 2, 2]
        assert torch.autograd.grad(found.loss, z)[0].eq(0).all()
    mixed = conr_loss(z, torch.tensor([0.0, 0.5, 20.0]), torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.autograd.grad(mixed.loss, z)[0].isfinite().all()


def test_large_similarities_stay_finite_and_half_precision_is_widened():
    z, y, guess, _ = batch_of(16, torch.float32)
    sharp = conr_loss(z, y, guess, temperature=1e-3)
    assert sharp.loss.isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert conr_loss(z, y, guess).loss == conr_loss(z, y, guess).loss.float()
    assert conr_loss(z.bfloat16(), y, guess).loss.dtype == torch.float32


def test_dense_targets_count_by_their_means():
    generator = torch.Generator().manual_seed(1)
    z, y = torch.randn(6, 2, 3, 3, generator=generator), torch.rand(6, 1, 4, 4, generator=generator)
    guess, s = y.flip(0), torch.rand(6, 1, 4, 4, generator=generator)
    found = conr_dense_loss(z, y, guess, s, 0.02)
    means = [part.mean((1, 2, 3)) for part in (y, guess, s)]
    assert found.loss == conr_dense_loss(z.flatten(1), *means, 0.02).loss
    assert found.loss.isfinite()


# ---- FDS -------------------------------------------------------------------------------------------------------------------------------


def test_moments_of_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(50, 3, generator=generator), torch.randint(0, 9, (50,), generator=generator)
    buckets = Buckets(2, 6)
    places = buckets.places(labels.float())
    parts = [moments(features[k::3], places[k::3], 7) for k in range(3)]
    count, mean, variance = pooled(parts[0] + parts[1] + parts[2])
    inside = labels.clamp(2, 6)  # both end labels occur
    for row in range(5):
        own = features[inside == row + 2].double()
        assert count[row] == len(own)
        torch.testing.assert_close(mean[row], own.mean(0))
        torch.testing.assert_close(variance[row], own.var(0))
    without = labels != 2  # now the lower end does not occur: what lies below it is left out
    count, _, _ = pooled(moments(features[without], places[without], 7))
    assert count[0] == 0
    empty = Moments(torch.zeros(7).double(), torch.zeros(7, 3).double(), torch.zeros(7, 3).double())
    torch.testing.assert_close((empty + parts[0]).mean, parts[0].mean)


def regression(**kwargs):
    torch.manual_seed(1)
    return ImbalancedRegression(MLP([144, 8]), nn.Linear(8, 1), **kwargs)


def fit(callbacks, data=None, **kwargs):
    pl.seed_everything(0, verbose=False)
    module = regression()
    trainer = tiny_trainer(callbacks=callbacks, **{"max_steps": 6, "limit_val_batches": 0, **kwargs})
    trainer.fit(module, data or BarsDataModule(**TINY))
    return cloned_state(module), trainer


def test_fds_calibrates_training_only_from_its_second_update_on():
    def losses(*callbacks):
        seen = []

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, *_):
                seen.append(float(outputs["loss"]))

        state, trainer = fit([*callbacks, Keep()], max_steps=24)
        return seen, state, trainer

    plain, _, _ = losses()
    smoothed, _, trainer = losses(fds := FDS(last_bucket=60))
    # epoch 1 has statistics of mean 0 and variance 1 still, which change a feature by rounding alone
    assert smoothed[:6] == plain[:6]
    assert smoothed[6:12] == pytest.approx(plain[6:12], rel=1e-4)
    assert all(abs(a - b) > 1e-4 for a, b in zip(smoothed[13:], plain[13:], strict=True))
    assert fds.statistics.mean.shape == (61, 8)
    module = trainer.lightning_module
    rows = torch.randn(4, 1, 12, 12)
    torch.testing.assert_close(module(rows), module.regressor(module.backbone(rows)))
    assert not module.backbone._forward_hooks


def test_fds_takes_a_pass_over_every_training_sample():
    _, trainer = fit([fds := FDS(last_bucket=60)])
    module, data = trainer.lightning_module, trainer.datamodule
    everything = data.train_set.__getitems__([(0, index) for index in range(48)])
    with torch.no_grad():
        features = module.backbone(everything["image"])
    found = pooled(moments(features, fds.buckets.places(everything["target"]), 63))
    seen = found[0] > 0
    torch.testing.assert_close(fds.statistics.mean[seen], found[1][seen].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fds.statistics.variance[seen], found[2][seen].float(), rtol=1e-4, atol=1e-6)


def test_fds_collects_every_second_sample_and_rounds_labels_up_to_their_bucket():
    _, trainer = fit([fds := FDS(last_bucket=60, collect_every=2)])
    module, data = trainer.lightning_module, trainer.datamodule
    half = data.train_set.__getitems__([(0, index) for index in range(0, 48, 2)])
    with torch.no_grad():
        found = pooled(moments(module.backbone(half["image"]), fds.buckets.places(half["target"]), 63))
    seen = found[0] > 0
    torch.testing.assert_close(fds.statistics.mean[seen], found[1][seen].float(), rtol=1e-5, atol=1e-6)
    tenths = FDS(last_bucket=49, bucket_width=0.1)
    edges = torch.arange(50) / 10  # 0.7 / 0.1 is below 7 in float32
    _, labels = tenths._rows(torch.zeros(50, 2), {"target": edges})
    assert tenths.buckets.places(labels).tolist() == list(range(1, 51))


# ---- resume, ranks, precision, accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [3, 14])
def test_a_killed_run_ends_like_an_uninterrupted_one(kill_at, tmp_path):
    def build():
        return regression(), BarsDataModule(**TINY, reweight="sqrt_inv", lds=True), [FDS(last_bucket=60), ConR(views=VIEWS), ExactResume()]

    whole, resumed = kill_and_resume(build, 20, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def both(**kwargs):
    return [FDS(last_bucket=60), ConR(views=VIEWS, gather_ranks=True)], kwargs


def two_ranks():
    callbacks, _ = both()
    return fit(callbacks, BarsDataModule(**TINY), max_steps=9, devices=2, strategy="ddp")[0]


def test_two_processes_equal_one_at_the_same_global_batch():
    first, second = run_two_processes(two_ranks)
    assert_state_dicts_equal(second, first)
    callbacks, _ = both()
    whole, _ = fit(callbacks, BarsDataModule(**{**TINY, "batch_size": 16}), max_steps=9)
    assert_state_dicts_equal(first, whole, atol=2e-5)


def test_bf16_trains():
    state, trainer = fit([FDS(last_bucket=60), ConR(views=VIEWS)], max_steps=14, precision="bf16-mixed")
    assert all(value.isfinite().all() for value in state.values())
    assert trainer.callback_metrics["conr/loss"].dtype == torch.float32


def test_accumulation_is_the_mean_over_micro_batches():
    seen = []

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    data = BarsDataModule(**TINY)
    fit([ConR(views=VIEWS, weight=2.0), Keep()], data, max_steps=1, accumulate_grad_batches=2)
    module, loader = regression(), iter(data.train_dataloader())
    for _ in range(2):
        batch = next(loader)
        views = torch.cat([batch["view_1"], batch["view_2"]])
        z = module.backbone(views)
        contrast = conr_loss(z, batch["target"].repeat(2), module.regressor(z)).loss
        ((regression_loss(module(batch["image"])[:, 0], batch["target"]) + 2 * contrast) / 2).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(seen[0][name], parameter.grad, rtol=1e-5, atol=1e-7)


# ---- modules that aren't ours ----------------------------------------------------------------------------------------------------------


class Stranger(pl.LightningModule):
    """Knows nothing of this package. Samples: (rows of 6 numbers, a number)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.body(x))[:, 0]

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OfflineTransformer(LightningTransformer):
    def prepare_data(self) -> None:
        """The demo would download its text here."""


def numbers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1).round()), batch_size=12)


class Photographs(Stranger):
    """A network that a dependency ships, with one output. Samples: (images, a number)."""

    def __init__(self):
        import timm

        super().__init__()
        torch.manual_seed(2)
        self.network = timm.create_model("resnet10t", in_chans=1, num_classes=1)

    def forward(self, x):
        return self.network(x)[:, 0]


def photographs():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(8, 1, 32, 32, generator=generator), torch.arange(8) % 3 * 1.0), batch_size=8)


def words():
    tokens = torch.arange(16)[:, None] % 8
    return DataLoader(TensorDataset(tokens, tokens.flip(0)), batch_size=8)


WIDE = {"window": 1.0, "temperature": 0.5}
STRANGERS = {
    "conr": (Stranger, numbers, lambda weight: ConR("body", "head", weight=weight, **WIDE)),
    "fds": (Stranger, numbers, lambda weight: FDS("body", first_bucket=0, last_bucket=5, start_smooth=1) if weight else pl.Callback()),
    "timm": (lambda: Photographs(), photographs, lambda weight: ConR("network.global_pool", "network.fc", weight=weight, **WIDE)),
    "shipped by Lightning": (
        lambda: OfflineTransformer(vocab_size=8),
        words,
        lambda weight: ConR("model.transformer", "model.decoder", weight=weight, **WIDE, variant="dense"),
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_module_learns_from_it_and_is_left_as_it_was(name):
    build, data, callback = STRANGERS[name]

    def run(*callbacks):
        pl.seed_everything(0, verbose=False)
        module = build()
        tiny_trainer(max_epochs=4, limit_val_batches=0, callbacks=[*callbacks]).fit(module, data())
        return cloned_state(module), fingerprint(module)

    (plain, after), (changed, after_term), (silent, after_silent) = run(), run(callback(1.0)), run(callback(0.0))
    assert after_term == after_silent == after
    assert_state_dicts_equal(silent, plain)
    assert any(not torch.equal(changed[key], value) for key, value in plain.items())


YAML = """
seed_everything: 0
model: {class_path: strange_regression.StrangeRegression}
data: {class_path: BarsDataModule, init_args: {num_train: 32, num_val: 61, views: 2, batch_size: 16}}
trainer:
  max_epochs: 3
  limit_val_batches: 0
  log_every_n_steps: 1
  callbacks+:
    - class_path: FDS
      init_args: {features: body, last_bucket: 60}
    - class_path: ConR
      init_args: {features: body, predictions: head, views: [view_1, view_2], weight: WEIGHT}
"""
MODULE = """
import torch
from lightning.pytorch import LightningModule
from torch import nn


class StrangeRegression(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 8)), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x))[:, 0]

    def training_step(self, batch, batch_idx):
        return nn.functional.l1_loss(self(batch["image"]), batch["target"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
"""


def test_a_strangers_module_takes_both_from_yaml(tmp_path, monkeypatch):
    (tmp_path / "strange_regression.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    weights = []
    for weight in ("0.0", "4.0"):
        file = tmp_path / f"{weight}.yaml"
        file.write_text(YAML.replace("WEIGHT", weight))
        assert main(["fit", "--config", str(file), "--run_root", str(tmp_path / weight), "--trainer.accelerator", "cpu"]) == 0
        (run,) = (tmp_path / weight).glob("*/*")
        logged = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any(record.get("conr/positives", 0) >= 1 for record in logged)  # the other view of a sample
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        (statistics,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("FDS")]
        assert statistics["mean"].shape == (61, 8)
        weights.append(checkpoint["state_dict"])
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_is_missing_is_said():
    def run(callback, module=None, data=None):
        tiny_trainer(max_steps=1, limit_val_batches=0, callbacks=[callback]).fit(module or Stranger(), data or numbers())

    for callback, problem in (
        (ConR("torso", "head"), "torso"),
        (ConR("body*", "head"), "matches 3 submodules"),
        (ConR("body", "head", labels="age"), "labels"),
        (ConR("body", "head", weights=2), "weights"),
        (ConR("body", "head", views=["view_1"]), "views"),
        (FDS("body*"), "matches 3 submodules"),
        (FDS("body", labels=2), "labels"),
    ):
        with pytest.raises(ValueError, match=problem):
            run(callback)
    silent = type("Silent", (Stranger,), {"forward": pl.LightningModule.forward})
    for callback in (ConR("body", "head", views=[0]), FDS("body")):
        with pytest.raises(TypeError, match="forward"):
            run(callback, silent())
    with pytest.raises(ValueError, match="calls backward itself"):
        run(ConR("network.0", "network.7"), TwoOptimisers())
    with pytest.raises(ValueError, match="must come after"):
        FDS(start_update=1, start_smooth=1)
    with pytest.raises(ValueError, match="range of ratios"):
        FDS(clip=(2.0, 0.5))
    with pytest.raises(ValueError, match="no 'tokens'"):
        regression(inputs="tokens").training_step({"image": torch.zeros(1, 144), "target": torch.zeros(1)}, 0)
    with pytest.raises(ValueError, match=r"has no \['a', 'b'\], it has the keys \['target'\]: name the key .* by labels"):
        find_in_batch({"target": torch.zeros(1)}, ["a", "b"], ("target", 1), "labels")
    with pytest.raises(ValueError, match="'count'"):
        regression().validation_step({"image": torch.zeros(1, 144), "target": torch.zeros(1)}, 0)


# ---- losses, weights, metrics ----------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    guess, target = torch.tensor([1.0, 4.0, -2.0]), torch.tensor([0.0, 4.0, 1.0])
    error = torch.tensor([1.0, 0.0, 3.0])
    weights = torch.tensor([1.0, 2.0, 0.5])
    assert regression_loss(guess, target) == error.mean()
    assert regression_loss(guess, target, weights, "mse") == (error.square() * weights).mean()
    torch.testing.assert_close(regression_loss(guess, target, loss="focal_l1"), (error * (2 * (0.2 * error).sigmoid() - 1)).mean())
    torch.testing.assert_close(regression_loss(guess, target, loss="huber"), torch.tensor([0.5, 0.0, 2.5]).mean())
    logits = -(guess[:, None] - target[None]).square() / (2 * 0.5**2)
    balanced = -2 * 0.5**2 * logits.log_softmax(1).diagonal().mean()
    torch.testing.assert_close(regression_loss(guess, target, loss="balanced_mse", noise_sigma=0.5), balanced)
    with pytest.raises(ValueError, match="one shape"):
        regression_loss(guess[:, None], target)
    with pytest.raises(ValueError, match="takes no weights"):
        regression_loss(guess, target, weights, "balanced_mse")


def test_rare_labels_weigh_more_and_smoothing_spreads():
    labels = np.repeat([3, 4, 9], [90, 1, 9])
    plain = label_weights(labels, "sqrt_inv")
    assert plain.mean() == pytest.approx(1, rel=1e-6)
    assert plain[90] / plain[0] == pytest.approx(90**0.5, rel=1e-5)
    smoothed = label_weights(labels, "sqrt_inv", lds=True)
    assert smoothed[90] / smoothed[0] < 2  # 4 lies beside the frequent 3
    assert label_weights(labels, "none").tolist() == [1.0] * 100
    np.testing.assert_allclose(smoothing_kernel("triang", 5, 1.0), np.array([1, 2, 3, 2, 1]) / 3)
    with pytest.raises(ValueError, match="odd"):
        smoothing_kernel("gaussian", 4, 1.0)


def shots(rank):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (40,), generator=generator).float()
    guess = labels + torch.randn(40, generator=generator)
    return (
        guess[rank::2],
        labels[rank::2],
        label_counts(labels, torch.arange(5).repeat_interleave(torch.tensor([200, 120, 50, 19, 0])))[rank::2],
    )


def on_rank(metric):
    metric.update(*shots(torch.distributed.get_rank()))
    return metric.compute()


def test_metric_of_two_processes_equals_one():
    whole = [torch.cat(parts) for parts in zip(shots(0), shots(1), strict=True)]
    expected = shot_metrics(*whole)
    for found in run_two_processes(on_rank, ShotMetrics()):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
    error = (whole[0] - whole[1]).double().abs()[whole[2] < 20]
    torch.testing.assert_close(expected["low_gmean"], error.log().mean().exp())
    assert shot_metrics(torch.ones(1), torch.ones(1), torch.zeros(1))["low_gmean"] == 0
    assert shot_metrics(torch.ones(1), torch.ones(1), torch.zeros(1))["many_l1"].isnan()
