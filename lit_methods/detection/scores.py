"""Average precision over all images of all ranks (COCO's), and pictures of images with boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.detection.nms import Detections
from lit_methods.distributed import gather_rows

_TRUTH, _FOUND = (70, 200, 90), (240, 80, 60)


def average_precision_metric() -> Any:
    """The ``MeanAveragePrecision`` of torchmetrics for boxes, by faster-coco-eval or, without it, pycocotools.

    Raises:
        ImportError: Neither is installed; the message names the extra.
    """
    import importlib.util

    backends = {"faster_coco_eval": "faster_coco_eval", "pycocotools": "pycocotools"}
    found = [backend for backend, module in backends.items() if importlib.util.find_spec(module) is not None]
    if not found:
        raise ImportError("average precision needs faster-coco-eval: pip install 'lit-methods[detection]'")
    from torchmetrics.detection import MeanAveragePrecision

    return MeanAveragePrecision(backend=found[0], sync_on_compute=False, dist_sync_on_step=False)  # type: ignore[arg-type]


class DetectionScores:
    """Collects truths and detections as rows of numbers, and computes AP over those of all ranks.

    Rows travel, so that ranks may have different numbers of images; every rank computes the same figures.
    """

    def __init__(self) -> None:
        self._truths: list[Tensor] = []
        self._found: dict[int, list[Tensor]] = {}

    def add_truths(self, image: Tensor, boxes: Tensor, labels: Tensor, ignored: Tensor) -> None:
        """What is in B images.

        Args:
            image: (B,) int64 numbers of the images, each once.
            boxes: (B, G, 4) corners in pixels.
            labels: (B, G) int64; below 0: there is no box.
            ignored: (B, G) bool: boxes that don't count, neither if they are found nor if they aren't.
        """
        number = image[:, None].expand_as(labels)
        columns = [number[..., None], boxes, labels[..., None], ignored[..., None]]
        rows = torch.cat([column.to(torch.float64) for column in columns], dim=-1)
        self._truths.append(rows[labels >= 0].cpu())

    def add_found(self, steps: int, image: Tensor, detections: Sequence[Detections]) -> None:
        """What was found in B images (B,) in a number of steps."""
        for number, one in zip(image.tolist(), detections, strict=True):
            image_column = torch.full_like(one.scores, number, dtype=torch.float64)[:, None]
            columns = [image_column, one.boxes, one.scores[:, None], one.labels[:, None]]
            self._found.setdefault(steps, []).append(torch.cat([column.to(torch.float64) for column in columns], dim=-1).cpu())

    def compute(self) -> dict[int, dict[str, float]]:
        """Steps -> ``ap`` (mean over IoU 0.5 to 0.95) and ``ap50``; 0 where nothing was to be found. A collective."""
        truths = gather_rows(torch.cat(self._truths), with_grad=False)
        figures = {}
        for steps, parts in sorted(self._found.items()):
            rows = gather_rows(torch.cat(parts), with_grad=False)
            images = torch.cat([truths[:, 0], rows[:, 0]]).unique()
            ours = _by_image(rows, images, ("boxes", "scores", "labels"))
            wanted = _by_image(truths, images, ("boxes", "labels", "iscrowd"))
            metric = average_precision_metric()
            metric.update(ours, wanted)
            result = metric.compute()
            figures[steps] = {name: max(0.0, float(result[key])) for name, key in (("ap", "map"), ("ap50", "map_50"))}
        return figures


def _by_image(rows: Tensor, images: Tensor, names: tuple[str, str, str]) -> list[dict[str, Tensor]]:
    """Rows (image, 4 corners, two further columns), sorted by image, as a dictionary for each image."""
    rows = rows[rows[:, 0].argsort(stable=True)]
    counts = torch.bincount(torch.searchsorted(images, rows[:, 0].contiguous()), minlength=len(images)).tolist()
    kinds: dict[str, Any] = {"scores": torch.float32}
    return [
        {
            "boxes": part[:, 1:5].float(),
            names[1]: part[:, 5].to(kinds.get(names[1], torch.int64)),
            names[2]: part[:, 6].to(kinds.get(names[2], torch.int64)),
        }
        for part in rows.split(counts)
    ]


def draw_boxes(
    images: Tensor, truths: Sequence[Tensor], detections: Sequence[Detections], names: Sequence[str], threshold: float = 0.4
) -> NDArray[np.uint8]:
    """A row of images: truths in green, detections above a score in red with their class.

    Args:
        images: (N, 3, H, W) in [0, 1].
        truths: (G, 4) corners in pixels of each image.
        detections: Of each image.
        names: Names of the classes.
        threshold: Least score that is drawn.

    Returns:
        (h, w, 3) uint8; small images are enlarged.
    """
    from torchvision.utils import draw_bounding_boxes, make_grid

    factor = max(1, -(-192 // max(images.shape[-2:])))
    pictures = []
    for image, boxes, found in zip(images, truths, detections, strict=True):
        big = image.mul(255).round().byte().repeat_interleave(factor, 1).repeat_interleave(factor, 2).cpu()
        sure = found.scores >= threshold
        words = [names[label] if label < len(names) else str(label) for label in found.labels[sure].tolist()]
        for corners, colour, labels in ((boxes, _TRUTH, None), (found.boxes[sure], _FOUND, words)):
            corners = torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], dim=1).cpu() * factor
            if len(corners):
                big = draw_bounding_boxes(big, corners, labels, colors=[colour] * len(corners), width=2)
        pictures.append(big)
    grid: Tensor = make_grid(pictures, nrow=len(pictures), padding=2)
    return grid.permute(1, 2, 0).contiguous().numpy()


__all__ = ["DetectionScores", "average_precision_metric", "draw_boxes"]
