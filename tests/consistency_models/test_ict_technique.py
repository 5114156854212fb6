"""ConsistencyTraining: draws, curriculum, teacher, resume, two processes, precision, sampling under averaged weights."""

import lightning.pytorch as pl
import pytest
import torch

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import ConsistencyTraining, NoiseMLP, RingTeacher, SmallUNet, VelocityDenoiser
from lit_methods.averages import ema_update
from lit_methods.callbacks import EMARemoval, ExactResume, WeightEMA
from lit_methods.consistency_models.curricula import ct_teacher_decay
from lit_methods.consistency_models.evaluation import density_picture
from lit_methods.consistency_models.pairs import heun_step
from lit_methods.datamodules import GenerativeDigitsDataModule, RingDataModule

CT = {"curriculum": "square_root", "s0": 2, "s1": 20, "levels": "uniform", "metric": "l2", "weight": "one", "teacher": "ema"}
ICT = {"s0": 2, "s1": 16}
CD = CT | {"denoiser": VelocityDenoiser(RingTeacher(modes=8, radius=0.65, noise=0.05))}


def module(arm=None, dropout=0.0, **kwargs):
    torch.manual_seed(3)
    return ConsistencyTraining(NoiseMLP(width=16, depth=2, dropout=dropout), **{"learning_rate": 1e-2, **(arm or ICT), **kwargs})


def ring(**kwargs):
    return RingDataModule(**{"num_train": 80, "num_val": 32, "batch_size": 8, "val_batch_size": 32, **kwargs})


def fit(model, data=None, callbacks=(), **kwargs):
    pl.seed_everything(0, verbose=False)
    trainer = tiny_trainer(callbacks=[*callbacks], **{"max_steps": 6, "limit_val_batches": 0, **kwargs})
    trainer.fit(model, data or ring())
    return trainer


class Watch(pl.Callback):
    """Keeps what is drawn, and the weights after each batch."""

    def __init__(self):
        self.drawn, self.levels, self.students, self.teachers, self.steps = [], [], [], [], []

    def setup(self, trainer, pl_module, stage):
        draw = pl_module.draw

        def watched(x, batch_idx):
            found = draw(x, batch_idx)
            self.drawn.append(found)
            return found

        pl_module.draw = watched

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.levels.append(self.drawn[-1].count)
        self.steps.append(trainer.global_step)
        self.students.append(cloned_state(pl_module.network))
        if pl_module.teacher_network is not None:
            self.teachers.append(cloned_state(pl_module.teacher_network))

    def teardown(self, trainer, pl_module, stage):
        del pl_module.draw


@pytest.mark.parametrize(("arm", "kill_at"), [(ICT, 3), (ICT, 10), (CT, 7), (CT, 10), (CD, 7)])
def test_a_killed_run_ends_like_an_uninterrupted_one(arm, kill_at, tmp_path):
    def build():
        return module(arm, dropout=0.3), ring(), [ExactResume(), WeightEMA(0.9)]

    whole, resumed = kill_and_resume(build, 14, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def test_a_resumed_run_keeps_its_curriculum_though_it_trains_longer(tmp_path):
    whole = fit(module(), max_steps=6, callbacks=[watch := Watch()])
    whole.save_checkpoint(tmp_path / "a.ckpt")
    longer = module()
    trainer = tiny_trainer(max_steps=12, limit_val_batches=0, callbacks=[more := Watch()])
    trainer.fit(longer, ring(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert longer.total_steps == 6
    assert watch.levels == [3, 5, 9, 17, 17, 17]
    assert set(more.levels) == {17}


def test_the_length_of_the_curriculum_is_that_of_the_training():
    model = module()
    fit(model, max_steps=-1, max_epochs=2)
    assert model.total_steps == 20
    with pytest.raises(ValueError, match="needs an end"):
        fit(module(), max_steps=-1, max_epochs=-1)


def test_levels_are_drawn_by_their_chances_with_one_noise_for_both():
    model, x = module(s0=10, s1=10, total_steps=6), torch.zeros(40_000, 2)
    fit(model, callbacks=[watch := Watch()])
    drawn = model.draw(x, 0)
    known = model._known
    shares = torch.bincount(drawn.index - 1, minlength=10) / len(x)
    torch.testing.assert_close(shares, known.chances, atol=0.01, rtol=0)
    assert torch.equal(drawn.lower, known.sigma[drawn.index - 1])
    assert torch.equal(drawn.upper, known.sigma[drawn.index])
    torch.testing.assert_close(drawn.weight, 1 / (drawn.upper - drawn.lower), rtol=1e-3, atol=0)
    assert abs(drawn.noise.mean()) < 0.02
    assert not any(torch.equal(a.noise, b.noise) for a, b in zip(watch.drawn, watch.drawn[1:], strict=False)), "each batch has its own"


def test_draws_leave_the_global_generators_alone():
    pl.seed_everything(0, verbose=False)
    before = torch.get_rng_state()
    model = module(total_steps=6)
    torch.set_rng_state(before)
    model.trainer = fit(module())
    torch.set_rng_state(before)
    model.draw(torch.zeros(4, 2), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_of_ct_follows_on_optimiser_steps_only(accumulate):
    model = module(CT)
    start = cloned_state(model.network)
    fit(model, accumulate_grad_batches=accumulate, max_steps=4, callbacks=[watch := Watch()])
    average = [value.clone() for value in start.values()]
    assert watch.steps == [k // accumulate for k in range(1, 4 * accumulate + 1)]
    for place, step in enumerate(watch.steps):
        if step and (place + 1) % accumulate == 0:
            source = list(watch.students[place].values())
            ema_update(average, source, ct_teacher_decay(model.num_levels(step - 1), 2, 0.9))
        for mine, theirs in zip(average, watch.teachers[place].values(), strict=True):
            torch.testing.assert_close(theirs, mine)
    assert not torch.equal(average[0], watch.students[-1]["layers.0.weight"])


def test_ict_keeps_no_second_network():
    assert module().teacher_network is None
    assert not any(name.startswith("teacher") for name in module().state_dict())


def two(arm, accumulate, devices):
    kwargs = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    model = module(arm)
    fit(model, ring(), accumulate_grad_batches=accumulate, max_steps=5, limit_val_batches=1.0, callbacks=[WeightEMA(0.9)], **kwargs)
    return cloned_state(model), float(model.trainer.callback_metrics["consistency/val_sw2"])


@pytest.mark.parametrize("arm", [ICT, CT], ids=["ict", "ct"])
def test_two_processes_end_like_one(arm):
    torch.set_num_threads(1)
    (both, distance), (other, other_distance) = run_two_processes(two, arm, 1, 2)
    assert_state_dicts_equal(other, both)
    assert distance == other_distance
    one, _ = two(arm, 2, 1)
    assert_state_dicts_equal(both, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_and_keeps_losses_wide(precision):
    # with bfloat16 losses neighbouring levels would look alike
    wide, narrow = module(), module()
    first = fit(wide, max_steps=6).callback_metrics["consistency/loss"]
    second = fit(narrow, max_steps=6, precision=precision).callback_metrics["consistency/loss"]
    assert second.dtype == torch.float32
    assert second.isfinite()
    assert second == pytest.approx(float(first), rel=0.5)
    moved = [not torch.equal(a, b) for a, b in zip(module().parameters(), narrow.cpu().float().parameters(), strict=True)]
    assert any(moved)


@pytest.mark.parametrize("arm", [ICT, CT], ids=["ict", "ct"])
def test_validation_draws_with_the_averaged_weights(arm):
    class Keep(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            self.lent, self.seen = cloned_state(pl_module.network), pl_module._seen[-1][1][1]

    model = module(arm)
    fit(model, callbacks=[WeightEMA(0.9), keep := Keep(), watch := Watch()], max_steps=10, limit_val_batches=1.0)
    average = [value.clone() for value in watch.students[0].values()]
    for student in watch.students[1:]:
        ema_update(average, list(student.values()), 0.9)
    for lent, mine in zip(keep.lent.values(), average, strict=True):
        torch.testing.assert_close(lent, mine)
    # after training the module has the average, and draws the very samples again
    model.trainer = tiny_trainer()
    drawn = model._draw_samples({"image": torch.zeros(32, 2)}, 0, "evaluation")[1]
    torch.testing.assert_close(drawn, keep.seen)


@pytest.mark.parametrize("first", [True, False])
def test_removing_the_average_of_ct_leaves_ct_with_a_stopped_gradient(first):
    pair = [EMARemoval("network", "teacher_network"), WeightEMA(0.9)]
    removed, never = module(CT), module(CT | {"teacher": "stopgrad"})
    settings = {"max_steps": 12, "limit_val_batches": 1.0, "val_check_interval": 3}
    one = fit(removed, callbacks=pair if first else pair[::-1], **settings)
    two = fit(never, callbacks=[WeightEMA(0.9)], **settings)
    assert_state_dicts_equal(cloned_state(removed.network), cloned_state(never.network))
    assert one.callback_metrics["consistency/val_sw2"] == two.callback_metrics["consistency/val_sw2"]
    assert_state_dicts_equal(cloned_state(removed.teacher_network), cloned_state(removed.network))


def test_what_is_logged():
    trainer = fit(module(CT), max_steps=10, log_every_n_steps=5, limit_val_batches=1.0)
    names = {f"consistency/{name}" for name in ("loss", "levels", "weight", "teacher_decay", "val_sw2", "val_sw2_2_steps")}
    assert names | {f"consistency/loss_q{k}" for k in range(1, 5)} == set(trainer.callback_metrics)
    assert trainer.callback_metrics["consistency/levels"] == module(CT, total_steps=10).num_levels(9)
    quiet = fit(module(CT), max_steps=4, log_every_n_steps=5)
    assert set(quiet.callback_metrics) == {"consistency/loss"}


def test_quarters_are_of_the_index_range():
    model = module(s0=8, s1=8, total_steps=6)
    fit(model, callbacks=[Watch()])
    drawn = model.draw(torch.zeros(64, 2), 0)

    class Found:
        losses = drawn.index.float()

    logs = model.details(Found, None, drawn)
    for quarter in range(4):
        mine = drawn.index[(drawn.index - 1) // 2 == quarter].float()
        assert float(logs[f"consistency/loss_q{quarter + 1}"]) == pytest.approx(mine.mean().item(), nan_ok=True)


def test_images_with_labels_train_validate_test_and_predict():
    torch.manual_seed(0)
    model = ConsistencyTraining(SmallUNet(channels=8, num_classes=10), num_classes=10, sample_times=(0.8, 0.4, 0.1), clip=True, **ICT)
    data = GenerativeDigitsDataModule(image_size=8, batch_size=16, val_batch_size=16, num_samples=20)
    trainer = tiny_trainer(max_steps=2, val_check_interval=2, limit_val_batches=1, limit_test_batches=1)
    trainer.fit(model, data)
    picture = model.dashboard_media()["consistency/samples"].pixels
    assert picture.shape == (4 * 9 + 1, 16 * 9 + 1, 3)
    assert "consistency/test_sw2_4_steps" in trainer.test(model, data, verbose=False)[0]
    drawn = trainer.predict(model, data)
    assert sum(len(part["4_steps"]) for part in drawn) == 20
    assert {name for part in drawn for name in part} == {"1_steps", "2_steps", "3_steps", "4_steps"}
    assert all(part["1_steps"].abs().max() <= 1 for part in drawn)
    assert not torch.equal(drawn[0]["1_steps"][:4], drawn[1]["1_steps"][:4]), "each batch has noise of its own"


def test_points_in_the_plane_are_shown_by_their_density():
    picture = density_picture(torch.tensor([[0.9, 0.9], [0.9, 0.9], [-0.9, -0.9], [5.0, 5.0]]), 1.0, size=4)
    brightness = picture.float().sum(-1)
    assert brightness.argmax() == 3, "top right"
    assert (brightness > brightness.min()).sum() == 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"metric": "lpips"}, "pseudo_huber, l2, l1"),
        ({"s0": 5, "s1": 3}, "1 <= s0 <= s1"),
        ({"c": -1.0}, r"c is -1.0: give a number in \(0, inf\)"),
        ({"sample_times": (0.1, 0.5)}, "descending"),
    ],
)
def test_wrong_arguments_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        module(**wrong)


def test_more_steps_than_times_are_refused():
    with pytest.raises(ValueError, match="sample_times"):
        module().sample(torch.zeros(2, 2), steps=3)


def test_distillation_takes_pairs_from_the_path_of_the_diffusion_model():
    model = module(CD)
    points = []
    teach = model.teach
    model.teach = lambda x, sigma: points.append((x, sigma)) or teach(x, sigma)
    watch = Watch()
    data = ring()
    fit(model, data, callbacks=[watch], max_steps=1)
    drawn, (nearer, lower) = watch.drawn[0], points[0]
    data.setup("fit")
    x = next(iter(data.train_dataloader()))["image"]
    noisy = x + drawn.upper[:, None] * drawn.noise
    torch.testing.assert_close(nearer, heun_step(CD["denoiser"], noisy, drawn.upper, drawn.lower))
    assert torch.equal(lower, drawn.lower)
    assert not any("denoiser" in name for name in model.state_dict())


def test_images_are_compared_by_the_features_of_a_network_that_learns_nothing():
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3)])

        def forward(self, x):
            first = self.layers[0](x)
            return [first, self.layers[1](first.relu())]

    features = Features()
    before = cloned_state(features)
    model = ConsistencyTraining(SmallUNet(channels=4, multipliers=(1,)), s0=2, s1=4, metric="perceptual", features=features)
    start = cloned_state(model.network)
    fit(model, GenerativeDigitsDataModule(num_train=32, batch_size=8), max_steps=2)
    assert_state_dicts_equal(features.state_dict(), before)
    assert any(not torch.equal(start[name], value) for name, value in model.network.state_dict().items())
    assert not any("features" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="go together"):
        module(metric="perceptual")
