"""MinkUNet, the sparse-voxel U-Net of image-to-LiDAR pretraining, on spconv.

Architecture as in the SuperFlow code base (after Choy et al., arXiv:1904.08755): MinkUNet-34 without heads has
37,873,280 parameters, MinkUNet-18 21,721,472, MinkUNet-50 31,774,912. The whole network runs in float32: spconv has
no bfloat16 kernels and the recipe is float32.
"""

import importlib
import logging
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.lidar.voxels import VoxelType, voxelize

_BLOCKS = {18: (2, 2, 2, 2), 34: (2, 3, 4, 6), 50: (2, 3, 4, 6)}


class VoxelFeatures(NamedTuple):
    """What a 3D backbone yields for a batch of clouds.

    Attributes:
        features: (V, C) one row per occupied voxel.
        point2voxel: (N,) int64, row of each point.
        first_point: (V,) int64, the point that stands for the voxel (its label is the voxel's).
    """

    features: Tensor
    point2voxel: Tensor
    first_point: Tensor

    def at_points(self) -> Tensor:
        """(N, C) features of each point's voxel."""
        return self.features[self.point2voxel]


def import_spconv() -> Any:
    """The ``spconv.pytorch`` package.

    Raises:
        ImportError: spconv is not installed; the message names the extra.
    """
    # spconv 2.3 calls torch names that newer torch deprecates: harmless, but a dozen lines on every start
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return importlib.import_module("spconv.pytorch")
    except ImportError as error:
        raise ImportError(
            'MinkUNet needs spconv: pip install "lit-methods[lidar]" (Linux x86-64). On other systems give another backbone_3d: any module '
            "that maps (points, points_per_sample) to lit_methods.lidar.minkunet.VoxelFeatures"
        ) from error


class _Sparse(nn.Module):
    """A sparse convolution with batch norm and, if asked, ReLU."""

    def __init__(self, convolution: nn.Module, channels: int, momentum: float, relu: bool = True) -> None:
        super().__init__()
        self.conv = convolution
        self.norm = nn.BatchNorm1d(channels, momentum=momentum)
        self.relu = relu

    def forward(self, x: Any) -> Any:
        x = self.conv(x)
        features = self.norm(x.features)
        return x.replace_feature(features.relu() if self.relu else features)


def normed(convolution: nn.Module, channels: int, momentum: float) -> nn.Module:
    """A sparse convolution with batch norm and ReLU, for networks that are built of these parts.

    Args:
        convolution: Of spconv.
        channels: That it puts out.
        momentum: Of batch norm.
    """
    return _Sparse(convolution, channels, momentum)


class _Residual(nn.Module):
    """Basic (3-3) or bottleneck (1-3-1) block; a 1x1 convolution with batch norm on the skip where the width changes."""

    def __init__(self, spconv: Any, channels: int, planes: int, bottleneck: bool, key: str, momentum: float) -> None:
        super().__init__()
        out = planes * (4 if bottleneck else 1)

        def conv(a: int, b: int, kernel: int, relu: bool = True) -> _Sparse:
            return _Sparse(spconv.SubMConv3d(a, b, kernel, bias=False, indice_key=f"{key}_k{kernel}"), b, momentum, relu)

        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = [channels, *[planes] * (len(kernels) - 1), out]
        self.body = nn.Sequential(*(conv(widths[i], widths[i + 1], k, relu=i + 1 < len(kernels)) for i, k in enumerate(kernels)))
        self.skip = conv(channels, out, 1, relu=False) if channels != out else nn.Identity()

    def forward(self, x: Any) -> Any:
        y = self.body(x)
        return y.replace_feature((y.features + self.skip(x).features).relu())


class MinkUNet(nn.Module):
    """Sparse U-Net with four down and four up stages: (points, points_per_sample) -> :class:`VoxelFeatures`.

    Cost: 38 million parameters with the defaults.

    Args:
        depth: 18, 34 or 50 (bottleneck blocks).
        in_channels: Features per point, x, y, z first.
        stem_channels: Width of the two stem convolutions.
        planes: Width of the four down and four up stages; narrower numbers give a small network for a laptop.
        voxel_type: ``cylinder`` or ``cubic``, see :func:`lit_methods.lidar.voxels.voxelize`.
        voxel_size: (rho m, phi degrees, z m) or (x, y, z) in metres.
        bn_momentum: 0.05 in pretraining, 0.02 downstream.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50] = 34,
        in_channels: int = 4,
        stem_channels: int = 32,
        planes: Sequence[int] = (32, 64, 128, 256, 256, 128, 96, 96),
        voxel_type: VoxelType = "cylinder",
        voxel_size: Sequence[float] = (0.1, 1.0, 0.1),
        bn_momentum: float = 0.05,
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS or len(planes) != 8:
            raise ValueError(f"MinkUNet has depth 18, 34 or 50 and 8 planes, got depth={depth} and {len(planes)} planes")
        checks.share(bn_momentum=bn_momentum)
        for edge in voxel_size:
            checks.positive(voxel_size=edge)
        spconv = import_spconv()
        self.in_channels, self.voxel_type, self.voxel_size = in_channels, voxel_type, tuple(voxel_size)
        bottleneck = depth == 50
        expansion = 4 if bottleneck else 1

        def blocks(channels: int, width: int, number: int, level: int) -> nn.Sequential:
            inputs = [channels] + [width * expansion] * (number - 1)
            return nn.Sequential(*(_Residual(spconv, c, width, bottleneck, f"level{level}", bn_momentum) for c in inputs))

        self.stem = nn.Sequential(
            *(
                _Sparse(spconv.SubMConv3d(c, stem_channels, 3, bias=False, indice_key="level0_k3"), stem_channels, bn_momentum)
                for c in (in_channels, stem_channels)
            )
        )
        self.down, self.down_blocks, self.up, self.up_blocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width, skips = stem_channels, [stem_channels]
        for level in range(4):
            halve = spconv.SparseConv3d(width, width, 2, stride=2, bias=False, indice_key=f"halve{level}")
            self.down.append(_Sparse(halve, width, bn_momentum))
            self.down_blocks.append(blocks(width, planes[level], _BLOCKS[depth][level], level + 1))
            width = planes[level] * expansion
            skips.append(width)
        for level in reversed(range(4)):
            double = spconv.SparseInverseConv3d(width, planes[7 - level], 2, bias=False, indice_key=f"halve{level}")
            self.up.append(_Sparse(double, planes[7 - level], bn_momentum))
            self.up_blocks.append(blocks(planes[7 - level] + skips[level], planes[7 - level], 2, level))
            width = planes[7 - level] * expansion
        self.out_channels = width
        self._algo_device = ""

    def _choose_kernels(self, device: torch.device) -> None:
        """Only spconv's ``Native`` algorithm runs on the CPU; on CUDA its faster default is left to choose."""
        if device.type == self._algo_device:
            return
        native = importlib.import_module("spconv.core").ConvAlgo
        for module in self.modules():
            if hasattr(module, "algo"):
                module.algo = native.Native if device.type == "cpu" else native.MaskImplicitGemm
        self._algo_device = device.type

    def forward(self, points: Tensor, points_per_sample: Tensor) -> VoxelFeatures:
        """Features of every occupied voxel.

        Args:
            points: (N, in_channels) float32, samples one after the other.
            points_per_sample: (B,) int64.

        Returns:
            The voxel features, width ``out_channels``.
        """
        self._choose_kernels(points.device)
        spconv = import_spconv()
        batch = points_per_sample.shape[0]
        sample = torch.repeat_interleave(torch.arange(batch, device=points.device), points_per_sample, output_size=points.shape[0])
        with torch.autocast(points.device.type, enabled=False):
            points = points.float()
            voxels = voxelize(points, sample, self.voxel_size, self.voxel_type, batch)
            # a multiple of 16, so that four halvings with kernel 2 lose no border voxel
            shape = [(extent // 16 + 1) * 16 for extent in voxels.coords[:, :3].amax(0).tolist()]
            x = spconv.SparseConvTensor(voxels.features, voxels.coords.roll(1, dims=1).contiguous(), shape, batch)
            skips = [self.stem(x)]
            for halve, block in zip(self.down, self.down_blocks, strict=True):
                skips.append(block(halve(skips[-1])))
            x = skips.pop()
            for double, block in zip(self.up, self.up_blocks, strict=True):
                x, skip = double(x), skips.pop()
                x = block(x.replace_feature(torch.cat([x.features, skip.features], dim=1)))
        return VoxelFeatures(x.features, voxels.point2voxel, voxels.first_point)
