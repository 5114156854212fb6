"""One process writes a run's folder: who holds it, who is refused, and what happens where the file system has no locks."""

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import MID, start
from lit_methods.cli.main import main
from lit_methods.cli.resume import unreadable
from lit_methods.files import replacing
from lit_methods.runs import lock
from lit_methods.runs.folder import RunFolder, is_first, told_by_first
from lit_methods.runs.lock import LOCK, RunInUse, hold_run, in_use, lock_run

TINY = [
    *("fit", "--model", "helpers.Classifier", "--data", "faults.FewImages", "--name", "tiny", "--trainer.max_epochs", "2"),
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true"),
    *("--trainer.callbacks+=faults.Trace", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"),
    *("--trainer.enable_progress_bar", "false"),
]


def other_process(folder: Path) -> int:
    """The number of a child that holds ``folder`` until it is killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"+" if lock_run(folder) else b"-")
        signal.pause()
    assert os.read(read, 1) == b"+"
    os.close(read)
    os.close(write)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[int]:
    child = other_process(tmp_path)
    yield child
    end(child)


def test_the_message_names_process_folder_and_what_to_do(tmp_path: Path, held: int) -> None:
    with pytest.raises(RunInUse) as refused:
        hold_run(tmp_path)
    said = str(refused.value)
    assert f"{tmp_path} is being written by process {held} on {socket.gethostname()}, since 20" in said
    assert "wait until it has ended" in said


def test_a_callback_in_plain_python_refuses_too(tmp_path: Path, held: int) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    from helpers import tiny_trainer

    with pytest.raises(RunInUse, match=f"process {held}"):
        tiny_trainer(max_steps=1, callbacks=[RunFolder(tmp_path)]).fit(BoringModel())
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_lock_goes_with_its_last_holder(tmp_path: Path) -> None:
    command, callback = hold_run(tmp_path), hold_run(tmp_path)
    assert command is callback is not None
    assert not in_use(tmp_path), "another process"
    callback.close()
    assert (tmp_path / LOCK).exists()
    child = os.fork()
    if child == 0:
        os._exit(0 if in_use(tmp_path) else 1)
    assert os.waitpid(child, 0)[1] == 0
    command.close()
    command.close()
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_second_fit_of_the_same_trainer_holds_the_folder_again(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    from helpers import tiny_trainer

    class Look(RunFolder):
        seen: list[bool] = []  # noqa: RUF012

        def on_train_batch_start(self, *_: Any) -> None:
            self.seen.append((self.folder / LOCK).exists())

    trainer = tiny_trainer(max_steps=1, limit_val_batches=0, callbacks=[Look(tmp_path)])
    trainer.fit(BoringModel())
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(trainer.lightning_module)
    assert Look.seen == [True, True]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_file_is_one(tmp_path: Path) -> None:
    child = other_process(tmp_path)
    assert in_use(tmp_path)
    assert lock_run(tmp_path) is None
    with pytest.raises(RunInUse, match=f"process {child} on "):
        hold_run(tmp_path)
    end(child)
    assert not in_use(tmp_path)
    mine = hold_run(tmp_path)  # its owner is dead
    assert mine is not None
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    mine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("owner", "taken"),
    [
        ({"host": "elsewhere", "pid": 1}, False),
        ({"host": "elsewhere", "pid": 1, "job": ["77", "0"]}, True),  # an earlier start of this job
        ({"host": "elsewhere", "pid": 1, "job": ["78", "0"]}, False),
        ({"host": socket.gethostname(), "pid": os.getpid(), "born": "1"}, True),  # another process had this number
        ({"host": socket.gethostname(), "pid": os.getppid()}, False),
    ],
)
def test_whose_file_counts(owner: dict[str, Any], taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / LOCK).write_text(json.dumps({"kind": "file", **owner}))
    if taken:
        lock_of_mine = hold_run(tmp_path)
        assert lock_of_mine is not None
        lock_of_mine.close()
        return
    with pytest.raises(RunInUse) as refused:
        hold_run(tmp_path)
    if owner["host"] == "elsewhere":
        assert f"if it has ended, delete {tmp_path / LOCK}" in str(refused.value)


@pytest.mark.usefixtures("no_locks")
def test_an_empty_file_counts_for_a_minute(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    assert lock_run(tmp_path) is None
    os.utime(tmp_path / LOCK, (time.time() - 100,) * 2)
    mine = lock_run(tmp_path)
    assert mine is not None
    mine.close()


def test_a_folder_that_is_made_anew_is_held_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    first = hold_run(folder)
    (folder / LOCK).unlink()
    folder.rmdir()
    folder.mkdir()
    assert hold_run(folder) is first
    assert first is not None
    child = os.fork()
    if child == 0:
        os._exit(0 if lock_run(folder) is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    first.close()
    first.close()
    assert list(folder.iterdir()) == []


def test_two_processes_never_share_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    with replacing(tmp_path / "last.ckpt") as one, replacing(tmp_path / "last.ckpt") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "last.ckpt").read_text() == "one"
    with replacing(tmp_path / f"{'ü' * 120}.ckpt") as long:
        long.write_text("a name of 245 bytes")


def test_slurm_tasks_hear_what_the_first_one_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert told_by_first(tmp_path, "restart", lambda: "this one") == "this one"
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert told_by_first(tmp_path, "restart", lambda: pytest.fail("it chooses nothing")) == "this one"


def test_processes_of_torchrun_hear_it_through_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert told_by_first(tmp_path, "restart", lambda: "this one") == "this one"
    monkeypatch.setenv("RANK", "1")
    assert told_by_first(tmp_path, "restart", lambda: pytest.fail("it chooses nothing")) == "this one"


def test_who_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert is_first()
    others = [{"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}, {"OMPI_COMM_WORLD_RANK": "3"}, {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}]
    for settings in (*others, {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}):
        with monkeypatch.context() as context:
            for name, value in settings.items():
                context.setenv(name, value)
            assert not is_first(), settings
    monkeypatch.setenv("SLURM_PROCID", "2")  # one task of a job, started by itself
    assert is_first()


def test_two_starts_of_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find the same unfinished run: one goes on with it, the other one says so, and what the first has saved stays whole."""
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "--resume", "auto"]
    killed = start(words, tmp_path, tmp_path / "log.txt")
    assert killed.wait_for(lambda phases: phases.count(MID) >= 3), killed.log.read_text()
    killed.send(signal.SIGSTOP)  # it lives
    (run,) = Path("runs", "tiny").iterdir()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"runs/tiny/{run.name} is being written by process {killed.process.pid} on " in said
    assert "Traceback" not in said
    assert [path.name for path in Path("runs", "tiny").iterdir()] == [run.name], "and nothing else was begun"
    killed.send(signal.SIGKILL)
    killed.end()
    assert all(unreadable(path) is None for path in (run / "checkpoints").glob("*.ckpt"))
    (run / "checkpoints" / ".last.ckpt.1-ab.tmp").write_text("left by a kill")
    (run / ".report.html.1-ab.tmp").write_text("left by a kill")
    assert main(words) == 0, "a dead process blocks nobody"
    assert "goes on from" in capsys.readouterr().out
    assert [path.name for path in Path("runs", "tiny").iterdir()] == [run.name]
    assert not [path for path in run.rglob(".*")], "neither a lock nor a temporary file stays"


def test_a_lock_is_described_whatever_its_file_holds() -> None:
    for content in ("", "[1]", "not json", json.dumps({"pid": "x"})):
        assert lock.described(lock._read(content)) == "another process"
