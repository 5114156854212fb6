"""Which units of a sparse network still do something. Pure functions of masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lit_methods.callbacks.targets import plain_name


@dataclass(frozen=True)
class Health:
    """What one weight's mask leaves.

    Attributes:
        dead_outputs: Rows (outputs, first dimension) without any kept weight.
        dead_inputs: Columns (inputs, second dimension) without any.
        disconnected: Nothing is kept.
    """

    dead_outputs: int
    dead_inputs: int
    disconnected: bool


def health(mask: Tensor) -> Health:
    """Count the dead units of one weight.

    Args:
        mask: (outputs, inputs, ...) bool.
    """
    rows = mask.flatten(1).any(1)
    columns = mask.transpose(0, 1).flatten(1).any(1)
    return Health(int((~rows).sum()), int((~columns).sum()), not bool(rows.any()))


def effective_masks(masks: Sequence[Tensor]) -> list[Tensor]:
    """Kept weights that lie on a path from the first layer's input to the last one's output.

    A weight into a unit whose outgoing weights are all removed has no effect, nor has one from a unit that gets no input (biases aside).

    Args:
        masks: Masks of layers that follow each other, (outputs, inputs, ...) bool each. The inputs of a layer are the outputs of the one
            before, or a whole multiple of them (a convolution, flattened).

    Returns:
        Smaller or equal masks.

    Raises:
        ValueError: Layers that don't fit each other.
    """
    links = [mask.flatten(2).any(2) if mask.ndim > 2 else mask for mask in masks]
    repeats = []
    for before, after in pairwise(links):
        repeat, rest = divmod(after.shape[1], before.shape[0])
        if rest or not repeat:
            raise ValueError(f"a layer with {before.shape[0]} outputs can't feed one with {after.shape[1]} inputs")
        repeats.append(repeat)
    fed = [torch.ones_like(links[0][0])]  # per layer: inputs that get something
    for link, repeat in zip(links[:-1], repeats, strict=True):
        fed.append((link & fed[-1]).any(1).repeat_interleave(repeat))
    needed = [torch.ones_like(links[-1][:, 0])]  # per layer, from the last: outputs that somebody uses
    for link, repeat in zip(reversed(links[1:]), reversed(repeats), strict=True):
        needed.append((link & needed[-1][:, None]).any(0).unflatten(0, (-1, repeat)).any(1))
    needed.reverse()
    shaped = [(1,) * (mask.ndim - 2) for mask in masks]
    return [
        mask & into.view(1, -1, *ones) & out.view(-1, 1, *ones) for mask, into, out, ones in zip(masks, fed, needed, shaped, strict=True)
    ]


_PASSED = (
    *("Identity", "Flatten", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"),
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
    *("MaxPool1d", "MaxPool2d", "AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"),
    *("ReLU", "ReLU6", "LeakyReLU", "GELU", "SiLU", "Mish", "ELU", "SELU", "Tanh", "Sigmoid", "Hardswish", "Softplus"),
)


def chains(root: nn.Module) -> list[list[str]]:
    """Weights of layers that are known to feed each other: linear layers and convolutions inside ``nn.Sequential``.

    Anything else between two of them, such as a residual block, a grouped convolution or a norm that mixes channels, ends a chain: what it
    connects isn't known.

    Returns:
        Lists of parameter names, each with two or more.
    """
    found: list[list[str]] = []
    inside: set[int] = set()
    for name, module in root.named_modules():
        if not isinstance(module, nn.Sequential) or id(module) in inside:
            continue
        current: list[str] = []
        for path, layer in _leaves(module, plain_name(name), inside):
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(layer, "groups", 1) == 1:
                current.append(f"{path}.weight")
            elif type(layer).__name__ not in _PASSED:
                found.append(current)
                current = []
        found.append(current)
    return [chain for chain in found if len(chain) > 1]


def _leaves(module: nn.Module, path: str, inside: set[int]) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        return [(path, module)]
    inside.add(id(module))
    return [leaf for key, child in module.named_children() for leaf in _leaves(child, f"{path}.{key}" if path else key, inside)]
