"""Where a run goes on: the newest checkpoint that can be read, and ``--resume auto``."""

import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from lit_methods.errors import CommandError
from lit_methods.runs.checkpoints import UnreadableCheckpoint, check_readable
from lit_methods.runs.folder import OWNER, owner_of
from lit_methods.runs.lock import hold_run

FINISHED = "finished.json"  # written at the end of a fit that came to its end
# what says where a run lies and goes on, and not what it does
_PLACES = ("name", "run_root", "resume", "ckpt_path", "weights_only")


_OBJECT = "<object>"  # what can't be compared


@dataclass(frozen=True)
class Restart:
    """A run that goes on in its own folder."""

    folder: Path
    checkpoint: Path


class Finished(Exception):
    """The newest run with this config has come to its end: nothing is left to do."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} has finished: nothing to do (leave out --resume auto to run it anew)")
        self.folder = folder


def newest_readable(checkpoints: list[Path]) -> Path | None:
    """The newest checkpoint of a run with which a fit can go on; broken ones are named on the standard error.

    Newest is the one of most optimiser steps, and of several of one step that which was written last: a copied folder may have any times.

    Args:
        checkpoints: ``.ckpt`` files or folders of sharded ones.

    Returns:
        None when there is none.
    """
    found = []
    for path in sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        content = _content(path)
        if isinstance(content, str):
            print(f"warning: {path} is left out: {content}", file=sys.stderr)
        else:
            found.append((content.get("global_step", -1), path))
    return max(found, key=lambda entry: entry[0])[1] if found else None  # the first of equals


def unreadable(path: Path) -> str | None:
    """Why a fit can't go on from ``path``; None when it can. Tensors are mapped, not read."""
    content = _content(path)
    return content if isinstance(content, str) else None


def _content(path: Path) -> dict[str, Any] | str:
    """What a checkpoint holds, of a sharded one what isn't in its shards; why a fit can't go on from it."""
    if path.is_dir() and not (path / "meta.pt").is_file():
        return "a folder without meta.pt is no sharded checkpoint"
    try:
        content = check_readable(path / "meta.pt" if path.is_dir() else path)
    except UnreadableCheckpoint as error:
        if path.is_dir():
            return {}  # Lightning says what is wrong with it
        said = str(error).removeprefix(f"{path}: ").splitlines()[0][:100]
        return f"it can't be read, it is cut off or no checkpoint ({said})"
    if not path.is_dir() and ("loops" not in content or "optimizer_states" not in content):
        return "it holds weights only"
    return content


def checkpoints_of(folder: Path) -> list[Path]:
    """All checkpoints that a run has written.

    Those below ``<folder>/checkpoints``, in subfolders too (a metric's ``/`` in the file name makes one), and those in the ``dirpath``
    of a callback of its config, as far as this run and no other has written them.

    Raises:
        CommandError: They lie in a place that can't be looked at, such as ``s3://...``, and nowhere else.
    """
    found = [path for path in (folder / "checkpoints").rglob("*.ckpt") if not path.name.startswith(".")]
    places = _checkpoint_places(_read(folder / "config.yaml"))
    for place in places:
        if "://" not in place and (elsewhere := Path(place).expanduser()).resolve() != (folder / "checkpoints").resolve():
            found += [path for path in elsewhere.rglob("*.ckpt") if not path.name.startswith(".") and _written_by(folder, path)]
    remote = [place for place in places if "://" in place]
    if remote and not found:
        raise CommandError(
            f"the checkpoints of {folder} are in {remote[0]}, where --resume can't look\n"
            f"  name the one to go on from: --ckpt_path {remote[0]}/..."
        )
    return found


def _checkpoint_places(config: Any) -> list[str]:
    """Every ``dirpath`` of a config's callbacks."""
    trainer = config.get("trainer") if isinstance(config, dict) else None
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    sections = callbacks if isinstance(callbacks, list) else [callbacks]
    arguments = [section.get("init_args") for section in sections if isinstance(section, dict)]
    return list(dict.fromkeys(str(given["dirpath"]) for given in arguments if isinstance(given, dict) and given.get("dirpath")))


def _written_by(folder: Path, path: Path) -> bool:
    """Whether the run in ``folder`` has written a checkpoint in a place that several runs may share."""
    if path.is_dir():
        content: Any = {}
    else:
        try:
            content = check_readable(path)
        except UnreadableCheckpoint:
            return False
    owner = content.get(OWNER) if isinstance(content, dict) else None
    if owner is not None:
        return bool(owner == owner_of(folder))
    return path.stat().st_mtime >= (folder / "config.yaml").stat().st_mtime  # from before checkpoints named their run, or a sharded one


def last_checkpoint(runs: Path) -> Path | None:
    """The newest readable checkpoint of the run below ``runs`` that was written last and has one."""
    for folder in sorted((folder for folder in runs.glob("*") if folder.is_dir()), key=_last_written, reverse=True):
        if (found := newest_readable(checkpoints_of(folder))) is not None:
            return found
    return None


def find_restart(runs: Path, config: dict[str, Any], hold: bool = True) -> Restart | None:
    """The run that ``--resume auto`` goes on with.

    Args:
        runs: Folder of all runs of that name.
        config: The resolved config of this start.
        hold: Hold the run from now on (:func:`hold_run`); False in a process other than the run's first one.

    Returns:
        The newest run with the same config that has a readable checkpoint; None when there is none.

    Raises:
        Finished: The newest run with the same config has come to its end.
        RunInUse: Another process is writing it.
    """
    candidates = [folder for folder in runs.glob("*") if (folder / "config.yaml").is_file()]
    for folder in sorted(candidates, key=_last_written, reverse=True):
        changed = differing_keys(_read(folder / "config.yaml"), config)
        if changed:
            shown = ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")
            print(f"--resume auto: {folder} is left out, its config differs: {shown}", file=sys.stderr)
        elif (folder / FINISHED).is_file():
            raise Finished(folder)
        else:
            lock = hold_run(folder) if hold else None  # first of all: another start of this command may be looking at it, too
            finished = (folder / FINISHED).is_file()  # it was being written until a moment ago
            checkpoint = None if finished else newest_readable(checkpoints_of(folder))
            if checkpoint is not None:
                return Restart(folder, checkpoint)
            if lock is not None:
                lock.close()
            if finished:
                raise Finished(folder)
            print(f"--resume auto: {folder} is left out, it has no checkpoint that can be read", file=sys.stderr)
    return None


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between an earlier resolved config and another, places aside.

    An argument that the earlier one lacks is no difference: it holds every default, so the argument came with a later version.
    """
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [prefix or "everything"]
    keys = [key for key in one if prefix or key not in _PLACES]
    differing = [differing_keys(one[key], other.get(key), f"{prefix}.{key}".lstrip(".")) for key in keys]
    return [key for part in differing for key in part]


def differing_arguments(written: dict[str, Any], model: Any) -> list[str]:
    """How the hyperparameters in a checkpoint differ from a command's model, as ``rate 0.1 there, 0.2 here``.

    Compared are the class and those arguments that both have, as far as they are numbers, texts, lists and dicts. Nothing is imported.

    Args:
        written: ``hyper_parameters`` of a checkpoint that was loaded with ``weights_only``.
        model: The ``model`` section of the config.
    """
    section = _comparable(model)
    kind, there = str(section.get("class_path")), written.get("_class_path")
    given = (section.get("init_args") or {}) | (section.get("dict_kwargs") or {})
    found = []
    if isinstance(there, str) and there != kind:
        ours = there.startswith("lit_methods.") and kind.startswith("lit_methods.")
        if not (ours and there.rpartition(".")[2] == kind.rpartition(".")[2]):  # files of ours may have moved
            found.append(f"class {_excerpt(there)} there, {kind} here")
    for key, value in written.items():
        here, value = given.get(key), _comparable(value)
        if key in given and value != here and _OBJECT not in (value, here):
            found.append(f"{key} {_excerpt(value)} there, {_excerpt(here)} here")
    return found


def _comparable(value: Any) -> Any:
    """Lists for tuples, dicts for namespaces, and a text for a path; an object of another kind is like every other."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else _OBJECT


def _excerpt(value: Any) -> str:
    text = repr(value)  # no control character of a foreign file reaches the terminal
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # a kill while it was written
        return None


def _last_written(folder: Path) -> int:
    files = [folder / "config.yaml", folder / "restarts.jsonl", *(folder / "checkpoints").rglob("*.ckpt"), folder / FINISHED]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)
