"""Backbones of imbalanced regression beside those of image classification: pairs of sentences, and images with a target at each pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.hub import timm_network


class SentencePairEncoder(nn.Module):
    """Features of a pair of sentences: [u, v, |u - v|, u v], where u and v are the means of their words' embeddings.

    Submodules: ``embedding``, ``hidden``.

    Args:
        num_tokens: Numbers that a token can have, 0 for padding included.
        embedding_dim: Width E of u and v.
        hidden_dim: Width D of the features: a linear layer and a ReLU on the four parts.

    Raises:
        ValueError: A number is below 1, or there are fewer than two tokens.
    """

    def __init__(self, num_tokens: int = 20_000, embedding_dim: int = 64, hidden_dim: int = 128) -> None:
        super().__init__()
        checks.at_least(2, num_tokens=num_tokens)
        checks.at_least(1, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        self.embedding = nn.Embedding(num_tokens, embedding_dim, padding_idx=0)
        self.hidden = nn.Linear(4 * embedding_dim, hidden_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 2, L) int64, 0 where a sentence has ended -> (B, D)."""
        words = self.embedding(tokens)
        lengths = (tokens != 0).sum(-1, keepdim=True).clamp(min=1)
        one, other = (words.sum(2) / lengths).unbind(1)
        return F.relu(self.hidden(torch.cat([one, other, (one - other).abs(), one * other], dim=1)))


class DenseFeatures(nn.Module):
    """Features at half of an image's resolution, from all stages of a convolutional network of timm.

    Each stage goes through a 1x1 convolution, is resized to the first stage's size, and joins the others; a 3x3 convolution with batch norm
    and ReLU makes the features.

    Submodules: ``encoder``, ``lateral``, ``fuse``.

    Args:
        name: Name in timm of a network with feature maps, such as ``resnet50``.
        channels: Width C of the features.
        lateral_channels: Channels that each stage is brought to.
        pretrained: Load timm's weights, which it downloads once.
    """

    def __init__(self, name: str = "resnet50", channels: int = 128, lateral_channels: int = 64, pretrained: bool = False) -> None:
        super().__init__()
        encoder = timm_network(name, pretrained, features_only=True)
        self.encoder = encoder
        widths = encoder.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(width, lateral_channels, 1) for width in widths)
        total = lateral_channels * len(widths)
        self.fuse = nn.Sequential(nn.Conv2d(total, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 2, W / 2)."""
        stages = [layer(stage) for layer, stage in zip(self.lateral, self.encoder(images), strict=True)]
        size = stages[0].shape[2:]
        return self.fuse(torch.cat([F.interpolate(stage, size, mode="bilinear") for stage in stages], dim=1))  # type: ignore[no-any-return]


__all__ = ["DenseFeatures", "SentencePairEncoder"]
