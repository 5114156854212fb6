"""SparseUNet, the sparse-voxel U-Net of indoor scenes, on the parts of MinkUNet."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lit_methods import checks
from lit_methods.lidar.minkunet import MinkUNet, import_spconv, normed


class SparseUNet(nn.Module):
    """A sparse U-Net with 34 layers and a linear layer: (points (N, D), points_per_sample (B,)) -> (N, num_classes) logits.

    MinkUNet's stages behind one stem convolution of 5 x 5 x 5 voxels. A voxel has the features of its first point, and its points have its
    logits. The whole network runs in float32.

    Cost: 36.6 million parameters with the defaults. Needs spconv: pip install "lit-methods[lidar]".

    Args:
        num_classes: Width of the logits.
        in_channels: Features of a point, x, y, z in metres first.
        stem_channels: Width of the stem.
        planes: Width of the four down and four up stages; narrower numbers give a small network for a laptop.
        voxel_size: Edge of a voxel, metres.
        bn_momentum: Of batch norm.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 9,
        stem_channels: int = 32,
        planes: Sequence[int] = (32, 64, 128, 256, 256, 128, 64, 64),
        voxel_size: float = 0.02,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        checks.at_least(1, num_classes=num_classes, stem_channels=stem_channels)
        self.backbone = MinkUNet(34, in_channels, stem_channels, planes, "cubic", (voxel_size,) * 3, bn_momentum)
        spconv: Any = import_spconv()
        convolution = spconv.SubMConv3d(in_channels, stem_channels, 5, bias=False, indice_key="stem")
        self.backbone.stem = nn.Sequential(normed(convolution, stem_channels, bn_momentum))
        self.head = nn.Linear(self.backbone.out_channels, num_classes)

    def forward(self, points: Tensor, points_per_sample: Tensor) -> Tensor:
        """(points (N, in_channels), points_per_sample (B,)) -> (N, num_classes) logits."""
        voxels = self.backbone(points, points_per_sample)
        return self.head(voxels.features)[voxels.point2voxel]  # type: ignore[no-any-return]


__all__ = ["SparseUNet"]
