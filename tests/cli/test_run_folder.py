"""One folder per run: what it holds, that nothing is overwritten, and who agrees on it."""

import datetime
import functools
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import forks
import lit_methods
from helpers import HANGS, run_lit, run_python, run_two_processes, tiny_trainer
from lit_methods.cli.explain import explain_run_error
from lit_methods.cli.main import main
from lit_methods.errors import CommandError
from lit_methods.runs.folder import (
    RUN_FOLDER_VARIABLE,
    RunFolder,
    agree_on_run_folder,
    claim_run_folder,
    git_state,
    run_dir,
    told_by_first,
)


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    folders = [claim_run_folder(tmp_path, "a b/c") for _ in range(4)]
    assert len(set(folders)) == 4
    assert all(folder.is_dir() and folder.parent == tmp_path / "a-b-c" for folder in folders)


def test_the_callback_works_in_plain_python(tmp_path: Path) -> None:
    folder = claim_run_folder(tmp_path, "plain")
    checkpoint = ModelCheckpoint()
    trainer = tiny_trainer(
        max_steps=2,
        limit_val_batches=0,
        callbacks=[checkpoint, RunFolder(folder, {"model": {"lr": 0.1}})],
        logger=CSVLogger(folder, "csv", ""),
        enable_checkpointing=True,
    )
    trainer.fit(BoringModel(), datamodule=BoringDataModule())
    assert run_dir(trainer) == folder
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"model": {"lr": 0.1}}
    assert json.loads((folder / "environment.json").read_text())["processes"] == 1
    assert Path(checkpoint.best_model_path).parent == folder / "checkpoints"
    assert yaml.safe_load((folder / "csv" / "hparams.yaml").read_text())["model"] == {"lr": 0.1}


def test_run_dir_without_the_callback_is_the_loggers_folder_or_the_trainers(tmp_path: Path) -> None:
    assert run_dir(tiny_trainer(logger=CSVLogger(tmp_path, "csv", "0"))) == tmp_path / "csv" / "0"
    assert run_dir(tiny_trainer(default_root_dir=tmp_path)) == tmp_path


def test_a_checkpoint_folder_of_the_users_own_stays(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "mine")
    trainer = tiny_trainer(max_steps=1, limit_val_batches=0, callbacks=[checkpoint, RunFolder(tmp_path / "run")], enable_checkpointing=True)
    trainer.fit(BoringModel(), datamodule=BoringDataModule())
    assert list((tmp_path / "mine").glob("*.ckpt"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None

    def git(*words: str) -> str:
        settings = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *settings, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "trunk")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file.txt").write_text("one\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = git_state(tmp_path)
    assert clean == {"commit": git("rev-parse", "HEAD"), "branch": "trunk", "dirty": False, "changes": []}
    (tmp_path / "file.txt").write_text("two\n")
    dirty = git_state(tmp_path)
    assert dirty is not None
    assert dirty["dirty"]
    assert "file.txt" in dirty["changes"][0]


def test_processes_started_by_lightning_read_the_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", RUN_FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    first = agree_on_run_folder(tmp_path, "run")
    assert os.environ[RUN_FOLDER_VARIABLE] == str(first)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert agree_on_run_folder(tmp_path, "run") == first
    monkeypatch.setenv("LOCAL_RANK", "0")  # left over in the first process: a later run of its own
    assert agree_on_run_folder(tmp_path, "run") != first
    monkeypatch.delenv(RUN_FOLDER_VARIABLE)


def agreed_folder(root: Path) -> str:
    return str(agree_on_run_folder(root, "run"))


def test_processes_that_are_a_group_already_agree(tmp_path: Path) -> None:
    first, second = run_two_processes(agreed_folder, tmp_path)
    assert first == second
    assert [str(path) for path in (tmp_path / "run").iterdir()] == [first]


def test_slurm_tasks_agree_without_talking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    other = agree_on_run_folder(tmp_path, "run")
    assert not other.exists()  # the first task makes it
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert agree_on_run_folder(tmp_path, "run") == other == tmp_path / "run" / "slurm-77-0"
    assert other.is_dir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued: another folder
    assert agree_on_run_folder(tmp_path, "run") == tmp_path / "run" / "slurm-77-0-1"
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with pytest.raises(FileExistsError):
        agree_on_run_folder(tmp_path, "run")


LAUNCHERS = {  # what a rank is given: a user's own ranks, Kubeflow's, the main processes of two nodes that a user starts
    "by hand": lambda rank: {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
    "Kubeflow": lambda rank: {"RANK": str(rank), "WORLD_SIZE": "2"},
    "two nodes": lambda rank: {"NODE_RANK": str(rank), "WORLD_SIZE": "4"},
}
AGREE = """
import sys
from pathlib import Path
import torch
from lit_methods.runs.folder import agree_on_run_folder, is_first, told_by_first
root, first = Path(sys.argv[1]), is_first()
told = told_by_first(root / "run", "restart", lambda: f"chosen by {first}")
print(first, told, agree_on_run_folder(root, "run"))
torch.distributed.init_process_group("gloo", rank=int(not first), world_size=2)  # as Lightning does later, at the same address
torch.distributed.barrier()
"""


def without_launchers() -> dict[str, str]:
    """The environment as a terminal has it."""
    heads = ("LOCAL_RANK", "MASTER_", "WORLD_", "NODE_", "SLURM", "RANK", RUN_FOLDER_VARIABLE)
    return {key: value for key, value in os.environ.items() if not key.startswith(heads)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_that_were_given_hear_the_first_ones_choice(launcher: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = without_launchers() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor() as pool:
        ranks = [common | LAUNCHERS[launcher](rank) for rank in (1, 0)]
        other, first = pool.map(lambda given: run_python(["-c", AGREE, tmp_path], env=given), ranks)
    assert (first.returncode, other.returncode) == (0, 0), other.stderr + first.stderr
    (folder,) = (tmp_path / "run").iterdir()
    assert first.stdout.split("\n")[0] == f"True chosen by True {folder}"
    assert other.stdout.split("\n")[0] == f"False chosen by True {folder}"


def test_a_first_process_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", without_launchers())
    monkeypatch.setattr("lit_methods.runs.folder.WAIT", datetime.timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommandError, match=rf"rank 0\) doesn't answer at 127\.0\.0\.1:{port}"):
        agree_on_run_folder(tmp_path, "run")


@pytest.mark.parametrize(
    ("job", "ranks", "name"),
    [
        ({"LSB_JOBID": "12", "PMIX_NAMESPACE": "7", "JSM_NAMESPACE_SIZE": "2"}, "JSM_NAMESPACE_RANK", "lsf-12-7"),
        ({"PMIX_NAMESPACE": "prterun-node1-99@1", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK", "mpi-prterun-node1-99-1"),
    ],
)
def test_processes_of_lsf_and_openmpi_agree_without_talking(
    job: dict[str, str], ranks: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", without_launchers())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # mpi4py is there
    for key, value in (job | {ranks: "0"}).items():
        monkeypatch.setenv(key, value)
    assert told_by_first(tmp_path / "run", "restart", lambda: "this one") == "this one"
    folder = agree_on_run_folder(tmp_path, "run")
    assert folder == tmp_path / "run" / name
    assert folder.is_dir()
    monkeypatch.setenv(ranks, "1")
    assert told_by_first(tmp_path / "run", "restart", lambda: pytest.fail("it chooses nothing")) == "this one"
    assert agree_on_run_folder(tmp_path, "run") == folder


def test_what_a_killed_run_left_in_a_shared_checkpoint_folder_goes(tmp_path: Path) -> None:
    """Only ours, only of a dead process of this machine: others may be saving there."""
    shared = tmp_path / "shared"
    (shared / "epoch=0-val").mkdir(parents=True)
    code = "import os, pathlib, sys; from lit_methods.files import replacing; blocks = [replacing(pathlib.Path(p)) for p in sys.argv[1:]]\n"
    code += "for block in blocks: block.__enter__().write_text('half')\nos._exit(9)"
    killed = [shared / "last.ckpt", shared / "epoch=0-val" / "loss=1.ckpt"]
    subprocess.run([sys.executable, "-c", code, *map(str, killed)], check=False, timeout=HANGS)
    left = {path.name for path in shared.rglob(".*.tmp")}
    assert len(left) == 2
    dead = next(shared.glob(".last.ckpt.*.tmp")).name
    machine, pid, rest = dead.removeprefix(".last.ckpt.").split("-")
    stay = {
        f".last.ckpt.{int(machine, 16) ^ 1:08x}-{pid}-{rest}",  # of another machine
        f".last.ckpt.{machine}-{os.getpid()}-{rest}",  # of a process that lives
        f".last.ckpt.{pid}-{rest}",  # of another program
        ".rsync.tmp",
        "notes.tmp",
    }
    for name in stay:
        (shared / name).write_text("not ours to delete")
    save = ModelCheckpoint(dirpath=shared, filename="{step}")
    tiny_trainer(callbacks=[RunFolder(tmp_path / "run"), save], enable_checkpointing=True, max_steps=1).fit(
        BoringModel(), BoringDataModule()
    )
    assert {path.name for path in shared.rglob("*") if path.is_file()} == stay | {"step=1.ckpt"}


def test_two_processes_share_one_folder(tmp_path: Path) -> None:
    """Also that a run stays in one folder with Lightning's own launcher, which starts the command a second time."""
    demo = "lightning.pytorch.demos.boring_classes."
    words = ["--model", f"{demo}BoringModel", "--data", f"{demo}BoringDataModule", "--name", "pair"]
    trainer = {
        "accelerator": "cpu",
        "devices": "2",
        "strategy": "ddp",
        "max_steps": "2",
        "limit_val_batches": "1",
        "enable_model_summary": "false",
    }
    for key, value in trainer.items():
        words += [f"--trainer.{key}", value]
    interpreter = {forks.INTERPRETER: forks.interpreter()}  # the second process is a fork, too
    done = run_lit(["fit", *words], tmp_path, without_launchers() | interpreter | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs" / "pair").iterdir()
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert done.stdout.count("run folder: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


class Named(BoringModel):
    """Its hyperparameters have the names of sections of a config."""

    def __init__(self, model: str = "mine", width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_do_not_overwrite_the_config_in_the_loggers(tmp_path: Path) -> None:
    class Data(BoringDataModule):
        def __init__(self, data: str = "theirs") -> None:
            super().__init__()
            self.save_hyperparameters()

    config = {"model": {"class_path": "Named"}, "data": {"class_path": "Data"}, "trainer": {"max_steps": 1}}
    for fn in ("fit", "validate"):
        folder = claim_run_folder(tmp_path, fn)
        loggers = [CSVLogger(folder, "csv", ""), TensorBoardLogger(folder, "tensorboard", "")]
        trainer = tiny_trainer(max_steps=1, callbacks=[RunFolder(folder, config)], logger=loggers)
        getattr(trainer, fn)(Named(), datamodule=Data())
        for name in ("csv", "tensorboard"):
            logged = yaml.safe_load((folder / name / "hparams.yaml").read_text())
            assert {key: logged[key] for key in config} == config, name
            assert logged["hyperparameters"] == {"model": "mine", "data": "theirs"}
            assert logged["width"] == 3, "what collides with nothing stays where Lightning puts it"


def test_hyperparameters_of_one_name_with_two_values_are_told_shortly(tmp_path: Path) -> None:
    class Data(BoringDataModule):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(RuntimeError) as caught:
        tiny_trainer(max_steps=1, logger=CSVLogger(tmp_path)).fit(Named(), datamodule=Data())
    said = str(explain_run_error(caught.value))
    assert "module and datamodule" in said
    assert "'width'" in said


@pytest.mark.parametrize(("config", "key"), [("cast", "data.init_args.root"), ("shrinkmatch", "data.init_args.data.init_args.root")])
def test_missing_data_are_said_before_anything_is_built(
    config: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for network in (lit_methods.MLP, lit_methods.SmallConvNet):
        builds = functools.wraps(network.__init__)(lambda *_, **__: pytest.fail("a network is built"))
        monkeypatch.setattr(network, "__init__", builds)
    kind = ["--data", "CIFARDataModule"] if config == "cast" else ["--data.init_args.data", "CIFARDataModule"]
    words = ["fit", "--config", f"configs/{config}.yaml", "--run_root", str(tmp_path), *kind, f"--{key}", "nowhere"]
    assert main(words) == 1
    assert "root='nowhere'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "a failed start leaves nothing"
