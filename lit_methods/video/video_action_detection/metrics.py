"""How well actions are found in videos: by masks, as the technique's authors score, and by boxes with average precision.

By masks (:class:`VideoScores`): a frame with something to find counts as found if the IoU of the predicted and the true foreground reaches
a threshold, a video if the IoU over all its frames together does; the share of what is found is averaged over the classes. The released
evaluation of AKASH2907/pi-consistency-activity-detection doesn't ask whether the class is right (``localisation``); with the right class it
is what the paper calls f-mAP and v-mAP for detectors that give one class for a video.

By boxes (:func:`frame_map`, :func:`video_map`): average precision as usual for UCF101-24 and JHMDB-21, all points of the precision-recall
curve, for detectors that give several scored boxes or tubes. Both are written from their definition in plain NumPy.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import share

Floats = NDArray[np.float64]

# ---- by masks --------------------------------------------------------------------------------------------------------------------------


def frame_overlaps(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each frame in prediction and truth, in either, and in the truth.

    Args:
        logits: (B, 1, T, H, W), foreground at 0 and above, which is a probability of a half.
        mask: (B, 1, T, H, W), foreground above 0.

    Returns:
        Intersection, union and size of the truth, each (B, T) float64.
    """
    predicted, truth = (logits >= 0).flatten(3).squeeze(1), (mask > 0).flatten(3).squeeze(1)
    parts = predicted & truth, predicted | truth, truth
    return tuple(part.sum(dim=2, dtype=torch.float64) for part in parts)  # type: ignore[return-value]


class VideoScores(NamedTuple):
    """Figures of :func:`video_scores`; NaN where there is nothing to find.

    Attributes:
        accuracy: Share of videos with the right class.
        iou: Mean IoU of frames with something to find.
        f_map: Threshold -> share of frames that are found in videos with the right class, mean over classes.
        v_map: Threshold -> share of videos that are found with the right class, mean over classes.
        f_localisation: Threshold -> share of frames that are found, whatever the class.
        v_localisation: Threshold -> share of videos that are found, whatever the class.
    """

    accuracy: float
    iou: float
    f_map: dict[float, float]
    v_map: dict[float, float]
    f_localisation: dict[float, float]
    v_localisation: dict[float, float]


def _mean_over_classes(found: Tensor, labels: Tensor, classes: int) -> float:
    counts = torch.bincount(labels, minlength=classes)
    sums = torch.bincount(labels, weights=found.double(), minlength=classes)
    there = counts > 0
    return float((sums[there] / counts[there]).mean()) if bool(there.any()) else float("nan")


def video_scores(
    video: Tensor,
    label: Tensor,
    scores: Tensor,
    intersection: Tensor,
    union: Tensor,
    truth: Tensor,
    thresholds: Sequence[float] = (0.2, 0.5),
) -> VideoScores:
    """Scores of videos that were seen clip by clip.

    The class of a video is that with the highest mean score of its clips. Frames without foreground in the truth don't count, neither for
    frames nor for videos; a video without any counts for the accuracy alone.

    Args:
        video: (N,) int64, which video each clip is of.
        label: (N,) int64 class, the same for all clips of a video.
        scores: (N, C) class scores.
        intersection: (N, T) pixels, as :func:`frame_overlaps`.
        union: (N, T) pixels.
        truth: (N, T) pixels.
        thresholds: IoUs that must be reached, 0 to 1.

    Raises:
        ValueError: A threshold outside its range, or clips of one video with two labels.
    """
    for threshold in thresholds:
        share(thresholds=threshold)
    names, place = torch.unique(video, return_inverse=True)
    count, classes = len(names), scores.shape[1]
    mean = torch.zeros(count, classes, dtype=torch.float64).index_add_(0, place, scores.double())
    of_video = torch.full((count,), -1, dtype=torch.int64)
    of_video[place] = label
    if bool((of_video[place] != label).any()):
        raise ValueError("clips of one video have different labels: give each video a number of its own")
    right = mean.argmax(dim=1) == of_video if count else torch.zeros(0, dtype=torch.bool)

    there = truth > 0
    iou = torch.where(there, intersection / union.clamp(min=1), 0.0)
    frames_iou, frames_label = iou[there], label[:, None].expand_as(there)[there]
    frames_right = right[place][:, None].expand_as(there)[there]
    sums = torch.zeros(count, 2, dtype=torch.float64)
    sums.index_add_(0, place, torch.stack([(part * there).sum(dim=1) for part in (intersection, union)], dim=1).double())
    seen = sums[:, 1] > 0
    video_iou, video_label, video_right = sums[seen, 0] / sums[seen, 1], of_video[seen], right[seen]

    def at(iou: Tensor, labels: Tensor, also: Tensor) -> dict[float, float]:
        return {threshold: _mean_over_classes((iou >= threshold) & also, labels, classes) for threshold in thresholds}

    return VideoScores(
        float(right.double().mean()) if count else float("nan"),
        float(frames_iou.mean()) if len(frames_iou) else float("nan"),
        at(frames_iou, frames_label, frames_right),
        at(video_iou, video_label, video_right),
        at(frames_iou, frames_label, torch.ones_like(frames_right)),
        at(video_iou, video_label, torch.ones_like(video_right)),
    )


# ---- by boxes --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tube:
    """Boxes of one action through the frames of a video.

    Attributes:
        video: Name of the video.
        label: Class.
        frames: (n,) int64, rising.
        boxes: (n, 4) x1, y1, x2, y2; the right and lower edge are outside.
        score: Of the whole tube; of a true one it doesn't count.
        scores: (n,) of the boxes; None: ``score`` for all.
    """

    video: str
    label: int
    frames: NDArray[np.int64]
    boxes: Floats
    score: float = 1.0
    scores: Floats | None = None

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.frames), 4):
            raise ValueError(f"a tube of {self.video} has {len(self.frames)} frames and boxes {self.boxes.shape}: expected (n, 4)")
        if len(self.frames) > 1 and not bool((np.diff(self.frames) > 0).all()):
            raise ValueError(f"a tube of {self.video} has frames that don't rise: give each frame once, in order")


def box_iou(first: Floats, second: Floats) -> Floats:
    """IoU of boxes, with broadcasting: (..., 4) and (..., 4) -> (...), 0 for boxes without area."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    both = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - both
    return np.divide(both, union, out=np.zeros_like(both, dtype=np.float64), where=union > 0)


def tube_iou(first: Tube, second: Tube) -> float:
    """IoU of two tubes: the mean box IoU over the frames that both have, times the IoU of their frames."""
    shared, ours, theirs = np.intersect1d(first.frames, second.frames, assume_unique=True, return_indices=True)
    if not len(shared):
        return 0.0
    frames = len(first.frames) + len(second.frames) - len(shared)
    return float(box_iou(first.boxes[ours], second.boxes[theirs]).mean() * len(shared) / frames)


def average_precision(scores: Floats, hits: NDArray[np.bool_], truths: int) -> float:
    """Area below the precision-recall curve, precision made to fall with recall.

    Args:
        scores: (N,) of the detections.
        hits: (N,) whether each found a truth that no better one had found.
        truths: What there was to find.

    Returns:
        0 to 1; NaN where there is nothing to find.
    """
    if truths == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    true = np.cumsum(hits[order])
    precision = true / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best that is reached at this recall or a higher one
    recall = np.concatenate([[0.0], true / truths])
    return float((np.diff(recall) * precision).sum())


def _matched(scores: Floats, ious: Sequence[Floats], keys: Sequence[int], threshold: float) -> NDArray[np.bool_]:
    """Which detections hit: best first, each takes the free truth of its group with the highest IoU, if that reaches the threshold."""
    hits = np.zeros(len(scores), dtype=bool)
    taken: dict[int, set[int]] = defaultdict(set)
    for place in np.argsort(-scores, kind="stable").tolist():
        free = [number for number in range(len(ious[place])) if number not in taken[keys[place]]]
        if free:
            best = max(free, key=lambda number: float(ious[place][number]))
            if ious[place][best] >= threshold:
                hits[place] = True
                taken[keys[place]].add(best)
    return hits


def _by_class(predicted: Sequence[Tube], truth: Sequence[Tube]) -> Mapping[int, tuple[list[Tube], list[Tube]]]:
    return {
        label: ([tube for tube in predicted if tube.label == label], [tube for tube in truth if tube.label == label])
        for label in sorted({tube.label for tube in truth})
    }


def frame_map(predicted: Sequence[Tube], truth: Sequence[Tube], threshold: float = 0.5) -> float:
    """f-mAP: average precision of single boxes, mean over the classes that the truth has.

    Args:
        predicted: Tubes, whose boxes count by themselves, each with its score.
        truth: True tubes.
        threshold: IoU of boxes that counts as found.
    """
    share(threshold=threshold)
    found = []
    for ours, theirs in _by_class(predicted, truth).values():
        boxes: dict[tuple[str, int], list[Floats]] = defaultdict(list)
        for tube in theirs:
            for frame, box in zip(tube.frames.tolist(), tube.boxes, strict=True):
                boxes[tube.video, frame].append(box)
        numbers = {key: number for number, key in enumerate(boxes)}
        scores: list[float] = []
        ious: list[Floats] = []
        keys: list[int] = []
        for tube in ours:
            values = np.full(len(tube.frames), tube.score) if tube.scores is None else tube.scores
            for frame, box, score in zip(tube.frames.tolist(), tube.boxes, values.tolist(), strict=True):
                there = boxes.get((tube.video, frame), [])
                scores.append(score)
                ious.append(box_iou(box[None], np.stack(there)) if there else np.zeros(0))
                keys.append(numbers.get((tube.video, frame), -1))
        ranked = np.array(scores, dtype=np.float64)
        found.append(average_precision(ranked, _matched(ranked, ious, keys, threshold), sum(map(len, boxes.values()))))
    return float(np.mean(found)) if found else float("nan")


def video_map(predicted: Sequence[Tube], truth: Sequence[Tube], threshold: float = 0.5) -> float:
    """v-mAP: average precision of whole tubes, mean over the classes that the truth has.

    Args:
        predicted: Tubes with scores.
        truth: True tubes.
        threshold: :func:`tube_iou` that counts as found.
    """
    share(threshold=threshold)
    found = []
    for ours, theirs in _by_class(predicted, truth).values():
        tubes: dict[str, list[Tube]] = defaultdict(list)
        for tube in theirs:
            tubes[tube.video].append(tube)
        numbers = {name: number for number, name in enumerate(tubes)}
        ious = [np.array([tube_iou(tube, other) for other in tubes.get(tube.video, [])], dtype=np.float64) for tube in ours]
        scores = np.array([tube.score for tube in ours], dtype=np.float64)
        hits = _matched(scores, ious, [numbers.get(tube.video, -1) for tube in ours], threshold)
        found.append(average_precision(scores, hits, len(theirs)))
    return float(np.mean(found)) if found else float("nan")


__all__ = ["Tube", "VideoScores", "average_precision", "box_iou", "frame_map", "frame_overlaps", "tube_iou", "video_map", "video_scores"]
