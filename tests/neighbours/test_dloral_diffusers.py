"""DLoRAL on a pipeline of diffusers itself: a small random one in a folder, its steps, prompts, checkpoints and refusals.

pip install "lit-methods[diffusers]" transformers
"""

from pathlib import Path

import pytest
import torch
from full_recipes import stable_diffusion

from helpers import assert_state_dicts_equal, cloned_state, tiny_trainer
from lit_methods import CrossFrameRetrieval, DiffusersBackbone, DualLoRAVSRModule, StageSchedule
from lit_methods.datamodules import VideoRestorationDataModule
from lit_methods.hub import NotThereError

pytest.importorskip("diffusers", reason='diffusers is not installed: pip install "lit-methods[diffusers]"')
pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("pipeline")
    stable_diffusion(work)
    return work / "stable_diffusion"


def module(folder: Path) -> DualLoRAVSRModule:
    torch.manual_seed(0)
    schedule = StageSchedule(0, 1, 1, 1)
    return DualLoRAVSRModule(DiffusersBackbone(str(folder)), CrossFrameRetrieval(4, 1, 4, 10.0), schedule, rank=2, learning_rate=1e-2)


def data() -> VideoRestorationDataModule:
    return VideoRestorationDataModule(size=32, eval_frames=2, per_clip=2, num_eval=1, batch_size=1)


def test_latents_teacher_and_prompts_are_the_pipelines(folder: Path) -> None:
    import diffusers

    backbone = DiffusersBackbone(str(folder))
    vae = diffusers.AutoencoderKL.from_pretrained(str(folder), subfolder="vae").eval()
    unet = diffusers.UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet").eval()
    frames = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode(frames), vae.encode(frames).latent_dist.mean * vae.config.scaling_factor)
        noise = torch.randn(2, 4, 4, 4)
        assert not torch.equal(backbone.encode(frames, noise), backbone.encode(frames))
        torch.testing.assert_close(backbone.decode(noise), vae.decode(noise / vae.config.scaling_factor).sample)
        wanted, unwanted = backbone.conditions(2, ["a cat", ""])
        assert wanted.shape == unwanted.shape == (2, 77, 32)
        torch.testing.assert_close(wanted[1], backbone.embed([backbone.prompt])[0])
        assert backbone.latent_shape(32, 32) == (4, 4, 4)
        trained = DualLoRAVSRModule(backbone, CrossFrameRetrieval(4, 1, 4))
        t = torch.tensor([500, 20])
        torch.testing.assert_close(trained.unet.teacher(noise, t, wanted), unet(noise, t, encoder_hidden_states=wanted).sample)
    with pytest.raises(ValueError, match="has given its U-Net to another module"):
        DualLoRAVSRModule(backbone, CrossFrameRetrieval(4, 1, 4))


def test_both_stages_train_and_a_checkpoint_has_the_adapters_alone(folder: Path, tmp_path: Path) -> None:
    trained = module(folder)
    start = cloned_state(trained)
    trainer = tiny_trainer(max_steps=3, limit_val_batches=1)
    trainer.fit(trained, datamodule=data())
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, start[name])}
    assert any(".quality." in name for name in moved)
    assert any(".consistency." in name for name in moved)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or "widened" in name or name.startswith("retrieval.") for name in saved)
    again = module(folder)
    tiny_trainer(precision="bf16-mixed").predict(again, datamodule=data(), ckpt_path=tmp_path / "run.ckpt")
    assert_state_dicts_equal(again.state_dict(), trained.state_dict())


def test_what_isnt_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotThereError, match="give the folder of a StableDiffusionPipeline"):
        DiffusersBackbone(str(tmp_path))
