"""ImageClassifier: loss, schedules, metrics, resume, two processes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import MLP, ImageClassifier, SmallConvNet
from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import DigitsDataModule
from lit_methods.optim import learning_rate_factor
from lit_methods.tasks.vision.classifier import classification_loss, mixup


def module(network=None, **kwargs):
    torch.manual_seed(1)
    return ImageClassifier(network or MLP([64, 16, 10]), **({"learning_rate": 0.1} | kwargs))


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_losses_against_sums_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, labels, s = torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2]), 0.1
    shares = (1 - s) * F.one_hot(labels, 4) + s / 4
    expected = -(shares * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(classification_loss(logits, labels, label_smoothing=s), expected)
    torch.testing.assert_close(classification_loss(logits, F.one_hot(labels, 4).double(), label_smoothing=s), expected)
    p = logits.sigmoid()
    expected = -(shares * p.log() + (1 - shares) * (1 - p).log()).mean()
    torch.testing.assert_close(classification_loss(logits, labels, "bce", s), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert classification_loss(logits.bfloat16(), labels, "bce").dtype == torch.float32


def test_mixup_pairs_a_batch_with_its_reverse():
    images, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 1])
    mixed, targets = mixup(images, labels, 0.75, 2)
    assert mixed.tolist() == [[1.75], [2.0], [3.25]]
    assert targets.tolist() == [[0.75, 0.25], [0.0, 1.0], [0.25, 0.75]]


def test_schedules():
    run = {"total_steps": 100, "steps_per_epoch": 10}
    steps = (0, 5, 10, 55, 100)
    rising = {"warmup_epochs": 1, "warmup_start": 0.2, "minimum": 0.1}
    cosine = [learning_rate_factor(step, schedule="cosine", **rising, **run) for step in steps]
    assert cosine == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1])
    falling = [learning_rate_factor(step, schedule="multistep", milestones=[3, 6], gamma=0.5, **run) for step in (29, 30, 59, 60, 99)]
    assert falling == [1, 0.5, 0.5, 0.25, 0.25]
    assert learning_rate_factor(77, schedule="constant", **run) == 1


# ---- training --------------------------------------------------------------------------------------------------------------------------


def test_digits_are_learned_and_evaluated():
    data, model = DigitsDataModule(train_size=640), module(MLP([64, 64, 10]), class_names=[f"digit {k}" for k in range(10)])
    trainer = tiny_trainer(max_epochs=6)
    trainer.fit(model, datamodule=data)
    logged = trainer.callback_metrics
    assert {"classifier/loss", "classifier/accuracy", "classifier/val_loss", "classifier/val_accuracy"} <= set(logged)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    predictions = trainer.predict(model, datamodule=data)
    logits, labels = (torch.cat([batch[key] for batch in predictions]) for key in ("logits", "label"))
    assert len(labels) == 597
    hits = logits.argmax(1) == labels
    assert hits.float().mean() > 0.85, "ten classes are told apart"
    assert result["classifier/test_accuracy"] == pytest.approx(hits.float().mean().item())
    assert result["classifier/test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)

    confidence = logits.softmax(1).amax(1)
    bins = (confidence * 15).ceil().clamp(1, 15)
    chosen = [bins == k for k in range(1, 16) if (bins == k).any()]
    ece = sum(abs(float(confidence[b].mean() - hits[b].float().mean())) * float(b.float().mean()) for b in chosen)
    assert result["classifier/test_ece"] == pytest.approx(ece, abs=1e-5)

    table = model.dashboard_media()["classifier/confusion"]
    assert table.columns == ("true class", *model.class_names)
    counts = np.array([row[1:] for row in table.rows])
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels.numpy(), logits.argmax(1).numpy()), 1)
    np.testing.assert_array_equal(counts, expected)


def test_many_classes_have_no_table():
    assert module(MLP([64, 21]), num_classes=21).eval_confusion is None


@pytest.mark.parametrize("network", [None, SmallConvNet()], ids=["mlp", "batch norm"])
@pytest.mark.parametrize("options", [{"mixup": 0.5, "loss": "bce"}, {"optimizer": "adamw", "warmup_epochs": 0.5}], ids=["mixup", "adamw"])
def test_a_killed_run_ends_like_an_uninterrupted_one(network, options, tmp_path):
    def build():
        fresh = SmallConvNet() if network is not None else None
        return module(fresh, **options), DigitsDataModule(train_size=64, batch_size=8), [ExactResume()]

    whole, resumed = kill_and_resume(build, steps=7, kill_at=3, tmp_path=tmp_path, limit_val_batches=0, accumulate_grad_batches=2)
    assert_state_dicts_equal(resumed, whole)


def test_mixup_changes_the_training():
    def trained(**kwargs):
        model = module(**kwargs)
        torch.manual_seed(3)
        tiny_trainer(max_steps=2, limit_val_batches=0).fit(model, datamodule=DigitsDataModule(train_size=64))
        return cloned_state(model)

    plain, mixed = trained(), trained(mixup=1.0)
    assert not torch.equal(plain["network.layers.0.weight"], mixed["network.layers.0.weight"])
    assert_state_dicts_equal(trained(mixup=1.0), mixed)


def test_training_in_bf16_follows_float32():
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        trainer, model = tiny_trainer(max_epochs=8, precision=precision, limit_val_batches=0), module(optimizer="adamw", learning_rate=0.03)
        trainer.fit(model, datamodule=DigitsDataModule(train_size=320))
        losses.append(trainer.callback_metrics["classifier/loss"])
    whole, half = losses
    assert half.dtype == torch.float32
    assert half != whole, "something was rounded"
    assert half == pytest.approx(float(whole), abs=0.1)
    assert whole < 0.7 * math.log(10), "better than guessing"


def fit_and_test(devices: int, accumulate: int):
    model = module(schedule="cosine", base_batch_size=64, warmup_epochs=0.5)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = tiny_trainer(
        max_epochs=2, devices=devices, strategy=strategy, accumulate_grad_batches=accumulate, use_distributed_sampler=False
    )
    trainer.fit(model, datamodule=DigitsDataModule(train_size=128, batch_size=16))
    (result,) = trainer.test(model, datamodule=DigitsDataModule(batch_size=16), verbose=False)
    table = model.dashboard_media()["classifier/confusion"]
    return cloned_state(model), result, trainer.optimizers[0].defaults["lr"], sum(sum(row[1:]) for row in table.rows)


def test_two_processes_equal_one_that_accumulates():
    state, result, rate, counted = fit_and_test(1, 2)
    assert rate == pytest.approx(0.1 * 32 / 64)
    assert counted == 597
    for two_state, two_result, two_rate, two_counted in run_two_processes(fit_and_test, 2, 1, timeout=300.0):
        assert_state_dicts_equal(two_state, state, atol=1e-6)
        assert two_result == pytest.approx(result, abs=1e-6)
        assert (two_rate, two_counted) == (rate, counted)


# ---- optimiser -------------------------------------------------------------------------------------------------------------------------


def test_norms_and_biases_escape_weight_decay():
    class WithToken(SmallConvNet):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"token"}

    model = module(WithToken(), no_decay_norms=True)
    model.network.convs[0].requires_grad_(False)
    decayed, bare = (group["params"] for group in model.parameter_groups())
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    assert {names[id(p)] for p in decayed} == {"convs.1.weight", "convs.2.weight", "head.weight"}
    norms = {f"norms.{k}.{kind}" for k in range(3) for kind in ("weight", "bias")}
    assert {names[id(p)] for p in bare} == norms | {"head.bias", "token"}
    assert model.parameter_groups()[1]["weight_decay"] == 0.0


def test_the_schedule_reaches_the_optimiser():
    class Rates(ExactResume):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    model = module(learning_rate=0.2, schedule="multistep", milestones=[1, 2], warmup_epochs=0.5, warmup_lr=0.1)
    tiny_trainer(max_epochs=3, limit_val_batches=0, callbacks=[Rates()]).fit(
        model, datamodule=DigitsDataModule(train_size=64, batch_size=16)
    )
    assert rates == pytest.approx([0.1, 0.15, 0.2, 0.2, *[0.02] * 4, *[0.002] * 4])


def test_pretrained_weights_are_loaded(tmp_path):
    first = module()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "lightning.ckpt")
    torch.save(first.network.state_dict(), tmp_path / "plain.pt")
    for file, prefix in (("lightning.ckpt", "network."), ("plain.pt", "")):
        other = ImageClassifier(MLP([64, 16, 10]), pretrained=tmp_path / file, pretrained_prefix=prefix)
        assert_state_dicts_equal(other.state_dict(), first.state_dict())
    with pytest.raises(ValueError, match="another architecture"):
        ImageClassifier(MLP([64, 8, 10]), pretrained=tmp_path / "lightning.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer is 'lion': give one of sgd, adam, adamw"),
        ({"schedule": "multistep"}, "needs milestones"),
        ({"class_names": ["a"]}, "class_names has 1"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1.5: give a number in \[0, 1\]"),
        ({"learning_rate": 0.0}, r"learning_rate is 0.0: give a number in \(0, inf\)"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)
