"""rCM: its maths against independent computations, bad samples, phases, resuming, two processes, half precision, accumulation."""

import copy
import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods.consistency_models.networks import NoiseMLP, SmallUNet
from lit_methods.consistency_models.rcm.core import (
    critic_loss,
    dcm_loss,
    dmd_loss,
    phase_at,
    sample,
    scm_loss,
    simulate,
    velocity_tangent,
)
from lit_methods.consistency_models.rcm.module import RCM, drop_bad_gradients
from lit_methods.consistency_models.rcm.teacher import IrisTeacher, RingTeacher
from lit_methods.consistency_models.rcm.trigflow import rectified_flow, trigflow

DOUBLE = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def network(seed: int = 0) -> NoiseMLP:
    torch.manual_seed(seed)
    return NoiseMLP(width=16, depth=2).double()


def inputs(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples, noise, times."""
    return numbers(count, 2), numbers(count, 2, seed=1), torch.linspace(0.2, 1.4, count, dtype=DOUBLE)


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters()]


# ---- maths -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [rectified_flow, trigflow])
def test_both_wrappers_keep_the_identities_of_trigflow(wrap):
    x, _, time = inputs()
    found = wrap(network(), DOUBLE)(x, time)
    torch.testing.assert_close(time.cos()[:, None] * x - time.sin()[:, None] * found.velocity, found.x0)


def test_the_wrapper_of_a_rectified_flow_is_exact_for_a_gaussian():
    """Data of one Gaussian have a closed form in both worlds: E[z - x0 | x_u] there, E[x0 | x_t] here."""
    spread = 0.7

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        u = (tau / 1000)[:, None]
        variance = (1 - u) ** 2 * spread**2 + u**2
        return (u - (1 - u) * spread**2) / variance * x

    x, _, time = inputs()
    cos, sin = time.cos()[:, None], time.sin()[:, None]
    torch.testing.assert_close(rectified_flow(velocity, DOUBLE)(x, time).x0, cos * spread**2 / (cos**2 * spread**2 + sin**2) * x)


def test_the_ring_teacher_is_the_posterior_mean():
    teacher, x, time = RingTeacher(modes=3, radius=1.0, noise=0.3), numbers(4, 2), torch.tensor([0.3, 0.8, 1.2, 1.5], dtype=DOUBLE)
    found = trigflow(teacher, DOUBLE)(x, time).x0
    grid = torch.linspace(-4, 4, 401, dtype=DOUBLE)
    points = torch.cartesian_prod(grid, grid)
    density = (-(points[:, None] - teacher.centres).square().sum(-1) / (2 * 0.3**2)).exp().sum(1)
    for one, t, mean in zip(x, time, found, strict=True):
        posterior = density * (-(one - t.cos() * points).square().sum(-1) / (2 * t.sin() ** 2)).exp()
        torch.testing.assert_close((posterior[:, None] * points).sum(0) / posterior.sum(), mean, rtol=1e-5, atol=1e-6)


def test_the_ring_teacher_counts_modes_and_near_samples():
    teacher = RingTeacher(modes=4, radius=1.0, noise=0.1)
    samples = torch.tensor([[1.0, 0.0], [1.2, 0.0], [1.4, 0.0], [0.0, 1.29], [0.0, 0.5]])
    found = teacher.evaluate(samples)
    assert found["quality"] == pytest.approx(3 / 5), "those at 0, 0.2 and 0.29 from a mode"
    assert found["modes"] == 2


def test_the_iris_teacher_knows_the_flowers_that_its_data_come_from():
    from lit_methods.datamodules import IrisDataModule

    teacher, data = IrisTeacher(noise=0.05), IrisDataModule(num_train=64, num_val=2000)
    data.setup("fit")
    assert teacher.centres.shape == (150, 2)
    assert teacher.evaluate(data.val_set.images)["quality"] > 0.985, "98.9 % of a Gaussian lie within 3 standard deviations"
    x, time = numbers(5, 2), torch.tensor([0.2, 0.5, 0.9, 1.3, 1.55], dtype=DOUBLE)
    found = trigflow(teacher, DOUBLE)(x, time).x0
    for one, t, mean in zip(x, time, found, strict=True):  # posterior means of the Gaussians, weighted by their evidence
        variance = (0.05 * t.cos()) ** 2 + t.sin() ** 2
        away = one - t.cos() * teacher.centres
        share = (-away.square().sum(1) / (2 * variance)).exp()
        expected = share @ (teacher.centres + t.cos() * 0.05**2 / variance * away) / share.sum()
        torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(("mode", "limit"), [("jvp", 1e-7), ("semi_continuous", 2e-3), ("discrete", 2e-3)])
def test_the_tangent_is_the_derivative_along_the_trajectory(mode, limit):
    x, drift, time = inputs()
    student = trigflow(network(), DOUBLE)
    h = 1e-5
    ahead, behind = (student(x + sign * h * drift, time + sign * h).velocity for sign in (1, -1))
    expected = (time.cos() * time.sin())[:, None] * (ahead - behind) / (2 * h)
    velocity, found = velocity_tangent(student, x, time, drift, mode)
    torch.testing.assert_close(velocity, student(x, time).velocity)
    assert not found.requires_grad
    assert not velocity.requires_grad
    assert (found - expected).abs().max() < limit * expected.abs().max()


def test_both_warmup_styles_meet_at_the_end_and_differ_before():
    student, teacher = trigflow(network(0), DOUBLE), trigflow(network(1), DOUBLE)
    norms = {
        (style, r): scm_loss(student, teacher, *inputs(), r, warmup_style=style).tangent_norm
        for style in ("rcm", "scm")
        for r in (0.4, 1.0)
    }
    torch.testing.assert_close(norms["rcm", 1.0], norms["scm", 1.0])
    assert not torch.allclose(norms["rcm", 0.4], norms["scm", 0.4], rtol=1e-2)


def test_the_gradient_of_scm_is_minus_twice_the_normalised_tangent():
    net = network()
    student, teacher = trigflow(net, DOUBLE), trigflow(network(1), DOUBLE)
    found = scm_loss(student, teacher, *inputs(), scale=3.0)
    (gradient,) = torch.autograd.grad(found.losses.sum(), found.student)
    norm = found.tangent_norm / (found.tangent_norm + 0.1)
    torch.testing.assert_close(gradient.norm(dim=1), 6.0 * norm)
    torch.testing.assert_close(found.losses, 3.0 * norm**2)


def bad(kind: str, x: Tensor) -> Tensor:
    x = x.clone()
    x[2, 0] = {"nan": math.nan, "inf": math.inf}[kind]
    return x


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("loss", ["scm", "dcm"])
def test_a_bad_sample_leaves_the_gradients_of_the_others(loss, place, kind):
    def run(given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        net = network()
        function = scm_loss if loss == "scm" else dcm_loss
        losses = function(rectified_flow(net, DOUBLE), rectified_flow(network(1), DOUBLE), *given).losses
        losses.sum().backward()
        return losses.detach(), gradients(net)

    given = [*inputs()[:2], torch.linspace(0.1, 0.9, 6, dtype=DOUBLE)]
    if loss == "dcm" and place == 2:
        pytest.skip("its times are drawn from numbers in [0, 1)")
    spoilt = [*given]
    spoilt[place] = bad(kind, given[place][:, None])[:, 0] if given[place].ndim == 1 else bad(kind, given[place])
    losses, found = run(spoilt)
    kept = torch.tensor([0, 1, 3, 4, 5])
    expected_losses, expected = run([one[kept] for one in given])
    assert losses[2] == 0
    torch.testing.assert_close(losses[kept], expected_losses)
    torch.testing.assert_close(found, expected)


def test_a_learned_weight_divides_the_loss_of_scm_and_learns_the_loss_itself():
    net = network()
    student, teacher = trigflow(net, DOUBLE), trigflow(network(1), DOUBLE)
    plain = scm_loss(student, teacher, *inputs(), scale=1.0)
    weight = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_()
    found = scm_loss(student, teacher, *inputs(), scale=3.0, log_weight=weight)
    torch.testing.assert_close(found.losses, 3 * (weight.exp() * plain.losses / 2 - weight))
    (of_weight,) = torch.autograd.grad(found.losses.sum(), weight, retain_graph=True)
    torch.testing.assert_close(of_weight, 3 * (weight.exp() * plain.losses / 2 - 1), msg="0 where e^-w is the loss")
    ours = torch.autograd.grad(found.losses.sum(), found.student)[0]
    theirs = torch.autograd.grad(plain.losses.sum(), plain.student)[0]
    torch.testing.assert_close(ours, 3 * weight.exp()[:, None] / 2 * theirs)


def test_a_bad_sample_teaches_the_weight_nothing():
    weight, (x0, noise, time) = torch.zeros(6, dtype=DOUBLE).requires_grad_(), inputs()
    found = scm_loss(trigflow(network(), DOUBLE), trigflow(network(1), DOUBLE), bad("nan", x0), noise, time, log_weight=weight)
    (gradient,) = torch.autograd.grad(found.losses.sum(), weight)
    assert gradient[2] == 0
    assert gradient.isfinite().all()
    assert (gradient[[0, 1, 3, 4, 5]] != 0).all()


def test_a_student_that_overflows_at_a_sample_is_seen_before_the_gradient():
    """Value without bound, tangent with one: only the value tells."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=DOUBLE))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            # the derivative of the last term is 0, the term is inf at the third sample
            return self.weight * torch.tanh(x) + self.weight / (x.detach()[:, :1] - spot).sign().abs() * 1e-3

    x0, noise, time = inputs()
    spot = (time.cos()[2] * x0[2] + time.sin()[2] * noise[2])[0]
    net = Steep()
    found = scm_loss(trigflow(net, DOUBLE), trigflow(network(1), DOUBLE), x0, noise, time)
    found.losses.sum().backward()
    assert found.good.tolist() == [True, True, False, True, True, True]
    assert net.weight.grad.isfinite().all()
    assert net.weight.grad.abs().max() > 0


@pytest.mark.parametrize("spoilt", ["start", "noise"])
def test_a_bad_sample_in_score_distillation_and_critic(spoilt):
    def run(rows: Tensor, damage: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        net, fake = network(), network(2)
        start, noise, time = (one[rows] for one in inputs())
        if damage:
            start, noise = (bad("nan", one) if name == spoilt else one for name, one in (("start", start), ("noise", noise)))
        made = simulate(rectified_flow(net, DOUBLE), start, numbers(1, 6, 2, seed=3)[:, rows], torch.full((1, len(rows)), 1.0))
        losses = dmd_loss(rectified_flow(fake, DOUBLE), rectified_flow(network(1), DOUBLE), made.x0, noise, time).losses
        losses.sum().backward()
        assert all(parameter.grad is None for parameter in fake.parameters()), "the gradient must not reach the fake score"
        critic_losses = critic_loss(rectified_flow(fake, DOUBLE), made.x0, noise, time).losses
        critic_losses.sum().backward()
        return torch.stack([losses, critic_losses]).detach(), gradients(net), gradients(fake)

    everything, kept = torch.arange(6), torch.tensor([0, 1, 3, 4, 5])
    losses, *found = run(everything, True)
    expected_losses, *expected = run(kept, False)
    assert (losses[:, 2] == 0).all()
    torch.testing.assert_close(losses[:, kept], expected_losses)
    torch.testing.assert_close(found, expected)


def test_score_distillation_pushes_from_fake_to_teacher():
    teacher, fake = trigflow(network(1), DOUBLE), trigflow(network(2), DOUBLE)
    samples = numbers(6, 2, seed=4).requires_grad_()
    found = dmd_loss(fake, teacher, samples, *inputs()[1:], scale=0.5)
    (gradient,) = torch.autograd.grad(found.losses.sum(), samples)
    torch.testing.assert_close(gradient, (found.fake - found.teacher) / found.weight[:, None])
    torch.testing.assert_close(found.weight, (samples - found.teacher).abs().mean(1))


def test_only_the_last_step_of_a_simulation_has_a_graph():
    calls = []

    def student(x: Tensor, time: Tensor) -> Tensor:
        calls.append((torch.is_grad_enabled(), time.clone()))
        return x * 0.5

    draws = torch.tensor([[0.7, 1.2], [1.0, 0.3]], dtype=DOUBLE)
    found = simulate(trigflow(student, DOUBLE), numbers(2, 2), numbers(2, 2, 2), draws)
    assert [grad for grad, _ in calls] == [False, False, True]
    torch.testing.assert_close(found.times, torch.tensor([[0.7, 1.2], [0.7, 0.3]], dtype=DOUBLE))
    assert calls[0][1].eq(math.pi / 2).all()
    with pytest.raises(ValueError, match="no fixed times"):
        simulate(trigflow(student, DOUBLE), numbers(2, 2), numbers(4, 2, 2))


def test_a_perfect_student_samples_the_data_in_any_number_of_steps():
    spread = 0.6

    def perfect(x: Tensor, time: Tensor) -> Tensor:  # x0 along the flow of a Gaussian: x scaled to its spread
        cos, sin = time.cos()[:, None], time.sin()[:, None]
        return (cos * x - spread / (cos**2 * spread**2 + sin**2).sqrt() * x) / sin

    for steps in range(3):
        found = sample(trigflow(perfect, DOUBLE), numbers(20000, 2), numbers(3, 20000, 2, seed=5), (1.5, 1.4, 1.0)[:steps])
        assert found.std() == pytest.approx(spread, rel=0.02)


def test_without_score_distillation_every_iteration_is_the_students():
    phases = [phase_at(iteration, 3, 5, dmd=False) for iteration in range(12)]
    assert all(phase.is_student for phase in phases)
    assert [phase.effective for phase in phases] == list(range(12))


# ---- the module ------------------------------------------------------------------------------------------------------------------------


class Points(Dataset):
    """Points on a ring."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        angle = torch.rand((), generator=generator) * 6.28
        return {"image": torch.stack([angle.cos(), angle.sin()]) * 1.35}


def points(batch_size: int = 8) -> DataLoader:
    return DataLoader(Points(), batch_size=batch_size)


def module(**settings) -> RCM:
    torch.manual_seed(3)
    defaults = {
        "wrapper": "trigflow", "tangent_warmup": 2, "student_every": 2, "learning_rate": 1e-2, "critic_learning_rate": 1e-2,
        "sample_steps": (1, 2), "consistency_weight": 1.0,
    }  # fmt: skip
    return RCM(RingTeacher(), NoiseMLP(width=16, depth=2), **(defaults | settings))


def fit(model: RCM, steps: int, **kwargs) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    trainer = tiny_trainer(max_steps=steps, limit_val_batches=0, log_every_n_steps=1, **kwargs)
    trainer.fit(model, points())
    return trainer


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith(f"{name}.")}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, bool]:
    return {name: any(not torch.equal(before[key], after[key]) for key in part(before, name)) for name in ("student", "critic", "average")}


def test_each_phase_changes_its_own_network_and_the_average_follows_the_student_alone():
    states: list[dict[str, Tensor]] = []

    class Keep(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            states.append(cloned_state(pl_module))

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            states.append(cloned_state(pl_module))

    model = module(pretrain_iterations=1)
    fit(model, 6, callbacks=[Keep()])
    steps = [changed(before, after) for before, after in pairwise(states)]
    assert steps[0] == {"student": True, "critic": True, "average": True}, "pretraining ends: critic and average start from the student"
    assert_state_dicts_equal(
        {key[8:]: v for key, v in part(states[1], "student").items()}, {key[7:]: v for key, v in part(states[1], "critic").items()}
    )
    student, critic = {"student": True, "critic": False, "average": True}, {"student": False, "critic": True, "average": False}
    assert steps[1:] == [student, student, student, critic, student]
    assert model.iteration == 5


def test_the_second_loss_is_added_to_the_first():
    """The gradient of an iteration with both losses is the sum of the gradients of each."""

    def gradient(**settings) -> dict[str, Tensor]:
        model, found = module(tangent_warmup=0, **settings), {}
        take = torch.optim.AdamW.step

        def keep(self, closure=None):
            found.update({name: parameter.grad.clone() for name, parameter in model.student.named_parameters()})
            return take(self, closure)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", keep)
            # both losses draw from one stream: a weight of 0 leaves the other one's numbers as they are
            fit(model, 1)
        return found

    both, first, second = gradient(dmd_weight=0.7), gradient(dmd_weight=1e-30), gradient(dmd_weight=0.7, consistency_weight=0.0)
    for name, value in both.items():
        torch.testing.assert_close(value, first[name] + second[name], rtol=1e-4, atol=1e-6)
        assert first[name].abs().max() > 1e-6
        assert second[name].abs().max() > 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"dmd_weight": 0.0},
        {"consistency": "dcm", "dmd_weight": 0.0},
        {"consistency": "none", "tangent_warmup": 0},
        {"tangent_mode": "discrete"},
        {"warmup_style": "scm", "adaptive_weight": True, "dmd_weight": 0.0},
    ],
    ids=["scm", "dcm", "dmd", "discrete", "original-scm"],
)
def test_baselines_train(settings):
    model = module(**settings)
    before = cloned_state(model)
    trainer = fit(model, 5)
    after = cloned_state(model)
    assert all(value.isfinite().all() for value in after.values())
    for name in ["student"] + ["weighting"] * ("adaptive_weight" in settings):
        assert any(not torch.equal(before[key], after[key]) for key in part(before, name)), name
    assert (model.critic is None) == ("dmd_weight" in settings)
    assert ("rcm/consistency_loss" in trainer.callback_metrics) == (settings.get("consistency") != "none")


class Overflowing(NoiseMLP):
    """Overflows at its n-th call with gradient, behind its first layer, for one sample of the batch."""

    def __init__(self, at: int) -> None:
        super().__init__(width=16, depth=2)
        self.calls, self.at = 0, at

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.at:
                x = x * torch.cat([torch.full((1, 1), 3e38), torch.ones(len(x) - 1, 1)])
        return super().forward(x, noise) * 10


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_network_that_overflows_in_the_differentiated_call_loses_the_iteration_and_not_the_run(at):
    """At 1 in the consistency loss, at 2 in the last step of the simulation, at 3 in the next student iteration."""
    torch.manual_seed(3)
    settings = {"wrapper": "trigflow", "tangent_warmup": 0, "student_every": 1, "learning_rate": 1e-2, "sample_steps": (1,)}
    model, seen = RCM(RingTeacher(), Overflowing(at), **settings), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            seen.append((trainer.callback_metrics["rcm/bad_gradients"].item(), cloned_state(pl_module)))

    fit(model, 3, callbacks=[Watch()])
    struck = (at - 1) // 2
    assert [bad for bad, _ in seen] == [float(step == struck) for step in range(3)]
    assert all(value.isfinite().all() for _, state in seen for value in state.values())
    assert any(not torch.equal(value, seen[2][1][key]) for key, value in seen[1][1].items()), "training goes on"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_bad_number_drops_all_gradients(wrong):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    assert drop_bad_gradients(parameters) == 0
    assert all((parameter.grad == 1).all() for parameter in parameters[:2])
    parameters[1].grad[0, 1] = wrong
    assert drop_bad_gradients(parameters) == 1
    assert all((parameter.grad == 0).all() for parameter in parameters[:2])
    assert parameters[2].grad is None
    assert drop_bad_gradients(parameters[2:]) == 0


def build():
    return module(pretrain_iterations=1, ema_profile="power", lr_warmup=3), points(), []


def test_dropout_is_off_in_training():
    losses = []
    for dropout in (0.0, 0.9):
        torch.manual_seed(3)
        model = RCM(RingTeacher(), NoiseMLP(width=16, depth=2, dropout=dropout), wrapper="trigflow", tangent_warmup=0, learning_rate=1e-2)
        losses.append(fit(model, 3).callback_metrics["rcm/df_dt"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kill_at", [1, 4, 5])
def test_a_killed_run_ends_like_the_whole_one(kill_at, tmp_path):
    from lit_methods.datamodules import RingDataModule

    def resumable():
        return build()[0], RingDataModule(num_train=80, num_val=8, batch_size=8), []

    whole, resumed = kill_and_resume(resumable, 8, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


class Repeatable(RCM):
    """Noise that depends on what is asked and on the place in the global batch, not on the process."""

    def _rows(self, shape, batch, generator, random) -> Tensor:
        count, seed = shape[batch], int(torch.randint(2**40, (), generator=generator))
        whole = [*shape[:batch], count * self.trainer.world_size, *shape[batch + 1 :]]
        drawn = random(*whole, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        return drawn.narrow(batch, self.global_rank * count, count)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._done)

    def normal(self, shape, like, generator) -> Tensor:
        return self._rows(shape, max(0, len(shape) - 2), generator, torch.randn).to(like.dtype)

    def uniform(self, shape, like, generator) -> Tensor:
        return self._rows(shape, len(shape) - 1, generator, torch.rand)


class InTurn(torch.utils.data.Sampler):
    """Rank r gets rows r * 4 to r * 4 + 3 of each global batch of 8."""

    def __init__(self, rank: int, world: int) -> None:
        self.order = [start + index for start in range(0, 64, 8) for index in range(rank * 8 // world, (rank + 1) * 8 // world)]

    def __iter__(self):
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def train_repeatable(world: int) -> dict[str, Tensor]:
    import torch.distributed as dist

    torch.manual_seed(3)
    rank = dist.get_rank() if world == 2 else 0
    settings = {"wrapper": "trigflow", "tangent_warmup": 2, "student_every": 2, "learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    model = Repeatable(RingTeacher(), NoiseMLP(width=16, depth=2), **settings, pretrain_iterations=1).double()
    loader = DataLoader(Points(), batch_size=8 // world, sampler=InTurn(rank, world), collate_fn=as_double)
    more = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False} if world == 2 else {}
    tiny_trainer(max_steps=7, limit_val_batches=0, **more).fit(model, loader)
    return cloned_state(model)


def as_double(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"image": torch.stack([one["image"] for one in samples]).double()}


def test_two_processes_end_like_one_at_the_same_global_batch():
    alone = train_repeatable(1)
    first, second = run_two_processes(train_repeatable, 2)
    assert_state_dicts_equal(first, second)
    assert_state_dicts_equal(first, alone, rtol=1e-7, atol=1e-9)


def draws_of_this_rank() -> Tensor:
    model = module()
    tiny_trainer(max_steps=1, limit_val_batches=0, devices=2, strategy="ddp").fit(model, points())
    return torch.randn(3, generator=model.generator())


def test_each_rank_draws_noise_of_its_own():
    first, second = run_two_processes(draws_of_this_rank)
    assert not torch.equal(first, second)


def test_bf16_trains_all_networks_and_keeps_the_losses_wide():
    model = module(tangent_warmup=1)
    before = cloned_state(model)
    seen = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            pl_module.student.layers[0].register_forward_hook(lambda *given: seen.append(given[2].dtype))

    trainer = fit(model, 6, precision="bf16-mixed", callbacks=[Watch()])
    after = cloned_state(model)
    assert changed(before, after) == {"student": True, "critic": True, "average": True}
    assert set(seen) == {torch.bfloat16}
    weights = [key for key in part(before, "student") if key.endswith("weight")]
    assert all(not torch.equal(before[key], after[key]) for key in weights), "a cached cast cut a graph"
    assert trainer.callback_metrics["rcm/consistency_loss"].isfinite()


def test_accumulated_batches_give_the_step_of_one_large_batch():
    def run(accumulate: int) -> dict[str, Tensor]:
        class Fixed(RCM):
            def normal(self, shape, like, generator) -> Tensor:
                rows = shape[0] if len(shape) < 3 else shape[1]
                whole = numbers(*(8 if size == rows else size for size in shape), seed=len(shape))
                return whole.narrow(0 if len(shape) < 3 else 1, self._batches * rows, rows).to(like.dtype)

        torch.manual_seed(3)
        settings = {"wrapper": "trigflow", "dmd_weight": 0.0, "learning_rate": 1e-2, "tangent_warmup": 2, "accumulate": accumulate}
        model = Fixed(RingTeacher(), NoiseMLP(width=16, depth=2), **settings)
        trainer = tiny_trainer(max_steps=3, limit_val_batches=0)
        trainer.fit(model, points(8 // accumulate))
        assert trainer.global_step == 3
        assert model.iteration == 3
        return cloned_state(model)

    assert_state_dicts_equal(run(2), run(1), rtol=1e-3, atol=1e-5)


def test_a_condition_reaches_student_and_teacher_and_guidance_needs_its_opposite():
    torch.manual_seed(0)
    teacher = SmallUNet(in_channels=1, channels=8, num_classes=4)
    nn.init.normal_(teacher.out[-1].weight, std=0.1)
    told: list[Tensor] = []
    teacher.classes.register_forward_hook(lambda _, given, __: told.append(given[0].clone()))
    model = RCM(teacher, condition="label", null_condition=3, guidance=5.0, tangent_warmup=1, student_every=2, learning_rate=1e-3)
    told.clear()
    batch = {"image": torch.randn(2, 1, 8, 8), "label": torch.tensor([0, 1])}
    loader = DataLoader([{key: value[index] for key, value in batch.items()} for index in range(2)], batch_size=2)
    trainer = tiny_trainer(max_epochs=4, limit_val_batches=1)
    trainer.fit(model, loader, loader)
    assert {tuple(labels.tolist()) for labels in told} == {(0, 1), (3, 3)}
    assert trainer.callback_metrics["rcm/val_sw2"].isfinite()
    assert model.dashboard_media()["rcm/samples"].pixels.shape[2] == 3


def test_the_teacher_is_neither_trained_nor_saved(tmp_path):
    torch.manual_seed(0)
    teacher = NoiseMLP(width=16, depth=2)
    before = copy.deepcopy(teacher.state_dict())
    model = RCM(teacher, tangent_warmup=0, student_every=2, learning_rate=1e-2)
    assert_state_dicts_equal(model.student.state_dict(), before)
    trainer = fit(model, 3)
    assert_state_dicts_equal(teacher.state_dict(), before)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"student", "critic", "average"}
    assert saved["rcm"]["done"] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"consistency": "cm"}, "consistency is 'cm'"),
        ({"consistency": "none"}, "score distillation alone"),
        ({"guidance": 5.0}, "no condition"),
        ({"sample_steps": (5,)}, "sample_steps"),
        ({"mid_times": (1.0, 1.5)}, "descending"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"dcm_skip": 49}, "dcm_skip"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"consistency": "dcm", "adaptive_weight": True}, "adaptive_weight"),
        ({"tangent_warmup": -1}, "tangent_warmup"),
        ({"fixed_times": True, "max_simulation_steps": 5}, "fixed_times"),
    ],
)
def test_contradictions_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        module(**settings)


def test_a_teacher_without_weights_needs_a_student():
    with pytest.raises(ValueError, match="give a student"):
        RCM(RingTeacher())


def test_the_student_learns_to_sample_the_ring():
    """Pretraining alone leaves one-step samples near the mean; consistency moves them to the ring."""
    average = {"ema_decay": 0.9, "ema_profile": "constant"}
    model = module(pretrain_iterations=60, pretrain_learning_rate=3e-3, tangent_warmup=40, learning_rate=3e-3, dmd_weight=0.0, **average)
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(Points(), batch_size=64)
    tiny_trainer(max_steps=60, limit_val_batches=0).fit(model, loader)
    noise = numbers(500, 2).float()
    start = model.sample(noise).norm(dim=1).mean()
    trainer = tiny_trainer(max_steps=240, limit_val_batches=0)
    trainer.fit(model, loader)
    assert model.sample(noise).norm(dim=1).mean() > start + 0.3
