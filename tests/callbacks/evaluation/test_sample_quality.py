"""SampleQuality: what it logs, on modules that are ours and that aren't, in one process and two."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from helpers import run_two_processes, tiny_trainer
from lit_methods import SLCT, DigitAutoencoder, DigitFeatures, SmallUNet
from lit_methods.callbacks import SampleQuality, WeightEMA
from lit_methods.consistency_models.evaluation import frechet_distance, precision_recall
from lit_methods.datamodules import GenerativeDigitsDataModule, LatentDataModule


class Copies(pl.LightningModule):
    """Its samples are the data, and the data with noise."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer

    def validation_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(batch_idx * self.trainer.world_size + self.global_rank)
        noisy = batch["image"] + torch.randn(batch["image"].shape, generator=generator)
        return {"1_steps": batch["image"], "2_steps": noisy} if self.answer is None else self.answer

    test_step = validation_step


def validate(model=None, **kwargs):
    data = GenerativeDigitsDataModule(image_size=8, num_train=1717, val_batch_size=20)  # 80 for validation
    (found,) = tiny_trainer(callbacks=[SampleQuality(DigitFeatures())], **kwargs).validate(model or Copies(), data, verbose=False)
    return found


def test_the_data_are_perfect_samples_and_noise_is_seen():
    found = validate()
    assert set(found) == {f"samples/val_{name}{steps}" for name in ("feature_fid", "precision", "recall") for steps in ("", "_2_steps")}
    assert found["samples/val_feature_fid"] == pytest.approx(0, abs=1e-2)
    assert found["samples/val_precision"] == found["samples/val_recall"] == 1
    assert found["samples/val_feature_fid_2_steps"] > 1
    assert found["samples/val_precision_2_steps"] < 1


def test_what_is_logged_is_the_distance_of_all_batches():
    data = GenerativeDigitsDataModule(image_size=8, num_train=1717, val_batch_size=20)
    data.setup("fit")
    images = data.val_set.images
    noisy = torch.cat(
        [part + torch.randn(part.shape, generator=torch.Generator().manual_seed(k)) for k, part in enumerate(images.split(20))]
    )
    with torch.no_grad():
        features = DigitFeatures()
        a, b = features(noisy), features(images)
    found = validate()
    assert found["samples/val_feature_fid_2_steps"] == pytest.approx(float(frechet_distance(a, b)), rel=1e-3)
    assert found["samples/val_recall_2_steps"] == pytest.approx(float(precision_recall(a, b)[1]))


def two(devices):
    kwargs = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    return validate(**kwargs)


def test_two_processes_see_what_one_does():
    torch.set_num_threads(1)
    first, second = run_two_processes(two, 2)
    assert first == second
    assert first == pytest.approx(two(1), rel=1e-3, abs=1e-2)


def test_latents_are_decoded_before_they_are_judged():
    class Sizes(nn.Module):
        def forward(self, images):
            assert images.shape[1:] == (1, 16, 16)
            return images.flatten(1)[:, ::32]

    torch.manual_seed(0)
    model = SLCT(SmallUNet(4, channels=8), autoencoder=DigitAutoencoder(), s0=2, s1=8, sample_times=())
    quality = SampleQuality(Sizes())
    trainer = tiny_trainer(max_steps=2, val_check_interval=2, limit_val_batches=1, callbacks=[WeightEMA(0.5), quality])
    trainer.fit(model, LatentDataModule(num_val=16, batch_size=8, val_batch_size=16))
    assert trainer.callback_metrics["samples/val_feature_fid"] > 0
    trainer.test(model, LatentDataModule(num_val=16, val_batch_size=16), verbose=False)
    assert trainer.callback_metrics["samples/test_feature_fid"] > 0


@pytest.mark.parametrize("answer", [torch.zeros(2), {}, {"1_steps": 3}])
def test_another_answer_is_refused(answer):
    with pytest.raises(ValueError, match="must return a dict"):
        validate(Copies(answer))
    with pytest.raises(ValueError, match="neighbours is 0"):
        SampleQuality(DigitFeatures(), neighbours=0)
