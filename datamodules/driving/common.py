"""What all driving data sets share: reading files with clear errors, augmentation, the segmentation data sets and their batches.

Clouds are (N, 4) float32: x, y, z in metres in the LiDAR frame and the raw intensity. In a batch the clouds of all samples follow one
another in ``points`` (N, 4), with ``points_per_sample`` (B,) int64; and so do pairs.

Every random number of a sample follows from (seed, epoch, index) alone, never from the worker or rank that reads it.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from torch import Tensor

from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.pictures import as_rgb, decoding
from lit_methods.datamodules.reading import read_bytes, read_npy
from lit_methods.datamodules.samples import OnBroken as OnBroken
from lit_methods.datamodules.samples import SampleDataset as SampleDataset
from lit_methods.files import write_atomically

LABEL_FRACTIONS = (1, 5, 10, 25, 100)
Sample = dict[str, Any]
Batch = dict[str, Any]


def _read_array(path: Path, field: str, dtype: DTypeLike, archive: str) -> tuple[NDArray[Any], int]:
    """Flat values of a raw binary file, or the array of an .npy file; and the size in bytes."""
    missing = f"the release is incomplete here, unpack its {archive} again"
    if path.suffix == ".npy":
        values = read_npy(path, field, missing, kinds="iuf")
        return values, values.nbytes
    content = read_bytes(path, field, missing)
    kind = np.dtype(dtype)
    usable = len(content) - len(content) % kind.itemsize
    return np.frombuffer(content[:usable], dtype=kind.newbyteorder("<")), len(content)


def read_points(path: Path, columns: int) -> Tensor:
    """Read a LiDAR scan of raw little-endian float32 values, or of an .npy array.

    Args:
        path: ``columns`` values per point, the first four being x, y, z, intensity.
        columns: 5 for nuScenes (the ring index comes last), 4 for KITTI.

    Returns:
        (N, 4) float32, N >= 1.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: The size fits no whole number of points, there are no points, or a value is NaN or infinite.
    """
    values, size = _read_array(path, "points", np.float32, "LiDAR archive")
    if path.suffix == ".npy" and (values.ndim != 2 or values.shape[1] != columns):
        raise BrokenRecordError(path, "points", f"expected an array (n, {columns}), got {values.shape}: another release?")
    if path.suffix != ".npy" and size % (4 * columns):
        raise BrokenRecordError(
            path, "points", f"{size} bytes is not a multiple of {4 * columns} ({columns} float32 per point): truncated, copy it again"
        )
    if size == 0:
        raise BrokenRecordError(path, "points", "the scan is empty, at least one point is expected: copy the file again")
    with np.errstate(over="ignore"):  # infinite then, and found below
        points = np.ascontiguousarray(values.reshape(-1, columns)[:, :4], dtype=np.float32)
    if not np.isfinite(points.sum(dtype=np.float64)):  # one pass without a temporary; which row, only when there is one
        finite = np.isfinite(points).all(axis=1)
        row = int(np.argmin(finite))
        raise BrokenRecordError(
            path, "points", f"{int((~finite).sum())} points hold NaN or infinite values, the first is point {row}: {points[row].tolist()}"
        )
    return torch.from_numpy(points.copy() if not points.flags.writeable else points)


def label_table(classes: Sequence[Sequence[int]], ignored: Sequence[int], ignore_index: int, size: int) -> NDArray[np.int64]:
    """Table of raw id -> training id; -1 marks raw ids that the data set does not have.

    Args:
        classes: Raw ids of training class 0, 1, ...
        ignored: Raw ids that become ``ignore_index``.
        ignore_index: Training id of ignored points.
        size: Length of the table: largest raw id + 1.

    Returns:
        (size,) int64.

    Raises:
        ValueError: A raw id stands in two places.
    """
    table = np.full(size, -1, dtype=np.int64)
    for target, raw_ids in [*enumerate(classes), (ignore_index, ignored)]:
        for raw in raw_ids:
            if table[raw] != -1:
                raise ValueError(f"raw label {raw} is mapped to class {table[raw]} and to class {target}: leave one")
            table[raw] = target
    return table


def read_labels(path: Path, dtype: DTypeLike, mask: int, table: NDArray[np.int64], num_points: int) -> Tensor:
    """Read per-point labels and map them to training ids.

    Args:
        path: Binary file of one unsigned integer per point, or an .npy array.
        dtype: Its integer type, such as ``np.uint8``.
        mask: Bits of the raw value that hold the class, such as 0xFFFF.
        table: (K,) raw id -> training id, -1 for raw ids that don't exist (see :func:`label_table`).
        num_points: Points of the scan.

    Returns:
        (num_points,) int64 training ids.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: The number of labels differs from the number of points, or a raw id is unknown.
    """
    kind = np.dtype(dtype)
    values, size = _read_array(path, "labels", kind, "label archive")
    if values.size != num_points or (path.suffix != ".npy" and size != num_points * kind.itemsize):
        found = size / (values.dtype.itemsize if path.suffix == ".npy" else kind.itemsize)
        raise BrokenRecordError(path, "labels", f"{size} bytes = {found:g} labels of {kind}, but the scan has {num_points} points")
    if values.dtype.kind not in "iu":
        raise BrokenRecordError(path, "labels", f"holds {values.dtype}, expected integers: another release?")
    raw = values.reshape(-1).astype(np.int64) & mask
    inside = (raw >= 0) & (raw < len(table))
    mapped = table[np.where(inside, raw, 0)]
    bad = ~inside | (mapped < 0)
    if bad.any():
        raise BrokenRecordError(
            path,
            "labels",
            f"raw label {int(raw[bad][0])} (point {int(np.argmax(bad))}) is not in the label map: another release, or broken",
        )
    return torch.from_numpy(mapped)


def read_image(path: Path, size: tuple[int, int] | int) -> tuple[Tensor, tuple[int, int]]:
    """Read an RGB image and resize the whole of it with Pillow's bilinear filter, without a crop.

    JPEGs are decoded at half or a quarter of their size where that is still at least ``size``: much faster, and the average over the
    dropped pixels is what an antialiasing filter computes anyway.

    Args:
        path: JPEG or PNG.
        size: (height, width) of the result in pixels; or one number: at most this many on the longer side, the aspect ratio kept.

    Returns:
        ``(image, native)``: (3, height, width) uint8, and the (height, width) on disk.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: The file can't be decoded, or its mode has no known range.
    """
    with decoding(path, "image", "the release is incomplete here, unpack its camera archives again") as picture:
        native = (picture.height, picture.width)
        if isinstance(size, int):
            factor = min(1.0, size / max(native))
            size = (max(1, round(native[0] * factor)), max(1, round(native[1] * factor)))
        height, width = size
        reduced = picture.draft("RGB", (width, height))
        box = reduced[1] if reduced is not None else None
        small = as_rgb(picture, path).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous(), native


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent, whoever else reads or writes it, and whenever the run is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def rigid(rotation: NDArray[np.float64], translation: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) float64 matrix of p -> rotation p + translation."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    return matrix


def draw_augmentation(rng: np.random.Generator, rotation: tuple[float, float]) -> NDArray[np.float64]:
    """Draw the augmentation of one cloud: x and y mirrored with p = .5 each, rotation about z, scale in [.95, 1.05].

    The distribution of SuperFlow (arXiv:2407.06190): rotation in [0, pi] when pretraining, in [-pi, pi] when a segmentor is trained.

    Args:
        rng: Source of randomness; four numbers are drawn.
        rotation: Range of the angle in radians, uniform.

    Returns:
        (4, 4) float64 matrix: augmented point = matrix @ (x, y, z, 1).
    """
    mirror = np.where(rng.random(2) < 0.5, -1.0, 1.0)
    angle = rng.uniform(*rotation)
    scale = rng.uniform(0.95, 1.05)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.eye(4)
    matrix[:3, :3] = scale * np.array([[cos * mirror[0], -sin * mirror[1], 0.0], [sin * mirror[0], cos * mirror[1], 0.0], [0.0, 0.0, 1.0]])
    return matrix


def transform_points(points: Tensor, matrix: NDArray[np.float64]) -> Tensor:
    """Apply a (4, 4) matrix to the coordinates of (N, 4) points; order and intensity stay."""
    linear, shift = torch.from_numpy(matrix[:3, :3]).float(), torch.from_numpy(matrix[:3, 3]).float()
    return torch.cat([points[:, :3] @ linear.T + shift, points[:, 3:]], dim=1)


def fraction_of(frames: Sequence[int], percent: int) -> list[int]:
    """Every (100 / percent)-th frame, beginning with the first: the few-label subsets of SLidR (arXiv:2203.16258).

    Raises:
        ValueError: ``percent`` is not one of the protocol's.
    """
    if percent not in LABEL_FRACTIONS:
        raise ValueError(f"label_fraction={percent} is not one of {LABEL_FRACTIONS} (percent of the training frames)")
    return list(frames[:: 100 // percent])


class Frames(Protocol):
    """LiDAR frames of a data set, numbered from 0: all that the segmentation data sets ask for."""

    def token(self, frame: int) -> str:
        """Name of the frame in the benchmark."""

    def points(self, frame: int) -> Tensor:
        """(N, 4) float32."""

    def labels(self, frame: int, num_points: int) -> Tensor:
        """(N,) int64 training ids."""

    def neighbour(self, frame: int, offset: int) -> int | None:
        """Frame ``offset`` steps later (negative: earlier) in the same scene; None past its border."""

    def lidar_to_global(self, frame: int) -> NDArray[np.float64]:
        """(4, 4) float64 pose of the LiDAR."""


class SegmentationDataset(SampleDataset):
    """One LiDAR scan with labels, and optionally its neighbours in time.

    Samples: ``points`` (N, 4) float32, ``labels`` (N,) int64 unless ``labelled`` is False, ``token``; with ``neighbours`` = k > 0 also
    ``neighbours``: 2k dicts in the order t-k..t-1, t+1..t+k with ``points`` (n, 4), ``to_current`` (4, 4) float64 and ``present`` bool.

    Neighbours are never augmented: ``to_current`` carries the current scan's augmentation, so that moved points lie on ``points``.

    Args:
        frames: The data set's frames.
        indices: Indices of the frames to use, in order.
        seed: Seed of the augmentation.
        augment: Mirror, rotate by [-pi, pi], scale.
        labelled: Read labels.
        neighbours: Scans before and after, each.
        on_broken: See :class:`SampleDataset`.
        num_workers: See :class:`SampleDataset`.
    """

    def __init__(
        self,
        frames: Frames,
        indices: Sequence[int],
        *,
        seed: int,
        augment: bool,
        labelled: bool = True,
        neighbours: int = 0,
        on_broken: OnBroken = "error",
        num_workers: int = 0,
    ) -> None:
        super().__init__(len(indices), seed, augment, on_broken, num_workers)
        self.frames, self.indices, self.labelled, self.neighbours = frames, np.asarray(indices, dtype=np.int64), labelled, neighbours

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Read one scan."""
        frame = int(self.indices[index])
        points = self.frames.points(frame)
        sample: Sample = {"token": self.frames.token(frame)}
        if self.labelled:
            sample["labels"] = self.frames.labels(frame, len(points))
        augmentation = draw_augmentation(rng, (-math.pi, math.pi)) if self.augment else np.eye(4)
        sample["points"] = transform_points(points, augmentation) if self.augment else points
        if self.neighbours:
            offsets = [k for k in range(-self.neighbours, self.neighbours + 1) if k]
            sample["neighbours"] = [self._neighbour(frame, offset, augmentation) for offset in offsets]
        return sample

    def _neighbour(self, frame: int, offset: int, augmentation: NDArray[np.float64]) -> Sample:
        other = self.frames.neighbour(frame, offset)
        if other is None:
            return {"points": torch.zeros(0, 4), "to_current": torch.eye(4, dtype=torch.float64), "present": False}
        to_current = augmentation @ np.linalg.inv(self.frames.lidar_to_global(frame)) @ self.frames.lidar_to_global(other)
        return {"points": self.frames.points(other), "to_current": torch.from_numpy(to_current), "present": True}


class SemiSupervisedDataset(SampleDataset):
    """Pairs of a labelled and an unlabelled sample; an epoch is one pass over the larger of the two sets.

    Sample i of epoch e is ``labelled[(i + e) % L]`` with ``unlabelled[i % U]``: the smaller set is used equally often, and the pairs
    change.
    """

    def __init__(self, labelled: SampleDataset, unlabelled: SampleDataset) -> None:
        super().__init__(max(len(labelled), len(unlabelled)), labelled.seed, labelled.augment)
        self.labelled, self.unlabelled = labelled, unlabelled

    @property
    def num_skipped(self) -> int:
        """Broken samples met in both sets."""
        return self.labelled.num_skipped + self.unlabelled.num_skipped

    def at(self, epoch: int, index: int) -> Sample:
        """A pair."""
        shifted = (index + epoch) % len(self.labelled)
        # The visit number stands in for the epoch: a labelled scan that returns within one epoch is augmented anew.
        visit = epoch * math.ceil(self.length / len(self.labelled)) + index // len(self.labelled)
        return {"labelled": self.labelled[visit, shifted], "unlabelled": self.unlabelled[epoch, index % len(self.unlabelled)]}


def collate_cloud(samples: Sequence[Sample]) -> Batch:
    """Join the clouds of several samples: ``points`` (N, 4) float32 and ``points_per_sample`` (B,) int64."""
    clouds = [sample["points"] for sample in samples]
    return {"points": torch.cat(clouds), "points_per_sample": torch.tensor([len(cloud) for cloud in clouds])}


def collate_pairs(samples: Sequence[Sample]) -> Batch:
    """Join the point-pixel pairs: ``pairing_points`` (M,), ``pairing_images`` (M, 3), ``pairs_per_sample`` (B,), all int64."""
    return {
        "pairing_points": torch.cat([sample["pairing_points"] for sample in samples]),
        "pairing_images": torch.cat([sample["pairing_images"] for sample in samples]),
        "pairs_per_sample": torch.tensor([len(sample["pairing_points"]) for sample in samples]),
    }


def collate_segmentation(samples: Sequence[Sample]) -> Batch:
    """Segmentation batch: the cloud, ``labels`` (N,) int64 where given, ``token`` list of B strings, ``neighbours`` where given.

    ``neighbours`` is a list of 2k clouds, each with ``to_current`` (B, 4, 4) float64 and ``present`` (B,) bool.
    """
    batch = {**collate_cloud(samples), "token": [sample["token"] for sample in samples]}
    if "labels" in samples[0]:
        batch["labels"] = torch.cat([sample["labels"] for sample in samples])
    if "neighbours" in samples[0]:
        batch["neighbours"] = [
            {
                **collate_cloud(same_offset),
                "to_current": torch.stack([neighbour["to_current"] for neighbour in same_offset]),
                "present": torch.tensor([neighbour["present"] for neighbour in same_offset]),
            }
            for same_offset in zip(*(sample["neighbours"] for sample in samples), strict=True)
        ]
    return batch


def collate_semi_supervised(samples: Sequence[Sample]) -> Batch:
    """``labelled`` and ``unlabelled``: a segmentation batch each."""
    return {part: collate_segmentation([sample[part] for sample in samples]) for part in ("labelled", "unlabelled")}


Collate = Callable[[Sequence[Sample]], Batch]
