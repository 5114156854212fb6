"""ScanNet and S3DIS as Pointcept's preprocessing writes them, with lists of labelled points and lifted masks."""

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.arguments import handed_on
from lit_methods.checks import at_least, one_of, positive, within
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.indoor.base import (
    IGNORE,
    Augmentation,
    IndoorDataModule,
    IndoorScenes,
    Scene,
    Supervision,
    first_of_voxels,
)
from lit_methods.datamodules.pickles import ArraysOnly
from lit_methods.datamodules.reading import finite, read_bytes, read_json, read_npy, read_npz, whole_numbers
from lit_methods.lidar.lifting import superpoints

SCANNET_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk", "curtain",
    "refrigerator", "shower curtain", "toilet", "sink", "bathtub", "other furniture",
)  # fmt: skip
S3DIS_CLASSES = (
    "ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa", "bookcase", "board", "clutter",
)  # fmt: skip
_SCANNET_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)  # of NYU's 40, in the order of the classes
_LARGEST_ROOM = 200.0  # metres
MaskSource = Literal["files", "geometric"]


class _PointLists(ArraysOnly):
    owner = "list of labelled points"


def read_labelled_points(path: Path) -> dict[str, NDArray[np.int64]]:
    """Scene -> rows of its labelled points, from JSON, or from a file of ``torch.save`` as in ScanNet's data-efficient benchmark.

    Raises:
        MissingFileError: No such file.
        BrokenRecordError: It holds something else; nothing in it is run.
    """
    field = "labelled points"
    if path.suffix == ".json":
        found = read_json(path, field)
    else:
        content = read_bytes(path, field, "points20 and others come with the data-efficient benchmark")
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
                found = _PointLists(io.BytesIO(archive.read(name))).load()
        except Exception as problem:  # a broken pickle raises nearly anything
            raise BrokenRecordError(
                path, field, f"can't be read ({problem}): expected a dictionary of scenes that torch 1.6 or newer saved, or a .json"
            ) from problem
    if not isinstance(found, Mapping) or not found:
        raise BrokenRecordError(path, field, f"holds {type(found).__name__}: expected a dictionary, scene -> rows of its labelled points")
    return {str(scene): whole_numbers(np.asarray(rows).ravel(), path, f"{field} of {scene}") for scene, rows in found.items()}


def read_scene(folder: Path, name: str, segment: str | None, classes: int) -> Scene:
    """Points and labels of a prepared scene, without masks.

    Args:
        folder: With ``coord.npy``, ``color.npy``, ``normal.npy`` and the labels.
        name: Of the scene.
        segment: Name of the labels' file, without its ending; None: no point has a label.
        classes: Number of classes.

    Raises:
        MissingFileError: A file isn't there.
        BrokenRecordError: A file can't be right: another number of points, a class that isn't there, a room of kilometres.
    """
    arrays = {}
    for field in ("coord", "color", "normal", *([] if segment is None else [segment])):
        path = folder / f"{field}.npy"
        found = arrays[field] = read_npy(path, field, "prepare the scene again")
        if field != segment and (found.ndim != 2 or found.shape[1] != 3):
            raise BrokenRecordError(path, field, f"has the shape {found.shape}, expected (points, 3): prepare the scene again")
        if found.ndim == 0 or len(found) != len(arrays["coord"]):
            raise BrokenRecordError(
                path, field, f"has the shape {found.shape}, and coord.npy {len(arrays['coord'])} rows: prepare the scene again"
            )
    coord = finite(arrays["coord"].astype(np.float32), folder / "coord.npy", "coord")
    if not len(coord):
        raise BrokenRecordError(folder / "coord.npy", "coord", "no points: leave the scene out")
    extent = float(np.ptp(coord, axis=0).max())
    if not 0.1 < extent < _LARGEST_ROOM:
        raise BrokenRecordError(
            folder / "coord.npy", "coord", f"the scene is {extent:.4g} long, expected metres, less than {_LARGEST_ROOM:g}"
        )
    normal = finite(arrays["normal"].astype(np.float32), folder / "normal.npy", "normal")
    color = finite(arrays["color"].astype(np.float32), folder / "color.npy", "color")
    if color.min() < 0 or color.max() > 255 or (color.max() <= 1 and arrays["color"].dtype.kind == "f"):
        raise BrokenRecordError(folder / "color.npy", "color", f"from {color.min():g} to {color.max():g}, expected 0 to 255")
    labels = np.full(len(coord), IGNORE)
    if segment is not None:
        path = folder / f"{segment}.npy"
        labels = whole_numbers(arrays[segment].reshape(len(coord), -1)[:, 0], path, segment)
        labels = np.where(labels == -1, IGNORE, labels)
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
        if wrong.size:
            raise BrokenRecordError(path, segment, f"has the class {wrong[0]}, and there are 0 to {classes - 1}, and -1 and 255 for none")
    points = np.concatenate([coord, normal, color / 255], axis=1)
    return Scene(name, points, labels.astype(np.uint8), np.empty((0, len(coord)), np.int32))


def read_lifted(path: Path, points: int) -> NDArray[np.int32]:
    """(V, N) masks that ``lit lift`` wrote.

    Raises:
        MissingFileError: No such file.
        BrokenRecordError: It is of another number of points, or has no whole numbers.
    """
    found = read_npz(path, ["mask_ids"], "mask_ids", "make it by lit lift")
    if "mask_ids" not in found:
        raise BrokenRecordError(path, "mask_ids", "it has no such array: make it by lit lift")
    masks = whole_numbers(found["mask_ids"], path, "mask_ids")
    if masks.ndim != 2 or masks.shape[1] != points:
        raise BrokenRecordError(path, "mask_ids", f"has the shape {masks.shape}, expected (views, {points}): make it anew by lit lift")
    return masks.astype(np.int32)


class _Reader:
    """Reads scenes by index; it goes into worker processes.

    Args:
        folders: Of the scenes.
        names: Of the scenes, for lists and masks.
        segment: Name of the labels' file, without its ending.
        classes: Number of classes.
        voxel_size: Scenes are thinned out to one point for each voxel of this edge, metres; None: they aren't.
        lists: Scene -> rows of points that stay in any case.
        listed_in: File of the lists, for messages.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        names: Sequence[str],
        segment: str,
        classes: int,
        voxel_size: float | None,
        lists: Mapping[str, NDArray[np.int64]] | None = None,
        listed_in: Path | None = None,
    ) -> None:
        self.folders, self.names, self.segment, self.classes, self.voxel_size = folders, names, segment, classes, voxel_size
        self.lists, self.listed_in = lists or {}, listed_in

    def whole(self, index: int) -> Scene:
        """A scene with all of its points."""
        folder = self.folders[index]
        bare = folder.parent.name == "test" and not (folder / f"{self.segment}.npy").exists()  # the benchmark keeps these labels
        return read_scene(folder, self.names[index], None if bare else self.segment, self.classes)

    def rows(self, scene: Scene) -> NDArray[np.int64]:
        """Listed points of a scene.

        Raises:
            BrokenRecordError: The scene has no such points.
        """
        rows, points = self.lists.get(scene.name, np.empty(0, dtype=np.int64)), len(scene.points)
        if rows.size and (rows.min() < 0 or rows.max() >= points):
            raise BrokenRecordError(
                str(self.listed_in),
                f"labelled points of {scene.name}",
                f"rows {rows.min()} to {rows.max()}, and the scene has {points} points",
            )
        return np.unique(rows)

    def kept(self, scene: Scene) -> NDArray[np.int64]:
        """Rows of the first point of each voxel, and of the listed points."""
        if self.voxel_size is None:
            return np.arange(len(scene.points))
        return np.union1d(first_of_voxels(scene.points, self.voxel_size), self.rows(scene))

    def __call__(self, index: int) -> Scene:
        scene = self.whole(index)
        kept = self.kept(scene)
        return Scene(scene.name, scene.points[kept], scene.labels[kept], scene.masks[:, kept])


class PreparedScenes(IndoorDataModule):
    """Base of the readers of prepared scenes; :class:`ScanNetDataModule` has the arguments."""

    parts: dict[str, tuple[str, ...]]
    segment: ClassVar[str]

    def __init__(
        self,
        root: Path,
        labelled: Path | None,
        labelled_share: float,
        masks: Path | None,
        mask_source: MaskSource,
        voxel_size: float,
        supervision: Supervision,
        augment: bool,
        elastic: float,
        max_points: int | None,
        labels_folder: Path | None,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(
            supervision=supervision,
            augmentation=Augmentation(elastic=elastic) if augment else None,
            max_points=max_points,
            labels_folder=labels_folder,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        one_of(MaskSource, mask_source=mask_source)
        positive(voxel_size=voxel_size)
        at_least(0, elastic=elastic)
        within("(0, 1]", "a share", labelled_share=labelled_share)
        self.root, self.labelled_file, self.labelled_share = data_path(root), data_path(labelled), labelled_share
        self.masks, self.mask_source, self.voxel_size = data_path(masks), mask_source, voxel_size
        self._train: _Reader | None = None
        self.save_hyperparameters(ignore=["root", "labelled", "masks", "labels_folder"])  # a path would block a strict resume

    def check_root(self, stage: str = "fit") -> None:
        """Look for the folders of the parts."""
        part: Literal["train", "val", "test"] = {"fit": "train", "validate": "val"}.get(stage, "test")  # type: ignore[assignment]
        self._scene_folders(part)

    def _scene_folders(self, part: Literal["train", "val", "test"]) -> list[Path]:
        found = [folder for name in self.parts[part] for folder in listed(self.root / name) if (folder / "coord.npy").is_file()]
        if not found:
            raise WrongRootError(
                f"root={str(self.root)!r} has no scenes in {', '.join(self.parts[part])}: expected folders with coord.npy, color.npy, "
                f"normal.npy and {self.segment}.npy, as Pointcept's preprocessing writes them"
            )
        return found

    def scene_name(self, folder: Path) -> str:
        """Name of a scene in lists of labelled points, masks and predictions."""
        return folder.name

    def scenes(self, part: Literal["train", "val", "test"]) -> tuple[Callable[[int], Scene], int]:
        """Scenes in the order of their names, thinned out to a point for each voxel; masks are read by :meth:`point_masks`."""
        reader = self._reader_of(part, self.voxel_size)
        if part == "train" and self.supervision == "sparse" and self.labelled_file is not None:
            reader.lists, reader.listed_in = read_labelled_points(self.labelled_file), self.labelled_file
            missing = [name for name in reader.names if name not in reader.lists]
            if missing:
                raise BrokenRecordError(
                    self.labelled_file,
                    "labelled points",
                    f"no entry for {missing[0]} and {len(missing) - 1} others: is it this data set's?",
                )
        if part == "train":
            self._train = reader
        return reader, len(reader.folders)

    def _reader_of(self, part: Literal["train", "val", "test"], voxel_size: float | None) -> _Reader:
        folders = self._scene_folders(part)
        return _Reader(folders, [self.scene_name(folder) for folder in folders], self.segment, len(self.class_names), voxel_size)

    def setup(self, stage: str | None = None) -> None:
        """Look for the scenes; predictions are of all points, not of voxels."""
        super().setup(stage)
        if stage in (None, "predict") and self.predict_set is None:
            reader = self._reader_of("test", None)
            self.predict_set = IndoorScenes(reader, len(reader.folders))

    def labelled(self, index: int) -> NDArray[np.int64]:
        """Those of the list, or a share at random."""
        assert self._train is not None
        raw = self._train.whole(index)
        kept = self._train.kept(raw)
        if self.labelled_file is not None:
            return np.searchsorted(kept, self._train.rows(raw))
        number = max(1, round(self.labelled_share * len(kept)))
        return np.random.default_rng([37, self.seed, index]).choice(len(kept), number, replace=False)

    def point_masks(self, index: int) -> NDArray[np.int32]:
        """(V, N) lifted masks of a training scene, or its superpoints."""
        if self._train is None:
            raise RuntimeError(f"{type(self).__name__} has read no training scenes: call setup('fit') first (the Trainer does)")
        raw = self._train.whole(index)
        kept = self._train.kept(raw)
        if self.mask_source == "geometric":
            return superpoints(raw.points[kept, :3], raw.points[kept, 3:6])[None].astype(np.int32)
        folder = self.root / "lifted" if self.masks is None else self.masks
        if not folder.is_dir():
            raise MissingFileError(folder, "masks", "no such folder: make it by lit lift, or set mask_source: geometric")
        return read_lifted(folder / f"{raw.name}.npz", len(raw.points))[:, kept]

    def label_id(self, label: int) -> int:
        """The benchmark's own number of a class."""
        return label

    def write_labels(self, token: str, labels: Tensor, folder: Path) -> Path:
        """Write ``<scene>.txt``: the benchmark's number of a class for each point that was predicted, a line each."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{token}.txt"
        path.write_text("".join(f"{self.label_id(int(label))}\n" for label in labels.tolist()))
        return path


class ScanNetDataModule(PreparedScenes):
    """ScanNet v2's scenes with few labelled points, 20 classes.

    Batch: {"points": (P, 9) float32, "points_per_sample": (B,) int64, "labels": (P,) int64, "weights": (P,) float32, "truth": (P,) int64, "index": (B,) int64}

    ``root``: ``{train,val,test}/<scene>/{coord,color,normal,segment20}.npy``, as Pointcept's preprocessing writes them (mem). Masks at the
    points are made once by ``lit lift`` from ``.sens`` files or exported frames. What batches and attributes hold:
    :class:`~lit_methods.datamodules.indoor.base.IndoorDataModule`. A scene is thinned out to one point for each voxel when it is read, and
    evaluated so.

    Args:
        root: Folder of the prepared scenes. ``RoomsDataModule`` generates rooms.
        labelled: List of labelled points: the data-efficient benchmark's ``points20``, ``points50``, ..., or JSON, scene -> rows.
        labelled_share: Without a list the share of points that is labelled, at random.
        masks: Folder of ``<scene>.npz`` with ``mask_ids`` (V, N); None: ``lifted`` in the root.
        mask_source: ``files``, or ``geometric``: superpoints of the points, without images; ``masks`` isn't read then.
        voxel_size: Edge of a voxel, metres.
        supervision: ``sparse``: the labelled points alone; ``full``: all labels, the upper bound.
        augment: Turn, scale, jitter and thin out training scenes.
        elastic: Standard deviation of a smooth distortion of training scenes, metres.
        max_points: Points of a training sample at most: those nearest to a random one; None: all.
        labels_folder: Folder of the label store; None: ``labels`` in the run's folder. It is written anew at every fit.
        batch_size: Scenes per process and step.
        num_workers: Processes that read data.
        seed: Seed of order, augmentation and shares.
    """  # noqa: E501

    class_names = SCANNET_CLASSES
    parts = {"train": ("train",), "val": ("val",), "test": ("test",)}  # noqa: RUF012
    segment = "segment20"

    def __init__(
        self,
        root: Path,
        labelled: Path | None = None,
        labelled_share: float = 0.001,
        masks: Path | None = None,
        mask_source: MaskSource = "geometric",
        voxel_size: float = 0.02,
        supervision: Supervision = "sparse",
        augment: bool = True,
        elastic: float = 0.04,
        max_points: int | None = 100_000,
        labels_folder: Path | None = None,
        batch_size: int = 12,
        num_workers: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(**handed_on(PreparedScenes, locals()))

    def label_id(self, label: int) -> int:
        """ScanNet's number of a class, one of NYU's 40."""
        return _SCANNET_IDS[label]


class S3DISDataModule(PreparedScenes):
    """S3DIS's rooms with few labelled points, 13 classes, tested on one area.

    Batch: {"points": (P, 9) float32, "points_per_sample": (B,) int64, "labels": (P,) int64, "weights": (P,) float32, "truth": (P,) int64, "index": (B,) int64}

    ``root``: ``Area_<k>/<room>/{coord,color,normal,segment}.npy``, as Pointcept's preprocessing writes them (mem). Rooms of the areas are
    told apart as ``Area_1-office_1`` in lists and masks. What batches and attributes hold:
    :class:`~lit_methods.datamodules.indoor.base.IndoorDataModule`.

    Args:
        root: Folder of the prepared rooms. ``RoomsDataModule`` generates rooms.
        test_area: Area, 1 to 6, of validation and test; the others are trained on.
        labelled: List of labelled points, JSON or of ``torch.save``: room -> rows.
        labelled_share: Without a list the share of points that is labelled, at random.
        masks: Folder of ``<room>.npz`` with ``mask_ids`` (V, N); None: ``lifted`` in the root.
        mask_source: ``files``, or ``geometric``: superpoints of the points, without images; ``masks`` isn't read then.
        voxel_size: Edge of a voxel, metres.
        supervision: ``sparse``: the labelled points alone; ``full``: all labels, the upper bound.
        augment: Turn, scale, jitter and thin out training rooms.
        elastic: Standard deviation of a smooth distortion of training rooms, metres.
        max_points: Points of a training sample at most: those nearest to a random one; None: all.
        labels_folder: Folder of the label store; None: ``labels`` in the run's folder. It is written anew at every fit.
        batch_size: Rooms per process and step.
        num_workers: Processes that read data.
        seed: Seed of order, augmentation and shares.
    """  # noqa: E501

    class_names = S3DIS_CLASSES
    segment = "segment"

    def __init__(
        self,
        root: Path,
        test_area: int = 5,
        labelled: Path | None = None,
        labelled_share: float = 0.001,
        masks: Path | None = None,
        mask_source: MaskSource = "geometric",
        voxel_size: float = 0.04,
        supervision: Supervision = "sparse",
        augment: bool = True,
        elastic: float = 0.0,
        max_points: int | None = 100_000,
        labels_folder: Path | None = None,
        batch_size: int = 12,
        num_workers: int = 8,
        seed: int = 0,
    ) -> None:
        within("[1, 6]", "an area", test_area=test_area)
        super().__init__(**handed_on(PreparedScenes, locals()))
        others = tuple(f"Area_{k}" for k in range(1, 7) if k != test_area)
        self.parts = {"train": others, "val": (f"Area_{test_area}",), "test": (f"Area_{test_area}",)}

    def scene_name(self, folder: Path) -> str:
        """Area and room: rooms of two areas may have one name."""
        return f"{folder.parent.name}-{folder.name}"


__all__ = [
    "S3DIS_CLASSES",
    "SCANNET_CLASSES",
    "PreparedScenes",
    "S3DISDataModule",
    "ScanNetDataModule",
    "read_labelled_points",
    "read_lifted",
    "read_scene",
]
