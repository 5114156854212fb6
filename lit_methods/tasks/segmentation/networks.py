"""Networks that give every pixel a logit for each class. Each names the deepest features of its encoder ``bottleneck``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.hub import timm_network


def _block(inside: int, outside: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for width in (inside, outside):
        parts += [nn.Conv2d(width, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*parts)


class SmallUNet2d(nn.Module):
    """A U-Net of two 3 x 3 convolutions with batch norm at each level, for images of some dozen pixels.

    Cost: 0.12 million parameters with the defaults.

    Args:
        num_classes: Classes, the background counted.
        in_channels: Channels of the images.
        widths: Channels of each level, from full resolution downwards; each further level halves it. Images may have any size.
    """

    def __init__(self, num_classes: int = 4, in_channels: int = 1, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        if num_classes < 2 or not widths:
            raise ValueError(f"num_classes={num_classes} must be 2 or more, and widths={list(widths)} not empty")
        channels = [in_channels, *widths]
        self.encoder = nn.ModuleList(_block(channels[i], channels[i + 1]) for i in range(len(widths)))
        self.bottleneck = nn.Identity()
        self.decoder = nn.ModuleList(_block(widths[i + 1] + widths[i], widths[i]) for i in reversed(range(len(widths) - 1)))
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes, H, W)."""
        kept: list[Tensor] = []
        x = images
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if level else x)
            kept.append(x)
        x = self.bottleneck(kept.pop())
        for block in self.decoder:
            skip = kept.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False), skip], dim=1))
        return self.classifier(x)  # type: ignore[no-any-return]


class TimmUNet(nn.Module):
    """A U-Net whose encoder is any network of timm with feature maps, such as ``resnet34``.

    Args:
        name: Name of the network in timm.
        num_classes: Classes, the background counted.
        in_channels: Channels of the images.
        decoder_channels: Channels of the decoder's levels, deepest first; one for each feature map of the encoder.
        pretrained: Load timm's weights.
    """

    def __init__(
        self,
        name: str = "resnet34",
        num_classes: int = 9,
        in_channels: int = 1,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        encoder = timm_network(name, pretrained, features_only=True, in_chans=in_channels)
        self.encoder = encoder
        channels = encoder.feature_info.channels()
        if len(decoder_channels) != len(channels):
            raise ValueError(
                f"decoder_channels has {len(decoder_channels)} entries, but {name} has {len(channels)} feature maps: give one for each"
            )
        self.bottleneck = nn.Identity()
        inside, skips = [channels[-1], *decoder_channels[:-1]], [*channels[-2::-1], 0]
        self.decoder = nn.ModuleList(_block(a + b, c) for a, b, c in zip(inside, skips, decoder_channels, strict=True))
        self.classifier = nn.Conv2d(decoder_channels[-1], num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes, H, W)."""
        *skips, x = self.encoder(images)
        x = self.bottleneck(x)
        for block in self.decoder:
            skip = skips.pop() if skips else None
            size = images.shape[2:] if skip is None else skip.shape[2:]
            x = F.interpolate(x, size=size, mode="nearest")
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
        return self.classifier(x)  # type: ignore[no-any-return]


class LargeFOV(nn.Module):
    """DeepLab-LargeFOV: a network of timm at an eighth of the resolution, and one dilated 3 x 3 convolution (arXiv:1412.7062).

    Args:
        name: Name of the network in timm; it must know ``output_stride``.
        num_classes: Classes, the background counted.
        width: Channels of the head.
        dilation: Dilation of the head's convolution.
        pretrained: Load timm's weights.
    """

    def __init__(
        self, name: str = "resnet50", num_classes: int = 21, width: int = 1024, dilation: int = 12, pretrained: bool = False
    ) -> None:
        super().__init__()
        checks.at_least(1, num_classes=num_classes, width=width, dilation=dilation)
        encoder = timm_network(name, pretrained, features_only=True, output_stride=8, out_indices=(-1,))
        self.encoder = encoder
        deepest = encoder.feature_info.channels()[-1]
        self.bottleneck = nn.Identity()
        self.head = nn.Sequential(nn.Conv2d(deepest, width, 3, padding=dilation, dilation=dilation), nn.ReLU(), nn.Dropout2d(0.5))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes, H, W), bilinear."""
        x = self.classifier(self.head(self.bottleneck(self.encoder(images)[0])))
        return F.interpolate(x, size=images.shape[2:], mode="bilinear", align_corners=False)


__all__ = ["LargeFOV", "SmallUNet2d", "TimmUNet"]
