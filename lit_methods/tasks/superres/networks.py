"""Networks for super-resolution: (B, C, h, w) images in [0, 1] -> (B, C, scale * h, scale * w)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB of the training images, in [0, 1], as EDSR subtracts it
DIV2K_LUMA_MEAN = 0.438  # BT.601 studio luminance of that colour / 255


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions without norms, the branch scaled."""

    def __init__(self, channels: int, residual_scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual_scale * self.conv2(F.relu(self.conv1(x)))


class EDSR(nn.Module):
    """EDSR (Lim et al., arXiv:1707.02921): residual blocks without batch norm at low resolution, pixel shuffling at the end.

    EDSR-L is ``channels=256, num_blocks=32, residual_scale=0.1``; the baseline has 64 and 16. Submodules: ``head``, ``body.i`` with
    ``conv1`` and ``conv2``, the last of them one convolution; ``tail``, which enlarges.

    Cost: 1.4 million parameters with the defaults.

    Args:
        scale: 2, 3 or 4.
        channels: Channels of all layers between the first and the last.
        num_blocks: Residual blocks.
        residual_scale: Factor of each block's branch.
        image_channels: 3 for RGB, 1 for luminance.
        mean: Subtracted from the input and added to the output, per channel; None: that of DIV2K.
        bicubic_skip: Add the bicubic enlargement of the input, so that the network learns the rest. Not in EDSR; for small networks and
            short trainings.

    Raises:
        ValueError: Another scale, or a number below 1.
    """

    mean: Tensor

    def __init__(
        self,
        scale: int = 2,
        channels: int = 64,
        num_blocks: int = 16,
        residual_scale: float = 1.0,
        image_channels: int = 3,
        mean: Sequence[float] | None = None,
        bicubic_skip: bool = False,
    ) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale={scale}: EDSR enlarges by 2, 3 or 4")
        checks.at_least(0, residual_scale=residual_scale)
        checks.at_least(1, channels=channels, num_blocks=num_blocks, image_channels=image_channels)
        if mean is None:
            mean = DIV2K_MEAN if image_channels == 3 else [DIV2K_LUMA_MEAN] * image_channels
        if len(mean) != image_channels:
            raise ValueError(f"mean has {len(mean)} numbers for image_channels={image_channels}: give one for each")
        self.scale, self.bicubic_skip = scale, bicubic_skip
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.head = nn.Conv2d(image_channels, channels, 3, padding=1)
        blocks = [_ResidualBlock(channels, residual_scale) for _ in range(num_blocks)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(channels, channels, 3, padding=1))
        stages: list[nn.Module] = []
        for factor in {2: (2,), 3: (3,), 4: (2, 2)}[scale]:
            stages += [nn.Conv2d(channels, channels * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        self.tail = nn.Sequential(*stages, nn.Conv2d(channels, image_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, scale * h, scale * w), both in [0, 1] but not clipped."""
        x = self.head(images - self.mean)
        x = self.tail(x + self.body(x)) + self.mean
        return x + enlarge(images, self.scale) - self.mean if self.bicubic_skip else x


class Swin2SRNetwork(nn.Module):
    """Swin2SR of the ``transformers`` library (Conde et al., arXiv:2209.11345), built from its config with random weights.

    It is SwinIR with the attention and the norms of Swin v2, and not SwinIR itself, which no library that we use has. The default is of
    the size of SwinIR-Lightweight. Submodules stand under ``model.``; ``model.upsample`` is the tail.

    Args:
        scale: Enlargement.
        embed_dim: Width.
        depths: Layers of each block.
        num_heads: Heads of each block, one number for each.
        mlp_ratio: Hidden width of the MLPs / ``embed_dim``.
        window_size: Window of the attention, pixels; the input is padded to a multiple of it.
        upsampler: ``pixelshuffledirect`` (one convolution) or ``pixelshuffle``.
        image_channels: 3 for RGB, 1 for luminance.
        options: Further arguments of ``Swin2SRConfig``, such as ``{drop_path_rate: 0.0}``.

    Raises:
        ModuleNotFoundError: ``transformers`` isn't there.
    """

    def __init__(
        self,
        scale: int = 4,
        embed_dim: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6),
        mlp_ratio: float = 2.0,
        window_size: int = 8,
        upsampler: str = "pixelshuffledirect",
        image_channels: int = 3,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution
        except ImportError as problem:
            raise ModuleNotFoundError("Swin2SRNetwork needs transformers: pip install 'lit-methods[transformers]'") from problem
        checks.at_least(1, scale=scale, embed_dim=embed_dim, window_size=window_size, image_channels=image_channels)
        config = Swin2SRConfig(
            upscale=scale,
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            mlp_ratio=mlp_ratio,
            window_size=window_size,
            upsampler=upsampler,
            num_channels=image_channels,
            num_channels_out=image_channels,
            **(options or {}),
        )
        self.scale, self.window_size = scale, window_size
        self.model = Swin2SRForImageSuperResolution(config)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, scale * h, scale * w), both in [0, 1] but not clipped."""
        height, width = images.shape[2:]
        bottom, right = -height % self.window_size, -width % self.window_size
        padded = F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
        return self.model(pixel_values=padded).reconstruction[..., : height * self.scale, : width * self.scale]


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement, kernel parameter -0.5 as in MATLAB and Pillow; (B, C, h, w) -> (B, C, scale * h, scale * w)."""
    # with antialias torch takes -0.5, without it -0.75; it changes nothing else here, for enlarging needs no filter
    return F.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)


__all__ = ["DIV2K_LUMA_MEAN", "DIV2K_MEAN", "EDSR", "Swin2SRNetwork", "enlarge"]
