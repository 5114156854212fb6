"""What callbacks on features share: the rows that a submodule put out in a step, and what the batch says about each of them."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_methods.callbacks.logits import Key


def rows_of(calls: Mapping[str, Sequence[Any]], pattern: str, argument: str) -> Tensor:
    """All rows that one submodule put out: (k * B, D) for k calls, flattened.

    Args:
        calls: Submodule -> its outputs of the step, as ``feature_calls`` of :class:`~lit_methods.callbacks.LossTerm`.
        pattern: ``fnmatch`` pattern of the submodule's name.
        argument: Name of the callback's argument, for messages.

    Raises:
        ValueError: Several submodules match, or an output isn't a tensor with rows.
    """
    names = [name for name in calls if fnmatch.fnmatchcase(name, pattern)]
    if len(names) != 1:
        raise ValueError(f"{argument}={pattern!r} matches {len(names)} submodules, {', '.join(names)}: name one")
    (name,) = names
    for output in calls[name]:
        if not isinstance(output, Tensor) or output.ndim < 1 or not output.is_floating_point():
            found = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{argument}={name!r} puts out {found}: expected a floating point tensor with a row for each sample")
    return torch.cat([output.flatten(1) if output.ndim > 1 else output[:, None] for output in calls[name]])


def find_in_batch(batch: Any, key: Key, default: tuple[str, int], argument: str) -> Tensor:
    """A tensor of the batch.

    Args:
        batch: Mapping or sequence.
        key: Key or position; None: the default.
        default: Key of a mapping and position in a sequence.
        argument: Name of the callback's argument, for messages.

    Raises:
        ValueError: The batch doesn't have it, or it is no tensor.
    """
    if isinstance(batch, Mapping):
        wanted: Any = default[0] if key is None else key
        there, missing = f"the keys {list(batch)}", wanted not in list(batch)  # also of what has no hash, such as a list of keys
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        wanted = default[1] if key is None else key
        there, missing = f"{len(batch)} parts", not isinstance(wanted, int) or not -len(batch) <= wanted < len(batch)
    else:
        raise ValueError(f"the batch is a {type(batch).__name__}: expected a dictionary or a sequence that has {argument}")
    if missing:
        raise ValueError(f"the batch has no {wanted!r}, it has {there}: name the key (or position) by {argument}")
    found = batch[wanted]
    if not isinstance(found, Tensor):
        raise ValueError(f"the batch's {wanted!r} is a {type(found).__name__}: expected a tensor")
    return found


def values_of_batch(batch: Any, key: Key, default: tuple[str, int], rows: int, argument: str, *, mean: bool = False) -> Tensor:
    """What the batch says about each of ``rows`` rows: one value a sample, repeated for every view.

    Args:
        batch: Mapping or sequence.
        key: As in :func:`find_in_batch`.
        default: As there.
        rows: Number of rows, a multiple of the batch's: views one behind the other.
        argument: As there.
        mean: Take the mean, in float32 or wider, where a sample has several values.

    Returns:
        (rows, 1).

    Raises:
        ValueError: It isn't there, has several values a sample, or the rows are no multiple of its length.
    """
    found = find_in_batch(batch, key, default, argument)
    size = len(found) if found.ndim else 0
    if not found.numel() or (found.numel() != size and not mean):
        raise ValueError(f"{argument} of the batch are {tuple(found.shape)}: expected one value a sample, (B,) or (B, 1)")
    if rows % size:
        raise ValueError(f"the features have {rows} rows and the batch {size} {argument}: a whole number of rows for each sample is needed")
    if mean:
        found = found.to(torch.promote_types(found.dtype, torch.float32)).reshape(size, -1).mean(1)
    return found.reshape(size, 1).repeat(rows // size, 1)


__all__ = ["find_in_batch", "rows_of", "values_of_batch"]
