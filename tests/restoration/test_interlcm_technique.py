"""InterLCM: its chain and encoders by other ways, models of diffusers, what is trained and saved, two processes, data, and mistakes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn

from helpers import assert_state_dicts_equal, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import (
    ControlledUNet,
    DiffusersLCM,
    DigitLCM,
    FeatureDistance,
    ImageResidual,
    InterLCM,
    PatchDiscriminator,
    RandomFeatures,
    SmallLCM,
    SmallSpatialEncoder,
    SmallUNet,
    SmallVisualEncoder,
    SpatialEncoder,
    TinyAutoencoder,
    VisualEncoder,
)
from lit_methods.callbacks import WeightEMA
from lit_methods.consistency_models.pairs import consistency_function
from lit_methods.datamodules import FaceRestorationDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.fake import picture
from lit_methods.datamodules.restoration.blind import FaceDegradation
from lit_methods.restoration.color import adain_color_fix
from lit_methods.restoration.interlcm.core import (
    consistency_chain,
    guidance_embedding,
    lcm_schedule,
    lcm_timesteps,
    renoise,
    restore_from_low_quality,
)
from lit_methods.restoration.interlcm.networks import ClipTokens, TokenMapper
from lit_methods.tasks.diffusion.noise_prediction import signal_shares

SHARES = signal_shares(1000, 0.00085, 0.012)
MILD = FaceDegradation(3, (1.0, 2.0), 1.0, (2.0, 2.0), (5.0, 5.0), None)


def build(**words: Any) -> InterLCM:
    torch.manual_seed(0)
    given: dict[str, Any] = {"visual_encoder": SmallVisualEncoder(12, channels=4), "spatial_encoder": ImageResidual(1, 16, (1,))}
    given |= {"learning_rate": 1e-2, "final_learning_rate": 1e-3, "lcm": DigitLCM(8, 12)}
    return InterLCM(**(given | words))


def faces(**words: Any) -> FaceRestorationDataModule:
    given: dict[str, Any] = {"source": "faces", "image_size": 8, "degradation": MILD, "batch_size": 10, "eval_batch_size": 6}
    return FaceRestorationDataModule(**(given | words))


# ---- the chain -------------------------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_distillation() -> None:
    assert lcm_timesteps(4).tolist() == [999, 759, 499, 259]
    assert lcm_timesteps(3).tolist() == [999, 679, 339]
    assert lcm_timesteps(50).tolist() == list(range(999, 0, -20))
    assert lcm_timesteps(1).tolist() == [999]
    for wrong in ((0, 50, 1000), (51, 50, 1000), (1, 2000, 1000)):
        with pytest.raises(ValueError, match="give 1 <= steps <= origin"):
            lcm_timesteps(*wrong)
    with pytest.raises(ValueError, match="give some of 0 to 999"):
        lcm_schedule(SHARES, torch.tensor([1000]))


def test_the_first_step_calls_no_network_and_one_step_is_the_image() -> None:
    lq, calls = torch.randn(2, 4, 3, 3), []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        calls.append(t.tolist())
        return torch.zeros_like(z)

    found = restore_from_low_quality(lq, predict, lcm_schedule(SHARES, lcm_timesteps(4)), list(torch.randn(3, 2, 4, 3, 3)))
    assert calls == [[759, 759], [499, 499], [259, 259]]
    assert found.denoised[0] is lq
    assert found.latents[-1] is found.denoised[-1]
    alone = restore_from_low_quality(lq, predict, lcm_schedule(SHARES, lcm_timesteps(1)), [])
    assert alone.denoised[0] is lq
    with pytest.raises(ValueError, match="4 steps need 3 noises, got 2"):
        restore_from_low_quality(lq, predict, lcm_schedule(SHARES, lcm_timesteps(4)), list(torch.randn(2, 2, 4, 3, 3)))


def test_a_network_that_knows_the_noise_gives_the_image_back_at_any_step() -> None:
    clean, schedule = torch.randn(2, 1, 4, 4, dtype=torch.float64), lcm_schedule(SHARES.double(), lcm_timesteps(4))
    noises = list(torch.randn(3, 2, 1, 4, 4, dtype=torch.float64))

    def predict(z: Tensor, t: Tensor) -> Tensor:
        share = SHARES.double()[t[0]]
        return (z - share.sqrt() * clean) / (1 - share).sqrt()

    found = restore_from_low_quality(clean, predict, schedule, noises)
    for answer in found.denoised:
        torch.testing.assert_close(answer, clean, rtol=1e-6, atol=1e-6)
    from_noise = consistency_chain(noises[0], predict, schedule, noises)
    assert len(from_noise.denoised) == 4
    torch.testing.assert_close(from_noise.denoised[-1], clean, rtol=1e-6, atol=1e-6)


def test_the_embedding_of_the_guidance_tells_scales_apart() -> None:
    assert guidance_embedding(8.0).shape == (1, 256)
    torch.testing.assert_close(guidance_embedding(1.0)[0, :128], torch.zeros(128))
    torch.testing.assert_close(guidance_embedding(1.5)[0, 0], torch.tensor(500.0).double().sin().float())


# ---- models and encoders ---------------------------------------------------------------------------------------------------------------


def test_the_gaussians_model_is_consistent_and_steered() -> None:
    lcm, clean = DigitLCM(8, 12), torch.rand(3, 1, 8, 8)
    eps = torch.randn(3, 1, 8, 8)
    z, t = renoise(clean, eps, lcm.abar[0]), torch.zeros(3, dtype=torch.int64)
    share = lcm.abar[0]
    start = (z - (1 - share).sqrt() * lcm.eps_model(z, t)) / share.sqrt()
    projected = lcm.centre + ((clean.flatten(1) - lcm.centre) @ lcm.basis) @ lcm.basis.T
    torch.testing.assert_close(start.flatten(1), projected, atol=0.15, rtol=0)
    prompt = torch.zeros(3, 2, 12)
    prompt[:, :, 5] = 1.0
    late = torch.full((3,), 759)
    moved = (lcm.eps_model(z, late) - lcm.eps_model(z, late, prompt)) * ((1 - lcm.abar[759]) / lcm.abar[759]).sqrt()
    torch.testing.assert_close(moved.flatten(1), lcm.basis[:, 5].expand(3, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        lcm.eps_model(z, late, None, [lcm.basis[:, 5].view(1, 1, 8, 8).expand(3, -1, -1, -1)]), lcm.eps_model(z, late, prompt)
    )


def test_a_network_trained_here_is_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SmallUNet(1, 8, (1, 2))
    nn.init.normal_(network.out[-1].weight, std=0.1)  # type: ignore[arg-type]
    torch.save({f"network.{name}": value for name, value in network.state_dict().items()}, tmp_path / "net.pt")
    lcm = SmallLCM(ControlledUNet(1, 8, (1, 2)), tmp_path / "net.pt")
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([499, 499])
    sigma = ((1 - lcm.abar[t]) / lcm.abar[t]).sqrt()
    answer = consistency_function(network)(z / lcm.abar[499].sqrt(), sigma)
    torch.testing.assert_close(z, renoise(answer, lcm.eps_model(z, t), lcm.abar[499]), rtol=1e-4, atol=1e-4)
    encoder = SmallSpatialEncoder(ControlledUNet(1, 8, (1, 2)))
    encoder.begin(lcm)
    assert torch.equal(encoder.network.down[0].conv1.weight, network.down[0].conv1.weight)  # type: ignore[union-attr]
    residuals = encoder(z, t, None, torch.randn(2, 1, 8, 8))
    assert all(float(part.abs().max()) == 0 for part in residuals)
    torch.testing.assert_close(lcm.eps_model(z, t, torch.zeros(2, 1, 32), residuals), lcm.eps_model(z, t))
    residuals[-1] = torch.randn_like(residuals[-1])
    assert not torch.allclose(lcm.eps_model(z, t, None, residuals), lcm.eps_model(z, t))
    with pytest.raises(ValueError, match=r"got 1 residuals for \d skip connections"):
        lcm.eps_model(z, t, None, residuals[:1])


def test_latents_of_an_autoencoder_are_smaller_than_images() -> None:
    torch.manual_seed(0)
    words = {"in_channels": 4, "channels": 8, "multipliers": (1,)}
    lcm = SmallLCM(ControlledUNet(**words), autoencoder=TinyAutoencoder(width=8, latents=4), scale=0.5)  # type: ignore[arg-type]
    for parameter in lcm.network.parameters():  # a network that nobody trained has zeros that stop the prompt
        nn.init.normal_(parameter, std=0.1)
    visual = SmallVisualEncoder(32, in_channels=3, channels=4)
    module = build(lcm=lcm, visual_encoder=visual, spatial_encoder=SmallSpatialEncoder(ControlledUNet(**words), 3), n_steps=2)  # type: ignore[arg-type]
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(module.encode(images), lcm.autoencoder.module.encode(images) * 0.5)  # type: ignore[union-attr, operator]
    noises = module.noises(images, [0, 1])[:1]
    assert noises[0].shape == (2, 4, 4, 4)
    output = module(images, noises)
    assert output.shape == images.shape
    output.square().mean().backward()
    gates = module.spatial_encoder.gates  # type: ignore[union-attr]
    assert all(float(gate.weight.grad.abs().sum()) > 0 for gate in gates)  # type: ignore[union-attr]
    assert float(visual.layers[-1].weight.grad.abs().sum()) > 0  # type: ignore[union-attr, operator]


def test_the_token_mapper_has_the_papers_size_and_tokens_for_channels() -> None:
    with torch.device("meta"):
        mapper = TokenMapper()
        assert sum(parameter.numel() for parameter in mapper.parameters()) == pytest.approx(13.0e6, rel=0.005)
        assert mapper(torch.zeros(2, 197, 768)).shape == (2, 77, 768)
    assert mapper.layers[0].in_channels == 197
    with pytest.raises(ValueError, match="as many of both"):
        TokenMapper(lengths=(256, 512))


def clip_folder(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)).save_pretrained(folder)
    return folder


def test_all_tokens_of_clip_pass_its_last_norm(tmp_path: Path) -> None:
    tokens = ClipTokens(str(clip_folder(tmp_path / "clip"))).eval()
    images = torch.rand(2, 3, 40, 48) * 2 - 1
    found = tokens(images)
    assert found.shape == (2, 5, 8)
    pixels = torch.nn.functional.interpolate(images / 2 + 0.5, (32, 38), mode="bicubic", antialias=True)[..., 3:35].clamp(0, 1)
    pooled = tokens.model(pixel_values=(pixels - tokens.mean) / tokens.std).pooler_output
    torch.testing.assert_close(found[:, 0], pooled)
    encoder = VisualEncoder(str(tmp_path / "clip"), tokens=6, width=12, widths=(8, 4))
    assert encoder(images).shape == (2, 6, 12)
    assert not any("clip" in name for name in encoder.state_dict())
    with pytest.raises(ValueError, match="give the folder of a CLIP model"):
        ClipTokens(str(tmp_path / "none"))


def pipeline_folder(folder: Path, guided: bool = True) -> Path:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 4, "in_channels": 4, "out_channels": 4}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        cross_attention_dim=12,
        attention_head_dim=4,
        time_cond_proj_dim=16 if guided else None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **blocks,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )
    scheduler = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_pretrained(folder / name)
    return folder


def test_a_pipeline_of_diffusers_trains_both_encoders_and_its_scheduler_agrees(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    path = str(pipeline_folder(tmp_path / "lcm"))
    lcm = DiffusersLCM(path)
    scheduler = diffusers.LCMScheduler.from_pretrained(path, subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == lcm_timesteps(4).tolist()
    z, eps = torch.randn(2, 1, 4, 4, 4).unbind(0)
    schedule = lcm_schedule(lcm.abar, lcm_timesteps(4))
    for number, time in enumerate(scheduler.timesteps):
        theirs = scheduler.step(eps, time, z, return_dict=False)[1]
        ours = consistency_chain(z, lambda z, t: eps, lcm_schedule(lcm.abar, schedule.times[number : number + 1]), []).denoised[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    pipeline_folder(tmp_path / "sd", guided=False)
    clip = str(clip_folder(tmp_path / "clip"))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        visual, spatial = VisualEncoder(clip, tokens=6, width=12, widths=(8, 4)), SpatialEncoder(str(tmp_path / "sd"))
        for block in (*spatial.network.controlnet_down_blocks, spatial.network.controlnet_mid_block):
            nn.init.normal_(block.weight, std=0.1)
        module = InterLCM(lcm, visual, spatial, checkpointing=checkpointing)
        lq = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        noises = list(torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
        output = module(lq, noises)
        assert output.shape == lq.shape
        output.square().mean().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert all(value is not None for value in gradients[0].values())
    assert not any("unet" in name or "vae" in name for name in gradients[0])
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="give the folder of a pipeline"):
        DiffusersLCM(str(tmp_path / "none"))


def test_objects_that_are_no_modules_serve_and_what_lacks_something_is_refused() -> None:
    class Plain:
        abar = SHARES

        def encode(self, images: Tensor) -> Tensor:
            return images

        decode = encode

        def eps_model(self, z: Tensor, t: Tensor, prompt: Any, residuals: Any) -> Tensor:
            return z - residuals[-1]

    module = build(lcm=Plain(), visual_encoder=None)
    trainer = tiny_trainer(max_steps=2)
    trainer.fit(module, faces())
    assert trainer.global_step == 2
    with pytest.raises(TypeError, match="Identity without eps_model, encode, decode, abar"):
        build(lcm=nn.Identity())


# ---- training --------------------------------------------------------------------------------------------------------------------------


class Steps(Callback):
    def __init__(self) -> None:
        self.gan: list[bool] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.gan.append("interlcm/gan" in trainer.callback_metrics)


def test_it_learns_and_the_adversarial_term_begins_behind_optimiser_steps(tmp_path: Path) -> None:
    steps, data = Steps(), faces()
    module = build(
        gan_start=3, accumulate=2, discriminator=PatchDiscriminator(1, 4, 1), perceptual=FeatureDistance(RandomFeatures(1, (4, 8)))
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    frozen = {name: value.clone() for name, value in module.lcm.state_dict().items()}
    trainer = tiny_trainer(max_steps=6, callbacks=[steps, WeightEMA(0.5)])
    trainer.fit(module, data)
    assert trainer.global_step == 6
    assert steps.gan == [False] * 6 + [True] * 6
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"visual_encoder", "spatial_encoder", "discriminator"}
    assert any(not torch.equal(before[name], value) for name, value in module.discriminator.state_dict(prefix="discriminator.").items())  # type: ignore[union-attr]
    assert_state_dicts_equal(module.lcm.state_dict(), frozen)
    (figures,) = tiny_trainer().test(module, data, verbose=False)
    (untrained,) = tiny_trainer().test(build(), data, verbose=False)
    assert figures["interlcm/test_psnr"] > untrained["interlcm/test_psnr"]
    assert {"interlcm/test_perceptual", "interlcm/test_error", "interlcm/test_lq_distance"} <= figures.keys()
    assert module.dashboard_media()["interlcm/images"].pixels.shape[2] == 3  # type: ignore[union-attr]


def _objects() -> tuple[InterLCM, Any, list[Any]]:
    return build(gan_start=2, discriminator=PatchDiscriminator(1, 4, 1)), faces(), [WeightEMA(0.5)]


def test_a_killed_run_ends_like_the_whole(tmp_path: Path) -> None:
    for kill_at in (2, 5):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        whole, resumed = kill_and_resume(_objects, 6, kill_at, folder)
        assert_state_dicts_equal(resumed, whole)


def _fit(devices: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    words: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if devices == 2 else {}
    size = 5 if devices == 2 else 10
    module = build()
    data = faces(batch_size=5, eval_batch_size=size // 2)
    module.hparams["accumulate"] = 1 if devices == 2 else 2
    tiny_trainer(max_steps=3, **words).fit(module, data)
    (figures,) = tiny_trainer(**words).test(module, data, verbose=False)
    return module.state_dict(), figures


def test_two_processes_train_and_restore_like_one_that_accumulates() -> None:
    state, figures = _fit(1)
    for theirs, found in run_two_processes(_fit, 2):
        assert_state_dicts_equal(theirs, state, rtol=1e-4, atol=1e-5)
        assert found == pytest.approx(figures, rel=1e-3)


def test_halved_precision_restores_in_float32() -> None:
    module = build(discriminator=PatchDiscriminator(1, 4, 1), gan_start=0)
    tiny_trainer(max_steps=2, precision="bf16-mixed").fit(module, faces())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = module.restored(torch.zeros(2, 1, 8, 8), [0, 1])
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("start", ["noise", "regression"])
def test_baselines_train(start: Any) -> None:
    module = build(start=start)
    trainer = tiny_trainer(max_steps=2)
    trainer.fit(module, faces())
    lq = torch.zeros(2, 1, 8, 8)
    alike = torch.equal(module.restored(lq, [0, 1]), module.restored(lq, [2, 3]))
    assert alike == (start == "regression")


# ---- evaluation ------------------------------------------------------------------------------------------------------------------------


def test_an_image_is_restored_alike_in_any_batch_and_later_starts_keep_more_of_it() -> None:
    module = build(visual_encoder=None, spatial_encoder=None).eval()
    data = faces()
    data.setup("test")
    lq = torch.stack([data.test_set[number]["lq"] for number in range(6)])
    with torch.no_grad():
        together = module.restored(lq, [3, 1, 4, 5, 9, 2])
        torch.testing.assert_close(module.restored(lq[2:3], [4])[0], together[2])
        kept = [
            float((build(visual_encoder=None, spatial_encoder=None, times=[999, t]).restored(lq, range(6)) - lq).square().mean())
            for t in (998, 354, 60)
        ]
    assert kept[0] > kept[1] > kept[2]


def test_colours_nearest_images_and_identity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = build(color_fix="adain", nearest=7, identity=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    plain, lq = build(), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = adain_color_fix(plain(lq, plain.noises(lq, [0, 1])[:3]), lq).clamp(-1, 1)
        torch.testing.assert_close(module.restored(lq, [0, 1]), expected)
    (figures,) = tiny_trainer().test(module, faces(), verbose=False)
    assert -1 <= figures["interlcm/test_identity"] <= 1
    assert figures["interlcm/test_nearest"] > 0
    assert not any("identity" in name for name in module.state_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("lq", 3), ("gt", 3)):
        for number in range(count):
            picture(tmp_path / "data" / part / f"{number}.png", rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
    return tmp_path / "data"


def test_a_folder_of_faces_is_restored(folder: Path, tmp_path: Path) -> None:
    module = build(output=tmp_path / "out")
    data = FaceRestorationDataModule(tmp_path / "none", faces=folder, image_size=8, grey=True, eval_batch_size=2)  # no root is needed
    found = tiny_trainer().predict(module, data)
    assert [name for part in found or [] for name in part["name"]] == ["0", "1", "2"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]
    pixels = np.asarray(Image.open(tmp_path / "out" / "1.png"))
    np.testing.assert_allclose(pixels / 127.5 - 1, found[0]["image"][1, 0].numpy(), atol=0.5 / 127.5 + 1e-6)  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"n_steps": 0}, "n_steps is 0"),
        ({"times": [5, 7]}, "give falling times"),
        ({"times": [1000, 5]}, "give falling times below 1000"),
        ({"start": "end"}, "start is 'end'"),
        ({"color_fix": "rgb"}, "color_fix is 'rgb'"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"gan_start": -1}, "gan_start is -1"),
    ],
)
def test_arguments_that_cannot_be(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**words)


def test_runs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no encoder to train"):
        tiny_trainer(max_steps=1).fit(build(visual_encoder=None, spatial_encoder=None), faces())
    with pytest.raises(ValueError, match="give n_steps=2 or more"):
        tiny_trainer(max_steps=1).fit(build(n_steps=1), faces())
    module = build()
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        module.restored(torch.full((1, 1, 8, 8), 7.0), [0])
    with pytest.raises(ValueError, match=r"batches with lq"):
        module._pair({"image": torch.zeros(1, 1, 8, 8)})
    with pytest.raises(ValueError, match="pairs of degraded and clean"):
        module._pair({"lq": torch.zeros(1, 1, 8, 8), "image": torch.zeros(1, 1, 8, 9)})


def test_channels_and_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="SmallVisualEncoder takes images of 1 channels, got 3"):
        build().restored(torch.zeros(1, 3, 8, 8), [0])
    with pytest.raises(ValueError, match="ImageResidual takes latents of 4 channels, got 1"):
        build(spatial_encoder=ImageResidual(4, 16, (1,))).restored(torch.zeros(1, 1, 8, 8), [0])

    class Halved(DigitLCM):
        def decode(self, latents: Tensor) -> Tensor:
            return latents[..., ::2]

    with pytest.raises(ValueError, match=r"restored ones \(1, 1, 8, 4\)"):
        build(lcm=Halved(8, 12)).restored(torch.zeros(1, 1, 8, 8), [0])


# ---- data ------------------------------------------------------------------------------------------------------------------------------


def test_folders_are_degraded_anew_in_each_epoch_and_pairs_are_read(folder: Path) -> None:
    data = FaceRestorationDataModule(folder, image_size=8, degradation=MILD, batch_size=2)
    data.setup("fit")
    assert [len(data.data_of(part)) for part in ("train", "val", "test")] == [4, 3, 3]
    first, again, other = (data.train_set[draw] for draw in ((0, 1), (0, 1), (1, 1)))
    assert torch.equal(first["lq"], again["lq"])
    assert not torch.equal(first["lq"], other["lq"])
    assert data.val_set[2]["image"].shape == (3, 8, 8)
    assert not torch.equal(data.val_set[2]["image"], data.val_set[2]["lq"])
    shutil.rmtree(folder / "lq")
    held = FaceRestorationDataModule(folder, image_size=8, degradation=MILD, num_val=1)
    held.setup("fit")
    assert (len(held.train_set), len(held.val_set)) == (3, 1)
    assert torch.equal(held.val_set[0, 0]["lq"], held.val_set[0]["lq"])


def test_built_in_images_are_split_once() -> None:
    for source, sizes in (("digits", (1497, 100, 200)), ("faces", (70, 15, 15))):
        data = FaceRestorationDataModule(source=source, image_size=8, degradation=MILD)  # type: ignore[arg-type]
        data.setup("fit")
        assert tuple(len(data.data_of(part)) for part in ("train", "val", "test")) == sizes
        assert data.test_set[0]["index"] == sizes[0] + sizes[1]


def spoil(folder: Path, way: str) -> dict[str, Any]:
    """Arguments that read a folder after it was spoiled."""
    train, lq, gt = (folder / part for part in ("train", "lq", "gt"))
    if way == "no such root":
        return {"root": folder / "none"}
    if way == "no such faces":
        return {"root": folder, "faces": folder / "none"}
    if way == "empty":
        shutil.rmtree(train)
        train.mkdir()
    elif way == "fewer than num_val":
        shutil.rmtree(lq)
        return {"root": folder, "num_val": 4}
    elif way == "no gt":
        shutil.rmtree(gt)
        return {"root": folder, "pairs": folder}
    elif way == "no partner":
        (gt / "2.png").unlink()
    elif way == "cut off":
        (lq / "0.png").write_bytes((lq / "0.png").read_bytes()[:60])
    elif way == "no image":
        (lq / "0.png").write_text("face")
    elif way == "name twice":
        shutil.copy(lq / "0.png", lq / "0.bmp")
    elif way == "float image":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(lq / "0.tiff")
        (lq / "0.png").unlink()
    return {"root": folder}


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ("no such root", WrongRootError, "holds 0 image files"),
        ("no such faces", WrongRootError, "faces=.*holds no image files"),
        ("empty", WrongRootError, "and 1 are needed"),
        ("fewer than num_val", WrongRootError, "holds 4 image files.*5 are needed"),
        ("no gt", WrongRootError, "has no images in gt"),
        ("no partner", MissingFileError, "no partner of its name"),
        ("cut off", BrokenRecordError, "0.png.*degraded image"),
        ("no image", BrokenRecordError, "can't be decoded"),
        ("name twice", BrokenRecordError, "has the same name but for its ending"),
        ("float image", BrokenRecordError, "mode F"),
    ],
)
def test_folders_that_are_broken(folder: Path, way: str, error: type[Exception], message: str) -> None:
    data = FaceRestorationDataModule(**spoil(folder, way), image_size=8, degradation=MILD)
    with pytest.raises(error, match=message):  # noqa: PT012
        data.setup("fit")
        data.val_set[0]
