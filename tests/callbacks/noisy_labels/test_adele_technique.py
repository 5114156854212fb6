"""ADELE and its consistency over scales: the rules, modules that aren't ours, ranks, precision, workers, resume."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from helpers import assert_state_dicts_equal, cloned_state, fingerprint, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import ImageSegmentor, LabelStore, SmallUNet2d
from lit_methods.callbacks import ADELE, ExactResume, MultiScaleConsistency
from lit_methods.callbacks.noisy_labels.adele.core import corrected_labels, fit_iou_curve, merged_labels, multiscale_consistency
from lit_methods.datamodules import NoisyMasksDataModule
from lit_methods.datamodules.loaders import make_loader
from lit_methods.tasks.segmentation.core import class_counts, class_iou

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_iou_of_absent_and_ignored():
    labels, prediction = torch.tensor([[0, 1, 255], [1, 1, 0]]), torch.tensor([[0, 1, 1], [0, 1, 2]])
    found = class_iou(prediction, labels, 4)
    assert found.tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert class_counts(prediction, labels, 4).tolist() == [[1, 2, 0, 0], [2, 2, 1, 0], [2, 3, 0, 0]]


def test_histories_that_say_nothing_give_no_curve():
    for history in ([], [0.3, 0.4], [0.0] * 8, [0.1, float("nan"), 0.3, 0.4]):
        assert fit_iou_curve(history, 1, 1) is None


def test_the_sooner_the_growth_ends_the_sooner_the_epoch():
    x = np.linspace(0, 12, 24)
    fast, slow = (fit_iou_curve(0.8 * (1 - np.exp(-x / c)), 50, 100) for c in (0.7, 4.0))
    assert 1 < fast.update_epoch < slow.update_epoch
    assert fast.a == pytest.approx(0.8, abs=1e-3)
    flat = np.concatenate([np.full(6, 0.05), 0.05 + 0.7 * (1 - np.exp(-np.arange(1, 15) / 1.0))])
    skipped = fit_iou_curve(flat, 1, 1, skip_flat_start=True)
    assert skipped.update_epoch == fit_iou_curve(flat[5:], 1, 1).update_epoch + 5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_batch_of_images_is_corrected_like_each_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (6, 9, 10), generator=generator)
    labels[0], labels[1, :3], labels[2] = 0, 255, 255
    prediction, confidence = torch.randint(0, 4, labels.shape, generator=generator), torch.rand(labels.shape, generator=generator)
    together = corrected_labels(labels.to(dtype), prediction, confidence, [0, 2], 0.3)
    assert together.dtype == dtype
    alone = torch.stack([corrected_labels(*one, [2], 0.3) for one in zip(labels, prediction, confidence, strict=True)])
    assert torch.equal(together.long(), alone)
    assert (together != labels).any()
    changed = together[1:].long()[together[1:] != labels[1:]]
    assert set(changed.tolist()) <= {0, 2}, "only background and the class that is corrected"


def test_a_collapse_to_background_is_refused():
    labels = torch.zeros(20, 20, dtype=torch.int64)
    labels[:5, :5] = 1
    background, sure = torch.zeros_like(labels), torch.ones(20, 20)
    assert torch.equal(corrected_labels(labels, background, sure, [1]), labels)
    labels[:10] = 1
    nearly = background.clone()
    nearly[:2] = 1  # fewer than half are left, and 90 % would be background: that is allowed
    assert torch.equal(corrected_labels(labels, nearly, sure, [1]), nearly)


def test_merging_needs_confidence_and_a_class_of_the_slice():
    labels = torch.tensor([[0, 1], [2, 0]])
    p = torch.zeros(4, 2, 2)
    p[2, 0, 0] = p[0, 0, 1] = p[1, 1, 0] = p[3, 1, 1] = 1.0
    assert merged_labels(labels, p, torch.tensor([0, 1, 1, 1])).tolist() == [[2, 0], [1, 0]], "3 isn't in the slice"
    assert merged_labels(labels, p, torch.tensor([0, 1, 0, 0])).tolist() == [[0, 0], [2, 0]], "2 isn't corrected"
    assert torch.equal(merged_labels(labels, p * 0.5, torch.ones(4)), labels)
    batch = merged_labels(labels[None].repeat(2, 1, 1), p[None].repeat(2, 1, 1, 1), torch.tensor([0, 1, 1, 1]))
    assert batch[1].tolist() == [[2, 0], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_finite_where_a_probability_is_zero(dtype):
    logits = [torch.tensor([[[[300.0]], [[-300.0]]]]).to(dtype).requires_grad_() for _ in range(3)]
    found = multiscale_consistency(logits, torch.tensor([[[0]]]), torch.ones(3, requires_grad=True))
    assert found.ce.dtype == torch.promote_types(dtype, torch.float32)
    grads = torch.autograd.grad(found.ce + found.consistency, logits)
    assert all(grad.isfinite().all() for grad in grads)


def test_one_class_an_image_is_a_map_of_one_pixel():
    generator = torch.Generator().manual_seed(1)
    logits, labels = [4 * torch.randn(5, 3, generator=generator) for _ in range(3)], torch.tensor([0, 2, 255, 1, 0])
    found = multiscale_consistency(logits, labels, threshold=0.7)
    pixels = multiscale_consistency([one[:, :, None, None] for one in logits], labels[:, None, None], threshold=0.7)
    assert 0 < int(found.confident.sum()) < 5
    for one, other in zip(found, pixels, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=0, atol=0)


def test_ignored_pixels_of_the_consistency():
    torch.manual_seed(0)
    logits, labels = [4 * torch.randn(2, 3, 4, 4) for _ in range(3)], torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0], labels[1, :2] = 255, 255
    plain, masked = (multiscale_consistency(logits, labels, threshold=0.1, mask_ignored=mask) for mask in (False, True))
    assert plain.confident.tolist() == [False, True], "an image without a labelled pixel doesn't count"
    assert 0 < masked.consistency < plain.consistency
    equal = multiscale_consistency([logits[0]] * 3, labels, threshold=0.1)
    assert equal.consistency < plain.consistency


# ---- modules that aren't ours ----------------------------------------------------------------------------------------------------------


class Stranger(pl.LightningModule):
    """Another module's names; samples are tuples (image, label, original label, index)."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = network or nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def training_step(self, batch, batch_idx):
        output = self.body(batch[0])
        return {"loss": F.cross_entropy(output["out"] if isinstance(output, dict) else output, batch[1])}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Stored(Dataset):
    """Images whose labels come out of a store."""

    def __init__(self, store, channels=1, whole=False):
        self.store, self.whole = store, whole
        truth, _ = scenes()
        self.images = (truth[:, None].float() + 0.1 * torch.randn(truth[:, None].shape, generator=torch.Generator().manual_seed(1))).repeat(
            1, channels, 1, 1
        )

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        if self.whole:
            return {"image": self.images[index], "index": index}
        now, first = (torch.from_numpy(part(index)).long() for part in (self.store.current, self.store.original))
        return self.images[index], now, first, index


def scenes():
    """Eight images with a square of class 1 or 2, and labels that miss a part of it."""
    truth = torch.zeros(8, 16, 16, dtype=torch.int64)
    for index in range(8):
        truth[index, 3:12, 2 + index % 3 : 12] = 1 + index % 2
    noisy = truth.clone()
    noisy[:, 9:] = 0
    return truth, noisy


def loader(store, **kwargs):
    return make_loader(Stored(store, **kwargs), 4, shuffle=True, seed=1, drop_last=True, with_epoch=False)


def whole_images(store, **kwargs):
    return make_loader(Stored(store, whole=True, **kwargs), 4, shuffle=False, seed=0, with_epoch=False)


def adele(labels, **kwargs):
    defaults = {
        "network": "body",
        "tracked": 2,
        "eval_interval": 1,
        "common_epoch": 14,
        "confidence": 0.5,
        "scales": (1.0,),
        "temperature": 1.0,
    }
    return ADELE(3, **{**defaults, "loader": whole_images(labels), "store": labels, **kwargs})


def test_a_strangers_labels_are_corrected_and_it_is_left_as_it_was(tmp_path):
    def run(*callbacks):
        pl.seed_everything(0, verbose=False)
        module = Stranger()
        trainer = tiny_trainer(max_epochs=18, callbacks=[*callbacks])
        trainer.fit(module, loader(store))
        return cloned_state(module), fingerprint(module), trainer

    truth, noisy = scenes()
    store = LabelStore.create(tmp_path / "labels", noisy.numpy())
    plain, after, _ = run()
    watched, after_watching, trainer = run(adele(store, correct=False))
    assert_state_dicts_equal(watched, plain)
    assert after_watching == after
    assert store.changed() == []
    assert "adele/iou/1" in trainer.callback_metrics
    changed, after_correction, trainer = run(adele(store))
    assert after_correction == after
    assert trainer.callback_metrics["adele/corrected"] > 0
    assert any(not torch.equal(changed[name], value) for name, value in plain.items()), "the corrected labels are learned from"
    now = torch.from_numpy(np.stack([store.current(i) for i in range(8)])).long()
    assert class_iou(now, truth, 3)[1:].mean() > class_iou(noisy, truth, 3)[1:].mean() + 0.1, "the missing part is found again"
    run(adele(store, correct=False))
    assert store.changed() == [], "a fresh run starts from the annotations"


def test_torchvisions_network_with_both_callbacks(tmp_path):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    store = LabelStore.create(tmp_path / "labels", scenes()[1].numpy())
    torch.manual_seed(0)
    module = Stranger(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))
    callbacks = [
        MultiScaleConsistency("body", scales=(1.5,), threshold=0.0),
        adele(store, common_epoch=1, confidence=0.0, loader=whole_images(store, channels=3)),
    ]
    trainer = tiny_trainer(max_epochs=1, limit_train_batches=1, callbacks=callbacks)
    trainer.fit(module, loader(store, channels=3))
    assert trainer.callback_metrics["multi_scale_consistency/consistency"] > 0
    assert trainer.callback_metrics["adele/triggered"] == 2


def test_what_is_missing_is_said(tmp_path):
    store = LabelStore.create(tmp_path / "labels", scenes()[1].numpy())
    for kwargs, problem in (
        ({"network": "nothing"}, "no submodule of Stranger"),
        ({"store": None}, "LabelStore.create"),
        ({"loader": None}, "correction_dataloader"),
        ({"tracked": "label_original"}, "original annotations"),
        ({"loader": loader(store), "common_epoch": 1}, "'image' and 'index'"),
    ):
        with pytest.raises(ValueError, match=problem):
            tiny_trainer(max_epochs=1, callbacks=[adele(store, **kwargs)]).fit(Stranger(), loader(store))
    with pytest.raises(ValueError, match="MultiScaleConsistency"):
        tiny_trainer(max_epochs=1, callbacks=[MultiScaleConsistency("nothing")]).fit(Stranger(), loader(store))
    with pytest.raises(ValueError, match="rule"):
        ADELE(3, rule="voc")


def test_the_consistency_replaces_the_loss_and_moves_its_weights():
    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([p.grad.clone() for p in pl_module.parameters()])

    class Plain(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            truth, noisy = scenes()
            return truth[index][None].float(), noisy[index]

    seen = []
    data = make_loader(Plain(), 2, shuffle=False, seed=0, with_epoch=False)
    callback = MultiScaleConsistency("body", threshold=0.0, momentum=0.0)
    tiny_trainer(max_steps=1, callbacks=[callback, Keep()], accumulate_grad_batches=2).fit(Stranger(), data)
    module, weights = Stranger(), torch.ones(3, requires_grad=True)
    for image, label in data:
        logits = [module.body(image)]
        for side in (11, 24):
            scaled = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=True)
            logits.append(F.interpolate(module.body(scaled), size=(16, 16), mode="bilinear", align_corners=True))
        found = multiscale_consistency(logits, label, weights, threshold=0.0)
        ((found.ce + found.consistency) / 2).backward()
    for mine, parameter in zip(seen[0], module.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(callback.scale_weights.detach(), 1 - 0.05 * weights.grad, rtol=1e-5, atol=1e-6)
    assert weights.grad.abs().sum() > 0


# ---- the recipe ------------------------------------------------------------------------------------------------------------------------


def recipe():
    torch.manual_seed(1)
    return ImageSegmentor(SmallUNet2d(widths=(4, 8)), dice_ratio=0.0, learning_rate=1e-2)


def data(folder, **kwargs):
    return NoisyMasksDataModule(**{"num_train": 8, "num_val": 2, "batch_size": 4, "labels_folder": folder, **kwargs})


def callbacks(**kwargs):
    defaults = {"eval_interval": 1, "common_epoch": 1, "confidence": 0.0, "temperature": 1.0, "scales": (1.0,), "flip_from_epoch": 1}
    return [MultiScaleConsistency(scales=(0.5,), threshold=0.0), ADELE(4, **{**defaults, **kwargs})]


def labels_of(store):
    return torch.from_numpy(np.stack([store.current(index) for index in range(len(store))]))


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    made = []

    def build():
        made.append((callbacks(), data(tmp_path / f"labels{len(made)}")))
        return recipe(), made[-1][1], [*made[-1][0], ExactResume()]

    whole, resumed = kill_and_resume(build, 6, 3, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)
    (first, one), _, (last, other) = made
    assert torch.equal(labels_of(one.label_store), labels_of(other.label_store))
    assert one.label_store.changed()
    assert first[1].history == last[1].history
    assert len(first[1].history) == 6
    assert torch.equal(first[0].scale_weights, last[0].scale_weights)


def two_ranks(folder):
    pl.seed_everything(0, verbose=False)
    module, both, datamodule = recipe(), callbacks(), data(folder, batch_size=2)
    trainer = tiny_trainer(callbacks=both, max_epochs=2, limit_val_batches=0, devices=2, strategy="ddp")
    trainer.fit(module, datamodule)
    return cloned_state(module), labels_of(datamodule.label_store), both[1].history, both[0].scale_weights.detach()


def test_two_processes_agree_and_equal_one_that_accumulates(tmp_path):
    (state, labels, history, weights), (other, *others) = run_two_processes(two_ranks, str(tmp_path / "two"))
    learned = [name for name, _ in recipe().named_parameters()]
    assert_state_dicts_equal({name: other[name] for name in learned}, {name: state[name] for name in learned})
    assert torch.equal(labels, others[0])
    assert history == others[1]
    assert torch.equal(weights, others[2])

    class OneAfterTheOther(NoisyMasksDataModule):
        def train_dataloader(self):
            return make_loader(self.train_set, 2, shuffle=True, seed=0, drop_last=True)

    pl.seed_everything(0, verbose=False)
    module, both = recipe(), callbacks(eval_interval=2, common_epoch=5)  # an entry for each step; no correction: running means differ
    trainer = tiny_trainer(callbacks=both, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(module, OneAfterTheOther(num_train=8, num_val=2, labels_folder=tmp_path / "one"))
    torch.testing.assert_close(torch.tensor(both[1].history), torch.tensor(history[: len(both[1].history)]), rtol=0, atol=1e-2)


def test_persistent_workers_learn_from_corrected_labels(tmp_path):
    def run(workers):
        pl.seed_everything(0, verbose=False)
        module, datamodule = recipe(), data(tmp_path / f"labels{workers}", num_workers=workers)
        tiny_trainer(callbacks=callbacks(), max_epochs=3, limit_val_batches=0).fit(module, datamodule)
        assert datamodule.label_store.changed()
        return cloned_state(module)

    assert_state_dicts_equal(run(1), run(0))


def test_bf16_trains(tmp_path):
    module, both = recipe(), callbacks()
    trainer = tiny_trainer(callbacks=both, max_epochs=1, limit_val_batches=0, precision="bf16-mixed")
    trainer.fit(module, data(tmp_path))
    assert all(value.isfinite().all() for value in cloned_state(module).values())
    assert both[0].scale_weights.dtype == torch.float32


def test_the_slices_rule_and_pictures(tmp_path):
    datamodule = data(tmp_path)
    both = callbacks(rule="slices", restart=False, background_confidence=0.0, eval_interval=None)
    trainer = tiny_trainer(callbacks=both, max_epochs=2, limit_val_batches=0)
    trainer.fit(recipe(), datamodule)
    media = both[1].dashboard_media()
    assert media["adele/corrections"].pixels.shape[0] == 4 * 32 * 3
    assert len(media["adele/classes"].rows) == 3
    assert 0 < trainer.callback_metrics["adele/label_iou_original"] < 1
    assert trainer.callback_metrics["adele/label_iou"] != trainer.callback_metrics["adele/label_iou_original"]
    assert len(both[1].history) == 2
