"""EPG: both stages, their networks, views and samplers; resume, two processes, precision, accumulation."""

import copy
import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import (
    AugmentedViews,
    EPGFinetune,
    EPGPretrain,
    PixelMLPDecoder,
    PixelMLPEncoder,
    PixelViTDecoder,
    PixelViTEncoder,
    ShiftedViews,
)
from lit_methods.averages import ema_update
from lit_methods.callbacks import ExactResume, WeightEMA
from lit_methods.consistency_models.curricula import ect_lower, ect_stage
from lit_methods.consistency_models.epg.core import (
    consistency_temperature,
    consistency_tuning_loss,
    cosine_info_nce,
    denoising_weight,
    interval_guidance,
    inverse_distance,
    nearest_level,
    neighbour_labels,
    pretrain_levels,
    pretrain_loss,
)
from lit_methods.consistency_models.epg.networks import projection_head, projection_head_of
from lit_methods.consistency_models.epg.views import gaussian_blur, luma, random_crop, turn_hue
from lit_methods.consistency_models.levels import karras_levels
from lit_methods.consistency_models.metrics import detached_pseudo_huber, pseudo_huber
from lit_methods.consistency_models.sampling import denoise_sample
from lit_methods.datamodules import GenerativeDigitsDataModule
from lit_methods.optim import warmup_cosine

STAGE1 = {"s0": 2, "s1": 16, "projector_width": 16, "projector_dim": 8, "base_resolution": 32, "warmup_steps": 2, "learning_rate": 1e-2}
STAGE2 = {"base_resolution": 32, "warmup_steps": 2, "learning_rate": 1e-2, "sample_steps": 3, "num_classes": 10}
CM = {"mode": "consistency", "ect_first": 3, "ect_length": 2, "sample_times": (0.5,), "schedule": "constant"}


def pretraining(cls=EPGPretrain, **kwargs):
    torch.manual_seed(3)
    return cls(PixelMLPEncoder(width=16, depth=2), ShiftedViews(), **(STAGE1 | kwargs))


def tuning(cls=EPGFinetune, dropout=0.0, **kwargs):
    torch.manual_seed(4)
    decoder = PixelMLPDecoder(width=16, encoder_width=16, depth=2, dropout=dropout)
    return cls(PixelMLPEncoder(width=16, depth=2), decoder, **(STAGE2 | kwargs))


def digits(**kwargs):
    return GenerativeDigitsDataModule(**{"image_size": 8, "num_train": 80, "batch_size": 8, "val_batch_size": 32, **kwargs})


def fit(model, data=None, callbacks=(), **kwargs):
    pl.seed_everything(0, verbose=False)
    trainer = tiny_trainer(callbacks=[*callbacks], **{"max_steps": 4, "limit_val_batches": 0, **kwargs})
    trainer.fit(model, data or digits())
    return trainer


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """Checkpoint of a short stage 1."""
    path = tmp_path_factory.mktemp("epg") / "stage1.ckpt"
    fit(pretraining()).save_checkpoint(path)
    return str(path)


# ---- the maths beside the golden vectors -----------------------------------------------------------------------------------------------


def test_further_keys_are_negatives_and_rows_without_a_key_are_refused():
    query, keys = torch.randn(3, 5), torch.randn(7, 5)
    losses = cosine_info_nce(query, keys, 0.3)
    for row in range(3):
        likeness = torch.nn.functional.cosine_similarity(query[row][None], keys) / 0.3
        torch.testing.assert_close(losses[row], -likeness.log_softmax(0)[row])
    with pytest.raises(ValueError, match="own key first"):
        cosine_info_nce(keys, query, 0.3)


def test_contrast_stays_wide_under_autocast():
    query, keys = torch.randn(64, 32), torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = cosine_info_nce(query, keys, 0.1)
    assert torch.equal(narrow, cosine_info_nce(query, keys, 0.1))


def test_keys_come_from_where_the_paper_takes_them():
    """The consistency never asks the target, and the key of a contrast never the online encoder: their calls are counted."""
    asked = {"online": [], "target": [], "head": 0}

    def encoder(name):
        def feature(u, tau):
            asked[name].append(round(float(tau[0].mul(4).exp()), 4))
            return u.flatten(1)

        return feature

    def head(h):
        asked["head"] += 1
        return h

    x, levels = torch.randn(4, 1, 2, 2), pretrain_levels(3, 5, shift=0.5)
    pretrain_loss(encoder("online"), head, encoder("target"), nn.Identity(), x, x, x, x, levels)
    high, low, clean = (round(level, 4) for level in levels)
    assert asked == {"online": [clean, clean, low, high], "target": [clean, clean], "head": 2}
    assert high == pytest.approx(0.5 * float(karras_levels(5)[3]), rel=1e-3)
    assert clean == 0.001


def test_the_detached_distance_has_twice_the_gradient_of_pseudo_huber():
    a, b = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    one, two = (torch.autograd.grad(metric(a, b, 0.06).sum(), a)[0] for metric in (detached_pseudo_huber, pseudo_huber))
    torch.testing.assert_close(one, 2 * two)


def test_pairs_come_closer_with_each_stage():
    t = torch.tensor([0.002, 0.1, 1.0, 40.0])
    assert torch.equal(ect_lower(t, 0), torch.full_like(t, 0.002))
    gaps = [t - ect_lower(t, stage) for stage in (4, 5, 6)]
    assert all(torch.all(b[1:] < a[1:]) for a, b in pairwise(gaps))
    assert all(gap[0] == 0 for gap in gaps)
    assert [ect_stage(step, 0, 5, 2) for step in (0, 4, 5, 6, 7)] == [0, 0, 1, 1, 2]


def test_equal_levels_weigh_nothing_and_give_no_nan():
    t, x = torch.tensor([0.5, 0.002]), torch.randn(2, 3, requires_grad=True)
    assert torch.equal(inverse_distance(t, t), torch.zeros(2))
    found = consistency_tuning_loss(lambda x, s: 2 * x, lambda x, s: x, x, torch.randn(2, 3), t, t)
    found.consistency.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_warm_up_compares_with_the_image_and_leaves_the_contrast_out():
    x, t = torch.randn(3, 4), torch.tensor([1.0, 2.0, 3.0])
    found = consistency_tuning_loss(lambda x, s: 2 * x, None, x, torch.zeros(3, 4), t, t - 0.5, warmup=True, perceptual=nn.Identity())
    assert torch.equal(found.teacher, x)
    assert torch.equal(found.perceptual, torch.zeros(3))
    torch.testing.assert_close(found.consistency, 2 * detached_pseudo_huber(2 * x, x, 0.06))


def test_sigma_is_snapped_to_the_nearest_level():
    levels, sigma = karras_levels(40), torch.rand(500, dtype=torch.float64).mul(14).sub(7).exp()
    index = nearest_level(sigma, levels)
    assert torch.equal(index, (sigma[:, None] - levels).abs().argmin(1))
    weight = denoising_weight(torch.tensor([0, 1, 39]), levels)
    torch.testing.assert_close(weight, 1 / torch.stack([levels[1] - levels[0], levels[1] - levels[0], levels[39] - levels[38]]))


def test_temperatures_and_rates():
    assert consistency_temperature("constant", 0.1, 0.5, 3.0, 0.5) == 0.1
    assert consistency_temperature("interpolated", 0.1, 0.5, 80.0, 0.0) == pytest.approx(0.5)
    assert consistency_temperature("interpolated", 0.1, 0.5, 0.002, 0.9) == pytest.approx(0.1)
    assert consistency_temperature("cosine", 0.1, 0.5, 80.0, 0.5) == pytest.approx(0.3)
    assert [warmup_cosine(step, 12, 4) for step in (0, 3, 4, 8, 12)] == pytest.approx([0.25, 1, 1, 0.5, 0])
    assert warmup_cosine(100, 12, 4, final=1) == 1


def test_neighbours_vote_without_the_image_itself():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]])
    labels = torch.tensor([7, 0, 0, 8, 1, 1])
    assert neighbour_labels(bank, bank, labels, 2, leave_out=True)[[0, 3]].tolist() == [0, 1]
    assert neighbour_labels(bank, bank, labels, 1, leave_out=False).tolist() == labels.tolist()


# ---- samplers --------------------------------------------------------------------------------------------------------------------------

SPREAD = 0.5  # of normal data, for which the best denoiser and the path are known


def exact(x, sigma):
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def test_solvers_follow_the_path_of_normal_data():
    start, right = torch.randn(64, 3, dtype=torch.float64) * 80, SPREAD / math.sqrt(SPREAD**2 + 80**2)
    errors = {}
    for solver in ("heun", "euler"):
        for count in (32, 64):
            end = denoise_sample(exact, start, karras_levels(count).flip(0).tolist(), solver)
            errors[solver, count] = float((end / (right * start) - 1).abs().max())
    assert errors["heun", 64] < errors["heun", 32] / 3 < errors["euler", 32] / 10
    assert errors["euler", 64] < 0.6 * errors["euler", 32]


def test_the_sde_ends_with_the_spread_of_the_data():
    start = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 80
    levels = karras_levels(200).flip(0).tolist()
    end = denoise_sample(exact, start, levels, "sde", torch.Generator().manual_seed(1))
    assert float(end.std()) == pytest.approx(SPREAD, rel=0.03)
    assert abs(float((start * end).mean() / start.std() / end.std())) < 0.05, "the start is forgotten"


def test_wrong_levels_are_refused():
    with pytest.raises(ValueError, match="descending"):
        denoise_sample(exact, torch.zeros(1, 1), [1.0, 2.0])


def test_guidance_inside_its_interval_takes_the_papers_75_calls():
    calls = []
    labels = torch.tensor([1, 2])

    def denoise(x, labels):
        calls.append(labels.tolist())
        return x + labels[:, None]

    x = torch.zeros(2, 1)
    guided = interval_guidance(denoise, x, 1.0, labels, 9, 3.0, (0.19, 1.61))
    torch.testing.assert_close(guided, torch.tensor([[9 + 3 * (1 - 9.0)], [9 + 3 * (2 - 9.0)]]))
    calls.clear()
    denoise_sample(
        lambda x, sigma: interval_guidance(denoise, x, sigma, labels, 9, 3.0, (0.19, 1.61)), x + 80, karras_levels(32).flip(0).tolist()
    )
    assert len(calls) == 75


# ---- networks --------------------------------------------------------------------------------------------------------------------------


def vit(depth=2, image_size=8):
    torch.manual_seed(0)
    encoder = PixelViTEncoder(image_size=image_size, patch_size=4, in_channels=1, width=16, depth=depth, heads=2)
    return encoder, PixelViTDecoder(image_size=image_size, patch_size=4, in_channels=1, width=24, encoder_width=16, depth=depth, heads=2)


def test_the_transformer_begins_at_zero_and_sees_everything():
    encoder, decoder = vit()
    x, noise, known = torch.randn(2, 1, 8, 8), torch.tensor([0.3, -0.2]), torch.randn(2, 16)
    encoded = encoder(x, noise)
    assert encoded.tokens.shape == (2, 2 + 4, 16)
    assert torch.equal(encoded.feature, encoded.tokens[:, 0])
    assert torch.equal(decoder(encoded), torch.zeros(2, 1, 8, 8))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        base = decoder(encoder(x, noise, known), known)
        others = (
            decoder(encoder(x, noise, -known), known),
            decoder(encoder(x, noise, known), -known),
            decoder(encoder(x, -noise, known), known),
            decoder(encoder(x.roll(1, 0), noise, known), known),
        )
    assert all((base - other).abs().max() > 1e-3 for other in others)


def test_the_last_block_of_the_encoder_is_joined_first():
    encoder, decoder = vit(depth=3)
    seen = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    encoded = encoder(torch.randn(2, 1, 8, 8), torch.zeros(2))
    decoder(encoded)
    assert [next(i for i, one in enumerate(encoded.blocks) if one is skip) for skip in seen] == [2, 1, 0]
    with pytest.raises(ValueError, match="same depth"):
        vit(depth=2)[1](encoded)


def test_patches_go_back_where_they_came_from():
    _, decoder = vit()
    x = torch.arange(64.0).view(1, 1, 8, 8)
    decoder.out = nn.Identity()
    decoder.norm = nn.Identity()
    decoder.blocks = nn.ModuleList()
    decoder.inp = nn.Identity()
    patches = torch.stack([x[0, 0, row : row + 4, column : column + 4].flatten() for row in (0, 4) for column in (0, 4)])

    class Given:
        blocks, time, tokens = (), torch.zeros(1, 16), torch.cat([torch.zeros(2, 16), patches])[None]

    assert torch.equal(decoder(Given()), x)


def test_a_head_is_rebuilt_from_its_weights():
    head = projection_head(6, 5, 4, 3)
    head(torch.randn(8, 6))
    again = projection_head_of(head.state_dict()).eval()
    x = torch.randn(3, 6)
    assert torch.equal(again(x), head.eval()(x))
    assert not any(name.endswith("bias") and parameter.ndim == 2 for name, parameter in head.named_parameters())
    with pytest.raises(ValueError, match="EPGPretrain"):
        projection_head_of({"bias": torch.zeros(3)})


# ---- views -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("views", "channels"), [(ShiftedViews(), 1), (AugmentedViews(), 3)], ids=["shifted", "augmented"])
def test_views_follow_from_their_generator_alone(views, channels):
    images = torch.rand(6, channels, 16, 16) * 2 - 1
    before = torch.get_rng_state()
    one, two = views(images, torch.Generator().manual_seed(1))
    again, _ = views(images, torch.Generator().manual_seed(1))
    other, _ = views(images, torch.Generator().manual_seed(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, two)
    assert one.shape == two.shape == images.shape
    assert one.min() >= -1
    assert torch.equal(torch.get_rng_state(), before)


def test_shifted_views_move_dim_and_drop():
    images = torch.full((400, 1, 6, 6), -1.0)
    images[:, :, 2, 3] = 0.5
    view = ShiftedViews(shift=1, gain=0.0, drop=0.0).view(images, False, torch.Generator().manual_seed(0))
    place = view.flatten(1).argmax(1)
    assert set(place.tolist()) == {6 * row + column for row in (1, 2, 3) for column in (2, 3, 4)}
    assert torch.equal(view.amax((1, 2, 3)), torch.full((400,), 0.5))
    dim = ShiftedViews(shift=0, gain=0.2, drop=0.0).view(images, False, torch.Generator().manual_seed(0))[:, 0, 2, 3] + 1
    assert 1.2 <= dim.min() < 1.25
    assert 1.75 < dim.max() <= 1.8
    holes = ShiftedViews(shift=0, gain=0.0, drop=0.1).view(images + 1.2, False, torch.Generator().manual_seed(0))
    assert float((holes == -1).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_augmented_views_with_nothing_to_do_are_the_image():
    views = AugmentedViews(min_crop=1.0, jitter=0.0, grey=0.0, blur=(0.0, 0.0), solarise=(0.0, 0.0), mirror=0.0)
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    square = views.view(images, False, torch.Generator().manual_seed(0))
    torch.testing.assert_close(square, images, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="3 colours"):
        views(images[:, :1], torch.Generator())


def test_hue_keeps_brightness_blur_keeps_the_mean_and_crops_enlarge():
    x = torch.rand(4, 3, 16, 16) * 0.5 + 0.25
    turned = turn_hue(x, torch.full((4,), 0.25))
    torch.testing.assert_close(luma(turned), luma(x), atol=2e-3, rtol=0)
    torch.testing.assert_close(turn_hue(x, torch.ones(4)), x, atol=1e-4, rtol=0)
    assert (turned - x).abs().max() > 0.1
    blurred = gaussian_blur(x, torch.tensor([0.01, 0.5, 1.0, 2.0]))
    torch.testing.assert_close(blurred[0], x[0])
    rough = blurred.diff(dim=3).abs().mean((1, 2, 3))
    assert torch.all(rough.diff() < 0)
    ramp = torch.linspace(0, 1, 64).expand(200, 1, 64, 64)
    width = (lambda crop: crop[:, 0, 32, -1] - crop[:, 0, 32, 0])(random_crop(ramp, 0.08, torch.Generator().manual_seed(0)))
    assert 0.2 < width.min() < 0.4
    assert width.max() > 0.95


# ---- both modules ----------------------------------------------------------------------------------------------------------------------

ARMS = {"pretrain": None, "denoise": {"guidance": 2.0}, "consistency": CM}


def module(arm, stage1, **kwargs):
    return pretraining(**kwargs) if arm == "pretrain" else tuning(encoder_ckpt=stage1, **(ARMS[arm] | kwargs))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kill_at", [3, 11])
def test_a_killed_run_ends_like_an_uninterrupted_one(arm, kill_at, stage1, tmp_path):
    def build():
        drop = {} if arm == "pretrain" else {"dropout": 0.3}
        average = [] if arm == "pretrain" else [WeightEMA(0.9)]
        return module(arm, stage1, **drop), digits(), [ExactResume(), *average]

    whole, resumed = kill_and_resume(build, 13, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_and_keeps_losses_wide(arm, precision, stage1):
    first = fit(module(arm, stage1), max_steps=2).callback_metrics["epg/loss"]
    model = module(arm, stage1)
    second = fit(model, max_steps=2, precision=precision, limit_val_batches=1, check_val_every_n_epoch=None, val_check_interval=2)
    loss = second.callback_metrics["epg/loss"]
    assert loss.dtype == torch.float32
    assert loss == pytest.approx(float(first), rel=0.5)
    assert all(value.isfinite() for value in second.callback_metrics.values())


class Fixed:
    """Draws that follow from the image, whichever process sees it; and steps that don't blow up rounding, as Adam's do."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    @staticmethod
    def image_noise(x):
        return torch.sin(50 * x.flatten(1).cumsum(1)).view_as(x)

    @staticmethod
    def image_sigma(x):
        return x.flatten(1).sum(1).sin().exp()


class FixedPretrain(Fixed, EPGPretrain):
    def draw_noise(self, x, batch_idx):
        return Fixed.image_noise(x)

    def draw_views(self, batch, batch_idx):
        return batch["image"].roll(1, 2), batch["image"].roll(1, 3) * 0.9


class FixedFinetune(Fixed, EPGFinetune):
    def draw(self, x, batch_idx):
        sigma = Fixed.image_sigma(x)
        lower = ect_lower(sigma, self.stage(self.trainer.global_step) + 2)
        return super().draw(x, batch_idx)._replace(noise=Fixed.image_noise(x), sigma=sigma, lower=lower)


def two(arm, stage1, devices, batch_size):
    kwargs = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    model = (
        pretraining(FixedPretrain, projector_layers=1)  # without batch norm, which needs GPUs to be synchronised
        if arm == "pretrain"
        else tuning(FixedFinetune, encoder_ckpt=stage1, class_dropout=0.0, **CM)
    )
    fit(model, digits(batch_size=batch_size), limit_val_batches=1, check_val_every_n_epoch=None, val_check_interval=4, **kwargs)
    index = model.draw_index(17, 5) if arm == "pretrain" else 0
    metrics = {name: float(value) for name, value in model.trainer.callback_metrics.items() if "val_" in name}
    return cloned_state(model), index, metrics


@pytest.mark.parametrize("arm", ["pretrain", "consistency"])
def test_two_processes_with_half_the_batch_end_like_one(arm, stage1):
    """Negatives are those of the global batch, and the level index is the same everywhere."""
    torch.set_num_threads(1)
    (both, index, metrics), (other, other_index, other_metrics) = run_two_processes(two, arm, stage1, 2, 8)
    assert_state_dicts_equal(other, both)
    assert (index, metrics) == (other_index, other_metrics)
    one, lone_index, _ = two(arm, stage1, 1, 16)
    assert index == lone_index
    assert_state_dicts_equal(both, one, atol=1e-6, rtol=1e-5)
    start = cloned_state(module(arm, stage1))
    assert not torch.equal(one["encoder.layers.1.0.weight"], start["encoder.layers.1.0.weight"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_target_levels_and_stage_go_by_optimiser_steps(accumulate, stage1):
    class Watch(pl.Callback):
        def __init__(self):
            self.students, self.targets, self.levels = [], [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.fit_loop._should_accumulate():
                return
            self.students.append([parameter.detach().clone() for parameter in pl_module.encoder.parameters()])
            self.targets.append([parameter.detach().clone() for parameter in pl_module.target_encoder.parameters()])
            self.levels.append(pl_module.num_levels(trainer.global_step - 1))

    model, watch = pretraining(), Watch()
    average = [parameter.detach().clone() for parameter in model.target_encoder.parameters()]
    fit(model, accumulate_grad_batches=accumulate, callbacks=[watch])
    assert watch.levels == [3, 5, 5, 9]
    for student, target in zip(watch.students, watch.targets, strict=True):
        ema_update(average, student, 0.99)
        for mine, theirs in zip(average, target, strict=True):
            torch.testing.assert_close(theirs, mine)
    tuned = module("consistency", stage1)
    fit(tuned, accumulate_grad_batches=accumulate, max_steps=6, log_every_n_steps=1)
    assert float(tuned.trainer.callback_metrics["epg/stage"]) == 3.0


def test_a_resumed_run_keeps_its_schedule_though_it_trains_longer(tmp_path):
    fit(pretraining()).save_checkpoint(tmp_path / "a.ckpt")
    longer = pretraining()
    tiny_trainer(max_steps=6, limit_val_batches=0).fit(longer, digits(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert longer.total_steps == 4
    with pytest.raises(ValueError, match="needs an end"):
        fit(pretraining(), max_steps=-1, max_epochs=-1)


def test_draws_leave_the_global_generators_alone_and_differ_between_batches(stage1):
    for arm in ("pretrain", "consistency"):
        model = module(arm, stage1)
        fit(model, max_steps=1)
        before, x = torch.get_rng_state(), torch.zeros(4, 1, 8, 8)
        batch = {"image": x, "label": torch.zeros(4, dtype=torch.int64)}
        if arm == "pretrain":
            noises = [model.draw_noise(x, number) for number in (0, 1)]
            model.draw_views(batch, 0)
            assert len({model.draw_index(1000, number) for number in range(8)}) > 5
        else:
            noises = [model.draw(x, number).noise for number in (0, 1)]
            model._labels(batch, 0)
        assert not torch.equal(*noises)
        assert torch.equal(torch.get_rng_state(), before)


def test_every_index_below_the_last_is_drawn():
    model = pretraining()
    fit(model, max_steps=1)
    assert {model.draw_index(5, number) for number in range(100)} == {1, 2, 3, 4}


def test_what_stage_one_logs_and_shows():
    trainer = fit(pretraining(), log_every_n_steps=2, max_steps=4, limit_val_batches=2, check_val_every_n_epoch=None, val_check_interval=4)
    pairs = [f"{sign}_{what}" for sign in ("positive", "negative") for what in ("contrastive", "consistency")]
    probes = [f"val_{what}_{sigma}" for what in ("match", "knn") for sigma in ("0.1", "0.5", "2")]
    names = ["loss", "contrastive", "consistency", "levels", "temperature", "grad_norm", "val_knn_clean", *pairs, *probes]
    assert set(trainer.callback_metrics) == {f"epg/{name}" for name in names}
    model = trainer.lightning_module
    assert model.dashboard_media()["epg/paths"].pixels.shape == (528, 528, 3)
    assert model.forward(torch.zeros(2, 1, 8, 8), torch.tensor([0.1, 2.0])).shape == (2, 16)
    assert trainer.predict(model, digits(num_samples=5))[0]["feature"].shape == (5, 16)
    assert "epg/test_knn_clean" in trainer.test(model, digits(val_batch_size=400), verbose=False)[0]


def test_the_contrast_alone_is_another_training_and_logs_no_consistency():
    alone = fit(pretraining(consistency_weight=0.0), log_every_n_steps=2)
    assert float(alone.callback_metrics["epg/consistency"]) == 0
    assert "epg/positive_consistency" not in alone.callback_metrics
    both = fit(pretraining())
    assert not torch.equal(alone.lightning_module.encoder.layers[0][0].weight, both.lightning_module.encoder.layers[0][0].weight)


def test_the_batch_may_bring_its_views():
    model = pretraining()
    model.views = None
    with pytest.raises(ValueError, match="view1 and view2"):
        fit(model)
    images = torch.randn(3, 1, 8, 8)
    assert model.draw_views({"image": images, "view1": images + 1, "view2": images + 2}, 0)[1] is not images


# ---- stage 2 ---------------------------------------------------------------------------------------------------------------------------


def test_the_encoder_of_stage_one_is_loaded_and_the_rest_is_new(stage1):
    saved = torch.load(stage1, weights_only=True)["state_dict"]
    model = module("consistency", stage1)
    before = cloned_state(model.decoder)
    fit(model, max_steps=1, callbacks=[first := FirstWeights()])
    assert_state_dicts_equal(first.encoder, {k.removeprefix("encoder."): v for k, v in saved.items() if k.startswith("encoder.")})
    assert_state_dicts_equal(first.decoder, before)
    frozen = model.perceptual.module
    assert_state_dicts_equal(cloned_state(frozen["encoder"]), first.encoder)
    projector = {k.removeprefix("projector."): v for k, v in saved.items() if k.startswith("projector.")}
    assert_state_dicts_equal(cloned_state(frozen["projector"]), projector)
    assert not any("perceptual" in name or "projector" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    assert not frozen.training
    image = torch.randn(4, 1, 8, 8, requires_grad=True)
    model.embed(image).sum().backward()
    assert image.grad.abs().sum() > 0


class FirstWeights(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.encoder, self.decoder = cloned_state(pl_module.encoder), cloned_state(pl_module.decoder)


def test_an_encoder_with_other_names_is_partly_loaded_and_one_of_another_shape_refused(stage1, caplog):
    torch.manual_seed(0)
    deeper = EPGFinetune(PixelMLPEncoder(width=16, depth=3), PixelMLPDecoder(width=16, encoder_width=16), encoder_ckpt=stage1, **STAGE2)
    with caplog.at_level("INFO"):
        fit(deeper, max_steps=1)
    assert "4 missing (layers.2.0.weight" in caplog.text
    wider = EPGFinetune(PixelMLPEncoder(width=32, depth=2), PixelMLPDecoder(width=16, encoder_width=32), encoder_ckpt=stage1, **STAGE2)
    with pytest.raises(ValueError, match="another encoder"):
        fit(wider, max_steps=1)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fit(tuning(encoder_ckpt="nowhere.ckpt"), max_steps=1)


def test_the_contrast_changes_the_training_and_its_keys_have_no_gradient(stage1):
    with_contrast, without = (fit(module("consistency", stage1, **more)) for more in ({}, {"perceptual_weight": 0.0}))
    assert without.lightning_module.perceptual is None
    assert not torch.equal(with_contrast.lightning_module.decoder.layers[1].weight, without.lightning_module.decoder.layers[1].weight)


def test_the_boundary_lies_at_the_shifted_smallest_level(stage1):
    model = module("consistency", stage1)
    x = torch.randn(3, 1, 8, 8)
    low = 0.002 * 8 / 32
    assert torch.equal(model(x, torch.full((3,), low), torch.tensor([0, 1, 2])), x)
    assert not torch.equal(model(x, torch.full((3,), 0.002), torch.tensor([0, 1, 2])), x)


def test_denoising_levels_are_snapped_and_weighed_before_the_shift():
    model = tuning(num_levels=30)
    fit(model, max_steps=1)
    drawn, levels = model.draw(torch.zeros(500, 1, 8, 8), 3), karras_levels(30).float()
    index = (drawn.sigma[:, None] == levels).int().argmax(1)
    torch.testing.assert_close(levels[index], drawn.sigma)
    torch.testing.assert_close(drawn.weight, denoising_weight(index, levels))
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    batch = {"image": torch.zeros(500, 1, 8, 8), "label": torch.zeros(500, dtype=torch.int64)}
    model.log = model.log_dict = lambda *_, **__: None
    model.training_step(batch, 3)
    ((u, noise, _),) = seen
    sigma = drawn.sigma * 8 / 32
    torch.testing.assert_close(noise, sigma.log() / 4)
    scale = (sigma**2 + 0.25).rsqrt()[:, None, None, None]
    torch.testing.assert_close(u, scale * (model.pixels(batch["image"]) + sigma[:, None, None, None] * drawn.noise))


def test_some_labels_are_withheld_in_training_alone():
    model = tuning(class_dropout=0.3)
    fit(model, max_steps=1)
    labels = torch.arange(10).repeat(300)
    (found,) = model._labels({"label": labels}, 0)
    assert float((found == 10).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(found[found != 10], labels[found != 10])
    assert torch.equal(model._labels({"label": labels})[0], labels)
    with pytest.raises(ValueError, match="no label"):
        model._labels({"image": labels})


def test_gradients_are_clipped_when_the_warm_up_is_over():
    class Norms(pl.Callback):
        def __init__(self):
            self.norms = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            found = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            if found:
                self.norms.append(float(torch.stack(found).norm()))

    norms = Norms()
    fit(tuning(gradient_clip=1e-3), max_steps=4, callbacks=[norms])
    assert norms.norms[1] > 1e-2
    assert norms.norms[-1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("arm", ["denoise", "consistency"])
def test_what_stage_two_logs_shows_and_draws(arm, stage1):
    settings = {"log_every_n_steps": 2, "limit_val_batches": 1, "check_val_every_n_epoch": None, "val_check_interval": 4}
    trainer = fit(module(arm, stage1), callbacks=[WeightEMA(0.5)], **settings)
    probes = [f"val_mse_{sigma}" for sigma in ("0.1", "0.25", "0.5", "1", "2")]
    own = ["stage", "consistency", "perceptual", "val_sw2_2_steps"] if arm == "consistency" else []
    names = ["loss", "grad_norm", "val_mse", "val_sw2", *probes, *own, *(f"loss_q{k}" for k in range(1, 5))]
    assert set(trainer.callback_metrics) == {f"epg/{name}" for name in names}
    model = trainer.lightning_module
    kinds = {"1_steps", "2_steps"} if arm == "consistency" else {"3_steps"}
    assert model.dashboard_media()["epg/samples"].pixels.shape == (9 * len(kinds) + 1, 16 * 9 + 1, 3)
    drawn = trainer.predict(model, digits(num_samples=20, val_batch_size=10))
    assert {name for part in drawn for name in part} == kinds
    assert sum(len(next(iter(part.values()))) for part in drawn) == 20
    assert all(value.abs().max() <= 1 for part in drawn for value in part.values())
    trainer.limit_test_batches = 1
    assert "epg/test_mse_0.25" in trainer.test(model, digits(), verbose=False)[0]


def test_samples_start_at_the_shifted_largest_level(stage1):
    model = module("consistency", stage1)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        model.sample(noise, labels, steps=2)
        assert seen == pytest.approx([math.log(80 / 4) / 4, math.log(0.5 / 4) / 4], rel=1e-5)
        seen.clear()
        diffusion = tuning()
        diffusion.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
        diffusion.sample(noise, labels, steps=2)
    assert seen == pytest.approx([math.log(level / 4) / 4 for level in (80, 0.002, 0.002)], rel=1e-5)
    with pytest.raises(ValueError, match="sample_times"):
        model.sample(noise, labels, steps=3)


def test_images_with_transformers_train_in_both_stages(tmp_path):
    encoder, decoder = vit()
    first = EPGPretrain(copy.deepcopy(encoder), ShiftedViews(), **STAGE1)
    fit(first, max_steps=2).save_checkpoint(tmp_path / "vit.ckpt")
    for mode in ("denoise", "consistency"):
        model = EPGFinetune(copy.deepcopy(encoder), copy.deepcopy(decoder), mode, str(tmp_path / "vit.ckpt"), **STAGE2)
        start = cloned_state(model)
        fit(model, max_steps=3)
        still = [name for name, value in cloned_state(model).items() if torch.equal(value, start[name])]
        assert still == [], "every weight takes part"


@pytest.mark.parametrize(
    ("build", "wrong", "says"),
    [
        (pretraining, {"s0": 5, "s1": 3}, "1 <= s0 <= s1"),
        (pretraining, {"temperature": 0.0}, r"temperature is 0.0: give a number in \(0, inf\)"),
        (pretraining, {"temperature_schedule": "linear"}, "constant, interpolated, cosine"),
        (pretraining, {"consistency_weight": -1.0}, r"give a number in \[0, inf\)"),
        (pretraining, {"target_decay": 1.5}, r"give a number in \[0, 1\]"),
        (pretraining, {"pixel_std": (0.0,)}, "above 0"),
        (tuning, {"mode": "latent"}, "denoise, consistency"),
        (tuning, {"num_levels": None}, "weight='one'"),
        (tuning, {"perceptual_weight": 1.0}, "encoder_ckpt"),
        (tuning, {"guidance": 2.0, "num_classes": None}, "num_classes"),
        (tuning, {"ect_q": 1.0}, r"ect_q is 1.0: give a number in \(1, inf\)"),
        (tuning, {"sample_times": (0.1, 0.5)}, "descending"),
        (tuning, {"class_dropout": 1.0}, r"give a number in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(build, wrong, says):
    with pytest.raises(ValueError, match=says):
        build(**wrong)


def test_an_encoder_that_does_not_say_its_width_is_refused():
    with pytest.raises(ValueError, match="width"):
        EPGPretrain(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="patch_size"):
        PixelViTEncoder(image_size=10, patch_size=4)
