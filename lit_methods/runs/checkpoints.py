"""Checkpoint files that are whole or not there: written beside their place, and moved into it when they are on the disk."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

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
