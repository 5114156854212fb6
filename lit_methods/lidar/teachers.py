"""Image teachers: frozen networks (n, 3, H, W) in [0, 1] -> patch features (n, C, H / stride, W / stride)."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.hub import leave_out, timm_network
from lit_methods.runs.checkpoints import read_weights

_DINOV2 = {
    "small": "vit_small_patch14_dinov2.lvd142m",
    "base": "vit_base_patch14_dinov2.lvd142m",
    "large": "vit_large_patch14_dinov2.lvd142m",
}


class DINOv2(nn.Module):
    """DINOv2 ViT-S/B/L-14 through timm: the tokens of the last block BEFORE the final LayerNorm, class token dropped.

    Args:
        size: ``small`` (384 channels), ``base`` (768) or ``large`` (1024).
        weights: None downloads the released weights from the hub; a path reads a local state dict in timm's format
            (``.pth`` or ``.safetensors``); ``random`` keeps the initialisation, for tests.
        image_size: (H, W) in pixels, multiples of 14.

    Raises:
        FileNotFoundError: ``weights`` is no file.
        ValueError: An argument outside its range, the released weights can't be had, or the file can't be read or holds other weights.
    """

    stride = 14

    def __init__(
        self, size: Literal["small", "base", "large"] = "small", weights: Path | str | None = None, image_size: tuple[int, int] = (224, 448)
    ) -> None:
        super().__init__()
        checks.one_of(_DINOV2, size=size)
        if image_size[0] % self.stride or image_size[1] % self.stride:
            raise ValueError(f"image_size must be multiples of {self.stride}, got {tuple(image_size)}")
        local = weights is not None and weights != "random"
        given = f"weights={str(weights)!r}"
        sizes: dict[str, Any] = {"img_size": tuple(image_size), "num_classes": 0}
        if local and not leave_out(given, str(weights)):
            if not Path(str(weights)).is_file():
                raise FileNotFoundError(f"{given} is no file: give a timm state dict of {_DINOV2[size]}, or null to download it")
            import timm  # imports torchvision: only where it is used

            # read here, since timm unpickles files in some of its versions; timm fits names and positions to the network
            own = {"state_dict": read_weights(Path(str(weights))), "file": None}
            try:
                self.vit = timm.create_model(_DINOV2[size], pretrained=True, pretrained_cfg_overlay=own, **sizes)
            except (RuntimeError, KeyError, AttributeError) as error:
                said = " ".join(str(error).split())[:300]
                raise ValueError(f"{given} holds other weights than those of {_DINOV2[size]}, in timm's names: {said}") from error
        else:
            instead = "give weights, a file with timm's state dict"
            self.vit = timm_network(_DINOV2[size], weights is None, "weights=null, the released ones", instead, **sizes)
        self.embed_dim = int(self.vit.embed_dim)  # type: ignore[arg-type]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, C, H / 14, W / 14)."""
        normed = (images - self.mean) / self.std
        return self.vit.forward_intermediates(normed, indices=[-1], norm=False, intermediates_only=True)[0]  # type: ignore[operator]


class PatchStatistics(nn.Module):
    """A teacher without weights or download: colour and gradient statistics of each patch and its surroundings.

    Per patch: mean and standard deviation of R, G, B; eight orientation bins of the brightness gradient; mean colour
    of the 3x3 and 7x7 patches around; the patch's height in the image. It knows nothing of categories: those come
    from the superpixels.

    Args:
        stride: Patch edge in pixels; image sides must be multiples of it.
    """

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        checks.at_least(1, "pixels", stride=stride)
        self.stride = stride
        self.embed_dim = 3 + 3 + 8 + 3 + 3 + 1

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, 21, H / stride, W / stride)."""
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"image size {height} x {width} must be a multiple of stride={self.stride}")
        mean = F.avg_pool2d(images, self.stride)
        std = (F.avg_pool2d(images.square(), self.stride) - mean.square()).clamp(min=0).sqrt()
        grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        dx, dy = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        direction = torch.atan2(dy, dx) / (2 * torch.pi) * 8
        bins = torch.arange(8, device=images.device).view(1, 8, 1, 1)
        share = (1 - ((direction - bins + 4) % 8 - 4).abs()).clamp(min=0) * torch.hypot(dx, dy)
        around = [F.avg_pool2d(mean, k, stride=1, padding=k // 2, count_include_pad=False) for k in (3, 7)]
        row = torch.linspace(-1, 1, mean.shape[-2], device=images.device).view(1, 1, -1, 1).expand(mean.shape[0], 1, -1, mean.shape[-1])
        # factors bring every entry to about unit spread on photographs
        return torch.cat([2 * mean - 1, 6 * std, 10 * F.avg_pool2d(share, self.stride), *(2 * a - 1 for a in around), row], dim=1)
