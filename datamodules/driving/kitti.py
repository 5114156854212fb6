"""SemanticKITTI and data sets laid out like it: scans (``.bin``), labels (``.label``), ``poses.txt`` and ``calib.txt`` per sequence.

What differs between them stands in a YAML label map (``configs/label_maps/``); a map of one's own makes another data set readable.

The Waymo Open Dataset is not read here. Its v2 release keeps labels as range images in parquet files. The official package needs
TensorFlow 2.12 and numpy < 2. ``torch-waymo`` 0.2 on PyPI reads v2 without them, by converting a whole split to a cache of its own; it
hasn't been tried here. Export scans and labels to the layout below to use them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.catalog import configs_folder
from lit_methods.checks import literals
from lit_methods.datamodules.driving.base import DrivingDataModule, LabelFraction
from lit_methods.datamodules.driving.common import (
    OnBroken,
    SampleDataset,
    collate_semi_supervised,
    label_table,
    read_labels,
    read_points,
    rigid,
    write_bytes,
)
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.reading import once, plain_file_name
from lit_methods.datamodules.tables import text_of
from lit_methods.files import refuse_repeated_keys

Splits = Literal["train", "val", "test"]
_ROUNDED = 0.05  # what rounding may take off a rotation's orthogonality


@dataclass(frozen=True)
class LabelMap:
    """A data set's label map, as its YAML holds it.

    Attributes:
        name: The data set's name.
        get: Where to get it.
        folders: Folders of the root that may hold the sequences, tried in order; "." is the root itself.
        scans: Folders of a sequence that may hold the scans, tried in order.
        labels: The same for labels.
        train_labels: The same for the labels of the training split, where they are others.
        columns: Values per point, the first four being x, y, z, intensity.
        label_dtype: Integer type of a label.
        label_mask: Bits of the label that hold the class.
        poses: Frame of poses.txt: camera (``Tr`` of calib.txt leads there from the LiDAR), lidar, or none.
        splits: Split -> sequences.
        split_files: Split -> file of lines that begin with ``<sequence>/<folder>/<frame>.bin``; wins over ``splits`` where given.
        classes: Training class -> raw ids; the first is written in predictions.
        ignored: Raw ids of points that don't count.
    """

    name: str
    get: str
    folders: tuple[str, ...]
    scans: tuple[str, ...]
    labels: tuple[str, ...]
    train_labels: tuple[str, ...]
    columns: int
    label_dtype: str
    label_mask: int
    poses: Literal["camera", "lidar", "none"]
    splits: dict[str, tuple[str, ...]]
    split_files: dict[str, str]
    classes: dict[str, tuple[int, ...]]
    ignored: tuple[int, ...]

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """Raw id -> training id; -1 for ids that the data set doesn't have."""
        raw = [*self.ignored, *(value for values in self.classes.values() for value in values)]
        return label_table(list(self.classes.values()), self.ignored, len(self.classes), max(raw) + 1)


def read_label_map(dataset: str | Path) -> LabelMap:
    """Read a label map.

    Args:
        dataset: Name of one that is shipped, such as ``semantickitti``, or the path of a YAML file.

    Raises:
        ValueError: No such map.
        BrokenRecordError: A key is missing, unknown, or of the wrong kind.
    """
    folder = configs_folder() / "label_maps"
    path = data_path(dataset) if str(dataset).endswith((".yaml", ".yml")) else folder / f"{dataset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"dataset={str(dataset)!r} is neither a shipped label map ({known}) nor the path of a YAML file")
    try:
        text = text_of(path, "give the path of a YAML file")
        refuse_repeated_keys(text, str(path))
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as problem:
        raise BrokenRecordError(path, "keys", f"isn't YAML ({' '.join(str(problem).split())}): truncated or no label map") from problem
    required = {
        "name",
        "get",
        "folders",
        "scans",
        "labels",
        "columns",
        "label_dtype",
        "label_mask",
        "poses",
        "splits",
        "classes",
        "ignored",
    }
    allowed = required | {"train_labels", "split_files"}
    if not isinstance(content, dict) or required - set(content) or set(content) - allowed:
        found = set(content) if isinstance(content, dict) else set()
        raise BrokenRecordError(
            path, "keys", f"missing: {sorted(required - found) or 'none'}, unknown: {sorted(found - allowed) or 'none'}"
        )
    try:
        label_map = LabelMap(
            name=content["name"],
            get=content["get"],
            folders=tuple(content["folders"]),
            scans=tuple(content["scans"]),
            labels=tuple(content["labels"]),
            train_labels=tuple(content.get("train_labels") or content["labels"]),
            columns=int(content["columns"]),
            label_dtype=str(np.dtype(content["label_dtype"])),
            label_mask=int(content["label_mask"]),
            poses=content["poses"],
            splits={split: tuple(str(name) for name in names) for split, names in content["splits"].items()},
            split_files=dict(content.get("split_files") or {}),
            classes={str(name): tuple(ids) for name, ids in content["classes"].items()},
            ignored=tuple(content["ignored"]),
        )
        if label_map.poses not in ("camera", "lidar", "none"):
            raise ValueError(f"poses is {label_map.poses!r}, expected camera, lidar or none")
        _ = label_map.table
    except (TypeError, ValueError, AttributeError) as problem:
        raise BrokenRecordError(path, "values", str(problem)) from problem
    return label_map


class KittiFrames:
    """Scans of the sequences that are used, by sequence and frame number, as the segmentation data sets see them.

    Args:
        root: Folder of the data set.
        label_map: Its label map.
        sequences: Names of the sequence folders.
        labels: Folders that may hold the labels.
        with_poses: Read ``poses.txt`` and ``calib.txt``.

    Raises:
        WrongRootError: The root, a sequence or its scans are missing.
        MissingFileError: Poses are asked for and missing.
        BrokenRecordError: Poses are asked for and unreadable, or fewer than scans.
    """

    def __init__(self, root: Path, label_map: LabelMap, sequences: Sequence[str], labels: Sequence[str], with_poses: bool) -> None:
        self.root, self.label_map, self.sequences, self.label_folders = root, label_map, tuple(sequences), tuple(labels)
        self.base = sequences_folder(root, label_map)
        self.scan_folders: list[Path] = []
        names: list[bytes] = []
        owners: list[int] = []
        suffixes = set()
        for number, sequence in enumerate(self.sequences):
            plain_file_name(sequence, label_map.name, "sequence")
            folder = next((path for name in label_map.scans if (path := self.base / sequence / name).is_dir()), None)
            if folder is None:
                raise WrongRootError(
                    f"sequence {sequence} of {label_map.name} is not in {self.base}: expected "
                    f"{self.base / sequence / label_map.scans[0]}/. Get it from {label_map.get}, "
                    "or name the sequences that you have (train_sequences, val_sequences)"
                )
            scans = listed(folder, endings=(".bin", ".npy"))
            self.scan_folders.append(folder)
            names += [path.stem.encode() for path in scans]
            owners += [number] * len(scans)
            suffixes |= {path.suffix for path in scans}
        if len(suffixes) > 1:
            raise WrongRootError(f"{self.base} holds both .bin and .npy scans: keep one kind")
        self.suffix = suffixes.pop() if suffixes else ".bin"
        self.name, self.sequence = np.array(names, dtype=np.bytes_), np.array(owners, dtype=np.int32)
        self.poses = np.concatenate([self._read_poses(number) for number in range(len(self.sequences))]) if with_poses and names else None

    def __len__(self) -> int:
        return len(self.name)

    def token(self, frame: int) -> str:
        """``<sequence>/<frame>``."""
        return f"{self.sequences[self.sequence[frame]]}/{self.name[frame].decode()}"

    def points(self, frame: int) -> Tensor:
        """(N, 4) float32."""
        return read_points(self.scan_folders[self.sequence[frame]] / (self.name[frame].decode() + self.suffix), self.label_map.columns)

    def labels(self, frame: int, num_points: int) -> Tensor:
        """(N,) int64 training ids."""
        sequence = self.base / self.sequences[self.sequence[frame]]
        folder = next((path for name in self.label_folders if (path := sequence / name).is_dir()), sequence / self.label_folders[0])
        path = folder / (self.name[frame].decode() + (".npy" if self.suffix == ".npy" else ".label"))
        return read_labels(path, self.label_map.label_dtype, self.label_map.label_mask, self.label_map.table, num_points)

    def neighbour(self, frame: int, offset: int) -> int | None:
        """The scan ``offset`` places later in the same sequence."""
        other = frame + offset
        return other if 0 <= other < len(self) and self.sequence[other] == self.sequence[frame] else None

    def lidar_to_global(self, frame: int) -> NDArray[np.float64]:
        """(4, 4) float64 pose of the LiDAR in the frame of the sequence's first pose."""
        if self.poses is None:
            raise ValueError(f"{self.label_map.name} is used without poses here")
        return self.poses[frame]

    def frames_of(self, sequences: Sequence[str]) -> list[int]:
        """All scans of the named sequences."""
        return np.flatnonzero(np.isin(self.sequence, [self.sequences.index(name) for name in sequences])).tolist()

    def frames_in(self, list_file: Path) -> list[int]:
        """The scans that a split file lists.

        Raises:
            MissingFileError: There is no such file.
            BrokenRecordError: A line names a scan that isn't there.
        """
        content = text_of(list_file, f"get it from {self.label_map.get}, or name whole sequences (train_sequences, val_sequences)", "split")
        index = {self.token(frame): frame for frame in range(len(self))}
        found: list[int] = []
        columns = len(next((line.split() for line in content.splitlines() if line.strip()), []))
        if not columns:
            raise BrokenRecordError(list_file, "split", "the list is empty: copy it again")
        for number, line in enumerate(content.splitlines()):
            if line.strip():
                if len(line.split()) != columns:
                    raise BrokenRecordError(list_file, f"line {number + 1}", f"is {line[:60]!r}, unlike the first: copy it again")
                parts = Path(line.split()[0]).parts or ("",)
                token = f"{parts[0]}/{Path(parts[-1]).stem}"
                if token not in index:
                    raise BrokenRecordError(list_file, f"line {number + 1}", f"names scan {token}, which isn't in {self.base}")
                found.append(index[token])
        once(found, list_file, "lines", "scan")
        return found

    def _read_poses(self, number: int) -> NDArray[np.float64]:
        folder = self.base / self.sequences[number]
        names = self.name[self.sequence == number]
        if self.label_map.poses == "none":
            raise MissingFileError(folder / "poses.txt", "poses", f"{self.label_map.name} is read without poses: set neighbours=0")
        poses = read_matrices(folder / "poses.txt")
        rows = np.array([int(name) if name.isdigit() else row for row, name in enumerate(names.tolist())], dtype=np.int64)
        if len(rows) and rows.max() >= len(poses):
            raise BrokenRecordError(
                folder / "poses.txt", "poses", f"has {len(poses)} lines, but scan {rows.max():06d} exists: one line per scan is expected"
            )
        return poses[rows] @ read_calibration(folder / "calib.txt") if self.label_map.poses == "camera" else poses[rows]


def sequences_folder(root: Path, label_map: LabelMap) -> Path:
    """The folder of a root that holds the sequences.

    Raises:
        WrongRootError: None of the expected ones is there.
    """
    for name in label_map.folders:
        if (root / name).is_dir():
            return root / name
    found = ", ".join([path.name for path in listed(root)][:8]) or "nothing" if root.is_dir() else "no such folder"
    raise WrongRootError(
        f"root={str(root)!r} holds no {' or '.join(label_map.folders)}/ (found: {found}). {label_map.name} is to be had from "
        f"{label_map.get}"
    )


def read_matrices(path: Path) -> NDArray[np.float64]:
    """(n, 4, 4) float64 from lines of 12 numbers, the upper rows of a rigid motion.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: A line doesn't hold 12 finite numbers.
    """
    lines = text_of(path, "unpack the pose archive of the release, or set neighbours=0", "poses").splitlines()
    matrices = np.tile(np.eye(4), (len(lines), 1, 1))
    for number, line in enumerate(lines):
        try:
            matrices[number, :3] = np.array(line.split(), dtype=np.float64).reshape(3, 4)
        except ValueError as problem:
            raise BrokenRecordError(path, f"line {number + 1}", f"expected 12 numbers ({problem})") from problem
    if not np.isfinite(matrices).all():
        raise BrokenRecordError(path, "poses", "holds NaN or infinite numbers")
    _rigid_alone(matrices, path, "poses")
    return matrices


def _rigid_alone(matrices: NDArray[np.float64], path: Path, field: str) -> None:
    """Raise if one of (n, 4, 4) matrices is no rotation and a place within 100,000 km."""
    with np.errstate(over="ignore", invalid="ignore"):
        rotation = matrices[:, :3, :3]
        error = np.abs(rotation @ rotation.swapaxes(1, 2) - np.eye(3)).max(axis=(1, 2), initial=0)
        good = (error < _ROUNDED) & (np.abs(matrices) <= 1e8).all(axis=(1, 2))
    if not good.all():
        line = int(np.argmin(good))
        raise BrokenRecordError(path, field, f"motion {line + 1} is no rotation and place in metres: damaged, copy the file again")


def read_calibration(path: Path) -> NDArray[np.float64]:
    """(4, 4) float64 motion LiDAR -> camera: the line ``Tr:`` of a KITTI odometry calibration.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: No line ``Tr:`` of 12 numbers.
    """
    lines = text_of(path, "unpack the calibration archive of the release, or set neighbours=0", "Tr").splitlines()
    for line in lines:
        key, _, numbers = line.partition(":")
        if key.strip() == "Tr":
            try:
                values = np.array(numbers.split(), dtype=np.float64).reshape(3, 4)
            except ValueError as problem:
                raise BrokenRecordError(path, "Tr", f"expected 12 numbers ({problem})") from problem
            if not np.isfinite(values).all():
                raise BrokenRecordError(path, "Tr", "holds NaN or infinite numbers: copy the file again")
            motion = rigid(values[:, :3], values[:, 3])
            _rigid_alone(motion[None], path, "Tr")
            return motion
    raise BrokenRecordError(path, "Tr", f"no such line; it has {', '.join(line.partition(':')[0] for line in lines if line.strip())}")


class KittiStyleDataModule(DrivingDataModule):
    """LiDAR segmentation on SemanticKITTI and data sets laid out like it.

    Batch: {"points": (N, 4) float32, "points_per_sample": (B,) int64, "labels": (N,) int64, "token": list of B strings}

    N: points of all B scans, x, y, z in metres and the intensity. In training with ``mode="semi_supervised"`` a batch has two parts,
    ``labelled`` and ``unlabelled``; all keys: :func:`~lit_methods.datamodules.driving.common.collate_segmentation`. A ``token`` is
    ``<sequence>/<frame>``. Validation and test read the validation split, as public test sequences have no labels.

    Args:
        root: Folder of the data set. There is no built-in sample in this layout: null is an error.
        dataset: semantickitti, scribblekitti, semanticposs, semanticstf, synlidar, rellis3d, daps3d, synth4d, or the path of a YAML label
            map.
        mode: segment or semi_supervised.
        label_fraction: Percent of the training scans that have labels: every (100 / x)-th.
        neighbours: Scans before and after each scan that come with it; needs poses.
        train_sequences: Training sequences; null: those of the label map.
        val_sequences: Validation sequences; null: those of the label map.
        test_sequences: Test sequences; null: those of the label map.
        predict_split: Scans to predict: val or test.
        batch_size: Samples per process and step.
        num_workers: Processes that read data; 0 reads in the training process.
        seed: Seed of order and augmentation.
        on_broken: error: a broken file ends the run, naming the file; skip: in training the next good scan takes its place, in
            validation, test and prediction it is left out, which ``setup`` finds out by reading these files once; with a warning and a
            count.

    Raises:
        ValueError: An argument is out of its range, or ``root`` is null.
    """

    def __init__(
        self,
        root: Path | None = None,
        dataset: str = "semantickitti",
        mode: Literal["segment", "semi_supervised"] = "segment",
        label_fraction: LabelFraction = 100,
        neighbours: int = 0,
        train_sequences: list[str] | None = None,
        val_sequences: list[str] | None = None,
        test_sequences: list[str] | None = None,
        predict_split: Literal["val", "test"] = "val",
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        on_broken: OnBroken = "error",
    ) -> None:
        super().__init__(
            label_fraction=label_fraction,
            neighbours=neighbours,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            on_broken=on_broken,
        )
        literals(KittiStyleDataModule, locals())
        self.label_map = read_label_map(dataset)
        if root is None:
            raise ValueError(
                f"root=null: KittiStyleDataModule has no built-in sample; give the folder of {self.label_map.name} "
                f"({self.label_map.get}), "
                "or use NuScenesDataModule, whose root=null is a built-in world"
            )
        self.root, self.mode, self.predict_split = data_path(root), mode, predict_split
        self.class_names = tuple(self.label_map.classes)
        self.sequences = {"train": train_sequences, "val": val_sequences, "test": test_sequences}
        if mode == "semi_supervised":
            self.collate_train = collate_semi_supervised

    def check_root(self, stage: str = "fit") -> None:
        """Look for the folder of sequences."""
        sequences_folder(self.root, self.label_map)

    def read(self, part: Literal["train", "val", "test", "predict"]) -> SampleDataset:
        """List the scans of a part."""
        if part == "train":
            return self.segmentation_train_set(*self._frames("train"), self.mode == "semi_supervised")
        split = self.predict_split if part == "predict" else "val"
        return self.segmentation_set(*self._frames(split), augment=False, labelled=part != "predict")

    def write_labels(self, token: str, labels: Tensor, folder: Path) -> Path:
        """Write ``sequences/<sequence>/predictions/<frame>.label``: one uint32 raw id per point, the first raw id of each class.

        Raises:
            ValueError: Ids outside 0..num_classes-1, or not a vector of integers.
        """
        self.check_predictions(token, labels)
        sequence, frame = (plain_file_name(part, "predictions", "token") for part in token.partition("/")[::2])
        raw = np.array([ids[0] for ids in self.label_map.classes.values()], dtype="<u4")
        path = folder / "sequences" / sequence / "predictions" / f"{frame}.label"
        write_bytes(path, raw[labels.cpu().numpy()].tobytes())
        return path

    def _frames(self, split: Splits) -> tuple[KittiFrames, list[int]]:
        chosen: Any = self.sequences[split]
        label_map = self.label_map
        labels = label_map.train_labels if split == "train" else label_map.labels
        if chosen is None and split in label_map.split_files:
            base = sequences_folder(self.root, label_map)
            sequences = [path.name for path in listed(base) if any((path / name).is_dir() for name in label_map.scans)]
            frames = KittiFrames(self.root, label_map, sequences, labels, with_poses=self.neighbours > 0)
            file = label_map.split_files[split]
            return frames, frames.frames_in(base / file if (base / file).is_file() else self.root / file)
        sequences = list(label_map.splits.get(split, ()) if chosen is None else chosen)
        frames = KittiFrames(self.root, label_map, sequences, labels, with_poses=self.neighbours > 0)
        return frames, frames.frames_of(sequences)
