"""What a machine does to a long run: full disk, unwritable folders, killed workers, broken checkpoints, NaN; `--resume auto`."""

import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers import Classifier
from lit_methods.cli.main import main
from lit_methods.cli.resume import differing_keys, newest_readable, unreadable
from lit_methods.runs.checkpoints import AtomicCheckpointIO, remove_leftovers
from lit_methods.runs.folder import in_use, lock_run

WORDS = [
    *("fit", "--model", "helpers.Classifier", "--data", "faults.FewImages", "--name", "run", "--trainer.max_epochs", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"),
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true"),
    *("--trainer.log_every_n_steps", "2"),
]


class NaN(Classifier):
    """The loss is NaN from the third step on; ``added``: as a constant, so that the gradients stay finite."""

    def __init__(self, added: bool = False) -> None:
        super().__init__()
        self.added = added

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        out = super().training_step(batch, batch_idx)
        if batch_idx >= 2:
            out["loss"] = out["loss"] + float("nan") if self.added else out["loss"] * float("nan")
        return out


class At(pl.Callback):
    """Does something at a step: the name of a function below."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            globals()[self.what](trainer)


def fill_the_disk(trainer: pl.Trainer) -> None:
    """No file may become longer than 8 kB from now on; the system answers EFBIG inside the write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoil_the_folder(trainer: pl.Trainer) -> None:
    folder = Path(trainer.default_root_dir, "checkpoints")
    folder.rename(folder.with_name("good"))
    folder.write_text("a file in place of the folder")


def kill_a_worker(trainer: pl.Trainer) -> None:
    # other tests may have left helpers behind; names such as Process-7 count up, while the system uses pids again
    worker = max(multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2]))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is left for the loader to find


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def runs() -> list[Path]:
    return sorted(Path("runs", "run").iterdir())


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def said(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    capsys.readouterr()
    assert main([*WORDS, *words]) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    error = captured.err[captured.err.rfind("error: ") :] if status else captured.err
    assert not status or len(error.splitlines()) <= 5
    return error + captured.out


def at(step: int, what: str) -> list[str]:
    return ["--trainer.callbacks+=test_robustness.At", "--trainer.callbacks.step", str(step), "--trainer.callbacks.what", what]


def test_a_full_disk_keeps_the_last_good_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    text = said(capsys, 1, *at(3, "fill_the_disk"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "the disk or the quota is full" in text
    assert ".ckpt" in text
    (run,) = runs()
    files = list((run / "checkpoints").iterdir())
    assert files
    assert all(unreadable(path) is None for path in files), files
    assert step_of(run / "checkpoints" / "last.ckpt") == 2
    assert not list((run / "checkpoints").glob(".*")), "no leftovers"


def test_an_unwritable_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("a file")
    text = said(capsys, 1)
    assert "can't make a run folder in runs/run" in text
    assert "--run_root" in text
    Path("runs").unlink()
    text = said(capsys, 1, *at(3, "spoil_the_folder"))
    assert "no folder to write to" in text
    assert "--run_root" in text
    assert step_of(runs()[0] / "good" / "last.ckpt") == 2


def test_a_worker_killed_by_the_system(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, 1, "--data.num_workers", "1", *at(2, "kill_a_worker"))
    assert "DataLoader worker" in text
    assert "num_workers" in text
    assert step_of(runs()[0] / "checkpoints" / "last.ckpt") in (1, 2)


def test_a_job_that_lightning_can_not_place_is_one_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "7", "NTASKS": "2", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert main(WORDS) == 1
    said = capsys.readouterr().err
    assert "`--ntasks-per-node=2`" in said
    assert "Traceback" not in said


def test_a_loss_that_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "test_robustness.NaN"]
    text = said(capsys, 1, *model)
    assert "the weights are not finite (network.0.weight): first at step 3, seen at step 3" in text
    assert "learning rate" in text
    last = torch.load(runs()[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    text = said(capsys, 1, *model, "--model.added", "true")
    assert "the loss is not finite: first at step 3, seen at step 4" in text
    guard = ["--trainer.callbacks+=FiniteGuard", "--trainer.callbacks.policy", "warn"]
    with pytest.warns(UserWarning, match="first at step 3"):
        said(capsys, 0, *model, "--model.added", "true", *guard)
    assert step_of(runs()[-1] / "checkpoints" / "last.ckpt") == 6


def test_auto_starts_anew_goes_on_or_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["--resume", "auto"]
    assert "run folder" in said(capsys, 0, *auto)
    (run,) = runs()
    metrics = (run / "csv" / "metrics.csv").read_bytes()
    assert "nothing is left to do" in said(capsys, 0, *auto)
    assert len(runs()) == 1
    (run / "finished.json").unlink()  # as if it had been killed
    last = run / "checkpoints" / "last.ckpt"
    best = next(path for path in (run / "checkpoints").glob("epoch*.ckpt"))
    last.write_bytes(last.read_bytes()[:5000])
    text = said(capsys, 0, *auto)
    assert "last.ckpt is left out: it can't be read" in text
    assert f"goes on from {best}" in text
    assert len(runs()) == 1
    assert (run / "finished.json").is_file()
    assert (run / "csv" / "metrics.csv").read_bytes() == metrics
    (run / "finished.json").unlink()
    assert "its config differs: trainer.max_steps" in said(capsys, 0, *auto, "--trainer.max_steps", "3")
    assert len(runs()) == 2
    assert main(["test", *WORDS[1:], *auto]) == 2


def test_broken_checkpoints_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, 0)
    good = runs()[0] / "checkpoints" / "last.ckpt"
    Path("cut.ckpt").write_bytes(good.read_bytes()[:7000])
    assert "cut.ckpt: the checkpoint can't be read" in said(capsys, 1, "--ckpt_path", "cut.ckpt")
    torch.save(torch.load(good, weights_only=True) | {"foreign": Path("x")}, "foreign.ckpt")
    text = said(capsys, 1, "--ckpt_path", "foreign.ckpt")
    assert "foreign.ckpt: the checkpoint holds a pathlib." in text
    assert "--weights_only false" in text
    said(capsys, 0, "--ckpt_path", "foreign.ckpt", "--weights_only", "false", "--trainer.max_epochs", "2")
    other = Path("runs", "run", "other", "checkpoints", "last.ckpt")
    other.parent.mkdir(parents=True)
    shutil.copy("cut.ckpt", other)
    text = said(capsys, 0, "--resume", "last", "--trainer.max_epochs", "2")
    assert f"{other} is left out" in text
    assert step_of(runs()[-2] / "checkpoints" / "last.ckpt") == 12


def test_only_whole_checkpoints_of_a_fit_count(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    assert newest_readable([tmp_path / "weights.ckpt"]) is None
    torch.save({"loops": {}, "optimizer_states": [], "state_dict": {}}, tmp_path / "whole.ckpt")
    os.utime(tmp_path / "whole.ckpt", (1, 1))  # older
    assert newest_readable([*tmp_path.glob("*.ckpt")]) == tmp_path / "whole.ckpt"


def test_a_failed_save_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"a": lambda: 2}, path)  # can't be pickled
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left.*last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"a": 3}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    (path.parent / ".last.ckpt.tmp").write_text("left by a kill")
    remove_leftovers(path.parent)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_the_same_config_elsewhere_is_the_same() -> None:
    one = {"name": "a", "ckpt_path": None, "trainer": {"max_steps": 3, "name": 1}, "data": [1, 2]}
    assert differing_keys(one, one | {"name": "b", "ckpt_path": "x"}) == []
    assert differing_keys(one, one | {"trainer": {"max_steps": 4, "name": 2}, "data": [1]}) == ["trainer.max_steps", "trainer.name", "data"]
    assert differing_keys(None, one) == ["everything"]


def test_a_run_is_in_use_as_long_as_its_process_lives(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        held = lock_run(tmp_path)
        os.write(write, b"+" if held else b"-")
        signal.pause()
    assert os.read(read, 1) == b"+"
    assert in_use(tmp_path)
    assert lock_run(tmp_path) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not in_use(tmp_path)
    os.close(read)
    os.close(write)
