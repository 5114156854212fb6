"""No datamodule draws its data from the numbers that ``seed_everything`` with the same seed gives a module."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from lit_methods import datamodules

SEED = 5
FILMS = ("JHMDBActionsDataModule", "UCF101ActionsDataModule", "YouTubeVOSDataModule")
WITHOUT = {"KittiStyleDataModule": "has no built-in sample", "VideoPromptsDataModule": "draws nothing"}
WITHOUT |= dict.fromkeys(FILMS, "has no built-in sample")
LONG = {"GenerativeImageNetDataModule", "STL10DataModule"}  # two seconds each


def has_sample(name: str) -> bool:
    """Whether the datamodule has a seed, and needs nothing else to make its data."""
    arguments = inspect.signature(getattr(datamodules, name)).parameters
    given = {key for key, argument in arguments.items() if argument.default is argument.empty}
    return "seed" in arguments and not given and name not in WITHOUT


def tensors(found: Any, depth: int = 4) -> Iterator[Tensor]:
    """All floating-point tensors and arrays that are reached from an object's attributes."""
    if isinstance(found, np.ndarray) and found.dtype.kind == "f":
        yield torch.from_numpy(found)
    elif isinstance(found, Tensor) and found.is_floating_point():
        yield found.detach()
    elif depth and isinstance(found, dict):
        for value in list(found.values()):
            yield from tensors(value, depth - 1)
    elif depth and isinstance(found, list | tuple):
        for value in found[:20]:
            yield from tensors(value, depth - 1)
    elif depth and hasattr(found, "__dict__"):
        yield from tensors(vars(found), depth - 1)


def likeness(values: Tensor) -> float:
    """Largest |correlation| of a tensor with the first numbers that a module of its shape would begin with."""
    count, largest = min(values.numel(), 4096), 0.0
    mine = values.flatten()[:count].double()
    for first in (torch.randn, torch.rand, np.random.randn, np.random.rand):
        seed_everything(SEED, verbose=False)
        theirs = torch.as_tensor(first(*values.shape)).flatten()[:count].double()
        largest = max(largest, float(torch.corrcoef(torch.stack([mine, theirs]))[0, 1].nan_to_num().abs()))
    return largest


NAMES = [pytest.param(name, marks=pytest.mark.thorough if name in LONG else ()) for name in sorted(datamodules.__all__) if has_sample(name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_module_seeded_alike_begins_with_other_numbers_than_the_data(name: str) -> None:
    data = getattr(datamodules, name)(seed=SEED)
    data.prepare_data()
    data.setup("fit")
    made = [*tensors(data), *tensors(data.train_set[0])]
    alike = [tuple(one.shape) for one in made if one.numel() >= 64 and likeness(one) > 0.7]
    assert not alike, f"these are the first numbers after seed_everything({SEED})"


def test_a_likeness_is_seen() -> None:
    torch.manual_seed(SEED)
    true = torch.nn.functional.normalize(torch.randn(20, 64), dim=1)
    assert likeness(true) > 0.9
    assert len([*tensors({"deep": [true, {"deeper": true.numpy()}]})]) == 2


def test_codes_are_far_from_a_module_seeded_alike() -> None:
    data = datamodules.AttributeSumsDataModule(seed=SEED)
    data.setup("fit")
    seed_everything(SEED, verbose=False)
    start = torch.nn.functional.normalize(torch.randn(20, 64), dim=1)
    assert (start @ data.codes["io"].T).abs().max() < 0.7
