"""One folder per run: never overwritten, the same for every logger, agreed on by all processes."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

import lit_methods
from lit_methods.distributed import broadcast_text, rank, world_size
from lit_methods.files import write_atomically, write_json

# Set by the first process of a run for the ones that it starts, which must write to the same folder.
RUN_FOLDER_VARIABLE = "LIT_METHODS_RUN_FOLDER"
OWNER = "lit_methods_run"  # key of a checkpoint: the run that wrote it


def owner_of(folder: Path) -> str:
    """How a checkpoint names the run that wrote it, also after all runs have moved: ``<name>/<time>``."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def claim_run_folder(root: Path, name: str) -> Path:
    """Create a new folder ``root/name/<YYYYmmdd-HHMMSS>[-k]``; safe against another run that starts in the same second.

    Args:
        root: Parent of all runs; created when missing.
        name: Name of the experiment; characters outside letters, digits, ``.``, ``_``, ``-`` become ``-``.

    Returns:
        The absolute path of the folder, which did not exist before.
    """
    parent = (root / safe_name(name)).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    attempt = 0
    while True:
        folder = parent / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir()  # atomic: of two runs only one succeeds
        except FileExistsError:
            attempt += 1
        else:
            return folder


def safe_name(name: str) -> str:
    """``name`` as a folder name: other characters than letters, digits, ``.``, ``_``, ``-`` replaced by ``-``."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def agree_on_run_folder(root: Path, name: str) -> Path:
    """The run's folder, the same in every process of a run, created by the first of them.

    - Where the processes are a group already, rank 0 tells the others.
    - Processes started by Lightning itself read it from the environment variable ``LIT_METHODS_RUN_FOLDER``.
    - Under torchrun, rank 0 tells the others through torchrun's own store.
    - Under SLURM with several tasks it is named after job, step and restart, which all nodes know.
    - Else a new folder is claimed and the environment variable set, for processes that are started later.
    """
    environment = os.environ
    if world_size() > 1:
        return Path(broadcast_text(str(claim_run_folder(root, name)) if rank() == 0 else ""))
    if environment.get("LOCAL_RANK", "0") != "0" and RUN_FOLDER_VARIABLE in environment:
        return Path(environment[RUN_FOLDER_VARIABLE])
    if "TORCHELASTIC_RUN_ID" in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
        return _agree_under_torchrun(root, name)
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        parts = [environment["SLURM_JOB_ID"], environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_RESTART_COUNT", "")]
        folder = (root / safe_name(name) / "-".join(["slurm", *filter(None, parts)])).resolve()
        if environment["SLURM_PROCID"] == "0":
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        return folder
    folder = claim_run_folder(root, name)
    environment[RUN_FOLDER_VARIABLE] = str(folder)
    return folder


def _agree_under_torchrun(root: Path, name: str) -> Path:
    environment = os.environ
    store = torch.distributed.TCPStore(
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False, timeout=datetime.timedelta(minutes=5)
    )
    key = f"lit_methods/{environment['TORCHELASTIC_RUN_ID']}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}/run_folder"
    if environment["RANK"] == "0":
        folder = claim_run_folder(root, name)
        store.set(key, str(folder))
        return folder
    return Path(store.get(key).decode())  # waits for rank 0


def lock_run(folder: Path) -> IO[str] | None:
    """Hold the run in ``folder`` as long as this process lives or the file that is returned is open.

    The lock is the process's own: loader workers don't inherit it, so it goes with the process even if they outlive it.

    Returns:
        None where another process holds it, or where the file system knows no locks.
    """
    try:
        import fcntl

        file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
    except (ImportError, OSError):
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def in_use(folder: Path) -> bool:
    """Whether another process holds the run in ``folder``; False where that can't be known."""
    if not (folder / ".lock").is_file():
        return False
    try:
        import fcntl

        with open(folder / ".lock", "a", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):
        return False
    return False


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and uncommitted changes of the git checkout that holds ``folder``; None outside a checkout.

    Returns:
        ``commit`` (40 hex digits), ``branch``, ``dirty`` (tracked files changed), ``changes`` (one line per changed file).
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        changes = git("diff", "--stat=120", "HEAD").splitlines()
        return {"commit": commit, "branch": git("rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(changes), "changes": changes[-50:]}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or no commit yet
        return None


def environment_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What a run was made with: versions, platform, devices, command."""
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "command": sys.argv,
        "lit_methods": lit_methods.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": cuda,
        "accelerator": type(trainer.accelerator).__name__,
        "strategy": type(trainer.strategy).__name__,
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "precision": str(trainer.precision),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class RunFolder(pl.Callback):
    """Keeps everything that belongs to a run in one folder, whatever the loggers.

    Runs: in ``setup``, on rank 0. Writes ``config.yaml`` (resolved config), ``git.json`` (absent outside a git checkout) and
    ``environment.json``; sends every ``ModelCheckpoint`` without a ``dirpath`` to ``checkpoints/``; logs the config and,
    under ``git``, commit, branch and ``dirty`` to every logger. Saves: the run's name in checkpoints. The ``lit`` command adds it; in
    Python give it to the ``Trainer`` like any callback.

    Args:
        folder: The run's own folder, from :func:`claim_run_folder`.
        config: Resolved config: mappings, lists, strings, numbers only. None: no ``config.yaml``.
        restart_from: Checkpoint with which the run goes on in its own folder. The files of its first start stay, and a line with this
            start's environment and git state is appended to ``restarts.jsonl``.
    """

    def __init__(self, folder: Path | str, config: dict[str, Any] | None = None, restart_from: Path | str | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.config = config
        self.restart_from = restart_from
        self._lock: IO[str] | None = None
        self._written = False
        self._logged: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the files once, and point the checkpoint callbacks here before their own ``setup`` (they always run last)."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(self.folder)
        git = git_state(Path.cwd())
        if self.restart_from is not None:
            line = json.dumps({"from": str(self.restart_from), "environment": environment_state(trainer), "git": git})
            with open(self.folder / "restarts.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        write_json(self.folder / "environment.json", environment_state(trainer))
        if git is not None:
            write_json(self.folder / "git.json", git)
        logged = dict(self.config or {})
        if git is not None:
            logged["git"] = {key: git[key] for key in ("commit", "branch", "dirty")}
        self._logged = logged
        for logger in trainer.loggers if logged else ():
            logger.log_hyperparams(logged)
        if self.config is not None:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            path = self.folder / "config.yaml"
            write_atomically(path, f"# lit {getattr(stage, 'value', stage)} --config {path}\n{text}")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("config", f"```yaml\n{text}\n```")

    def _log_again(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put sections of the config back that hyperparameters of the same name (``model``, ``data``) have overwritten in the loggers.

        Lightning logs the hyperparameters of module and datamodule behind all ``setup`` hooks; theirs stay below ``hyperparameters``.
        """
        parts = [pl_module, getattr(trainer, "datamodule", None)]
        hyperparameters = {key: value for part in parts if part is not None for key, value in part.hparams_initial.items()}
        if overwritten := sorted(set(hyperparameters) & set(self._logged)):
            config = {key: self._logged.pop(key) for key in overwritten}  # once a run
            for logger in trainer.loggers:
                logger.log_hyperparams(config | {"hyperparameters": {key: hyperparameters[key] for key in overwritten}})
                if isinstance(logger, TensorBoardLogger):  # it writes its file but once
                    Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
                logger.save()

    on_train_start = on_validation_start = on_test_start = on_predict_start = _log_again

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name the run in its checkpoints, which may lie elsewhere, beside those of other runs."""
        checkpoint[OWNER] = owner_of(self.folder)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the folder."""
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def run_dir(trainer: pl.Trainer) -> Path:
    """The run's own folder: that of its :class:`RunFolder`, else of its logger, else ``default_root_dir``.

    Call it on every rank: without a ``RunFolder``, Lightning broadcasts the logger's folder.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunFolder):
            return callback.folder
    return Path(trainer.log_dir or trainer.default_root_dir)
