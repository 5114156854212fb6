"""DiffusersVideo with diffusers itself: a small random text-to-video pipeline in a folder, every strategy, windows that are taken back.

pip install "lit-methods[diffusers]" transformers
"""

from pathlib import Path

import pytest
import torch
from full_recipes import text_to_video

from helpers import tiny_trainer
from lit_methods import DiffusersVideo, LongVideoSampler, VideoDiffusionModule
from lit_methods.datamodules import VideoPromptsDataModule
from lit_methods.hub import NotThereError

pytest.importorskip("diffusers", reason='diffusers is not installed: pip install "lit-methods[diffusers]"')
pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("pipeline")
    text_to_video(work)
    return work / "text_to_video"


def test_the_denoiser_is_the_pipelines(folder: Path) -> None:
    """Noise, embeddings and frames are those of diffusers; what is frozen isn't saved."""
    import diffusers

    ours = DiffusersVideo(str(folder)).eval()
    unet = diffusers.UNet3DConditionModel.from_pretrained(str(folder), subfolder="unet").eval()
    x, t = torch.randn(2, 6, 4, 8, 8), torch.tensor([500, 20])
    with torch.no_grad():
        prompt = ours.encode_prompts(["a cat", "a dog at sea"])
        wanted = unet(x.transpose(1, 2), t, encoder_hidden_states=prompt).sample.transpose(1, 2)
        torch.testing.assert_close(ours.denoise(x, t, prompt), wanted)
        assert torch.equal(ours.unconditional(prompt)[1], ours.encode_prompts([""])[0])
        assert ours.decode(x).shape == (2, 6, 3, 8, 8)
        with ours.attention_windows(6, 2):  # one window that holds all frames
            torch.testing.assert_close(ours.denoise(x, t, prompt), wanted, rtol=1e-4, atol=1e-5)
        with ours.attention_windows(4, 2):
            assert not torch.allclose(ours.denoise(x, t, prompt), wanted, atol=1e-4)
        torch.testing.assert_close(ours.denoise(x, t, prompt), wanted)
    assert {name.split(".")[0] for name in ours.state_dict()} == {"unet"}
    assert ours.shares[0] == pytest.approx(0.99915)


@pytest.mark.parametrize("strategy", ["cono", "freenoise", "genl", "direct"])
def test_every_strategy_runs_on_texts(folder: Path, strategy: str) -> None:
    sampler = LongVideoSampler(strategy, frames=6, left=2, right=3, steps=2, guided_until=1, stride=2, guidance=7.0)  # type: ignore[arg-type]
    module = VideoDiffusionModule(DiffusersVideo(str(folder)), sampler, (4, 8, 8))
    trainer = tiny_trainer(precision="bf16-true" if strategy == "cono" else "32-true")
    if strategy in ("freenoise", "direct"):
        with pytest.raises(ValueError, match="one prompt a video"):
            trainer.test(module, VideoPromptsDataModule(), verbose=False)
        same = [torch.zeros(1, 77, 32)]
        found = sampler.sample(module.network, module.shares, same, lambda name, frames: torch.randn(1, frames, 4, 8, 8))
        assert found.video.isfinite().all()
        return
    (logs,) = trainer.test(module, VideoPromptsDataModule(), verbose=False)
    assert logs["cono/test_jump"] > 0


def test_a_wrong_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotThereError, match="TextToVideoSDPipeline"):
        DiffusersVideo(str(tmp_path))
