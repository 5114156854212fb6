"""One folder per run: never overwritten, the same for every logger, agreed on by all processes."""

import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

import lit_methods
from lit_methods.distributed import broadcast_text, rank, world_size
from lit_methods.errors import CommandError
from lit_methods.files import dump_yaml, remove_dead, write_atomically, write_json
from lit_methods.git import git
from lit_methods.runs.lock import RunLock, hold_run
from lit_methods.runs.lock import in_use as in_use
from lit_methods.runs.lock import lock_run as lock_run

# Set by the first process of a run for the ones that it starts, which must write to the same folder.
RUN_FOLDER_VARIABLE = "LIT_METHODS_RUN_FOLDER"
_RANKS = (  # of other launchers
    *("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK"),
    *("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "JSM_NAMESPACE_RANK"),
)
_SERVED: list[torch.distributed.TCPStore] = []  # a store ends with the last object that names it
WAIT = datetime.timedelta(minutes=5)  # for what the first process says
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
    - Under SLURM with several tasks, under LSF and OpenMPI it is named after the start (job, step, restart), which all nodes know.
    - Processes that were given ``RANK``, or ``NODE_RANK`` and ``LOCAL_RANK``, by hand or by Kubeflow hear it from the first one, through a
      store at ``MASTER_ADDR`` and ``MASTER_PORT``.
    - Else a new folder is claimed and the environment variable set, for processes that are started later.
    """
    environment = os.environ
    if world_size() > 1:
        return Path(broadcast_text(str(claim_run_folder(root, name)) if rank() == 0 else ""))
    if _started_by_first():
        return Path(environment[RUN_FOLDER_VARIABLE])
    if _under_torchrun():
        return Path(_told_by_store("run_folder", lambda: str(claim_run_folder(root, name))))
    if (start := _named_start()) is not None:
        folder = (root / safe_name(name) / start).resolve()
        if is_first():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        return folder
    if _under_hand():
        folder = Path(_told_by_store("run_folder", lambda: str(claim_run_folder(root, name))))
        environment[RUN_FOLDER_VARIABLE] = str(folder)  # for the processes that Lightning starts on this node
        return folder
    folder = claim_run_folder(root, name)
    environment[RUN_FOLDER_VARIABLE] = str(folder)
    return folder


def is_first() -> bool:
    """Whether this process is the first one of its run, which makes the run's folder and holds its lock.

    Told from the process group where there is one, else from what Lightning and the launchers set in the environment.
    """
    if world_size() > 1:
        return rank() == 0
    if _under_torchrun():
        return os.environ["RANK"] == "0"
    if _under_slurm():
        return os.environ["SLURM_PROCID"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def told_by_first(runs: Path, topic: str, choose: Callable[[], str]) -> str:
    """What the first process of a run chooses, in every process of it, before they are a group.

    Under torchrun they talk through its store, with ranks given by hand or by Kubeflow through one at ``MASTER_ADDR`` and ``MASTER_PORT``,
    under SLURM, LSF and OpenMPI through a file in ``runs``, which all nodes see. Processes of which nothing is known choose for themselves.

    Args:
        runs: Folder of all runs of the name.
        topic: What is chosen; a file name.
        choose: Called in the first process alone, where it may take or refuse a lock. It must not raise: its text tells the others.
    """
    if world_size() > 1:
        return broadcast_text(choose() if rank() == 0 else "")
    start = _named_start()
    if _under_torchrun() or (start is None and _under_hand()):
        return _told_by_store(topic, choose)
    if start is None:
        return choose()
    file = runs / f".{start}.{topic}"
    if is_first():
        runs.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text := choose())
        return text
    deadline = time.monotonic() + WAIT.total_seconds()
    while not file.exists():
        if time.monotonic() > deadline:
            raise CommandError(f"the job's first task hasn't written {file}: all nodes must see the same --run_root", exit_code=1)
        time.sleep(0.2)
    return file.read_text(encoding="utf-8")


def forget_told(runs: Path, topic: str) -> None:
    """Delete the file through which a choice was told, when all processes of the run have read it."""
    if (start := _named_start()) is not None and is_first():
        (runs / f".{start}.{topic}").unlink(missing_ok=True)


def _started_by_first() -> bool:
    """Whether Lightning's launcher has started this process: it names the folder."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and RUN_FOLDER_VARIABLE in os.environ


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _under_slurm() -> bool:
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def _named_start() -> str | None:
    """A name of this start of the run that all of its processes know: SLURM's job, step and restart, or the one of LSF or OpenMPI.

    OpenMPI without mpi4py is left out: Lightning doesn't see it then, and each process trains by itself.
    """
    environment = os.environ
    if _under_slurm():
        parts = [environment["SLURM_JOB_ID"], environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_RESTART_COUNT", "")]
        return f"slurm-{'-'.join(filter(None, parts))}"
    lsf = int(environment.get("JSM_NAMESPACE_SIZE", "1")) > 1
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 and importlib.util.find_spec("mpi4py") is not None
    given = [environment.get("LSB_JOBID"), environment.get("PMIX_NAMESPACE")]
    return safe_name("-".join(["lsf" if lsf else "mpi", *filter(None, given)])) if (lsf or mpi) and any(given) else None


def _under_hand() -> bool:
    """Whether several processes were started that find each other at an address, by a user or by Kubeflow.

    Lightning leaves the same variables behind in a process that has started others; there the run's folder is named, too.
    """
    environment = os.environ
    several = int(environment.get("WORLD_SIZE", "1")) > 1 and any(name in environment for name in _RANKS)
    return several and {"MASTER_ADDR", "MASTER_PORT"} <= set(environment) and RUN_FOLDER_VARIABLE not in environment


def _told_by_store(topic: str, choose: Callable[[], str]) -> str:
    environment, hand = os.environ, not _under_torchrun()
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # by hand the first process serves, and PyTorch's process group takes the same server later; torchrun's agent has one
    serves = hand and is_first()
    try:
        store = torch.distributed.TCPStore(address, port, is_master=serves, timeout=WAIT, wait_for_workers=False, multi_tenant=hand)
        key = f"lit_methods/{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}/{topic}"
        if not is_first():
            return store.get(key).decode()  # type: ignore[no-any-return]  # waits for the first process
    except torch.distributed.DistError as error:
        if serves or not hand:
            raise
        first = f"the first process (rank 0) doesn't answer at {address}:{port}, the MASTER_ADDR and MASTER_PORT that were given"
        raise CommandError(f"{first}\n  look at what it says, and whether this machine reaches it", exit_code=1) from error
    if serves:
        _SERVED.append(store)
    text = choose()
    store.set(key, text)
    return text


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and uncommitted changes of the git checkout that holds ``folder``; None outside a checkout.

    Returns:
        ``commit`` (40 hex digits), ``branch``, ``dirty`` (tracked files changed; None where that can't be told), ``changes`` (one line per
        changed file).
    """
    try:
        commit = git(folder, "rev-parse", "--verify", "HEAD", timeout=10).strip()
        branch = git(folder, "rev-parse", "--abbrev-ref", "HEAD", timeout=10).strip()
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or no commit yet
        return None
    try:
        changes = git(folder, "diff", "--stat=120", "HEAD", timeout=10).strip().splitlines()
    except (OSError, subprocess.SubprocessError):  # it takes too long, or would run a program of the checkout's
        return {"commit": commit, "branch": branch, "dirty": None, "changes": []}
    return {"commit": commit, "branch": branch, "dirty": bool(changes), "changes": changes[-50:]}


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
    ``environment.json``; sends every ``ModelCheckpoint`` without a ``dirpath`` to ``checkpoints/``, and clears a ``dirpath`` of what a
    killed run had half written there; logs the config and,
    under ``git``, commit, branch and ``dirty`` to every logger. Holds the folder as long as the run lasts (:mod:`lit_methods.runs.lock`).
    Saves: the run's name in checkpoints. Refuses: a folder that another process is writing (``RunInUse``). The ``lit`` command adds it;
    in Python give it to the ``Trainer`` like any callback.

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
        self.began = False  # a batch was reached: what is in the folder says something
        self._lock: RunLock | None = None
        self._written = False
        self._stage = "fit"
        self._logged: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the files once, and point the checkpoint callbacks here before their own ``setup`` (they always run last)."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = hold_run(self.folder)
        if self._written:
            return
        self._written = True
        for place in (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks):
            if place is not None and "://" not in str(place):
                remove_dead(Path(place))  # several runs may share it: what a killed one was writing
        state = git_state(Path.cwd())
        if self.restart_from is not None:
            line = json.dumps({"from": str(self.restart_from), "environment": environment_state(trainer), "git": state})
            with open(self.folder / "restarts.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        write_json(self.folder / "environment.json", environment_state(trainer))
        self._stage = str(getattr(stage, "value", stage))
        if state is not None:
            write_json(self.folder / "git.json", state)
        logged = dict(self.config or {})
        if state is not None:
            logged["git"] = {key: state[key] for key in ("commit", "branch", "dirty")}
        self._logged = logged
        for logger in trainer.loggers if logged else ():
            logger.log_hyperparams(logged)
        if self.config is not None:
            text = self._write_config()
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("config", f"```yaml\n{text}\n```")

    def _write_config(self) -> str:
        text = dump_yaml(self.config)
        path = self.folder / "config.yaml"
        write_atomically(path, f"# lit {self._stage} --config {path}\n{text}")
        return text

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

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note that the run has begun."""
        self.began = True

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note that the run has begun."""
        self.began = True

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note that the run has begun."""
        self.began = True

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note that the run has begun."""
        self.began = True

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name the run in its checkpoints, which may lie elsewhere, beside those of other runs; mend a folder that was deleted."""
        checkpoint[OWNER] = owner_of(self.folder)
        if self._lock is not None and not self.folder.exists():
            rank_zero_warn(f"{self.folder} was deleted under way: it is made anew, with checkpoints from now on")
            self.folder.mkdir(parents=True)
            hold_run(self.folder)
            self._lock.close()  # that of the folder that is gone
            write_json(self.folder / "environment.json", environment_state(trainer))
            if self.config is not None:
                self._write_config()

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
