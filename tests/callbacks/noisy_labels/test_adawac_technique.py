"""AdaWAC: its weights, on modules that aren't ours, over ranks, precision, accumulation, resume."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from helpers import (
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    fingerprint,
    kill_and_resume,
    run_two_processes,
    tiny_trainer,
)
from lit_methods import ImageSegmentor, SmallUNet2d
from lit_methods.callbacks import AdaWAC, ExactResume, LossTerm
from lit_methods.callbacks.noisy_labels.adawac.core import MODES, SINGLE_VIEW, adawac_loss, normalised_weights, update_sample_weights
from lit_methods.datamodules import OrganSlicesDataModule
from lit_methods.datamodules.loaders import make_loader
from lit_methods.tasks.segmentation.core import batch_dice, has_foreground, sample_cross_entropy

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_ascend_and_never_overflow(dtype):
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5], [0.3, 0.7]], dtype=dtype)
    ce, ac = torch.tensor([1.0, 0.2, 80.0, 1e4, float("nan")], dtype=dtype), torch.tensor([0.5, 2.0, 0.0, 0.0, 0.1], dtype=dtype)
    found = update_sample_weights(weights, ce, ac, 2.0)
    assert found.dtype == dtype
    ratio = weights[:2] * torch.stack([ce, ac], dim=1)[:2].mul(2.0).exp()
    torch.testing.assert_close(found[:2], ratio / ratio.sum(1, keepdim=True))
    assert found[2, 0] > 0.99, "a weight that had reached 0 comes back"
    assert found[3].tolist() == [1.0, 0.0]
    torch.testing.assert_close(found[4], weights[4], msg="a loss that isn't a number leaves the row")


def test_one_weight_a_sample_sums_to_one_over_the_batch():
    w, ce = torch.tensor([0.2, 0.5, 0.5]), torch.tensor([1.0, 2.0, 0.3])
    by_hand = w ** (1 - 1.5 * 0.1) * (1.5 * ce).exp()
    torch.testing.assert_close(normalised_weights(w, ce, 1.5, 0.1), by_hand / by_hand.sum())


def random_views(size=4, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(size, classes, 5, 6, generator=generator).to(dtype) for _ in range(2)]
    latents = [torch.randn(size, 2, 3, 3, generator=generator).to(dtype) for _ in range(2)]
    labels = [torch.randint(0, classes, (size, 5, 6), generator=generator) for _ in range(2)]
    labels[0][0] = 0
    return tuple(logits), tuple(labels), tuple(latents), torch.full((size, 2), 0.5, dtype=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 4])
def test_every_mode_with_any_batch(mode, size):
    found = adawac_loss(*random_views(size), mode)
    assert found.loss.isfinite()
    assert found.ce.shape == found.dice.shape == found.consistency.shape == (size,)
    if mode == "trim-train" and size == 1:
        assert found.kept == 0
        assert found.loss == 0, "nobody is kept"


def test_ignored_pixels_change_nothing():
    logits, labels, *_ = random_views()
    ignored = labels[0].clone()
    ignored[:, :2] = 255
    other = logits[0].clone()
    other[:, :, :2] += 3
    for of in (sample_cross_entropy, batch_dice):
        torch.testing.assert_close(of(logits[0], ignored, 255), of(other, ignored, 255))
    torch.testing.assert_close(sample_cross_entropy(logits[0], ignored, 255), sample_cross_entropy(logits[0][:, :, 2:], labels[0][:, 2:]))
    assert sample_cross_entropy(logits[0], torch.full_like(labels[0], 255), 255).tolist() == [0.0] * 4
    assert has_foreground(torch.tensor([[0, 255], [0, 1]]), 255).tolist() == [False, True]


def test_mixed_precision_computes_in_float32():
    logits, labels, latents, weights = random_views()
    plain = adawac_loss(logits, labels, latents, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert adawac_loss(logits, labels, latents, weights).loss == plain.loss


# ---- modules that aren't ours ----------------------------------------------------------------------------------------------------------


class Stranger(pl.LightningModule):
    """A segmentation module with other names, whose batch is a tuple and whose step returns a dict."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = network or nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))

    def training_step(self, batch, batch_idx):
        output = self.body(batch[0])
        logits = output["out"] if isinstance(output, dict) else output
        return {"loss": F.cross_entropy(logits, batch[1])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Pairs(Dataset):
    """(view, labels, second view, its labels, index)."""

    def __init__(self, size: int = 12, channels: int = 1, side: int = 8) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(size, channels, side, side, generator=generator)
        self.labels = (self.images[:, 0] > 0.7).long() + (self.images[:, 0] > 1.4).long()
        self.labels[: size // 2] = 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image, label = self.images[index], self.labels[index]
        return image, label, image.flip(-1), label.flip(-1), index


KEYS = {"images": [0, 2], "labels": [1, 3], "index": 4}


def pairs(batch_size=4, **kwargs):
    return make_loader(Pairs(**kwargs), batch_size, shuffle=True, seed=1, drop_last=True, with_epoch=False)


def test_a_strangers_module_learns_by_the_weights_and_is_left_as_it_was():
    def run(*callbacks):
        pl.seed_everything(0, verbose=False)
        module = Stranger()
        trainer = tiny_trainer(max_epochs=2, callbacks=[*callbacks])
        trainer.fit(module, pairs())
        return cloned_state(module), fingerprint(module), trainer

    plain, after, _ = run()
    callback = AdaWAC("body", "body.2", **KEYS, rate=2.0, dice_ratio=0.0)
    changed, after_term, trainer = run(callback)
    assert after_term == after
    assert any(not torch.equal(changed[name], value) for name, value in plain.items())
    rows = callback.table.rows
    assert rows.shape == (12, 2)
    torch.testing.assert_close(rows.sum(1), torch.ones(12))
    assert len(rows[:, 0].unique()) == 12, "every sample has a weight of its own"
    dense = Pairs().labels.flatten(1).any(1)
    assert dense.sum() == 6
    metrics = {name.partition("/")[2]: value for name, value in trainer.callback_metrics.items()}
    torch.testing.assert_close(metrics["weight_dense"], rows[dense, 0].mean())
    torch.testing.assert_close(metrics["weight_gap"], rows[dense, 0].mean() - rows[~dense, 0].mean())
    assert metrics["ce_dense"] != metrics["ce_sparse"]
    media = callback.dashboard_media()
    assert sum(media["adawac/weights_dense"].counts) == sum(media["adawac/weights_sparse"].counts) == 6


def test_torchvisions_segmentation_network():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    module = Stranger(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))
    callback = AdaWAC("body", "body.backbone.16", **KEYS)
    trainer = tiny_trainer(max_steps=1, callbacks=[callback])
    trainer.fit(module, pairs(channels=3, side=32))
    assert trainer.callback_metrics["adawac/consistency"] > 0


def test_the_module_runs_once_for_each_view():
    seen = []
    for mode in ("adawac", "base"):
        module = Stranger()
        calls = []
        module.body.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tiny_trainer(max_steps=1, callbacks=[AdaWAC("body", "body.2", **KEYS, mode=mode)]).fit(module, pairs())
        seen.append(len(calls))
    assert seen == [2, 1]


def test_the_baseline_base_is_cross_entropy_and_dice():
    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([p.grad.clone() for p in pl_module.parameters()])

    seen: list[list[torch.Tensor]] = []
    module = Stranger()
    tiny_trainer(max_steps=1, callbacks=[AdaWAC("body", **KEYS, mode="base", dice_ratio=0.3), Keep()]).fit(module, pairs())
    fresh, batch = Stranger(), next(iter(pairs()))
    logits = fresh.body(batch[0])
    (0.7 * F.cross_entropy(logits, batch[1]) + 0.3 * batch_dice(logits, batch[1])).backward()
    for found, parameter in zip(seen[0], fresh.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-7)


def test_what_is_missing_is_said():
    for kwargs, problem in (
        ({"network": "nothing", **KEYS}, "no submodule of Stranger"),
        ({"network": "body", "features": "body.9", **KEYS}, "body.9"),
        ({"network": "body", "features": "body.2"}, "AdaWAC needs the labels of each view"),
        ({"network": "body", "features": "body.2", **KEYS, "index": 7}, "data set's index"),
        ({"network": "body", "features": "body.2", **KEYS, "images": [0, 9]}, "second augmented view"),
        ({"network": "body", "features": "body.2", **KEYS, "num_samples": 3}, "training set"),
    ):
        with pytest.raises(ValueError, match=problem):
            tiny_trainer(max_steps=3, callbacks=[AdaWAC(**kwargs)]).fit(Stranger(), pairs())
    with pytest.raises(ValueError, match="calls backward itself"):
        tiny_trainer(max_steps=1, callbacks=[AdaWAC("network", "network.0", **KEYS)]).fit(TwoOptimisers(), pairs())
    with pytest.raises(ValueError, match="mode"):
        AdaWAC(mode="adawak")


def test_another_term_must_come_after():
    class Extra(LossTerm):
        def term(self, inputs):
            return sum(p.square().sum() for p in inputs["module"].parameters())

    with pytest.raises(ValueError, match="AdaWAC must be set up before Extra"):
        tiny_trainer(max_steps=1, callbacks=[Extra(), AdaWAC("body", "body.2", **KEYS)]).fit(Stranger(), pairs())

    def run(*more):
        module = Stranger()
        tiny_trainer(max_steps=2, callbacks=[AdaWAC("body", "body.2", **KEYS), *more]).fit(module, pairs())
        return cloned_state(module)

    plain, added = run(), run(Extra())
    assert any(not torch.equal(added[name], value) for name, value in plain.items())


# ---- the recipe ------------------------------------------------------------------------------------------------------------------------


def recipe():
    torch.manual_seed(1)
    return ImageSegmentor(SmallUNet2d(widths=(4, 8)))


def data(**kwargs):
    return OrganSlicesDataModule(**{"num_train": 1, "num_val": 1, "batch_size": 4, **kwargs})


def fit(callback, datamodule, **kwargs):
    pl.seed_everything(0, verbose=False)
    module = recipe()
    trainer = tiny_trainer(callbacks=[callback], **{"max_steps": 4, "limit_val_batches": 0, **kwargs})
    trainer.fit(module, datamodule)
    return cloned_state(module), trainer


@pytest.mark.parametrize("mode", ["adawac", "pm-dro"])
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, mode):
    callbacks = []

    def build():
        callbacks.append(AdaWAC(mode=mode, rate=2.0))
        return recipe(), data(), [callbacks[-1], ExactResume()]

    whole, resumed = kill_and_resume(build, 7, 5, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)
    assert torch.equal(callbacks[0].table.rows, callbacks[2].table.rows)
    assert torch.equal(callbacks[0].groups.rows, callbacks[2].groups.rows)
    assert not torch.equal(callbacks[0].table.rows, torch.full((16, 2), 0.5))


def two_ranks():
    callback = AdaWAC(rate=2.0)
    state, trainer = fit(callback, data(batch_size=2), devices=2, strategy="ddp")
    return state, callback.table.rows, {name: float(value) for name, value in trainer.callback_metrics.items() if "weight" in name}


def test_two_processes_equal_one_that_accumulates():
    (state, rows, logs), (other, other_rows, other_logs) = run_two_processes(two_ranks)
    assert_state_dicts_equal({n: v for n, v in other.items() if "running" not in n}, {n: v for n, v in state.items() if "running" not in n})
    assert torch.equal(rows, other_rows)
    assert logs == other_logs
    callback = AdaWAC(rate=2.0)

    class OneAfterTheOther(OrganSlicesDataModule):
        def train_dataloader(self):
            return make_loader(self.train_set, 2, shuffle=True, seed=0, drop_last=True)

    whole, trainer = fit(callback, OneAfterTheOther(num_train=1, num_val=1), accumulate_grad_batches=2)
    torch.testing.assert_close(rows, callback.table.rows, rtol=0, atol=1e-5)
    learned = {name: value for name, value in whole.items() if "running" not in name and "num_batches" not in name}
    assert_state_dicts_equal({name: state[name] for name in learned}, learned, atol=1e-4)
    assert logs == pytest.approx({name: float(trainer.callback_metrics[name]) for name in logs}, abs=1e-4)


def test_bf16_trains():
    callback = AdaWAC()
    state, _ = fit(callback, data(), precision="bf16-mixed")
    assert all(value.isfinite().all() for value in state.values())
    assert callback.table.rows.dtype == torch.float32


def test_single_view_modes_need_no_second_view():
    assert set(SINGLE_VIEW) == {"base", "reweight-only", "pm-dro"}
    _, trainer = fit(AdaWAC(mode="base"), data(views=1))
    assert trainer.callback_metrics["adawac/ce"] > 0
    with pytest.raises(ValueError, match="labels"):
        fit(AdaWAC(mode="pair"), data(views=1))
