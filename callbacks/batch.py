"""What callbacks on features share: the rows that a submodule put out in a step, and what the batch says about each of them."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lit_methods.callbacks.features import one_of_calls


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested mappings and sequences, in their order."""
    if isinstance(value, Tensor):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        yield from tensors_in(part)


def rows_of(calls: Mapping[str, Sequence[Any]], pattern: str, argument: str) -> Tensor:
    """All rows that one submodule put out: (k * B, D) for k calls, flattened.

    Args:
        calls: Submodule -> its outputs of the step, as ``feature_calls`` of :class:`~lit_methods.callbacks.LossTerm`.
        pattern: ``fnmatch`` pattern of the submodule's name.
        argument: Name of the callback's argument, for messages.

    Raises:
        ValueError: Several submodules match, or an output isn't a tensor with rows.
    """
    name = one_of_calls(calls, pattern, argument)
    for output in calls[name]:
        if not isinstance(output, Tensor) or output.ndim < 1 or not output.is_floating_point():
            got = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{argument}={name!r} puts out {got}: expected a floating point tensor with a row for each sample")
    return torch.cat([output.flatten(1) if output.ndim > 1 else output[:, None] for output in calls[name]])


Key = str | int | None


def find_in_batch(batch: Any, key: Key, default: tuple[str, int], argument: str, needed: str = "") -> Tensor:
    """A tensor of the batch.

    Args:
        batch: Mapping or sequence.
        key: Key or position; None: the default.
        default: Key of a mapping and position in a sequence.
        argument: Name of the callback's argument, for messages.
        needed: Who needs it, and what it is: a clause that opens the message when it is missing.

    Raises:
        ValueError: The batch doesn't have it, or it is no tensor.
    """
    if isinstance(batch, Mapping):
        wanted: Any = default[0] if key is None else key
        has, missing = f"the keys {list(batch)}", wanted not in list(batch)  # also of what has no hash, such as a list of keys
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        wanted = default[1] if key is None else key
        has, missing = f"{len(batch)} parts", not isinstance(wanted, int) or not -len(batch) <= wanted < len(batch)
    else:
        raise ValueError(f"the batch is a {type(batch).__name__}: expected a dictionary or a sequence that has {argument}")
    if missing:
        raise ValueError(
            f"{needed and f'{needed}, but '}the batch has no {wanted!r}, it has {has}: name the key (or position) by {argument}"
        )
    value = batch[wanted]
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the batch's {wanted!r} is a {type(value).__name__}: expected a tensor; name the key (or position) of one by {argument}"
        )
    return value


def values_of_batch(batch: Any, key: Key, default: tuple[str, int], rows: int, argument: str, *, mean: bool = False) -> Tensor:
    """What the batch says about each of ``rows`` rows: one value a sample, repeated for every view.

    Args:
        batch: Mapping or sequence.
        key: Key or position; None: the default.
        default: Key of a mapping and position in a sequence.
        rows: Number of rows, a multiple of the batch's: views one behind the other.
        argument: Name of the callback's argument, for messages.
        mean: Take the mean, in float32 or wider, where a sample has several values.

    Returns:
        (rows, 1).

    Raises:
        ValueError: It isn't there, has several values a sample, or the rows are no multiple of its length.
    """
    values = find_in_batch(batch, key, default, argument)
    size = len(values) if values.ndim else 0
    if not values.numel() or (values.numel() != size and not mean):
        raise ValueError(
            f"{argument} of the batch are {tuple(values.shape)}: expected one value a sample, (B,) or (B, 1): name such ones by {argument}"
        )
    if rows % size:
        raise ValueError(f"the features have {rows} rows and the batch {size} {argument}: a whole number of rows for each sample is needed")
    if mean:
        values = values.to(torch.promote_types(values.dtype, torch.float32)).reshape(size, -1).mean(1)
    return values.reshape(size, 1).repeat(rows // size, 1)


def inputs_and_labels(batch: Any, inputs: Key = None, labels: Key = None) -> tuple[Tensor, Tensor]:
    """The two parts of a batch that a classifier needs.

    Args:
        batch: A dictionary or a sequence.
        inputs: Key or position of the inputs; None: ``image`` of a dictionary, 0 of a sequence.
        labels: Key or position of the labels; None: ``label`` of a dictionary, 1 of a sequence.

    Returns:
        Inputs (B, ...) and labels (B,) int64.

    Raises:
        ValueError: The batch is neither, or lacks one of them; or the labels aren't (B,) integers.
    """
    x, y = find_in_batch(batch, inputs, ("image", 0), "inputs"), find_in_batch(batch, labels, ("label", 1), "labels")
    if y.ndim != 1 or y.is_floating_point() or len(y) != len(x):
        raise ValueError(
            f"the batch's labels are {tuple(y.shape)} {y.dtype} for inputs {tuple(x.shape)}: expected one class a sample, (B,) integers; "
            "name such ones by labels"
        )
    return x, y.long()


def require_logits(pl_module: pl.LightningModule, name: str, who: str) -> None:
    """Raise if the module has nothing of that name to get logits from.

    Raises:
        TypeError: No such method or submodule, or the module has no ``forward``.
    """
    try:
        method = operator.attrgetter(name)(pl_module)
    except AttributeError:
        method = None
    if not callable(method) or (name == "forward" and not is_overridden("forward", pl_module, pl.LightningModule)):
        raise TypeError(
            f"{who} needs logits, but {type(pl_module).__name__} has no {name!r} that maps inputs to them: "
            "give logits the name of a method or submodule that takes the inputs of a batch and returns (B, classes)"
        )


def logits_of(pl_module: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """(B, classes) logits of a batch's inputs.

    Raises:
        ValueError: Something else came out.
    """
    logits = pl_module(inputs) if name == "forward" else operator.attrgetter(name)(pl_module)(inputs)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name!r} of {type(pl_module).__name__} returns {shape}, expected logits ({len(inputs)}, classes)")
    return logits


def logits_from(output: Any, who: str) -> Tensor:
    """The logits in what a network returns: a tensor, ``output["out"]`` (torchvision), or ``output.logits`` (transformers).

    Raises:
        ValueError: None of them is there.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("out", output.get("logits"))
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        kind = f"{tuple(logits.shape)} {logits.dtype}" if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"{who} puts out {kind}: expected (B, classes, ...) logits, or a mapping with 'out' or 'logits'")
    return logits


def resized(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """(B, C, *size): bilinear where the size is another."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    if logits.ndim != 4 or len(size) != 2:
        raise ValueError(f"logits are {tuple(logits.shape)} and labels have {tuple(size)} pixels: only (B, C, h, w) can be resized")
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def rescaled(images: Tensor, scale: float, *, align_corners: bool = False) -> Tensor:
    """(B, C, h, w) images with ``scale`` times as many pixels a side, at least one; bilinear. Scale 1 gives the images themselves."""
    if scale == 1:
        return images
    pixels = [max(1, round(scale * side)) for side in images.shape[2:]]
    return F.interpolate(images, size=pixels, mode="bilinear", align_corners=align_corners)


def rows_of_calls(outputs: Sequence[Any], who: str) -> Tensor:
    """Logits of all calls of a network in a step, one behind the other."""
    return torch.cat([logits_from(output, who) for output in outputs])
