"""A small point network of plain torch operations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.lidar.contrast import group_mean


def cells_of(positions: Tensor, sample: Tensor, edge: float) -> tuple[Tensor, int]:
    """Cubic cells of some clouds.

    Args:
        positions: (N, 3) metres.
        sample: (N,) int64, cloud of each point.
        edge: Metres.

    Returns:
        (N,) int64 cell of each point, and the number of cells.
    """
    cell = torch.floor(positions / edge).long()
    cell = cell - cell.amin(0) if len(cell) else cell
    extent = cell.amax(0) + 1 if len(cell) else cell.new_ones(3)
    key = ((sample * extent[0] + cell[:, 0]) * extent[1] + cell[:, 1]) * extent[2] + cell[:, 2]
    found, index = torch.unique(key, return_inverse=True)
    return index, len(found)


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


class PointNetOfCells(nn.Module):
    """Points see the mean of their surroundings: an MLP for each point, means over cells of several sizes, and an MLP on all of it.

    A point's input is its height above the lowest point of its cloud, its other features, and its place in each cell, relative to the mean
    of the cell's points. It needs no compiled library and learns generated rooms in seconds.

    Args:
        num_classes: Width of the logits.
        in_channels: Features of a point, x, y, z in metres first.
        width: Width of the layers.
        cells: Edges of the cells, metres.
    """

    def __init__(self, num_classes: int, in_channels: int = 9, width: int = 32, cells: Sequence[float] = (0.3, 0.9)) -> None:
        super().__init__()
        checks.at_least(1, num_classes=num_classes, width=width)
        checks.at_least(3, "features, x, y, z first", in_channels=in_channels)
        checks.positive(**{f"cells[{i}]": edge for i, edge in enumerate(cells)})
        self.cells = tuple(float(edge) for edge in cells)
        self.inside = nn.Sequential(_layer(in_channels - 2 + 3 * len(self.cells), width), _layer(width, width))
        self.around = nn.Sequential(_layer(width * (1 + len(self.cells)), 2 * width), nn.Linear(2 * width, num_classes))

    def forward(self, points: Tensor, points_per_sample: Tensor) -> Tensor:
        """(points (N, in_channels), points_per_sample (B,)) -> (N, num_classes) logits."""
        clouds = len(points_per_sample)
        sample = torch.repeat_interleave(torch.arange(clouds, device=points.device), points_per_sample, output_size=len(points))
        place = points[:, :3]
        lowest = place.new_zeros(clouds).scatter_reduce(0, sample, place[:, 2], "amin", include_self=False)
        groups = [cells_of(place.detach(), sample, edge) for edge in self.cells]
        away = [place - group_mean(place, index, number)[0][index] for index, number in groups]
        own = self.inside(torch.cat([(place[:, 2] - lowest[sample])[:, None], points[:, 3:], *away], dim=1))
        means = [group_mean(own, index, number)[0][index].to(own.dtype) for index, number in groups]
        return self.around(torch.cat([own, *means], dim=1))  # type: ignore[no-any-return]


__all__ = ["PointNetOfCells", "cells_of"]
