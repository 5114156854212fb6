"""SLCT: its parts by hand, coupling, outliers, norms, resume, two processes, precision."""

import itertools
import math

import lightning.pytorch as pl
import pytest
import torch

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import SLCT, NoiseMLP, NonScalingLayerNorm
from lit_methods.callbacks import ExactResume, WeightEMA
from lit_methods.consistency_models.metrics import cauchy, pseudo_huber
from lit_methods.consistency_models.slct.core import adaptive_c, couple, early_diffusion_loss, is_early, remove_norm_scales
from lit_methods.datamodules import RingDataModule


def module(dropout=0.0, **kwargs):
    torch.manual_seed(3)
    return SLCT(NoiseMLP(width=16, depth=2, dropout=dropout), **{"s0": 2, "s1": 16, "learning_rate": 1e-2, **kwargs})


def ring(**kwargs):
    return RingDataModule(**{"num_train": 80, "num_val": 32, "batch_size": 8, "val_batch_size": 32, "impulses": 0.1, **kwargs})


def fit(model, data=None, callbacks=(), **kwargs):
    pl.seed_everything(0, verbose=False)
    trainer = tiny_trainer(callbacks=[*callbacks], **{"max_steps": 6, "limit_val_batches": 0, "log_every_n_steps": 1, **kwargs})
    trainer.fit(model, data or ring())
    return trainer


def test_c_falls_stage_by_stage_behind_the_first():
    found = [adaptive_c(levels, 10, 0.03456) for levels in (11, 21, 41, 81, 161, 321, 641)]
    assert found == pytest.approx([0.03456, 0.01364, 0.00614, 0.00277, 1.248e-3, 5.62e-4, 2.53e-4], rel=2e-3)


def test_the_early_region_is_that_of_the_smallest_levels():
    index = torch.arange(1, 11)
    assert index[is_early(index, 11)].tolist() == [1, 2]
    assert not is_early(index, 11, 0.0).any()
    assert is_early(index, 11, 1.0).all()


def test_an_empty_early_region_is_zero_with_a_finite_gradient():
    answer = torch.randn(3, 2, requires_grad=True)
    found = early_diffusion_loss(answer, torch.zeros(3, 2), torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert found.mean == 0
    found.mean.backward()
    assert torch.equal(answer.grad, torch.zeros(3, 2))


def test_the_early_loss_is_the_mean_over_its_samples():
    answer, x, sigma = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = early_diffusion_loss(answer, x, sigma, torch.tensor([True, False, True, False]))
    by_hand = [((answer[k] - x[k]) ** 2).mean() * (1 / sigma[k] ** 2 + 4) for k in (0, 2)]
    torch.testing.assert_close(found.mean, sum(by_hand) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_coupling_is_the_cheapest_of_all(dtype):
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(6, 2, 2, generator=generator).to(dtype) for _ in range(2))
    found = couple(x, noise)
    flat, drawn = x.double().flatten(1), noise.double().flatten(1)
    costs = [float((flat - drawn[list(order)]).square().sum()) for order in itertools.permutations(range(6))]
    assert float(found.cost) == pytest.approx(min(costs), rel=1e-5)
    assert float(found.identity_cost) == pytest.approx(costs[0], rel=1e-5)
    assert found.cost < found.identity_cost
    assert torch.equal(found.match.sort().values, torch.arange(len(found.match)))


def test_couplings_of_one_and_of_equal_rows():
    assert couple(torch.zeros(1, 3), torch.ones(1, 3)).match.tolist() == [0]
    assert sorted(couple(torch.zeros(4, 3), torch.ones(4, 3)).match.tolist()) == [0, 1, 2, 3]
    assert couple(torch.zeros(0, 3), torch.zeros(0, 3)).match.shape == (0,)


def test_what_cannot_be_coupled_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        couple(torch.full((2, 2), math.nan), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="as many of the same size"):
        couple(torch.zeros(2, 2), torch.zeros(3, 2))


def test_an_outlier_pulls_less_with_the_cauchy_metric():
    student = torch.zeros(2, 16, requires_grad=True)
    teacher = torch.stack([torch.full((16,), 0.03), torch.full((16,), 30.0)])

    def pull(metric):
        gradient = torch.autograd.grad(metric(student, teacher, 0.03).sum(), student)[0].norm(dim=1)
        return gradient[1] / gradient[0]

    assert pull(cauchy) < 0.01 < pull(lambda a, b, c: pseudo_huber(a, b, c, "mean"))


def test_norms_lose_their_scale_and_keep_their_bias():
    nn = torch.nn
    network = nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.LayerNorm(4, eps=1e-3)), nn.LayerNorm(4, elementwise_affine=False))
    with torch.no_grad():
        network[0].weight.fill_(3.0)
        network[0].bias.fill_(0.5)
    assert remove_norm_scales(network) == 2
    assert isinstance(network[1][0], NonScalingLayerNorm)
    assert type(network[2]) is nn.LayerNorm
    assert network[1][0].eps == 1e-3
    assert [name for name, _ in network.named_parameters()] == ["0.bias", "1.0.bias"]
    x = torch.randn(5, 4) * 7
    torch.testing.assert_close(network[0](x), nn.functional.layer_norm(x, (4,)) + 0.5)


def test_the_module_takes_scales_away_unless_told_otherwise():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(2)

        def forward(self, x, noise):
            return self.norm(x)

    assert isinstance(SLCT(Normed()).network.norm, NonScalingLayerNorm)
    assert isinstance(SLCT(Normed(), remove_scales=False).network.norm, torch.nn.LayerNorm)


def test_noise_is_matched_with_the_data_of_the_batch():
    plain, coupled = module(coupling="none", total_steps=6), module(total_steps=6)
    x = torch.randn(16, 2)
    for model in (plain, coupled):
        fit(model)
    before, after = plain.draw(x, 4), coupled.draw(x, 4)
    assert torch.equal(after.noise, before.noise[couple(x, before.noise).match])
    assert torch.equal(after.index, before.index)
    assert coupled._cost_ratio < 1


def test_the_loss_is_the_sum_that_the_paper_has():
    model = module(total_steps=6, diffusion_fraction=0.6, c_initial=0.2, c_slope=None)
    fit(model)
    x = torch.randn(12, 2)
    drawn = model.draw(x, 0)
    with torch.no_grad():
        answer = model(x + drawn.upper[:, None] * drawn.noise, drawn.upper)
        target = model(x + drawn.lower[:, None] * drawn.noise, drawn.lower)
    gap = (answer - target).square().mean(1)
    pair = ((1 + gap / (2 * 0.2**2)).log() / (drawn.upper - drawn.lower)).mean()
    inside = drawn.count - 1 - drawn.index >= int(0.4 * drawn.count)
    assert 0 < inside.sum() < 12
    early = ((answer - x).square().mean(1) * (1 / drawn.upper**2 + 4))[inside].mean()
    model.draw = lambda *_: drawn
    model.log = model.log_dict = lambda *_, **__: None
    torch.testing.assert_close(model.training_step({"image": x}, 0).detach(), pair + 5 * early, rtol=1e-3, atol=1e-4)


def test_what_is_logged():
    trainer = fit(module())
    found = trainer.callback_metrics
    assert {f"consistency/{name}" for name in ("c", "pair_loss", "early_loss", "early_samples", "outlier", "coupling")} <= set(found)
    assert found["consistency/coupling"] < 1
    assert found["consistency/c"] == pytest.approx(adaptive_c(17, 2))
    total = found["consistency/pair_loss"] + 5 * found["consistency/early_loss"]
    torch.testing.assert_close(found["consistency/loss"], total)
    assert fit(module(coupling="none")).callback_metrics["consistency/coupling"] == 1


@pytest.mark.parametrize("kill_at", [3, 10])
def test_a_killed_run_ends_like_an_uninterrupted_one(kill_at, tmp_path):
    def build():
        return module(dropout=0.3), ring(), [ExactResume(), WeightEMA(0.9)]

    whole, resumed = kill_and_resume(build, 14, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def test_half_precision_trains():
    model = module()
    loss = fit(model, precision="bf16-mixed").callback_metrics["consistency/loss"]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(fit(module()).callback_metrics["consistency/loss"]), rel=0.3)


def two(accumulate, devices):
    kwargs = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    model = module(diffusion_weight=0.0)  # the mean over early samples is each rank's own
    fit(model, accumulate_grad_batches=accumulate, max_steps=5, **kwargs)
    return cloned_state(model)


def test_two_processes_end_like_one():
    torch.set_num_threads(1)
    both, other = run_two_processes(two, 1, 2)
    assert_state_dicts_equal(other, both)
    assert_state_dicts_equal(both, two(2, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"coupling": "sinkhorn"}, "one of ot, none"),
        ({"coupling_size": 0}, r"null for the whole batch, in \[1, inf\)"),
        ({"diffusion_fraction": 2.0}, "share"),
        ({"diffusion_weight": -1.0}, r"give a number in \[0, inf\)"),
        ({"c_initial": 0.0}, r"null for 0\.00054 sqrt\(D\), in \(0, inf\)"),
    ],
)
def test_wrong_arguments_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        module(**wrong)
