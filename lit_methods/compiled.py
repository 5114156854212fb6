"""Names of parameters and modules without what ``torch.compile`` adds to them."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def plain_name(name: str) -> str:
    """``name`` as it is without ``torch.compile``: ``net._orig_mod.0`` becomes ``net.0``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_names(state: Mapping[str, T]) -> dict[str, T]:
    """A state dict under the names that its network has without ``torch.compile``; the order stays."""
    return {plain_name(name): value for name, value in state.items()}


def names_in(module: nn.Module, state: Mapping[str, T]) -> dict[str, T]:
    """A state dict of either kind under the names that ``module`` gives its parameters and buffers; unknown names are plain."""
    given = {plain_name(name): name for name in module.state_dict()}
    return {given.get(name, name): value for name, value in plain_names(state).items()}
