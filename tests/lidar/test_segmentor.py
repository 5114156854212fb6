"""PointSegmentor: protocols, metric, checkpoints, semi-supervised training, submission."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("spconv", reason="spconv is not installed: pip install 'lit-methods[lidar]'")
from lightning.pytorch import seed_everything

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, tiny_trainer
from lit_methods import MinkUNet, PointSegmentor
from lit_methods.callbacks import EMATeacher, ExactResume, SubmissionWriter, TemporalVoting
from lit_methods.datamodules import NuScenesDataModule
from lit_methods.lidar.point_metrics import PointIoU, mean_iou


def data(root: Path, **kwargs) -> NuScenesDataModule:
    return NuScenesDataModule(root=root, **({"version": "v1.0-mini", "mode": "segment", "batch_size": 2} | kwargs))


def small_unet(width: int = 4) -> MinkUNet:
    return MinkUNet(18, stem_channels=4, planes=(4, 4, 8, 8, 8, 8, 4, width), voxel_size=(1.0, 10.0, 1.0))


def module(**kwargs) -> PointSegmentor:
    torch.manual_seed(1)
    return PointSegmentor(small_unet(), **({"learning_rate": 0.01} | kwargs))


def test_a_linear_probe_changes_the_linear_layer_alone(release):
    model = module(protocol="linear_probe")
    before = cloned_state(model)
    trainer = tiny_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(model, datamodule=data(release))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}, "weights and running statistics of the backbone stay"


def test_lp_bn_train_imitates_the_official_codes_moving_statistics(release):
    model = module(protocol="linear_probe", lp_bn_train=True)
    before = cloned_state(model)
    tiny_trainer(max_steps=2, limit_val_batches=0).fit(model, datamodule=data(release))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in changed)
    assert not any(name.endswith("conv.weight") for name in changed)


def test_finetuning_learns_the_batch(release):
    model = module(learning_rate=0.05)
    trainer = tiny_trainer(max_steps=25, limit_val_batches=0, overfit_batches=1)
    seed_everything(0, verbose=False)
    trainer.fit(model, datamodule=data(release))
    final = trainer.callback_metrics["segmentor/loss_ce"]
    assert final < 0.75 * np.log(17), "better than guessing among 17 outputs"


def test_iou_against_a_count_by_hand():
    metric = PointIoU(4, ignore_index=3)
    predicted, labels = torch.tensor([0, 0, 1, 3, 1, 2]), torch.tensor([0, 1, 1, 0, 3, 3])
    metric.update(predicted, labels)
    iou = metric.iou()
    # class 0: 1 hit, 1 wrongly found, 1 missed as the ignored class; class 1: 1 hit, 1 missed; class 2 occurs in no counted point
    torch.testing.assert_close(iou[:2], torch.tensor([1 / 3, 1 / 2], dtype=torch.float64))
    assert iou[2].isnan()
    torch.testing.assert_close(mean_iou(iou), torch.tensor((1 / 3 + 1 / 2) / 2))


def test_pretrained_weights_are_loaded_and_a_wrong_file_is_named(release, tmp_path):
    source = module()
    torch.save(
        {"state_dict": {f"backbone_3d.{k}": v for k, v in source.backbone_3d.state_dict().items()} | {"head_3d.weight": torch.ones(1)}},
        tmp_path / "good.ckpt",
    )
    torch.manual_seed(9)
    loaded = PointSegmentor(small_unet(), pretrained=tmp_path / "good.ckpt")
    assert_state_dicts_equal(loaded.backbone_3d.state_dict(), source.backbone_3d.state_dict())
    with pytest.raises(ValueError, match=r"good\.ckpt is a checkpoint of another architecture.*in the file"):
        PointSegmentor(small_unet(width=8), pretrained=tmp_path / "good.ckpt")
    torch.save({"other.weight": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"no weights under 'backbone_3d\.'; it has other"):
        PointSegmentor(small_unet(), pretrained=tmp_path / "other.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.ckpt can't be read.*truncated"):
        PointSegmentor(small_unet(), pretrained=tmp_path / "cut.ckpt")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        PointSegmentor(small_unet(), pretrained=tmp_path / "none.ckpt")


def test_wrong_number_of_class_names_is_named():
    with pytest.raises(ValueError, match="2 names, but 16 classes"):
        module(class_names=["car", "bus"])


def voting(**kwargs):
    return [EMATeacher(decay=0.9), TemporalVoting(voxel_size=2.0, confidence_threshold=0.05, pseudo_labels=True, **kwargs)]


def semi_supervised(root):
    return data(root, mode="semi_supervised", neighbours=1, label_fraction=25, batch_size=1)


def test_semi_supervised_training_with_voting_resumes_bit_equal(release, tmp_path):
    def build():
        return module(), semi_supervised(release), [*voting(), ExactResume()]

    whole, resumed = kill_and_resume(build, 4, 2, tmp_path, limit_val_batches=1)
    assert_state_dicts_equal(resumed, whole)
    seed_everything(0, verbose=False)
    supervised = module(unlabelled_weight=0.0)
    tiny_trainer(max_steps=4, callbacks=voting(), limit_val_batches=0).fit(supervised, datamodule=semi_supervised(release))
    assert not torch.equal(supervised.head.weight, whole["head.weight"]), "the pseudo-labels matter"


def test_semi_supervised_without_the_callback_is_explained(release):
    with pytest.raises(ValueError, match="TemporalVoting"):
        tiny_trainer(max_steps=1).fit(module(), datamodule=semi_supervised(release))


def test_predictions_are_written_in_the_submission_layout(release, tmp_path):
    model, source = module(), data(release)
    with torch.no_grad():
        model.head.bias[16] = 100.0  # the ignored class must never be submitted
    tiny_trainer(callbacks=[SubmissionWriter(tmp_path)]).predict(model, datamodule=source, return_predictions=False)
    files = sorted(tmp_path.rglob("*_lidarseg.bin"))
    assert len(files) == len(source.predict_set)
    written = np.fromfile(files[0], np.uint8)
    assert len(written) == 120
    assert 1 <= written.min() <= written.max() <= 16


def test_voting_reports_miou_before_and_after(release):
    trainer = tiny_trainer(callbacks=[TemporalVoting(voxel_size=2.0)])
    (metrics,) = trainer.validate(module(), datamodule=data(release, neighbours=1), verbose=False)
    assert metrics["segmentor/val_miou"] == pytest.approx(metrics["voting/miou"]), "the module's own metric sees the voted labels"
    (plain,) = tiny_trainer().validate(module(), datamodule=data(release, neighbours=1), verbose=False)
    assert plain["segmentor/val_miou"] == pytest.approx(metrics["voting/miou_own"])
