"""EMARemoval on modules that are not ours."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from helpers import Classifier, Images, assert_state_dicts_equal, cloned_state, fingerprint, kill_and_resume, tiny_trainer
from lit_methods.callbacks import EMARemoval, ExactResume, WeightEMA
from lit_methods.datamodules.loaders import make_loader


class MeanTeacher(Classifier):
    """A stranger's module: the average of the network teaches it; both drop units."""

    def __init__(self, average: bool = True) -> None:
        nn = torch.nn
        torch.manual_seed(7)
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4)))
        self.slow = copy.deepcopy(self.network).requires_grad_(False) if average else None

    def training_step(self, batch, batch_idx):
        image, label = batch
        teacher = self.network if self.slow is None else self.slow
        answer = self.network(image)
        with torch.no_grad(), torch.random.fork_rng([]):
            target = teacher(image)
        loss = torch.nn.functional.cross_entropy(answer, label) + (answer - target).square().mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_):
        if self.slow is not None:
            for slow, fast in zip(self.slow.parameters(), self.network.parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)


class TwoSteps(MeanTeacher):
    """By hand, two steps a batch; the teacher is asked between them."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.same = False, []

    def training_step(self, batch, batch_idx):
        optimiser = self.optimizers()
        for _ in range(2):
            optimiser.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1]))
            optimiser.step()
            self.same.append(torch.equal(self.network[1].weight, self.slow[1].weight))


def batches():
    return make_loader(Images(), 4, shuffle=True, seed=0, drop_last=True)


def fit(model, *callbacks, steps=6, **kwargs):
    pl.seed_everything(0, verbose=False)
    trainer = tiny_trainer(max_steps=steps, callbacks=[*callbacks], **kwargs)
    trainer.fit(model, batches(), make_loader(Images(), 8, shuffle=False, seed=0))
    return cloned_state(model.network)


def test_the_student_teaches_itself():
    """Also where the module's update of the teacher is made of two steps in place."""
    tied = MeanTeacher()
    found = fit(tied, EMARemoval("network", "slow"), val_check_interval=3)
    assert_state_dicts_equal(found, fit(MeanTeacher(average=False), val_check_interval=3))
    assert_state_dicts_equal(cloned_state(tied.slow), found)
    assert not torch.equal(found["1.weight"], fit(MeanTeacher())["1.weight"]), "the average mattered"


def test_the_teacher_follows_within_a_batch():
    model = TwoSteps()
    fit(model, EMARemoval("network", "slow"), steps=4)
    assert model.same == [True] * 4
    model = TwoSteps()
    fit(model, steps=4)
    assert model.same == [False] * 4


def test_nothing_is_left_behind():
    model = MeanTeacher()
    assert not model.hparams  # Lightning makes the attribute in fit
    before = fingerprint(model)
    fit(model, EMARemoval("network", "slow"))
    assert fingerprint(model) == before
    with torch.no_grad():
        model.slow[1].weight.zero_()
    assert model.network[1].weight.abs().sum() > 0


def test_also_after_an_error():
    class Fail(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("enough")

    model, callback = MeanTeacher(), EMARemoval("network", "slow")
    assert not model.hparams  # Lightning makes the attribute in fit
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="enough"):
        fit(model, callback, Fail())
    assert fingerprint(model) == before
    assert not callback._copy


@pytest.mark.parametrize("average", [WeightEMA, lambda decay: EMAWeightAveraging(decay=decay)], ids=["ours", "lightnings"])
@pytest.mark.parametrize("first", [True, False])
def test_averages_for_evaluation_work_beside_it_in_both_orders(average, first):
    pair = [EMARemoval("network", "slow"), average(0.9)]
    found = fit(MeanTeacher(), *(pair if first else pair[::-1]), val_check_interval=2)
    assert_state_dicts_equal(found, fit(MeanTeacher(average=False), average(0.9), val_check_interval=2))


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    def build():
        return MeanTeacher(), batches(), [ExactResume(), EMARemoval("network", "slow")]

    whole, resumed = kill_and_resume(build, 8, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def test_what_cannot_be_tied_is_refused():
    class Other(MeanTeacher):
        def __init__(self):
            super().__init__()
            self.slow = torch.nn.Linear(3, 3)

    class Trained(MeanTeacher):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="differ in"):
        fit(Other(), EMARemoval("network", "slow"))
    with pytest.raises(ValueError, match="an optimiser trains 'slow'"):
        fit(Trained(), EMARemoval("network", "slow"))
    with pytest.raises(ValueError, match="nobody"):
        fit(MeanTeacher(), EMARemoval("network", "nobody"))
    with pytest.raises(ValueError, match="name two submodules"):
        EMARemoval("network", "network")
