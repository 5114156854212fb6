"""``lit fit | validate | test | predict``: LightningCLI with short names, one run folder and short error messages.

Importing this module imports torch and Lightning (seconds); the other ``lit`` commands never do.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_dumper
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_methods.catalog import installed_names
from lit_methods.cli.config_files import mentioned_files, refuse_repeated, resolve_config_arguments
from lit_methods.cli.hyperparameters import with_those_of_bases
from lit_methods.cli.resume import (
    FINISHED,
    Finished,
    Restart,
    checkpoints_of,
    differing_arguments,
    find_restart,
    last_checkpoint,
    newest_readable,
)
from lit_methods.errors import CommandError
from lit_methods.files import dump_yaml, load_yaml, write_atomically
from lit_methods.hub import weights_left_out
from lit_methods.import_path import add_current_folder
from lit_methods.runs.checkpoints import AtomicCheckpointIO, check_readable, remove_leftovers
from lit_methods.runs.folder import RUN_FOLDER_VARIABLE, RunFolder, agree_on_run_folder, forget_told, is_first, safe_name, told_by_first
from lit_methods.runs.lock import RunLock, hold_run
from lit_methods.runs.wandb import finish_runs, open_runs

set_dumper("yaml", dump_yaml)  # PyYAML's own takes as long as the parsing
_PARSERS: dict[str, tuple[LightningArgumentParser, dict[str, LightningArgumentParser], dict[str, list[str]]]] = {}  # by subcommand


class LitCLI(LightningCLI):
    """LightningCLI in subclass mode whose runs go to one folder each.

    Args:
        args: Command-line words, starting with the subcommand; config paths already resolved.
        config_files: The files behind ``--config``, in order; the first gives an unnamed run its name.
    """

    def __init__(self, args: list[str], config_files: list[Path]) -> None:
        self.args, self.config_files = args, config_files
        self.run_folder: Path | None = None
        self.lock: RunLock | None = None
        self.auto = False  # --resume auto
        self.restart: Restart | None = None
        self.started = time.monotonic()
        super().__init__(
            LightningModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # RunFolder saves it: the stock callback refuses a second run without a logger
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},  # a cut-off key is a typo
            args=args,
        )

    def setup_parser(self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]) -> None:
        """Make the parser of the one subcommand that was given, once a process: that of all four takes longer than the parsing."""
        command = self.args[0]
        given = {command: LightningCLI.subcommands()[command]}
        self.subcommands = lambda: given  # type: ignore[method-assign]
        if command in _PARSERS:
            self.parser, self._subcommand_parsers, self._subcommand_method_arguments = _PARSERS[command]
        else:
            super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
            _PARSERS[command] = (self.parser, self._subcommand_parsers, self._subcommand_method_arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys that concern the run as a whole."""
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run's folder; default: stem of the first config.")
        parser.add_argument("--run_root", type=str, default="runs", help="Folder that holds all runs.")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Checkpoint to go on from; `last`: the newest one of the same name, in a new folder; "
            "`auto`: go on with the newest unfinished run of the same name and config in its own folder, else start anew.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without the stock warning about ``sys.argv``, and settle the run's name and checkpoint."""
        self.config = _expanded(parser.parse_args(args))
        config = self.config[self.config.subcommand]
        config.name = config.name or (self.config_files[0].stem if self.config_files else _class_name(config.model))
        if config.resume is not None:
            if config.get("ckpt_path"):
                raise CommandError("both --resume and --ckpt_path are given: keep one of them")
            if config.resume == "auto" and self.config.subcommand != "fit":
                raise CommandError(f"--resume auto goes on with a fit; for {self.config.subcommand} give --ckpt_path, or --resume last")
            self.auto = config.resume == "auto"
            if not self.auto:
                config.ckpt_path = self._resumed(config.resume, Path(config.run_root) / safe_name(config.name))
            config.resume = None
        for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):  # Lightning divides by them
            value = config.trainer.get(key)
            if isinstance(value, int) and value < 1:
                raise CommandError(f"trainer.{key} is {value}: give 1 or more")
        path = config.get("ckpt_path")
        if isinstance(path, Path):  # which of its two types is tried first isn't the same in every process
            path = config.ckpt_path = str(path)
        if path and path not in ("best", "last", "hpc", "registry") and "://" not in path and not Path(path).exists():
            raise CommandError(f"checkpoint {path!r} not found\n  give the path of a .ckpt file: runs/<name>/<time>/checkpoints/last.ckpt")

    def _parse_ckpt_path(self) -> None:
        """Say where a checkpoint was written with other arguments than these, which count.

        Lightning lays the checkpoint's class and arguments over the command's and imports what they name. Here nothing of a checkpoint
        gets into the config, and no name in it is imported.
        """
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path and Path(path).is_file():
            if config.get("weights_only") is False:
                return  # the user trusts the file, and Lightning reads it with weights_only here
            written = check_readable(path).get("hyper_parameters")
            differing = differing_arguments(written, config.model) if isinstance(written, dict) else []
            if differing and os.environ.get("LOCAL_RANK", "0") == "0":
                more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
                print(f"note: {path} was written with other arguments, and those of this command count:", file=sys.stderr)
                print(f"  {'; '.join(differing[:3])}{more}", file=sys.stderr)

    @staticmethod
    def _resumed(given: str, runs: Path) -> str:
        if given != "last":
            return given
        found = last_checkpoint(runs)
        if found is None:
            raise CommandError(f"--resume last: no run in {runs} has a checkpoint: give its path, or start without --resume")
        return str(found)

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and send every logger there."""
        config = self.config[self.subcommand]
        self.resolved_config: dict[str, Any] = load_yaml(self._parser(self.subcommand).dump(config, skip_none=False, format="yaml"))
        if self.auto:
            self.restart = self._restart(Path(config.run_root) / safe_name(config.name))
        if self.restart is not None:
            config.ckpt_path = str(self.restart.checkpoint)
            self.run_folder = self.restart.folder.resolve()
            os.environ[RUN_FOLDER_VARIABLE] = str(self.run_folder)
        else:
            self.run_folder = self._new_folder(Path(config.run_root), config.name)
        if is_first():
            self.lock = hold_run(self.run_folder)
            if self.restart is not None and self.lock is not None:
                self.lock.close()  # find_restart has taken it, too
        config.trainer.default_root_dir = str(self.run_folder)
        if not config.trainer.barebones:
            config.trainer.logger = self._redirected(config.trainer.logger)

    def _dump_config(self) -> None:
        """What Lightning hands to ``save_hyperparameters``, model and data as they were resolved, without resolving them again."""
        self.config_dump = copy.deepcopy(self.resolved_config)

    def instantiate_classes(self) -> None:
        """Look for the data before anything is built: a model may take minutes, or download weights."""
        section = self.config[self.subcommand].get("data")
        if section is not None and any(key.rpartition(".")[2] == "root" and value is not None for key, value in section.items()):
            parser = LightningArgumentParser(exit_on_error=False)
            parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
            with weights_left_out():  # of models that the data are made with: they are loaded when the data are built for good
                data = parser.instantiate_classes(Namespace(data=section.clone())).data
            if hasattr(data, "check_root"):
                data.check_root(self.subcommand)
        with with_those_of_bases():
            super().instantiate_classes()

    def _restart(self, runs: Path) -> Restart | None:
        """What ``--resume auto`` goes on with. The first process looks and tells the others."""
        first = os.environ.get(RUN_FOLDER_VARIABLE) if os.environ.get("LOCAL_RANK", "0") != "0" else None
        if first is not None:  # started by the first process, which has chosen
            checkpoint = newest_readable(checkpoints_of(Path(first)))
            return None if checkpoint is None else Restart(Path(first), checkpoint)

        def choose() -> str:
            try:
                found = find_restart(runs, self.resolved_config, hold=is_first())
            except Finished as finished:
                return json.dumps({"finished": str(finished.folder)})
            except CommandError as error:
                return json.dumps({"refused": str(error), "code": error.exit_code})
            except OSError as error:
                return json.dumps({"refused": f"--resume auto can't look at the runs in {runs}: {error}", "code": 1})
            return json.dumps({} if found is None else {"folder": str(found.folder), "checkpoint": str(found.checkpoint)})

        told = json.loads(told_by_first(runs, "restart", choose))
        if "refused" in told:
            raise CommandError(told["refused"], exit_code=told["code"])
        if "finished" in told:
            folder = _short(Path(told["finished"]))
            print(f"--resume auto: {folder} has finished, nothing is left to do (without --resume it is run anew)")
            raise SystemExit(0)
        return Restart(Path(told["folder"]), Path(told["checkpoint"])) if told else None

    @staticmethod
    def _new_folder(root: Path, name: str) -> Path:
        try:
            return agree_on_run_folder(root, name)
        except OSError as error:
            reason = f"can't make a run folder in {root / safe_name(name)}: {error.strerror or error}"
            raise CommandError(f"{reason}\n  give a folder that can be written: --run_root <folder>", exit_code=1) from error

    def _redirected(self, loggers: Any) -> Any:
        """The logger section with every ``save_dir`` set to the run's folder; a CSV logger when none is given."""
        if loggers is False:
            return False
        if loggers is None or loggers is True:
            loggers = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace())
        loggers = loggers if isinstance(loggers, list) else [loggers]
        folders: list[str] = []
        for logger in loggers:
            arguments = logger.setdefault("init_args", Namespace()) if isinstance(logger, dict) else logger.init_args
            kind = _class_name(logger)
            if kind in ("CSVLogger", "TensorBoardLogger"):
                folder = "csv" if kind == "CSVLogger" else "tensorboard"
                folders.append(folder)
                count = folders.count(folder)
                arguments.name, arguments.version = (folder if count == 1 else f"{folder}-{count}"), ""
                if self.restart is not None and kind == "CSVLogger":  # it deletes the file that it finds
                    arguments.version = f"restart-{1 + len(list((self.restart.folder / arguments.name).glob('restart-*')))}"
            if kind == "WandbLogger":
                if self.restart is not None:
                    arguments.id = arguments.get("id") or _wandb_id(self.restart.folder)
                arguments.name = arguments.get("name") or f"{self.run_folder.parent.name}/{self.run_folder.name}"  # type: ignore[union-attr]
            if "save_dir" in arguments or kind in ("CSVLogger", "TensorBoardLogger"):
                arguments.save_dir = str(self.run_folder)
        return loggers

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with our default callbacks, each unless the user gave one of its kind."""
        assert self.run_folder is not None
        settings = self._get(self.config_init, "trainer")
        given = settings.get("callbacks") or []
        callbacks: list[Callback] = [*given] if isinstance(given, list) else [given]
        defaults = [RunFolder(self.run_folder, self.resolved_config, self.restart.checkpoint if self.restart else None)]
        defaults += [] if settings.get("barebones") else self._default_callbacks(settings, callbacks)
        trainer = super().instantiate_trainer(callbacks=[defaults[0], *callbacks, *defaults[1:]], **kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        if getattr(profiler, "dirpath", "") is None:
            profiler.dirpath = self.run_folder / "profiler"
        return trainer

    def _default_callbacks(self, settings: Any, given: list[Callback]) -> list[Any]:
        defaults: list[Any] = []
        if settings.get("enable_progress_bar") is not False and not any(isinstance(callback, ProgressBar) for callback in given):
            from lit_methods.callbacks.run.progress import ThroughputProgressBar

            defaults.append(ThroughputProgressBar())
        if settings.get("enable_checkpointing") is not False and not any(isinstance(callback, Checkpoint) for callback in given):
            defaults.append(ModelCheckpoint(save_last=True))  # last.ckpt: a killed run can go on
        if settings.get("enable_model_summary") is not False and not any(isinstance(callback, ModelSummary) for callback in given):
            from lit_methods.cli.summary import PartsTable

            defaults.append(PartsTable())
        from lit_methods.callbacks.run.dashboard import Dashboard
        from lit_methods.callbacks.run.exact_resume import ExactResume
        from lit_methods.callbacks.run.finite import FiniteGuard
        from lit_methods.callbacks.run.preemption import Preemption

        own: dict[Any, dict[str, Any]] = {FiniteGuard: {}, ExactResume: {}, Dashboard: {}}
        if settings.get("enable_checkpointing") is not False:
            own[Preemption] = {"requeue": self.auto}
        return defaults + [kind(**arguments) for kind, arguments in own.items() if not any(isinstance(one, kind) for one in given)]

    def before_fit(self) -> None:
        """Open the W&B runs, say where the run's files go, and start the clock."""
        open_runs(self.trainer.loggers, self.run_folder)
        self.started = time.monotonic()
        if self.trainer.is_global_zero:
            print(f"run folder: {_short(self.run_folder)}", flush=True)
            if self.subcommand != "fit" and not self.config[self.subcommand].get("ckpt_path"):
                print(
                    f"no --ckpt_path: lit {self.subcommand} takes the network as its config builds it (random, unless that loads weights)"
                )

        if self.restart is not None and self.trainer.is_global_zero:
            remove_leftovers(self.restart.folder)
            print(f"goes on from {_short(self.restart.checkpoint)}", flush=True)

    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Say where everything is."""
        from lit_methods.cli.summary import print_summary

        if self.trainer.is_global_zero and self.run_folder is not None:
            if self.subcommand == "fit" and (self.run_folder / "environment.json").is_file():
                said = {"step": self.trainer.global_step, "epoch": self.trainer.current_epoch, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                write_atomically(self.run_folder / FINISHED, json.dumps(said) + "\n")
            print_summary(self.trainer, self.run_folder, time.monotonic() - self.started)

    after_validate = after_test = after_predict = after_fit


def _expanded(value: Any) -> Any:
    """A config with ``~`` as the home folder in every text and path that begins with it."""
    if isinstance(value, str | Path):
        return type(value)(os.path.expanduser(value)) if re.match(r"~(/|$)", str(value)) else value
    if isinstance(value, Namespace):
        for key, inner in vars(value).items():
            value[key] = _expanded(inner)
        return value
    if isinstance(value, dict):
        return {key: _expanded(inner) for key, inner in value.items()}
    return [_expanded(inner) for inner in value] if isinstance(value, list) else value


def _wandb_id(folder: Path) -> str | None:
    """Id of the W&B run that an earlier start has left in the run's folder; W&B then goes on with it."""
    found = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
    return found[-1].name.rpartition("-")[2] if found else None


def _class_name(config: Any) -> str:
    """Short class name of a ``{class_path, init_args}`` section."""
    path = config.get("class_path", "") if hasattr(config, "get") else str(config or "")
    return path.rpartition(".")[2] or "run"


def _short(path: Path | None) -> str:
    """``path`` relative to the current folder where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))  # type: ignore[union-attr]
    except ValueError:
        return str(path)


def _stay_offline_without_login() -> None:
    """Switch W&B to offline when there is no API key, so that a fresh machine is asked nothing, and say so once."""
    from lit_methods.callbacks.run.dashboard import wandb_offline_without_login

    if wandb_offline_without_login() and os.environ.get("LOCAL_RANK", "0") == "0":
        print("W&B: no login on this machine, so the run stays offline (`wandb login` before a run, or `wandb sync` after it, sends it)")


class _Quiet(logging.Filter):
    """Drops Lightning's advertisements, and what it says of our table of parts."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("💡", "Trainer already configured with model summary"))


_QUIET = _Quiet()  # one object: adding it twice does nothing


def prepare_mentioned(argv: list[str], files: list[Path]) -> None:
    """Import those public classes, ours and plugins', whose short names stand in the arguments or files, so that the parser finds them.

    A name inside a dotted path (``my_project.SuperFlow``) is somebody else's and is left alone. W&B is switched to offline where
    needed before anything imports it, as it reads its environment only once.

    Raises:
        CommandError: A class needs a library that is not installed, or a plugin's module is broken.
    """
    texts = [*argv, *(re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8", errors="replace"), flags=re.M) for path in files)]
    words = {word for text in texts for word in re.findall(r"(?<![\w.])[A-Za-z_]\w*(?![\w.])", text)}
    if any("WandbLogger" in text for text in texts):
        _stay_offline_without_login()
    for name, package in installed_names().items():
        if name in words:
            try:
                getattr(importlib.import_module(package), name)
            except ImportError as error:
                raise CommandError(f"{name} can't be imported: {error}", exit_code=1) from error
            except Exception as error:
                if package.partition(".")[0] == "lit_methods":
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise CommandError(f"{name} can't be imported from the plugin {package}: {reason}", exit_code=1) from error


def _show_help(argv: list[str], files: list[Path]) -> int:
    """``--model.help SuperFlow``: all arguments of a class, and none of torch's."""
    from lit_methods.cli.explain import condense_help, refuse_unknown_help

    refuse_unknown_help(argv)
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            LitCLI(argv, files)
    except SystemExit as stop:
        print(condense_help(text.getvalue()), end="")
        return int(stop.code or 0)
    except argparse.ArgumentError as error:
        raise CommandError(str(error).splitlines()[0]) from error
    return 0


def _leave(cli: LitCLI, failed: bool) -> None:
    """Let go of the run's folder, and take one away whose run failed before its first batch: it holds nothing but its start."""
    folder: Path = cli.run_folder  # type: ignore[assignment]
    callbacks = getattr(getattr(cli, "trainer", None), "callbacks", [])
    began = any(isinstance(callback, RunFolder) and callback.began for callback in callbacks)
    if failed and not began and cli.lock is not None and cli.restart is None:
        shutil.rmtree(folder, ignore_errors=True)
    if cli.auto and began:
        forget_told(folder.parent, "restart")
    if cli.lock is not None:
        cli.lock.close()
    for empty in (folder, folder.parent):
        with contextlib.suppress(OSError):  # it holds something, or is gone
            empty.rmdir()


class PlannedCLI(LitCLI):
    """A command that is parsed and not run: no folder is made, nothing is built until :meth:`built` is asked for it."""

    def before_instantiate_classes(self) -> None:
        """Nothing: the run has no folder."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""

    @staticmethod
    def built(kind: str, section: Namespace) -> Any:
        """The object of a section of the config: ``model``, ``data`` or ``callback``."""
        bases: dict[str, Any] = {"model": LightningModule, "data": LightningDataModule}
        parser = LightningArgumentParser(exit_on_error=False)
        if kind in bases:
            parser.add_lightning_class_args(bases[kind], kind, subclass_mode=True)
        else:
            parser.add_subclass_arguments(Callback, kind)
        return parser.instantiate_classes(Namespace({kind: section.clone()}))[kind]


def planned(argv: list[str]) -> tuple[PlannedCLI, list[Path]]:
    """Parse a command without running it.

    Args:
        argv: As in :func:`run`.

    Returns:
        The command, whose ``config`` is the parsed one, and the files behind ``--config``.

    Raises:
        CommandError: A mistake in the arguments or configs.
    """
    argv, files = _prepared(argv)
    cli = PlannedCLI.__new__(PlannedCLI)
    try:
        cli.__init__(argv, files)  # type: ignore[misc]  # the object is needed where it fails
    except argparse.ArgumentError as error:
        from lit_methods.cli.explain import explain

        raise CommandError(explain(str(error), cli, argv, files)) from error
    return cli, files


class _Made(Exception):
    """A parser is there, and nothing is to be parsed by it."""


class _ParserAlone(LitCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Made


def run_parser(command: str) -> LightningArgumentParser:
    """The parser of all keys of ``fit``, ``validate``, ``test`` or ``predict``."""
    with contextlib.suppress(_Made):
        _ParserAlone([command], [])
    return _PARSERS[command][1][command]


def _refuse_other_encodings(texts: list[str]) -> None:
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python keeps bytes that it can't decode
            raise CommandError(
                f"{text!r} isn't UTF-8, which configs and reports are written in: give the file or folder another name, or start elsewhere"
            )


def _prepared(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Arguments with full paths of configs, and these; the classes that they name are imported."""
    _refuse_other_encodings([*argv, os.getcwd()])
    add_current_folder()
    argv = [re.sub(r"^--[a-z_-]+(?=$|=)", lambda key: "--" + key[0][2:].replace("-", "_"), word) for word in argv]  # --run-root
    argv, files = resolve_config_arguments(argv)
    mentioned = mentioned_files(argv, files)
    refuse_repeated(argv, mentioned)
    prepare_mentioned(argv, mentioned)
    return argv, files


def run(argv: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        argv: The subcommand and its arguments, without the program's name.

    Raises:
        CommandError: A mistake in the arguments or configs.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_QUIET)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec")  # torch to Lightning, not to the user
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # every run has its own folder
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # --resume auto
    argv, files = _prepared(argv)
    if any(word.partition("=")[0].endswith(".help") for word in argv):
        return _show_help(argv, files)
    cli = LitCLI.__new__(LitCLI)
    failed = True
    try:
        cli.__init__(argv, files)  # type: ignore[misc]  # LightningCLI runs inside its constructor; keep the object when it fails
        failed = False
    except argparse.ArgumentError as error:
        from lit_methods.cli.explain import explain

        raise CommandError(explain(str(error), cli, argv, files)) from error
    except FileNotFoundError as error:
        folder, file = getattr(cli, "run_folder", None), Path(os.fsdecode(error.filename or ""))
        if folder is None or not file.is_relative_to(folder) or file.parent.exists():
            raise
        what = f"{_short(folder)} was deleted under way, or a folder in it: {error.strerror}: {file}"
        raise CommandError(f"{what}\n  nothing can go on without its folder: start the run again", exit_code=1) from error
    except SystemExit as stop:
        trainer = getattr(cli, "trainer", None)
        if trainer is not None and isinstance(stop, SIGTERMException):
            if trainer.is_global_zero:
                again = "the same command goes on" if cli.auto else "the same command with --resume auto goes on"
                print(f"{stop or 'stopped by a signal'}\n{again} (exit status {stop.code})", flush=True)
            raise
        last = sorted(cli.run_folder.glob("checkpoints/last*.ckpt")) if trainer is not None and cli.run_folder is not None else []
        if stop.code and last and trainer is not None and trainer.is_global_zero:
            print(f"stopped; go on: lit {argv[0]} --config {_short(cli.run_folder)}/config.yaml --ckpt_path {_short(last[-1])}")
        elif stop.code and argv[0] == "fit" and trainer is not None and trainer.is_global_zero:
            print("stopped; nothing was kept, as no checkpoint had been written")
        raise
    finally:
        finish_runs(getattr(getattr(cli, "trainer", None), "loggers", ()), failed)
        os.environ.pop(RUN_FOLDER_VARIABLE, None)
        if getattr(cli, "run_folder", None) is not None:
            _leave(cli, failed)
    return 0
