"""CoNo: its parts by hand, every strategy on the exact model, the module's wiring, moving digits, prompts."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from helpers import assert_state_dicts_equal, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import GaussianVideos, LongVideoSampler, SmallVideoUNet, VideoDiffusionModule
from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import GaussianVideosDataModule, MovingDigitsDataModule, VideoPromptsDataModule
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.video.digits import bounce, draw_moving
from lit_methods.diffusion.cono.core import (
    closed_share,
    content,
    content_distance,
    content_gradient,
    delta_of_share,
    extend_video,
    extending_shuffle,
    internal_shuffle,
    regularise,
)
from lit_methods.diffusion.ddim import ddim_schedule, ddim_step
from lit_methods.diffusion.denoisers import with_guidance
from lit_methods.diffusion.video_metrics import content_drift, junction_jump
from lit_methods.diffusion.windows import (
    covering_views,
    draw_block_orders,
    fuse_windows,
    reschedule_noise,
    window_attention,
    window_weights,
)
from lit_methods.tasks.diffusion.noise_prediction import signal_shares

SHARES = signal_shares(1000, 0.00085, 0.012).double()


def exact(**kwargs):
    return LongVideoSampler(**{"steps": 10, "guided_until": 2, **kwargs})


def noise_source(batch=4, shape=(1, 4, 6), seed=0):
    def draw(name, frames):
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        return torch.randn(batch, frames, *shape, generator=generator, dtype=torch.float64)

    return draw


def sampled(sampler, prompts=(0.0, 1.0, 1.0)):
    return sampler.sample(GaussianVideos(), SHARES, [torch.full((4,), value) for value in prompts], noise_source())


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_shuffles_keep_the_set_and_their_edges():
    noise = torch.arange(5.0).view(5, 1, 1, 1)
    assert extending_shuffle(noise, 2).flatten().tolist() == [3, 4, 2, 1, 0]
    assert extending_shuffle(noise, 0).flatten().tolist() == [4, 3, 2, 1, 0]
    assert torch.equal(extending_shuffle(noise, 5), noise)
    assert internal_shuffle(noise, 2, 1).flatten().tolist() == [0, 1, 3, 4, 2]
    assert torch.equal(internal_shuffle(noise, 2, 3), noise), "nothing is between"
    for shuffle in (lambda: extending_shuffle(noise, 6), lambda: internal_shuffle(noise, 3, 3)):
        with pytest.raises(ValueError, match="together at most 5"):
            shuffle()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_is_autograds_and_kappa_what_a_step_closes(reduction):
    eps = torch.randn(3, 7, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 7, 2, 3, 3, dtype=torch.float64)
    content_distance(eps, reference, reduction).sum().backward()
    torch.testing.assert_close(content_gradient(eps, reference, reduction), eps.grad)
    delta = delta_of_share(0.6, eps.shape, reduction)
    assert closed_share(delta, eps.shape, reduction) == pytest.approx(0.6)
    gap = content(reference) - content(eps)
    torch.testing.assert_close(content(reference) - content(regularise(eps, reference, delta, reduction)), 0.4 * gap)


def test_guided_frames_follow_their_source_and_details_are_free():
    """With guidance down to the last step, the frames that two clips share are the same ones."""
    denoise = GaussianVideos().denoise
    prompts, noise = [torch.zeros(2)] * 3, torch.randn(2, 16, 1, 2, 2, dtype=torch.float64)
    schedule = ddim_schedule(SHARES, 10)
    whole = extend_video(denoise, noise, prompts, schedule, guided_until=1, delta=0.0)
    first, extension, between, last = (clip.frames for clip in whole.clips)
    torch.testing.assert_close(extension[:, :6], first[:, 10:])
    torch.testing.assert_close(between[:, :6], first[:, 10:])
    torch.testing.assert_close(between[:, 8:], extension[:, 6:14])
    torch.testing.assert_close(last[:, :6], between[:, 10:])
    free = extend_video(denoise, noise, prompts, schedule, guided_until=6, delta=0.0)
    assert not torch.allclose(free.clips[1].frames[:, :6], first[:, 10:], atol=1e-3)
    assert whole.junctions == [16, 26]
    assert whole.video.shape[1] == 36


def test_more_pieces_alternate_and_one_prompt_is_one_clip():
    denoise, schedule = GaussianVideos().denoise, ddim_schedule(SHARES, 3)
    noise = torch.randn(1, 6, 1, 2, 2, dtype=torch.float64)
    for pieces, clips in ((1, 1), (2, 3), (3, 4), (4, 6), (5, 7)):
        found = extend_video(denoise, noise, [torch.zeros(1)] * pieces, schedule, 2, 3, 2)
        assert (len(found.clips), found.video.shape[1]) == (clips, 6 + 4 * (pieces - 1))
    with pytest.raises(ValueError, match="give a prompt"):
        extend_video(denoise, noise, [], schedule, 2, 3, 2)


def test_ddim_by_hand():
    schedule = ddim_schedule(SHARES, 50)
    assert (schedule.times[0], schedule.times[-1]) == (981, 1)
    assert schedule.following[-1] == SHARES[0]
    assert ddim_schedule(SHARES, 1000).times.max() == 999
    with pytest.raises(ValueError, match="give 1 to 1000"):
        ddim_schedule(SHARES, 1001)
    x0, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    a, b = SHARES[500], SHARES[400]
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    torch.testing.assert_close(ddim_step(x, eps, a, b), b.sqrt() * x0 + (1 - b).sqrt() * eps)
    spread = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    z = torch.randn(2, 3, dtype=torch.float64)
    wanted = b.sqrt() * x0 + (1 - b - spread**2).sqrt() * eps + spread * z
    torch.testing.assert_close(ddim_step(x, eps, a, b, 1.0, z), wanted)
    with pytest.raises(ValueError, match="give noise"):
        ddim_step(x, eps, a, b, 1.0)


def test_guidance_leaves_the_condition_alone_at_one():
    network = GaussianVideos()
    x, t, cond = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64), torch.tensor([400, 400]), torch.tensor([0.5, 2.0])
    given, without = network.denoise(x, t, cond), network.denoise(x, t, torch.zeros(2))
    torch.testing.assert_close(with_guidance(network.denoise, network.unconditional, 1.0)(x, t, cond), given)
    torch.testing.assert_close(with_guidance(network.denoise, network.unconditional, 3.0)(x, t, cond), without + 3 * (given - without))


def test_windows():
    assert covering_views(9, 4, 3).tolist() == [[0, 4], [3, 7], [5, 9]]
    assert window_weights(5).tolist() == [1, 2, 3, 2, 1]
    predictions = torch.randn(3, 4, 2, dtype=torch.float64)
    fused = fuse_windows(predictions, covering_views(9, 4, 3), 9)
    torch.testing.assert_close(fused[3], (predictions[0, 3] + predictions[1, 0]) / 2)
    few = torch.randn(1, 2, 3, 4)
    assert torch.equal(window_attention(few, few, few, 5, 2), torch.zeros_like(few)), "no window fits"
    orders = draw_block_orders(10, 4, 3, torch.Generator().manual_seed(0))
    noise = reschedule_noise(torch.arange(10.0), orders, 4, 3)
    assert sorted(noise[4:7].tolist()) == [0, 1, 2]
    assert set(noise[7:].tolist()) <= set(noise[3:6].tolist())


# ---- strategies ------------------------------------------------------------------------------------------------------------------------


def test_the_exact_model_makes_its_own_distribution():
    found = LongVideoSampler("direct", pieces=1, steps=100).sample(GaussianVideos(), SHARES, [torch.zeros(64)], noise_source(64, (1, 8, 8)))
    frames = found.video.permute(0, 2, 3, 4, 1).reshape(-1, 16)
    assert frames.mean() == pytest.approx(0.0, abs=0.1)
    wanted = GaussianVideos().covariance(16, frames)
    torch.testing.assert_close(torch.cov(frames.T), wanted, atol=0.15, rtol=0.1)  # of 4,096 pixels


def test_fresh_noise_jumps_and_the_pull_holds_the_content():
    jump = {
        name: junction_jump(found.video, found.junctions).mean() for name in ("cono", "naive") if (found := sampled(exact(strategy=name)))
    }
    assert jump["cono"] < 0.5 * jump["naive"]
    free, pulled = (content_drift(sampled(exact(delta=delta)).video, 16).mean() for delta in (0.0, 140.0))
    assert pulled < 0.6 * free
    torch.testing.assert_close(sampled(exact(kappa=exact().closed_share((1, 4, 6)))).video, sampled(exact()).video)
    torch.testing.assert_close(sampled(exact(memory="cpu")).video, sampled(exact()).video)


@pytest.mark.parametrize("strategy", ["cono", "naive", "independent", "genl", "direct", "freenoise"])
def test_every_strategy_has_the_same_length(strategy):
    torch.manual_seed(0)
    network = SmallVideoUNet(channels=16)
    prompts = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    sampler = LongVideoSampler(strategy, frames=6, left=2, right=3, steps=2, guided_until=1, stride=2, guidance=2.0)
    found = sampler.sample(network, SHARES.float(), prompts, lambda name, frames: noise_source(2, (1, 4, 4))(name, frames).float())
    assert found.video.shape == (2, 14, 1, 4, 4)
    assert found.junctions == [6, 10]
    assert found.video.isfinite().all()
    assert all(layer.window is None for layer in network.modules() if hasattr(layer, "window")), "windows are taken back"


class Bare(nn.Module):
    """A callable of (x, t, cond) and no more."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, cond):
        return self.weight * x


def test_what_a_denoiser_lacks_is_said():
    source, prompts = noise_source(1), [torch.zeros(1), torch.ones(1)]
    for options, message in (
        ({"strategy": "freenoise"}, "attention_windows"),
        ({"guidance": 2.0}, "unconditional"),
        ({"strategy": "direct"}, "one prompt a video"),
        ({"pieces": 1}, "2 prompts for 1 pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            exact(**options).sample(Bare(), SHARES, prompts, source)
    assert exact().sample(Bare().bfloat16(), SHARES, prompts, source).video.dtype == torch.float64, "latents stay wide"
    for options in ({"left": 16}, {"left": 9, "right": 8}, {"stride": 17}, {"kappa": 2.0}, {"steps": 0}, {"strategy": "none"}):
        with pytest.raises(ValueError):
            LongVideoSampler(**options)
    with pytest.raises(ValueError, match="unconditional"):
        tiny_trainer(max_steps=1).fit(VideoDiffusionModule(Bare()), MovingDigitsDataModule())
    with pytest.raises(ValueError, match="nothing to train"):
        tiny_trainer(max_steps=1).fit(VideoDiffusionModule(GaussianVideos(), clip_shape=(1, 4, 6)), GaussianVideosDataModule())
    with pytest.raises(ValueError, match="same sizes"):
        tiny_trainer(max_steps=1).fit(VideoDiffusionModule(SmallVideoUNet(channels=16)), MovingDigitsDataModule(frames=8))
    with pytest.raises(ValueError, match="even sizes"):
        SmallVideoUNet(channels=16)(torch.zeros(1, 2, 1, 5, 4), torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(ValueError, match="encode_prompts"):
        tiny_trainer().test(VideoDiffusionModule(SmallVideoUNet(channels=16)), VideoPromptsDataModule(), verbose=False)


# ---- wiring ----------------------------------------------------------------------------------------------------------------------------

SMALL = {"frames": 6, "left": 2, "right": 3, "steps": 2, "guided_until": 1, "stride": 2}


def small_module(**kwargs):
    torch.manual_seed(0)
    return VideoDiffusionModule(SmallVideoUNet(channels=16), LongVideoSampler(**SMALL), (1, 8, 8), **kwargs)


def small_digits(**kwargs):
    return MovingDigitsDataModule(
        **{"frames": 6, "image_size": 8, "num_train": 24, "num_val": 4, "batch_size": 4, "val_batch_size": 2, **kwargs}
    )


def test_a_killed_run_ends_like_the_whole_one(tmp_path):
    def build():
        return small_module(), small_digits(), [ExactResume()]

    whole, resumed = kill_and_resume(build, 5, 3, tmp_path, limit_val_batches=0, accumulate_grad_batches=2)
    assert_state_dicts_equal(whole, resumed)


def figures(seed=0, **kwargs):
    trainer = tiny_trainer(**kwargs)
    module = small_module(seed=seed)
    (found,) = trainer.validate(module, small_digits(val_batch_size=1), verbose=False)
    return {name: torch.tensor(value) for name, value in found.items()}


def test_two_processes_make_the_same_videos():
    whole = figures()
    for one in run_two_processes(partial(figures, devices=2, strategy="ddp")):
        for name, value in whole.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert figures(seed=1)["cono/val_jump"] != whole["cono/val_jump"]


def test_the_dashboard_has_strips_and_tables():
    module = small_module(strips=2)
    tiny_trainer().validate(module, small_digits(), verbose=False)
    media = module.dashboard_media()
    assert media["cono/strip"].pixels.shape == (2 * 9 + 1, 14 * 9 + 1, 3)
    assert len(media["cono/drift"].rows) == 14
    assert [row[0] for row in media["cono/gaps"].rows] == [2, 1]
    assert len(media["cono/gaps"].columns) == 4


def test_one_piece_has_no_junction_and_bfloat16_runs():
    module = small_module()
    module.sampler = LongVideoSampler(**SMALL, pieces=1)
    trainer = tiny_trainer(precision="bf16-true")
    (found,) = trainer.validate(module, small_digits(pieces=1), verbose=False)
    assert "cono/val_jump" not in found
    assert found["cono/val_change"] > 0
    video = module.predict_step({"prompt": torch.zeros(1, 1, dtype=torch.int64), "index": torch.tensor([0])}, 0)["video"]
    assert video.dtype == torch.float32


# ---- data ------------------------------------------------------------------------------------------------------------------------------


def test_digits_bounce_between_the_walls():
    places = bounce(torch.tensor([0.0, 7.5]), torch.tensor([3.0, 1.0]), 6, 8.0)
    torch.testing.assert_close(places, torch.tensor([[0.0, 3, 6, 7, 4, 1], [7.5, 7.5, 6.5, 5.5, 4.5, 3.5]]))
    assert torch.equal(bounce(torch.zeros(1), torch.ones(1), 3, 0.0), torch.zeros(1, 3))
    image = torch.rand(1, 1, 8, 8)
    drawn = draw_moving(image, torch.tensor([[[0.0, 0.0], [3.0, 5.0]]]), 16)
    torch.testing.assert_close(drawn[0, 0, 0, :8, :8], image[0, 0])
    torch.testing.assert_close(drawn[0, 1, 0, 5:13, 3:11], image[0, 0])
    assert drawn[0, 1].sum() == pytest.approx(float(image.sum()), rel=1e-5)


def test_motion_follows_from_the_epoch_and_prompts_from_the_digit():
    data = small_digits(prompts="next", image_size=12)
    data.setup("fit")
    first, again, other = data.train_set[0, 3], data.train_set[0, 3], data.train_set[1, 3]
    assert torch.equal(first["video"], again["video"])
    assert not torch.equal(first["video"], other["video"])
    label = int(first["prompt"][0])
    assert first["prompt"].tolist() == [label, (label + 1) % 10, (label + 1) % 10]
    assert data.val_set[0]["index"] == 24, "no training video has its number"


def test_prompts_are_read_and_bad_lines_named(tmp_path):
    def read(text):
        (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
        data = VideoPromptsDataModule(tmp_path, batch_size=2)
        data.setup("test")
        return next(iter(data.test_dataloader()))

    batch = read("a cat | a dog\n\na sea | a storm\n")
    assert batch["prompt"] == [["a cat", "a dog"], ["a sea", "a storm"]]
    assert batch["index"].tolist() == [0, 1]
    for text, message in (("\n", "no line"), ("a | b\nc\n", "line 2"), ("a |  \n", "none of them empty")):
        with pytest.raises(BrokenRecordError, match=message):
            read(text)


def test_a_module_is_copied_whole():
    module = small_module()
    again = copy.deepcopy(module)
    assert again.sampler == module.sampler
    assert torch.equal(again.shares, module.shares)
