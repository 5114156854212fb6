"""Calibration, likelihood, attack and detection: against independent computations, and on modules that aren't ours."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from helpers import Classifier, Images, cloned_state, fingerprint, run_two_processes, tiny_trainer
from lit_methods.callbacks import Reliability
from lit_methods.callbacks.batch import inputs_and_labels
from lit_methods.callbacks.evaluation.reliability import calibration_error, detection_auroc, fast_gradient_sign, negative_log_likelihood


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_bin_by_bin(dtype, bins):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.cat([torch.rand(200, generator=generator, dtype=dtype), torch.tensor([0.0, 0.25, 1.0], dtype=dtype)])
    correct = torch.rand(203, generator=generator) < 0.6
    expected = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        inside |= (confidence == 0) if k == 0 else False
        if inside.any():
            expected += float(inside.sum()) / 203 * abs(float(correct[inside].double().mean() - confidence[inside].double().mean()))
    found = calibration_error(confidence, correct, bins)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert calibration_error(torch.empty(0), torch.empty(0)).isnan()


def test_a_bin_belongs_to_its_upper_edge():
    assert float(calibration_error(torch.tensor([0.5, 0.6]), torch.tensor([1.0, 0.0]), 2)) == pytest.approx((0.5 + 0.6) / 2)


def test_auroc_is_the_share_of_pairs_in_order():
    known, unknown = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([0.5, 0.6])
    pairs = [1.0 if k > u else 0.5 if k == u else 0.0 for k in known.tolist() for u in unknown.tolist()]
    assert float(detection_auroc(known, unknown)) == pytest.approx(sum(pairs) / 6)


def test_the_attack_goes_uphill_and_stays_among_pixels():
    images, gradient = torch.tensor([[0.0, 0.5, 1.0, 0.5]]), torch.tensor([[-3.0, 0.1, 2.0, 0.0]])
    assert fast_gradient_sign(images, gradient, 0.1, 0.0, 1.0).tolist() == [[0.0, pytest.approx(0.6), 1.0, 0.5]]
    by_channel = fast_gradient_sign(images, gradient, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor(-1.0), torch.tensor(2.0))
    assert by_channel.tolist() == [[pytest.approx(-0.1), pytest.approx(0.7), pytest.approx(1.3), 0.5]]


def test_likelihood_is_that_of_the_label():
    logits, labels = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([1, 2])
    expected = -logits.softmax(1)[torch.arange(2), labels].log()
    torch.testing.assert_close(negative_log_likelihood(logits, labels), expected)


class Strangers(pl.LightningDataModule):
    """Images of other statistics."""

    def val_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(99)
        return DataLoader([(3 * torch.randn(3, 8, 8, generator=generator), 0) for _ in range(10)], batch_size=4)


def reliability(**kwargs: Any) -> Reliability:
    arguments = {"logits": "network", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5], "fgsm_epsilon": 0.05, "unknown": Strangers()}
    return Reliability(**{**arguments, **kwargs})


def expected_values(module: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    module.eval()
    images = images.clone().requires_grad_()
    logits = module.network(images)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), images)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    pixels = images.detach() * std + mean
    moved = (pixels + 0.05 * gradient.sign()).minimum(torch.tensor(1.0)).maximum(torch.tensor(0.0))
    confidence, predicted = logits.detach().softmax(1).max(1)
    strangers = torch.cat([module.network(x).softmax(1).amax(1).detach() for x, _ in Strangers().val_dataloader()])
    return {
        "accuracy": float((predicted == labels).float().mean()),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": float(calibration_error(confidence, predicted == labels)),
        "fgsm_accuracy": float((module.network((moved - mean) / std).argmax(1) == labels).float().mean()),
        "ood_auroc": float(detection_auroc(confidence, strangers)),
    }


def pixels_only() -> Images:
    """Images that come from pixels in [0, 1]."""
    data = Images(24)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    data.images = (data.images.sigmoid() - mean) / std
    return data


def test_what_is_logged_equals_a_computation_by_hand_and_nothing_is_left_behind():
    module, data = Classifier(), pixels_only()
    before, callback = cloned_state(module), reliability()
    trainer = tiny_trainer(callbacks=[callback])
    trainer.validate(module, DataLoader(data, batch_size=7), verbose=False)
    found = {
        name.removeprefix("reliability/val_"): float(value) for name, value in trainer.callback_metrics.items() if "reliability" in name
    }
    assert found == pytest.approx(expected_values(module, data.images, data.labels), rel=1e-5, abs=1e-6)
    plain = Classifier()
    tiny_trainer().validate(plain, DataLoader(data, batch_size=7), verbose=False)
    assert fingerprint(module) == fingerprint(plain)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_every_nth_epoch_and_no_random_numbers():
    def train(*callbacks: pl.Callback) -> tuple[dict[str, Tensor], list[bool]]:
        seen = []

        class Look(pl.Callback):
            def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                seen.append("reliability/val_ece" in trainer.callback_metrics)

        torch.manual_seed(1)
        module, data = Classifier(), DataLoader(pixels_only(), batch_size=8)
        tiny_trainer(max_epochs=3, callbacks=[*callbacks, Look()]).fit(module, data, data)
        return cloned_state(module), seen

    (with_it, seen), (without, _) = train(reliability(every_n_epochs=2)), train()
    assert seen[:2] == [False, True]
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())


def validate_in_two_processes() -> dict[str, float]:
    trainer = tiny_trainer(callbacks=[reliability()], devices=2, strategy="ddp", accelerator="cpu")
    trainer.validate(Classifier(), DataLoader(pixels_only(), batch_size=6), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "reliability" in name}


def test_two_processes_count_all_samples_together():
    one, other = run_two_processes(validate_in_two_processes)
    assert one == other
    data = pixels_only()
    expected = {f"reliability/val_{name}": value for name, value in expected_values(Classifier(), data.images, data.labels).items()}
    assert one == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 0}, "bins is 0"),
        ({"fgsm_epsilon": 8.0}, "fgsm_epsilon is 8.0: pixels lie in"),
        ({"std": [1.0, 0.0, 1.0]}, "std above 0"),
        ({"mean": [0.0]}, "one number a channel"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reliability(**arguments)


def test_modules_and_batches_that_dont_fit_are_refused():
    with pytest.raises(TypeError, match="Reliability needs logits, but Classifier has no 'head'"):
        tiny_trainer(callbacks=[reliability(logits="head")]).validate(Classifier(), DataLoader(Images(4)), verbose=False)
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    assert inputs_and_labels({"a": x, "b": y.int()}, "a", "b")[1].dtype == torch.int64
    for batch, message in (
        ({"x": x}, "the batch has no 'image', it has"),
        ((x,), "the batch has no 1, it has 1 parts"),
        (x, "the batch is a Tensor: expected a dictionary"),
        ((x, ["a", "b"]), "is a list: expected a tensor"),
        ((x, y.float()), "expected one class a sample"),
        ((x, y[:1]), "expected one class a sample"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs_and_labels(batch)


class Pixels(Images):
    """A class for each pixel."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, torch.full((8, 8), int(label))


class Watched(Classifier):
    """It notes what is logged when training begins."""

    logged = None

    def validation_step(self, batch, batch_idx):
        self.network(batch[0])

    def on_train_start(self):
        self.logged = list(self.trainer.callback_metrics)


def test_the_sanity_check_refuses_what_cannot_be_measured_and_logs_nothing():
    module, loader = Watched(), DataLoader(Pixels(4), batch_size=2)
    trainer = tiny_trainer(callbacks=[reliability()], num_sanity_val_steps=1, max_steps=1)
    with pytest.raises(ValueError, match=r"^Reliability: the batch's labels are \(2, 8, 8\).*name such ones by labels"):
        trainer.fit(module, loader, loader)
    assert module.logged is None, "training hasn't begun"

    images = DataLoader(Images(4), batch_size=2)
    trainer = tiny_trainer(callbacks=[reliability()], num_sanity_val_steps=1, max_steps=2)
    trainer.fit(module, images, images)
    assert module.logged == []
    assert "reliability/val_ece" in trainer.callback_metrics
