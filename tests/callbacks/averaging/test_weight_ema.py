"""WeightEMA: its averages by hand, accumulation, what is lent when, resume."""

import lightning.pytorch as pl
import pytest
import torch

from helpers import Classifier, Images, assert_state_dicts_equal, cloned_state, fingerprint, kill_and_resume, tiny_trainer
from lit_methods.averages import power_decay, power_exponent
from lit_methods.callbacks import EMATeacher, ExactResume, WeightEMA
from lit_methods.datamodules.loaders import make_loader


def batches():
    return make_loader(Images(), 4, shuffle=True, seed=0, drop_last=True)


class Follow(pl.Callback):
    """The weights after each optimiser step, and those that validation sees."""

    def __init__(self):
        self.steps, self.lent, self.own = [], None, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.steps):
            self.steps.append([p.detach().clone() for p in pl_module.parameters()])

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.lent = [p.detach().clone() for p in pl_module.parameters()]

    def on_validation_end(self, trainer, pl_module):
        self.own = [p.detach().clone() for p in pl_module.parameters()]


@pytest.mark.parametrize("profile", ["constant", "power"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_and_the_end_have_the_average_of_optimiser_steps(profile, accumulate):
    ema = WeightEMA(0.7, profile=profile, width=0.2)
    trainer = tiny_trainer(max_steps=6, accumulate_grad_batches=accumulate, val_check_interval=6, callbacks=[ema, follow := Follow()])
    model = Classifier()
    trainer.fit(model, batches(), make_loader(Images(), 8, shuffle=False, seed=0))
    average = follow.steps[0]
    for step, weights in enumerate(follow.steps[1:], start=1):
        keep = 0.7 if profile == "constant" else power_decay(step, power_exponent(0.2))
        average = [keep * a + (1 - keep) * w for a, w in zip(average, weights, strict=True)]
        if step == (5 if accumulate == 1 else 2):
            for lent, mine in zip(follow.lent if accumulate == 1 else average, average, strict=True):
                torch.testing.assert_close(lent, mine)
    for mine, theirs in zip(average, model.parameters(), strict=True):
        torch.testing.assert_close(theirs.detach(), mine)
    assert all(torch.equal(a, b) for a, b in zip(follow.own, follow.steps[-1], strict=True)), "given back after validation"


def test_the_power_profile_has_the_width_that_was_asked_for():
    for width in (0.05, 0.1, 0.2):
        gamma = power_exponent(width)
        # of a profile t^gamma on [0, 1]: variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
        assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(width)


def test_the_power_profile_weighs_steps_by_a_power_of_time():
    gamma, steps = power_exponent(0.1), 2000
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        keep = power_decay(step, gamma)
        weights *= keep
        weights[step] = 1 - keep
    times = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    expected = times**gamma / (times**gamma).sum()
    torch.testing.assert_close(weights[500:], expected[500:], rtol=0.02, atol=0)


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"profile": "linear"}, {"profile": "power", "width": 0.5}, {"shift": -1}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="give"):
        WeightEMA(**wrong)


@pytest.mark.parametrize("profile", ["constant", "power"])
def test_a_killed_run_ends_like_an_uninterrupted_one(profile, tmp_path):
    def build():
        return Classifier(), batches(), [ExactResume(), WeightEMA(0.7, profile=profile)]

    whole, resumed = kill_and_resume(build, 9, 4, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def test_checkpoints_hold_the_average_under_the_plain_names(tmp_path):
    model = Classifier()
    trainer = tiny_trainer(max_steps=5, callbacks=[WeightEMA(0.9), follow := Follow()])
    assert not model.hparams  # Lightning makes the attribute in fit
    before = fingerprint(model)
    trainer.fit(model, batches())
    assert fingerprint(model) == before
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert_state_dicts_equal(saved, cloned_state(model))
    assert not torch.equal(saved["network.0.weight"], follow.steps[-1][0])


class Late(Classifier):
    """Its layers are put in place late."""

    def __init__(self):
        super().__init__()
        self.made, self.network = [self.network], None

    def make(self, stage="fit"):
        self.network = self.made[0]


def test_layers_of_configure_model_are_averaged_and_those_of_setup_refused():
    configured = type("Configured", (Late,), {"configure_model": Late.make})()
    tiny_trainer(max_steps=1, callbacks=[WeightEMA()]).fit(configured, batches())
    in_setup = type("InSetup", (Late,), {"setup": Late.make})()
    with pytest.raises(ValueError, match=r"^WeightEMA averages a copy of InSetup .* lacks network\.0\.weight"):
        tiny_trainer(max_steps=1, callbacks=[WeightEMA()]).fit(in_setup, batches())
    for hook in ("configure_model", "setup"):
        module, teacher = type("Late", (Late,), {hook: Late.make})(), EMATeacher(targets=["network"])
        tiny_trainer(max_steps=1, callbacks=[teacher]).fit(module, batches())
        assert "network.0.weight" in teacher.averaged()
