"""Backbones that give maps of features, and the cascaded head that refines boxes on them (DiffusionDet, arXiv:2211.09788)."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.detection.pooling import pyramid_align
from lit_methods.hub import timm_network


class SmallDetectionBackbone(nn.Module):
    """Three convolutions with group norm: one map of an eighth, or any other power of two, of the resolution.

    Args:
        out_channels: Channels of the map, a multiple of 8.
        in_channels: Channels of the image.
        stride: Pixels from one position of the map to the next: 4, 8 or 16.

    Attributes:
        strides: The stride, as a list of one.
    """

    def __init__(self, out_channels: int = 32, in_channels: int = 3, stride: int = 4) -> None:
        super().__init__()
        checks.at_least(1, in_channels=in_channels)
        if out_channels < 8 or out_channels % 8:
            raise ValueError(f"out_channels is {out_channels}: give a multiple of 8")
        if stride not in (4, 8, 16):
            raise ValueError(f"stride is {stride}: give 4, 8 or 16")
        self.out_channels, self.strides = out_channels, [stride]
        layers: list[nn.Module] = []
        halvings, width = stride.bit_length() - 1, in_channels
        for number in range(max(3, halvings)):
            step = 2 if number < halvings else 1
            layers += [nn.Conv2d(width, out_channels, 3, stride=step, padding=1, bias=False), nn.GroupNorm(8, out_channels), nn.ReLU()]
            width = out_channels
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W), sides divisible by the stride -> one map (B, out_channels, H / stride, W / stride)."""
        return [self.layers(images)]


class TimmPyramid(nn.Module):
    """A network of timm with feature maps, and a feature pyramid on top of them (arXiv:1612.03144).

    Args:
        name: Name in timm, such as ``resnet50``, ``resnet101``, ``swin_base_patch4_window7_224``.
        pretrained: Load timm's weights.
        out_channels: Channels of every map.
        levels: Indices of timm's maps; the default ones have strides 4 to 32 in ResNets. Swin's are 0 to 3.
        frozen: Beginnings of names of parameters that aren't trained, such as ``conv1`` and ``layer1`` of a ResNet.
        freeze_norm: Batch norms keep the statistics and factors that they have.

    Attributes:
        strides: Of the maps, from fine to coarse.

    Raises:
        ValueError: timm has no such network, or ``frozen`` names nothing.
    """

    def __init__(
        self,
        name: str = "resnet50",
        pretrained: bool = True,
        out_channels: int = 256,
        levels: Sequence[int] = (1, 2, 3, 4),
        frozen: Sequence[str] = (),
        freeze_norm: bool = True,
    ) -> None:
        super().__init__()
        from timm.layers import freeze_batch_norm_2d
        from torchvision.ops import FeaturePyramidNetwork

        checks.at_least(1, out_channels=out_channels)
        checks.patterns(frozen=frozen)
        options: dict[str, Any] = {"features_only": True, "out_indices": tuple(levels)}
        if name.startswith("swin"):
            options["strict_img_size"] = False
        body: Any = timm_network(name, pretrained, **options)
        self.out_channels, self.strides = out_channels, [int(stride) for stride in body.feature_info.reduction()]
        self._widths = [int(width) for width in body.feature_info.channels()]
        names = [name for name, _ in body.named_parameters()]
        for beginning in frozen:
            if not any(name.startswith(beginning) for name in names):
                raise ValueError(f"frozen: no parameter of {name} begins with {beginning!r}; the first ones are {', '.join(names[:4])}")
        for own, parameter in body.named_parameters():
            parameter.requires_grad_(not own.startswith(tuple(frozen)) if frozen else True)
        self.body: nn.Module = freeze_batch_norm_2d(body) if freeze_norm else body
        self.pyramid: nn.Module = FeaturePyramidNetwork(self._widths, out_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), sides divisible by the coarsest stride -> maps (B, out_channels, h, w), from fine to coarse."""
        maps = [
            one if one.shape[1] == width else one.permute(0, 3, 1, 2)  # timm's Swin has the channels last
            for one, width in zip(self.body(images), self._widths, strict=True)
        ]
        return list(self.pyramid(OrderedDict((str(number), one) for number, one in enumerate(maps))).values())


def time_features(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of times (N,) at ``width`` / 2 frequencies from 1 to 1e-4: (N, width) float32."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10_000) / max(half - 1, 1)))
    angles = time.float()[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class DynamicConvolution(nn.Module):
    """Two matrices made from a proposal's feature are applied to the features inside its box (Sparse R-CNN, arXiv:2011.12450).

    Args:
        channels: C of the features.
        hidden: Channels between the two matrices.
        positions: Positions inside a box.
    """

    def __init__(self, channels: int, hidden: int, positions: int) -> None:
        super().__init__()
        self.channels, self.hidden = channels, hidden
        self.matrices = nn.Linear(channels, 2 * channels * hidden)
        self.norm_hidden, self.norm_channels, self.norm_out = nn.LayerNorm(hidden), nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.out = nn.Linear(positions * channels, channels)

    def forward(self, proposal: Tensor, inside: Tensor) -> Tensor:
        """(R, C) and (R, positions, C) -> (R, C)."""
        first, second = self.matrices(proposal).chunk(2, dim=-1)
        x = torch.bmm(inside, first.unflatten(-1, (self.channels, self.hidden)))
        x = F.relu(self.norm_hidden(x))
        x = F.relu(self.norm_channels(torch.bmm(x, second.unflatten(-1, (self.hidden, self.channels)))))
        return F.relu(self.norm_out(self.out(x.flatten(1))))


def _tower(channels: int, layers: int) -> nn.Sequential:
    blocks = [(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(layer for block in blocks for layer in block))


class HeadStage(nn.Module):
    """One head of the cascade: proposals look at each other and into their boxes, and say class and correction.

    Args:
        num_classes: K.
        channels: C of features and proposals.
        attention_heads: Heads of the self-attention.
        feedforward: Width of the feed-forward layer.
        dynamic: Channels between the two matrices of the dynamic convolution.
        bins: Side of the grid inside a box.
    """

    def __init__(self, num_classes: int, channels: int, attention_heads: int, feedforward: int, dynamic: int, bins: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, attention_heads, batch_first=True)
        self.interact = DynamicConvolution(channels, dynamic, bins**2)
        self.feedforward = nn.Sequential(nn.Linear(channels, feedforward), nn.ReLU(), nn.Linear(feedforward, channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(4 * channels, 2 * channels))
        self.class_tower, self.box_tower = _tower(channels, 1), _tower(channels, 3)
        self.classes, self.deltas = nn.Linear(channels, num_classes), nn.Linear(channels, 4)

    def forward(self, inside: Tensor, proposals: Tensor | None, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, deltas and the proposals' features for the next head.

        Args:
            inside: (N, P, bins^2, C) features inside the boxes.
            proposals: (N, P, C) of the head before; None: the mean of what is inside.
            time: (N, 4 C) embedded.

        Returns:
            (N, P, K), (N, P, 4), (N, P, C).
        """
        x = inside.mean(2) if proposals is None else proposals
        x = self.norms[0](x + self.attention(x, x, x, need_weights=False)[0])
        interacted = self.interact(x.flatten(0, 1), inside.flatten(0, 1)).view_as(x)
        x = self.norms[1](x + interacted)
        x = self.norms[2](x + self.feedforward(x))
        scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)
        modulated = x * (scale + 1) + shift
        return self.classes(self.class_tower(modulated)), self.deltas(self.box_tower(modulated)), x


_LARGEST_LOG = math.log(100_000 / 16)


def refined(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes moved and scaled: the centre by delta / 2 of the size, the size by exp(delta), at most 100,000 / 16.

    Args:
        boxes: (..., 4) corners.
        deltas: (..., 4) of x, y, width and height.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + size / 2
    centre = centre + deltas[..., :2] / 2 * size
    half = size * deltas[..., 2:].clamp(max=_LARGEST_LOG).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


class CascadedHead(nn.Module):
    """Heads with weights of their own, each of which refines the boxes of the one before; boxes carry no gradient between heads.

    Boxes, their refinement and the answers are in float32 in any precision. Corners are put in order first, as noise may turn a box
    inside out.

    Args:
        num_classes: K.
        channels: C of the backbone's maps.
        stages: H, heads of the cascade.
        attention_heads: Heads of each self-attention; they divide ``channels``.
        feedforward: Width of the feed-forward layers.
        dynamic: Channels inside the dynamic convolution.
        bins: Side of the grid inside a box.
        samples: Samples in a bin along each axis.
        prior: Score that a class has at the start of training.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        stages: int = 6,
        attention_heads: int = 8,
        feedforward: int = 2048,
        dynamic: int = 64,
        bins: int = 7,
        samples: int = 2,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        checks.at_least(1, num_classes=num_classes, channels=channels, stages=stages, attention_heads=attention_heads)
        checks.at_least(1, feedforward=feedforward, dynamic=dynamic, bins=bins, samples=samples)
        checks.within("(0, 1)", "a score", prior=prior)
        if channels % attention_heads:
            raise ValueError(f"channels={channels} can't be divided among attention_heads={attention_heads}: give a divisor")
        self.num_classes, self.channels, self.bins, self.samples = num_classes, channels, bins, samples
        self.time = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, 4 * channels))
        heads = [HeadStage(num_classes, channels, attention_heads, feedforward, dynamic, bins) for _ in range(stages)]
        self.stages = nn.ModuleList(heads)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for head in heads:
            nn.init.constant_(head.classes.bias, -math.log((1 - prior) / prior))

    def forward(self, features: Sequence[Tensor], boxes: Tensor, time: Tensor, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Class logits and boxes of every head.

        Args:
            features: Maps (B, C, h, w), from fine to coarse.
            boxes: (V * B, P, 4) corners in pixels: V views of each of the B images, a whole batch behind the other.
            time: (V * B,) time condition of each view.
            strides: Of the maps.

        Returns:
            (H, V * B, P, K) logits and (H, V * B, P, 4) corners in pixels, float32; not moved into the image.
        """
        images = len(features[0])
        views, proposals = len(boxes) // images, boxes.shape[1]
        condition = self.time(time_features(time, self.channels).to(features[0].dtype))
        boxes = boxes.float()
        boxes = torch.cat([torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])], dim=-1)
        logits, answers, state = [], [], None
        with torch.autocast(boxes.device.type, enabled=False):  # bfloat16 has no room for places in an image
            maps = [one.float() for one in features]
        for stage in self.stages:
            boxes = boxes.detach()
            by_image = boxes.unflatten(0, (views, images)).transpose(0, 1).flatten(1, 2)
            with torch.autocast(boxes.device.type, enabled=False):
                inside = pyramid_align(maps, by_image, strides, self.bins, self.samples)
            inside = inside.flatten(3).transpose(2, 3).unflatten(1, (views, proposals)).transpose(0, 1).flatten(0, 1)
            scores, deltas, state = stage(inside.to(features[0].dtype), state, condition)
            boxes = refined(boxes, deltas.float())
            logits.append(scores.float())
            answers.append(boxes)
        return torch.stack(logits), torch.stack(answers)


__all__ = ["CascadedHead", "DynamicConvolution", "HeadStage", "SmallDetectionBackbone", "TimmPyramid", "refined", "time_features"]
