"""The operations of DARTS' search space (arXiv:1806.09055), (B, C, H, W) -> (B, C, H / stride, W / stride)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPERATIONS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
"""All of them, in the order of the columns of alpha."""

Conv = type[nn.Conv2d]


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2 that look at pixels one apart, side by side, and batch norm: half the size.

    Args:
        inside: Input channels.
        outside: Output channels, two or more.
        affine: The norm has a scale and a shift.
        conv: Class of the convolutions.
    """

    def __init__(self, inside: int, outside: int, affine: bool = True, conv: Conv = nn.Conv2d) -> None:
        super().__init__()
        self.even = conv(inside, outside // 2, 1, stride=2, bias=False)
        self.odd = conv(inside, outside - outside // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outside, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, H, W) -> (B, outside, H / 2, W / 2), rounded up."""
        x = F.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]  # padded for odd sizes; of even ones the padding isn't looked at
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1))  # type: ignore[no-any-return]


def relu_conv_norm(inside: int, outside: int, affine: bool = True, conv: Conv = nn.Conv2d) -> nn.Sequential:
    """ReLU, a 1x1 convolution, batch norm: brings an input of a cell to the cell's channels."""
    return nn.Sequential(nn.ReLU(), conv(inside, outside, 1, bias=False), nn.BatchNorm2d(outside, affine=affine))


def _depthwise(channels: int, size: int, stride: int, dilation: int, affine: bool, conv: Conv) -> Sequence[nn.Module]:
    padding = dilation * (size - 1) // 2
    return (
        nn.ReLU(),
        conv(channels, channels, size, stride=stride, padding=padding, dilation=dilation, groups=channels, bias=False),
        conv(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


def make_operation(
    name: str, channels: int, stride: int = 1, *, affine: bool = True, pool_norm: bool = False, conv: Conv = nn.Conv2d
) -> nn.Module | None:
    """One operation.

    Args:
        name: One of :data:`OPERATIONS`.
        channels: C, of input and output.
        stride: 1 or 2.
        affine: Norms have a scale and a shift; not in a search, where they would compensate alpha.
        pool_norm: Pools are followed by a norm without scale and shift, as in a search.
        conv: Class of the convolutions, such as ``SparseConv2d``.

    Returns:
        None for ``none``, whose output is 0.

    Raises:
        ValueError: There is no such operation.
    """
    if name not in OPERATIONS:
        raise ValueError(f"there is no operation {name!r}: give some of {', '.join(OPERATIONS)}")
    if name == "none":
        return None
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine, conv)
    if name.endswith("pool_3x3"):
        pool: nn.Module = nn.MaxPool2d(3, stride, 1) if name.startswith("max") else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False)) if pool_norm else pool
    size = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*_depthwise(channels, size, stride, 2, affine, conv))
    return nn.Sequential(*_depthwise(channels, size, stride, 1, affine, conv), *_depthwise(channels, size, 1, 1, affine, conv))


def reduction_cells(cells: int) -> tuple[int, int]:
    """Which cells halve the size, at a third and at two thirds of them; the others are normal ones.

    Raises:
        ValueError: Fewer than three cells, of which none would be a normal one.
    """
    if cells < 3:
        raise ValueError(f"cells is {cells}: give 3 or more, as two of them reduce the size and a normal one is to be there as well")
    return cells // 3, 2 * cells // 3


__all__ = ["OPERATIONS", "FactorizedReduce", "make_operation", "reduction_cells", "relu_conv_norm"]
