"""Checkpoint files that are whole or not there: written beside their place, and moved into it when they are on the disk."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from lit_methods.compiled import names_in, plain_name, plain_names
from lit_methods.datamodules.reading import file_size, reading, refuse_bombs
from lit_methods.errors import suggest
from lit_methods.files import replacing
from lit_methods.hub import leave_out


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
        UnreadableCheckpoint: A checkpoint can't be loaded; the message names it.
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
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial:
                with open(partial, "wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(target.parent)
        except Exception as error:
            cause = _system_error(error)
            if cause is None:
                raise
            raise type(cause)(cause.errno, os.strerror(cause.errno or 0), str(target)) from error


class UnreadableCheckpoint(RuntimeError):
    """A checkpoint that is there and can't be loaded; the message names it, the cause is what PyTorch said."""


def check_readable(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint file, loaded with ``weights_only``; tensors are mapped, not read.

    Raises:
        UnreadableCheckpoint: It is cut off, no checkpoint, or holds objects of other kinds.
    """
    try:
        file_size(Path(path), "checkpoint", "give another one")  # a named pipe would be waited for
        refuse_bombs(Path(path))
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UnreadableCheckpoint(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path}: it holds a {type(content).__name__}")
    return content


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a kill in the middle of a save has left in ``folder`` and below; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file():
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
    system_error = None
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            system_error = error
        error = error.__cause__ or error.__context__
    return system_error


class PrefixError(ValueError):
    """A file of weights that has none under a prefix; the message names those that it has."""


def read_state_dict(path: Path | str, prefix: str = "", plain: bool = True) -> dict[str, Tensor]:
    """The weights in a Lightning checkpoint or a plain state dict, on the CPU.

    Names are those without ``torch.compile``: of a compiled network's weights ``net._orig_mod.0.weight`` becomes ``net.0.weight``.

    Args:
        path: File written by a Trainer, ``lit export`` or ``torch.save``; read with ``weights_only``: nothing in it is executed.
        prefix: Keep only names that start with it, without it; ``backbone_3d.`` for instance.
        plain: Take a plain state dict, too; False: a Lightning checkpoint alone.

    Raises:
        OSError: No such file, or a folder.
        PrefixError: Nothing under the prefix.
        ValueError: The file is cut off, is no checkpoint, or holds other objects than tensors, numbers, strings, lists and dicts.
    """
    path, prefix = Path(path).expanduser(), plain_name(prefix)
    if path.is_dir():
        first = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        raise IsADirectoryError(f"{path} is a folder, as sharded strategies write them\n  first: {first}")
    if os.path.lexists(path):
        file_size(path, "checkpoint", "give the path of a checkpoint")
    else:
        near = [str(near) for near in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        example = "" if near else ": give the path of a checkpoint, such as runs/<name>/<time>/checkpoints/last.ckpt"
        raise FileNotFoundError(f"{path} does not exist{example}{suggest(str(path), near)}")
    try:
        refuse_bombs(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            held = f"{path} holds more than tensors, numbers, strings, lists and dicts, and is not read: {refused.group(1)}"
            raise ValueError(f"{held}\n  save it again with plain hyperparameters") from error
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} can't be read as a checkpoint ({reason}): it is truncated (cut off), or no checkpoint of PyTorch's"
        ) from error
    state = content.get("state_dict", content if plain else None) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        wanted = "a Lightning checkpoint or a plain state dict" if plain else "a Lightning checkpoint"
        held = ", ".join(sorted(map(str, content))[:6]) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds no state_dict of tensors, but {held}: give {wanted}")
    state = plain_names(state)
    chosen = {name.removeprefix(prefix): value.detach() for name, value in state.items() if name.startswith(prefix)}
    if not chosen:
        heads = sorted({f"{name.partition('.')[0]}." for name in state})
        raise PrefixError(f"{path} has no weights under {prefix!r}; it has {', '.join(heads[:12]) or 'none at all'}")
    return chosen


def read_weights(path: Path) -> dict[str, Tensor]:
    """A plain state dict in a file of safetensors or of ``torch.save``, on the CPU; nothing in the file is executed.

    Raises:
        OSError: No such file.
        ValueError: It can't be read, or holds other things than tensors.
    """
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    from safetensors.torch import load_file

    with reading(path, "weights", "a file of safetensors", missing="give the path of a file of weights"):
        return load_file(path)


def load_into(module: nn.Module, path: Path | str, prefix: str = "") -> None:
    """Load weights into ``module``, all of them or none; whether either side was compiled makes no difference.

    Raises:
        ValueError: Names or shapes differ: the checkpoint belongs to another architecture; the message shows where.
    """
    if leave_out(str(path), path):
        return
    state, needed = names_in(module, read_state_dict(path, prefix)), module.state_dict()
    shapes = [
        f"{k}: {tuple(state[k].shape)} in the file, {tuple(needed[k].shape)} here"
        for k in needed
        if k in state and state[k].shape != needed[k].shape
    ]
    differences = {
        "missing in the file": [k for k in needed if k not in state],
        "not in this network": [k for k in state if k not in needed],
        "of another shape": shapes,
    }
    problems = [
        f"{len(names)} {what} ({'; '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for what, names in differences.items() if names
    ]
    if problems:
        raise ValueError(f"{path} is a checkpoint of another architecture than {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(state)
