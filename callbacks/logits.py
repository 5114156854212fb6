"""How callbacks get the logits of anybody's classifier: names of what the batch holds, and of what maps inputs to logits."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

Key = str | int | None


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
    if isinstance(batch, Mapping):
        keys: tuple[Any, Any] = ("image" if inputs is None else inputs, "label" if labels is None else labels)
        there: Any = list(batch)
        missing = [key for key in keys if key not in batch]
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        keys = (0 if inputs is None else inputs, 1 if labels is None else labels)
        there = f"{len(batch)} parts"
        missing = [key for key in keys if not isinstance(key, int) or not -len(batch) <= key < len(batch)]
    else:
        raise ValueError(f"the batch is a {type(batch).__name__}: expected a dictionary, or a sequence with inputs and labels")
    if missing:
        raise ValueError(f"the batch has no {missing[0]!r}, it has {there}: name the keys (or positions) by inputs and labels")
    found, target = (batch[key] for key in keys)
    if not isinstance(found, Tensor) or not isinstance(target, Tensor):
        raise ValueError(
            f"the batch's {keys[0]!r} and {keys[1]!r} are {type(found).__name__} and {type(target).__name__}: expected tensors"
        )
    if target.ndim != 1 or target.is_floating_point() or len(target) != len(found):
        raise ValueError(
            f"the batch's {keys[1]!r} are {tuple(target.shape)} {target.dtype} for inputs {tuple(found.shape)}: expected one class a sample"
        )
    return found, target.long()


def require_logits(pl_module: pl.LightningModule, name: str, who: str) -> None:
    """Raise if the module has nothing of that name to get logits from.

    Raises:
        TypeError: No such method or submodule, or the module has no ``forward``.
    """
    try:
        found = operator.attrgetter(name)(pl_module)
    except AttributeError:
        found = None
    if not callable(found) or (name == "forward" and not is_overridden("forward", pl_module, pl.LightningModule)):
        raise TypeError(
            f"{who} needs logits, but {type(pl_module).__name__} has no {name!r} that maps inputs to them: "
            "give logits the name of a method or submodule that takes the inputs of a batch and returns (B, classes)"
        )


def logits_of(pl_module: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """(B, classes) logits of a batch's inputs.

    Raises:
        ValueError: Something else came out.
    """
    found = pl_module(inputs) if name == "forward" else operator.attrgetter(name)(pl_module)(inputs)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(inputs):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name!r} of {type(pl_module).__name__} returns {shape}, expected logits ({len(inputs)}, classes)")
    return found
