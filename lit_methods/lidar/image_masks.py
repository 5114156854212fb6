"""Masks of whole images without classes, by SAM 2 of transformers: a grid of points asks, and what is certain and stable stays."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lit_methods.checks import at_least, share
from lit_methods.hub import fetch
from lit_methods.lidar.lifting import smallest_masks

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sam2_network(name: str, untrained: bool = False) -> Any:
    """SAM 2 for images.

    Args:
        name: On the hub, such as ``facebook/sam2.1-hiera-tiny``, or a folder.
        untrained: The network of that configuration with random weights, to try a pipeline.

    Raises:
        NotThereError: Neither a folder, nor the cache, nor the hub has it; or transformers is too old.
    """
    try:
        from transformers import Sam2Config, Sam2Model
    except ImportError as problem:
        raise ImportError("masks by SAM 2 need transformers 4.56 or newer: pip install 'lit-methods[transformers]'") from problem

    def load() -> Any:
        return Sam2Model(Sam2Config.from_pretrained(name)) if untrained else Sam2Model.from_pretrained(name)

    return fetch(load, name, given=f"--model {name}", instead="give a folder, or masks of your own with --source files").eval()


def distinct_masks(masks: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Rows of the masks that overlap with none of a higher score by more than a share.

    Args:
        masks: (M, H, W) bool.
        scores: (M,).
        overlap: Largest intersection over union.

    Returns:
        (K,) int64, the highest score first; of equal ones the lower row counts as higher.
    """
    order = scores.argsort(descending=True, stable=True)
    flat = masks[order].flatten(1).float()
    both = flat @ flat.T
    size = flat.sum(1)
    union = size[:, None] + size - both
    alike = (both / union.clamp(min=1)).tril(-1) > overlap
    return order[~alike.any(1)]


@torch.no_grad()
def image_masks(
    network: Any,
    picture: Image.Image,
    size: tuple[int, int],
    grid: int = 16,
    least_score: float = 0.7,
    least_stability: float = 0.85,
    overlap: float = 0.7,
    least_pixels: int = 20,
    at_once: int = 64,
) -> Tensor:
    """The smallest mask at each pixel of an image.

    Args:
        network: Of :func:`sam2_network`.
        picture: RGB.
        size: Height and width of what is returned.
        grid: Points along each side that ask for masks, three each.
        least_score: Of the overlap that the network expects of a mask.
        least_stability: Overlap of a mask at a threshold of 1 with itself at -1.
        overlap: Of two masks that overlap more, the one with the higher score stays.
        least_pixels: Of a mask, at the network's resolution.
        at_once: Points of a pass.

    Returns:
        (H, W) int64 numbers of masks; -1: none.
    """
    at_least(1, grid=grid, at_once=at_once)
    share(least_score=least_score, least_stability=least_stability, overlap=overlap)
    side, device = int(network.config.prompt_encoder_config.image_size), next(network.parameters()).device
    pixels = torch.frombuffer(
        bytearray(picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR).tobytes()), dtype=torch.uint8
    )
    pixels = pixels.view(side, side, 3).permute(2, 0, 1).to(device) / 255
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (_MEAN, _STD))
    features = network.get_image_embeddings(((pixels - mean) / std)[None])
    places = (torch.arange(grid, device=device) + 0.5) * side / grid
    asked = torch.cartesian_prod(places, places).flip(1)
    logits, scores = [], []
    for points in asked.split(at_once):
        found = network(
            image_embeddings=features,
            input_points=points[None, :, None],
            input_labels=torch.ones(1, len(points), 1, dtype=torch.long, device=device),
            multimask_output=True,
        )
        logits.append(found.pred_masks[0].flatten(0, 1).float())
        scores.append(found.iou_scores[0].flatten().float())
    logit, score = torch.cat(logits), torch.cat(scores)
    stable = (logit > 1).flatten(1).sum(1) / (logit > -1).flatten(1).sum(1).clamp(min=1)
    good = (score >= least_score) & (stable >= least_stability) & ((logit > 0).flatten(1).sum(1) >= least_pixels)
    logit, score = logit[good], score[good]
    kept = distinct_masks(logit > 0, score, overlap)
    if not len(kept):
        return torch.full(size, -1, dtype=torch.int64)
    fine = F.interpolate(logit[kept][None], size=size, mode="bilinear", align_corners=False)[0] > 0
    return smallest_masks(fine).cpu()


__all__ = ["distinct_masks", "image_masks", "sam2_network"]
