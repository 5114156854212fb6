"""Checkpoint files that are whole or not there: written beside their place, and moved into it when they are on the disk."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

TEMPORARY = ".{name}.tmp"  # in the checkpoint's own folder: a rename across file systems is a copy


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves a checkpoint so that a kill, a crash or a full disk leaves the earlier file of that name as it was.

    Lightning 2.6.6 writes into the system's temporary folder and moves the file from there; between two file systems
    that is a copy, and a kill in the middle of it leaves half a ``last.ckpt`` over the good one. Here the temporary
    file lies in the same folder, is flushed to the disk (``fsync``) and then renamed, which is one step for the file
    system. The checkpoint is streamed, without a second copy of it in memory. Remote paths (``s3://...``) go
    Lightning's way. Loading is Lightning's, too: with ``weights_only``, as PyTorch 2.6 and later do by default.

    Runs: on rank 0 alone, called by the strategy. ``lit`` sets it for every strategy that uses Lightning's own plugin;
    in Python: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Raises:
        OSError: The file can't be written; it names the checkpoint, and the error's number is the system's.
        UnreadableCheckpoint: In loading.
    """

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Lightning's, with errors that name the file."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            raise UnreadableCheckpoint(f"{path}: {error}") from error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, creating its folder."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(TEMPORARY.format(name=target.name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)
        except Exception as error:
            cause = _system_error(error)
            if cause is None:
                raise
            raise type(cause)(cause.errno, os.strerror(cause.errno or 0), str(target)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


class UnreadableCheckpoint(RuntimeError):
    """A checkpoint that is there and can't be loaded; the message names it, the cause is what PyTorch said."""


def check_readable(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint file, loaded with ``weights_only``; tensors are mapped, not read.

    Raises:
        UnreadableCheckpoint: It is cut off, no checkpoint, or holds objects of other kinds.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UnreadableCheckpoint(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path}: it holds a {type(content).__name__}")
    return content


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a kill in the middle of a save has left in ``folder``."""
    for path in folder.glob(TEMPORARY.format(name="*.ckpt")):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the rename itself on the disk, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind what torch says when it can't write on: the first one in the chain of causes."""
    found = None
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            found = error
        error = error.__cause__ or error.__context__
    return found


def read_state_dict(path: Path | str, prefix: str = "") -> dict[str, Tensor]:
    """The weights in a Lightning checkpoint or a plain state dict, on the CPU.

    Args:
        path: File written by a Trainer, ``lit export`` or ``torch.save``; read with ``weights_only``.
        prefix: Keep only names that start with it, without it; ``backbone_3d.`` for instance.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is truncated, is no checkpoint, or has nothing under the prefix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of a checkpoint, such as runs/<name>/<time>/checkpoints/last.ckpt")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as a checkpoint ({reason}): it is truncated, or not written by PyTorch") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors: give a Lightning checkpoint or a plain state dict")
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not chosen:
        heads = sorted({name.partition(".")[0] for name in state})
        raise ValueError(f"{path} has no weights under {prefix!r}; it has {', '.join(heads[:8]) or 'none at all'}")
    return chosen


def load_into(module: nn.Module, path: Path | str, prefix: str = "") -> None:
    """Load weights into ``module``, all of them or none.

    Raises:
        ValueError: Names or shapes differ: the checkpoint belongs to another architecture; the message shows where.
    """
    state, own = read_state_dict(path, prefix), module.state_dict()
    shapes = [
        f"{k}: {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} here"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    differences = {
        "missing in the file": [k for k in own if k not in state],
        "not in this network": [k for k in state if k not in own],
        "of another shape": shapes,
    }
    found = [
        f"{len(names)} {what} ({'; '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for what, names in differences.items() if names
    ]
    if found:
        raise ValueError(f"{path} is a checkpoint of another architecture than {type(module).__name__}: {'; '.join(found)}")
    module.load_state_dict(state)
