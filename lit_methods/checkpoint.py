"""Reading weights out of checkpoints, with errors that name the file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


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
