"""MaskSparsity (arXiv:2201.06776): a sparsity penalty on the batch-norm scales of those channels alone that will be removed.

Golden vectors: CASIA-IVA-Lab/MaskSparsity at 2827de4, netslim/sparse.py and netslim/prune.py, see tests/golden/data/masksparsity/README.md.
The baseline, with the penalty on all scales, is Network Slimming (arXiv:1708.06519). Removing channels, and the mask that the branches of a
residual sum agree on, stand in :mod:`~lit_methods.callbacks.sparsity.channels`. Left out: masks from other pruning methods (any file of
bools serves as one), folding a removed channel's constant into the next bias.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.sparsity.masks import keep_largest
from lit_methods.datamodules.reading import read_npz, read_tensors

Penalty = Literal["l1", "l2", "smooth_l1", "bounded_l2"]
Criterion = Literal["threshold", "ot", "ratio", "global_ratio"]


def penalty_gradient(gamma: Tensor, penalty: Penalty, strength: float, learning_rate: float | Tensor = 0.0) -> Tensor:
    """Gradient of the sparsity penalty on batch-norm scales: strength * r(gamma).

    Args:
        gamma: Scales, any shape, floating point.
        penalty: ``l1``: r is the sign, 0 at 0. ``l2``: gamma. ``smooth_l1``: gamma where |gamma| < learning_rate * strength, else the sign,
            so that scales don't oscillate about 0. ``bounded_l2`` (``shiyan`` in the authors' code): gamma where |gamma| <= 0.09, else 0.
        strength: lambda, >= 0.
        learning_rate: Learning rate of the step; ``smooth_l1`` alone uses it.

    Returns:
        Shape and dtype of ``gamma``.

    Raises:
        ValueError: An unknown penalty.
    """
    return strength * _direction(gamma, penalty, strength, learning_rate)


def _direction(gamma: Tensor, penalty: Penalty, strength: float, learning_rate: float | Tensor) -> Tensor:
    """r(gamma)."""
    if penalty == "l1":
        return gamma.sign()
    if penalty == "l2":
        return gamma
    if penalty == "smooth_l1":
        return torch.where(gamma.abs() < learning_rate * strength, gamma, gamma.sign())
    checks.one_of(Penalty, penalty=penalty)
    return torch.where(gamma.abs() <= 0.09, gamma, torch.zeros_like(gamma))


def sparse_gradient(
    gamma: Tensor, grad: Tensor, prune: Tensor | None, penalty: Penalty, strength: float, learning_rate: float | Tensor = 0.0
) -> Tensor:
    """The gradient of batch-norm scales with the penalty's: for channels that will be removed, or for all.

    Args:
        gamma: (C,) scales.
        grad: (C,) gradient of the loss.
        prune: (C,) bool, True: will be removed (the inverse of a keep mask); None: all channels, as in Network Slimming.
        penalty: Which r, as in :func:`penalty_gradient`.
        strength: lambda.
        learning_rate: Learning rate of the step; ``smooth_l1`` alone uses it.

    Returns:
        (C,) dtype of ``grad``.
    """
    direction = _direction(gamma, penalty, strength, learning_rate)
    if prune is not None:
        direction = direction * prune if direction is gamma else direction.mul_(prune)
    return grad.add(direction if direction.dtype == grad.dtype else direction.to(grad.dtype), alpha=strength)


def ot_threshold(gamma: Tensor, discard: float = 1e-4) -> Tensor:
    """Threshold that discards a share of the energy (the authors' OT).

    |gamma|, at least 1e-18, in rising order: midway between the first scale at which the cumulated share of the squares exceeds
    ``discard`` and the one before it; 0 if it is the first of all. 1 (the whole layer) if the largest is below 1e-3.

    Args:
        gamma: (C,) floating point; computed in its dtype.
        discard: Share in [0, 1).

    Returns:
        Scalar; channels with |gamma| above it stay.

    Raises:
        ValueError: ``discard`` lies outside its range.
    """
    checks.within("[0, 1)", "a share of the energy", discard=discard)
    rising = gamma.detach().abs().clamp(min=1e-18).sort().values
    energy = rising.square().cumsum(0)
    first = (energy / energy[-1] > discard).int().argmax()
    middle = (rising[first] + rising[(first - 1).clamp(min=0)]) / 2
    found = torch.where(first == 0, torch.zeros_like(middle), middle)
    return torch.where(rising[-1] < 1e-3, torch.ones_like(found), found)


def threshold_mask(gamma: Tensor, threshold: float | Tensor, min_channels: int = 1) -> Tensor:
    """Channels whose scale is above a threshold, with the authors' guard.

    If fewer than ``min_channels`` are, those at least as large as the ``min_channels``-th largest stay; if ties make that another number,
    the thresholded mask with channel 0 counts, which may be fewer.

    Args:
        gamma: (C,) floating point.
        threshold: >= 0; a channel at the threshold goes.
        min_channels: >= 1; a layer with no more channels keeps all of them in the guard's case.

    Returns:
        (C,) bool, True: kept; never all False.
    """
    size = gamma.detach().abs()
    keep = size > threshold
    if len(keep) <= min_channels:
        return keep if bool(keep.sum() >= min_channels) else torch.ones_like(keep)
    largest = size >= size.sort(descending=True).values[min_channels - 1]
    with_first = keep.clone()
    with_first[0] = True
    guarded = torch.where(largest.sum() == min_channels, largest, with_first)
    return torch.where(keep.sum() < min_channels, guarded, keep)


def keep_masks(
    gammas: Mapping[str, Tensor],
    criterion: Criterion = "threshold",
    *,
    threshold: float = 0.01,
    energy: float = 1e-4,
    ratio: float | Mapping[str, float] = 0.5,
    min_channels: int = 1,
) -> dict[str, Tensor]:
    """Which channels stay, by the magnitude of their scales.

    Args:
        gammas: Name of the batch norm -> (C,) scales.
        criterion: ``threshold``: |gamma| > ``threshold``. ``ot``: :func:`ot_threshold` of each layer. ``ratio``: the smallest go, a share
            of each layer. ``global_ratio``: the smallest of all layers together go (Network Slimming).
        threshold: Scales above it stay, for ``threshold``.
        energy: Share that ``ot`` discards.
        ratio: Share that goes, in [0, 1]: of each layer, rounded; or pattern of names -> share, where the first that fits counts and a
            layer that no pattern fits stays whole. ``global_ratio`` takes a number.
        min_channels: So many channels of each layer stay at least, as in :func:`threshold_mask`; ``ratio`` keeps them exactly.

    Returns:
        Name -> (C,) bool.

    Raises:
        ValueError: An argument outside its range.
    """
    checks.one_of(Criterion, criterion=criterion)
    checks.at_least(1, "channels", min_channels=min_channels)
    checks.at_least(0, threshold=threshold)
    for share in ratio.values() if isinstance(ratio, Mapping) else [ratio]:
        checks.share(ratio=share)
    sizes = {name: gamma.detach().abs() for name, gamma in gammas.items()}
    if criterion == "threshold":
        return {name: threshold_mask(size, threshold, min_channels) for name, size in sizes.items()}
    if criterion == "ot":
        return {name: threshold_mask(size, ot_threshold(size.double(), energy), min_channels) for name, size in sizes.items()}
    if criterion == "ratio":
        found = {}
        for name, size in sizes.items():
            share = next((s for p, s in ratio.items() if fnmatchcase(name, p)), 0.0) if isinstance(ratio, Mapping) else ratio
            found[name] = keep_largest(size, min(len(size), max(min_channels, len(size) - round(share * len(size)))))
        return found
    if isinstance(ratio, Mapping):
        raise ValueError(f"ratio is {dict(ratio)}, but global_ratio takes one share of all channels: give a number, or criterion='ratio'")
    every = torch.cat([size.float().cpu() for size in sizes.values()]).sort().values
    count = round(ratio * len(every))
    limit = float(every[count - 1]) if count else -1.0
    return {name: threshold_mask(size.float(), limit, min_channels) for name, size in sizes.items()}


def save_masks(path: Path | str, keep: Mapping[str, Tensor]) -> None:
    """Write keep masks to a ``.npz`` or ``.pt`` file: name of the batch norm -> bool, True: kept. Layers that stay whole are left out.

    Raises:
        ValueError: Another ending.
    """
    path = Path(path)
    partial = {name: mask.cpu() for name, mask in keep.items() if not mask.all()}
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **{name: mask.numpy() for name, mask in partial.items()})  # type: ignore[arg-type]
    elif path.suffix == ".pt":
        torch.save(partial, path)
    else:
        raise ValueError(f"{path}: masks are written as .npz or .pt")


def load_masks(path: Path | str) -> dict[str, Tensor]:
    """Read keep masks: name -> (C,) bool, True: kept. A name may be that of the norm or of its weight.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Neither ``.npz`` nor ``.pt``, or an entry is no vector of bools.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"mask={str(path)!r} does not exist: give a .npz or .pt file of keep masks, or a checkpoint")
    if path.suffix == ".npz":
        found = {name: torch.from_numpy(array) for name, array in read_npz(path, field="masks").items()}
    elif path.suffix == ".pt":
        found = read_tensors(path, path, "masks")
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}, expected name of the batch norm -> bool")
    else:
        raise ValueError(f"{path} is no file of masks: give .npz or .pt (name of the batch norm -> bool), or a checkpoint (.ckpt)")
    for name, mask in found.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 1:
            kind = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{path}: {name!r} is {kind}, expected one bool a channel, True for channels that stay")
    return {name.removesuffix(".weight"): mask for name, mask in found.items()}


__all__ = [
    "keep_masks",
    "load_masks",
    "ot_threshold",
    "penalty_gradient",
    "save_masks",
    "sparse_gradient",
    "threshold_mask",
]
