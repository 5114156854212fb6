"""ScorePruning: phases on any module, what rests in them, masks, learning rates, kill and resume, two processes, what is left behind."""

import pytest
import torch
from torch import nn

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    compiled_classifier,
    kill_and_resume,
    left_behind,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods import MLP, ImageClassifier
from lit_methods.callbacks import EMATeacher, ExactResume, ScorePruning
from lit_methods.callbacks.sparsity.score_masks import pruning_phase, scaled_scores, score_mask, scored_weight
from lit_methods.datamodules import DigitsDataModule


def mlp(**kwargs):
    torch.manual_seed(0)
    return ImageClassifier(MLP([64, 12, 10]), **{"learning_rate": 0.1, "weight_decay": 1e-2, "schedule": "constant"} | kwargs)


def digits(batch_size=8):
    return DigitsDataModule(num_train=96, batch_size=batch_size)


def images():
    return torch.utils.data.DataLoader(Images(), batch_size=4)


def pruning(**kwargs):
    return ScorePruning(**{"keep": 0.2, "pretrain_steps": 2, "prune_steps": 2} | kwargs)


def fit(module, callbacks, data=None, **kwargs):
    trainer = tiny_trainer(**{"max_steps": 6, "limit_val_batches": 0, "callbacks": callbacks, "log_every_n_steps": 1} | kwargs)
    trainer.fit(module, data or digits())
    return trainer


# ---- the maths ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.37, 0.01])
def test_as_many_stay_as_the_formula_says_and_ties_go_from_the_front(keep):
    scores = torch.tensor([0.0, -3.0, 1.0, 1.0, -1.0, 2.0, 0.0])
    mask = score_mask(scores, keep)
    assert int((~mask).sum()) == int((1 - keep) * 7)
    assert scores.abs()[mask].min() >= scores.abs()[~mask].max() if keep < 1 else mask.all()
    assert score_mask(torch.ones(4), 0.5).tolist() == [False, False, True, True]


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.1, 1e-20])
def test_a_keep_ratio_that_leaves_none_is_refused(keep):
    with pytest.raises(ValueError, match=r"give a share|leaves none"):
        score_mask(torch.ones(3), keep)


def test_a_gradient_goes_straight_through_the_mask():
    weight, scores = torch.tensor([2.0, -3.0, 5.0], requires_grad=True), torch.tensor([0.1, -4.0, 0.0], requires_grad=True)
    seen = scored_weight(weight, scores, torch.tensor([False, True, True]))
    assert seen.tolist() == [0.0, -3.0, 5.0]
    (seen * torch.tensor([10.0, 100.0, 1000.0])).sum().backward()
    assert weight.grad.tolist() == [0.0, 100.0, 1000.0]
    assert scores.grad.tolist() == [20.0, 300.0, 0.0]


def test_scaled_scores_are_in_the_order_of_magnitudes():
    weight = torch.randn(4, 3, 2, 2)
    scores = scaled_scores(weight)
    torch.testing.assert_close(scores.abs().max(), torch.tensor(6 / 12).sqrt())
    assert torch.equal(scores.flatten().argsort(), weight.flatten().argsort())
    assert torch.equal(scaled_scores(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_phases_follow_from_the_step():
    assert [pruning_phase(step, 2, 1) for step in range(4)] == [("pretrain", 0), ("pretrain", 1), ("prune", 0), ("finetune", 0)]
    assert pruning_phase(0, 0, 0) == ("finetune", 0)


# ---- the run -----------------------------------------------------------------------------------------------------------------------------


class Watch(ScorePruning):
    """Latent weights, scores, masks and biases behind each batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        latent = {name: layer.latent.detach().clone() for name, layer in self._layers.items()}
        scores = {name: layer.scores.detach().clone() for name, layer in self._layers.items()}
        masks = {name: mask.clone() for name, mask in self.sparsity_masks().items()}
        bias = module.network.layers[0].bias.detach().clone()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((latent, scores, masks, bias, rate))
        super().on_train_batch_end(trainer, module, *args)


def test_each_phase_trains_what_is_its_own():
    watch, module = Watch(0.2, pretrain_steps=2, prune_steps=2), mlp()
    fit(module, [watch])
    name = "network.layers.0.weight"

    def same(first, second, part):
        own = (watch.seen[place][part] for place in (first, second))
        return torch.equal(*(value[name] if isinstance(value, dict) else value for value in own))

    assert watch.seen[0][2][name].all()
    assert not same(0, 1, 0)
    assert same(0, 1, 1)
    for first, second in ((1, 2), (2, 3)):  # scores alone
        assert same(first, second, 0)
        assert same(first, second, 3)
        assert not same(first, second, 1)
    for first, second in ((3, 4), (4, 5)):  # what stays
        assert not same(first, second, 0)
        assert same(first, second, 1)
        assert same(first, second, 2)
    weight = module.network.layers[0].weight
    assert int((weight == 0).sum()) == int(0.8 * weight.numel())
    assert torch.equal(weight != 0, watch.sparsity_masks()[name])
    assert set(module.state_dict()) == set(mlp().state_dict())


def test_without_score_steps_it_is_pruning_by_magnitude():
    watch = Watch(0.2, pretrain_steps=2, prune_steps=0)
    fit(mlp(), [watch], max_steps=3)
    before, after = watch.seen[1], watch.seen[2]
    for name, latent in before[0].items():
        assert torch.equal(after[2][name], score_mask(latent, 0.2))


def test_a_phase_has_its_own_learning_rate_and_gives_the_modules_back():
    rates = []

    class Rates(ScorePruning):
        def _give_back(self, optimizer, own):
            rates.append(optimizer.param_groups[0]["lr"])
            super()._give_back(optimizer, own)

    watch = Rates(0.2, pretrain_steps=2, prune_steps=2, prune_learning_rate=1.0, finetune_learning_rate=0.5)
    module = mlp(schedule="cosine")
    trainer = fit(module, [watch])
    own = [0.1 * (1 + torch.cos(torch.tensor(torch.pi * step / 6))) / 2 for step in range(2)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([*own, 1.0, 0.5, 0.5, 0.25]))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_random_scores_are_drawn_from_the_seed():
    masks = []
    for seed in (0, 0, 1):
        callback = pruning(scores="random", prune_steps=0, seed=seed)
        fit(mlp(), [callback])
        masks.append(callback.sparsity_masks()["network.layers.0.weight"])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_training_that_ends_early_ends_sparse():
    module = mlp()
    fit(module, [pruning(pretrain_steps=100)], max_steps=2)
    assert int((module.network.layers[1].weight == 0).sum()) == int(0.8 * 120)


@pytest.mark.parametrize("build", [resnet_classifier, compiled_classifier, TwoOptimisers])
def test_other_modules(build):
    module = build()
    callback = pruning(keep=0.1, pretrain_steps=1, prune_steps=1)
    trainer = tiny_trainer(max_steps=4, limit_val_batches=0, callbacks=[callback])
    trainer.fit(module, images())
    for name, mask in callback.sparsity_masks().items():
        assert int((~mask).sum()) == int(0.9 * mask.numel()), name


def test_accumulated_batches_are_one_step():
    wide, narrow = mlp(), mlp()
    fit(wide, [pruning()], digits(8))
    fit(narrow, [pruning()], digits(4), accumulate_grad_batches=2)
    assert_state_dicts_equal(cloned_state(narrow), cloned_state(wide), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_a_killed_run_ends_bit_equal(kill_at, tmp_path):
    def build():
        callback = pruning(prune_learning_rate=0.5, finetune_learning_rate=0.1)
        return mlp(optimizer="adam", learning_rate=1e-2, momentum=0.0), digits(), [callback, ExactResume()]

    whole, resumed = kill_and_resume(build, 6, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def train_once(batch_size, **kwargs):
    module = mlp()
    fit(module, [pruning()], digits(batch_size), **kwargs)
    return cloned_state(module)


def one_of_two():
    return train_once(4, devices=2, strategy="ddp")


def test_two_processes_are_one():
    whole = train_once(8)
    for state in run_two_processes(one_of_two):
        assert_state_dicts_equal(state, whole, atol=1e-6, rtol=1e-5)


def test_a_teacher_follows_the_masks():
    teacher, callback = EMATeacher(decay=0.5), pruning()
    fit(mlp(), [callback, teacher])
    masks = callback.sparsity_masks()
    assert masks


class Raises(ScorePruning):
    def on_train_epoch_end(self, trainer, module):
        raise InterruptedError


@pytest.mark.parametrize(("kind", "raises"), [(ScorePruning, None), (Raises, InterruptedError)])
def test_nothing_stays_behind(kind, raises):
    assert not left_behind(Classifier, lambda: kind(keep=0.5, pretrain_steps=1, prune_steps=1), images(), raises=raises)


# ---- refusals ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"prune_steps": -1}, "prune_steps is -1"),
        ({"scores": "ones"}, "give one of scaled, random"),
        ({"finetune_learning_rate": 0.0}, "finetune_learning_rate is 0.0"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pruning(**change)


def test_a_layer_of_which_nothing_would_stay_is_named():
    with pytest.raises(ValueError, match=r"ScorePruning, network.layers.0.weight: keep=1e-20 of 768 weights leaves none: raise keep"):
        fit(mlp(), [pruning(keep=1e-20)])


def test_a_learning_rate_needs_an_end():
    with pytest.raises(ValueError, match="finetune_learning_rate needs an end"):
        fit(mlp(), [pruning(finetune_learning_rate=0.1)], max_steps=-1, max_epochs=-1)


def test_scores_learn_more_than_magnitude_knows():
    """Of two equal inputs the one with the smaller weight carries the label: scores bring it back."""
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    batches = [{"image": x, "label": (x[:, 1] > 0).long()}] * 40

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            with torch.no_grad():
                self.layer.weight.copy_(torch.tensor([[1.0, -0.9], [1.0, 0.9]]))

        def forward(self, images):
            return self.layer(images)

    def accuracy(prune_steps):
        module = ImageClassifier(Net(), num_classes=2, learning_rate=0.2, schedule="constant")
        callback = ScorePruning(keep=0.5, prune_steps=prune_steps)
        fit(module, [callback], torch.utils.data.DataLoader(batches, batch_size=None), max_steps=max(1, prune_steps))
        return float((module.network(x).argmax(1) == batches[0]["label"]).float().mean())

    assert accuracy(40) > 0.95 > accuracy(0)
