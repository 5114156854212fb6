"""SubmissionWriter: the files of a prediction run, one process and two."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from helpers import run_two_processes, tiny_trainer
from lit_methods.callbacks import SubmissionWriter
from lit_methods.datamodules import KittiStyleDataModule


def write_scans(root: Path, frames: int = 5) -> Path:
    folder = root / "sequences" / "08" / "velodyne"
    folder.mkdir(parents=True)
    for k in range(frames):
        np.random.default_rng(k).uniform(-5, 5, (10 + k, 4)).astype(np.float32).tofile(folder / f"{k:06d}.bin")
    return root


class HeightSegmentor(pl.LightningModule):
    """Class 8 (road) below 0, class 14 (vegetation) above."""

    def predict_step(self, batch, batch_idx):
        labels = torch.where(batch["points"][:, 2] < 0, 8, 14)
        return {"token": batch["token"], "labels": list(labels.split(batch["points_per_sample"].tolist()))}


def predict(root: Path, callback: SubmissionWriter, module: pl.LightningModule | None = None, **trainer) -> pl.Trainer:
    runner = tiny_trainer(callbacks=[callback], **trainer)
    runner.predict(module or HeightSegmentor(), datamodule=KittiStyleDataModule(root, batch_size=2), return_predictions=False)
    return runner


def check(root: Path, output: Path, frames: int = 5) -> None:
    files = sorted((output / "sequences" / "08" / "predictions").iterdir())
    assert [file.name for file in files] == [f"{k:06d}.label" for k in range(frames)]
    for k, file in enumerate(files):
        points = np.fromfile(root / "sequences" / "08" / "velodyne" / f"{k:06d}.bin", np.float32).reshape(-1, 4)
        assert np.fromfile(file, np.uint32).tolist() == np.where(points[:, 2] < 0, 40, 70).tolist()


def test_files_of_a_run(tmp_path):
    root = write_scans(tmp_path / "data")
    callback = SubmissionWriter(tmp_path / "out")
    predict(root, callback)
    check(root, tmp_path / "out")
    assert callback.num_written == 5


def test_default_folder_is_the_runs_own(tmp_path):
    root = write_scans(tmp_path / "data")
    callback = SubmissionWriter()
    trainer = predict(root, callback, default_root_dir=tmp_path / "run")
    assert callback.folder(trainer).name == "predictions"
    assert callback.folder(trainer).is_relative_to(tmp_path / "run")
    check(root, callback.folder(trainer))


def test_modules_and_datamodules_that_do_not_fit(tmp_path):
    root = write_scans(tmp_path / "data")

    class Logits(HeightSegmentor):
        def predict_step(self, batch, batch_idx):
            return {"token": batch["token"], "logits": batch["points"]}

    class OneTensor(HeightSegmentor):
        def predict_step(self, batch, batch_idx):
            return super().predict_step(batch, batch_idx) | {"labels": torch.zeros(21, dtype=torch.long)}

    class Ignored(HeightSegmentor):
        def predict_step(self, batch, batch_idx):
            output = super().predict_step(batch, batch_idx)
            return output | {"labels": [labels * 0 + 19 for labels in output["labels"]]}

    for module, message in (
        (Logits(), r"Logits\.predict_step must return a dict with 'token' and 'labels'.*got \['logits', 'token'\]"),
        (OneTensor(), "one label tensor per token, got 2 tokens and Tensor of 21"),
        (Ignored(), r"predictions of 08/000000 hold ids 19\.\.19"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(root, SubmissionWriter(tmp_path / "bad"), module)
    assert not (tmp_path / "bad").exists()  # nothing half-written
    with pytest.raises(ValueError, match=r"needs a datamodule with write_labels.*got NoneType"):
        tiny_trainer(callbacks=[SubmissionWriter()]).predict(HeightSegmentor(), dataloaders=[{"points": torch.zeros(1, 4)}])


def _predict_on_a_rank(root: str, output: str) -> int:
    callback = SubmissionWriter(Path(output))
    predict(Path(root), callback, devices=2, strategy="ddp")
    return callback.num_written


def test_two_ranks_write_their_own_scans(tmp_path):
    root = write_scans(tmp_path / "data")
    counts = run_two_processes(_predict_on_a_rank, str(root), str(tmp_path / "out"))
    check(root, tmp_path / "out")
    assert sorted(counts) == [2, 3]
