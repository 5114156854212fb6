"""nuScenes v1.0 (arXiv:1903.11027), read from the official layout without the devkit; lidarseg labels; the SuperFlow pretraining samples.

Any folder in that layout will do: the release itself, nuScenes-C (Robo3D, arXiv:2303.17597) once its scans are laid out in it, or the
built-in procedural world, which is written in the same layout and read by the same code.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, literals, within
from lit_methods.datamodules.driving.base import DrivingDataModule, LabelFraction
from lit_methods.datamodules.driving.common import (
    Batch,
    OnBroken,
    Sample,
    SampleDataset,
    collate_cloud,
    collate_pairs,
    collate_segmentation,
    collate_semi_supervised,
    draw_augmentation,
    label_table,
    read_image,
    read_labels,
    read_points,
    transform_points,
    write_bytes,
)
from lit_methods.datamodules.driving.nuscenes_tables import CAMERAS, NuScenesTables, read_tables, tables_folder
from lit_methods.datamodules.driving.splits import Split, choose_scenes
from lit_methods.datamodules.driving.superpixels import compute_slic, read_superpixels
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, user_path
from lit_methods.datamodules.reading import plain_file_name
from lit_methods.files import write_json
from lit_methods.lidar.projection import dense_cloud, flip_cameras, project_points, resize_pairs, resize_superpixels

CLASSES: dict[
    str, tuple[int, ...]
] = {  # training class -> raw lidarseg ids, in the order of the lidarseg challenge (whose ids are ours + 1)
    "barrier": (9,),
    "bicycle": (14,),
    "bus": (15, 16),
    "car": (17,),
    "construction_vehicle": (18,),
    "motorcycle": (21,),
    "pedestrian": (2, 3, 4, 6),
    "traffic_cone": (12,),
    "trailer": (22,),
    "truck": (23,),
    "driveable_surface": (24,),
    "other_flat": (25,),
    "sidewalk": (26,),
    "terrain": (27,),
    "manmade": (28,),
    "vegetation": (30,),
}
IGNORED = (0, 1, 5, 7, 8, 10, 11, 13, 19, 20, 29, 31)  # noise, animals, debris, ego vehicle, ...
IGNORE_INDEX = len(CLASSES)
LABEL_TABLE = label_table(list(CLASSES.values()), IGNORED, IGNORE_INDEX, size=32)
VIEWS = {1: ("cur",), 2: ("cur", "prev"), 3: ("cur", "prev", "next")}  # frames -> views of a pretraining sample


class NuScenesFrames:
    """Key frames as the segmentation data sets see them."""

    def __init__(self, tables: NuScenesTables) -> None:
        self.tables = tables

    def token(self, frame: int) -> str:
        """LiDAR sample_data token."""
        return self.tables.token[self.tables.lidar[frame]].decode()

    def points(self, frame: int) -> Tensor:
        """(N, 4) float32 key scan."""
        return read_points(self.tables.path(self.tables.lidar[frame]), columns=5)

    def labels(self, frame: int, num_points: int) -> Tensor:
        """(N,) int64 training ids."""
        file = self.tables.lidarseg[frame].decode()
        if not file:
            table = self.tables.root / self.tables.version / "lidarseg.json"
            raise MissingFileError(
                table, "labels", f"names no labels of scan {self.token(frame)}: unpack the nuScenes-lidarseg archive into the root"
            )
        return read_labels(self.tables.root / file, np.uint8, 0xFF, LABEL_TABLE, num_points)

    def neighbour(self, frame: int, offset: int) -> int | None:
        """Key frame ``offset`` steps (0.5 s each) later."""
        return self.tables.neighbour(frame, offset)

    def lidar_to_global(self, frame: int) -> NDArray[np.float64]:
        """(4, 4) float64 pose of the LiDAR."""
        return self.tables.sensor_to_global(self.tables.lidar[frame])


def sweep_to_key(tables: NuScenesTables, sweep: int, key: int) -> NDArray[np.float64]:
    """Motion of a sweep into the key scan's frame, in the form that ``dense_cloud`` takes.

    A sweep's point goes through the sweep's own vehicle pose to the world and back through the key's: p_key = R p + t. With row vectors
    that is ``p @ R.T + t``; ``dense_cloud`` computes ``p @ A - b``, so A = R.T (the rotation of key -> sweep) and b = -t.

    Args:
        tables: The release.
        sweep: Record of the sweep.
        key: Record of the key scan.

    Returns:
        (4, 4) float64, (A | b) in its top rows.
    """
    motion = np.linalg.inv(tables.sensor_to_global(key)) @ tables.sensor_to_global(sweep)
    stored = np.eye(4)
    stored[:3, :3], stored[:3, 3] = motion[:3, :3].T, -motion[:3, 3]
    return stored


class NuScenesPretrainDataset(SampleDataset):
    """One sample of image-to-LiDAR pretraining: key frame, its neighbours in time, the dense cloud, images, superpixels, pairs.

    Samples: a dict per view (``cur``; with ``frames`` >= 2 ``prev``; with 3 ``next``): ``points`` (N, 4), ``pairing_points`` (M,),
    ``pairing_images`` (M, 3), ``images`` (c, 3, H, W) float32 in [0, 1], ``superpixels`` (c, H, W) uint8; ``dense`` with points and pairs
    alone; and ``token``. Points are paired before they are augmented; the four clouds are augmented independently of one another. prev
    and next use cur's cameras in cur's order; a missing neighbour is replaced by the frame itself.

    Args:
        tables: The release.
        indices: Key frames.
        superpixel_root: Folder of ``<sample_data token>.png``.
        num_superpixels: Upper bound of ids.
        cameras: Cameras per sample, drawn without replacement.
        num_sweeps: Sweeps joined to the key scan in ``dense``; at the start of a scene those that exist.
        image_size: (height, width) in pixels.
        frames: 1: cur; 2: cur and prev; 3: cur, prev and next.
        seed: Seed of cameras, flips and augmentation.
        augment: Flip images, mirror / rotate by [0, pi] / scale clouds.
        on_broken: See :class:`SampleDataset`.
        num_workers: See :class:`SampleDataset`.
    """

    def __init__(
        self,
        tables: NuScenesTables,
        indices: Sequence[int],
        *,
        superpixel_root: Path,
        num_superpixels: int = 17,
        cameras: int = 3,
        num_sweeps: int = 2,
        image_size: tuple[int, int] = (224, 448),
        frames: int = 3,
        seed: int = 0,
        augment: bool = True,
        on_broken: OnBroken = "error",
        num_workers: int = 0,
    ) -> None:
        super().__init__(len(indices), seed, augment, on_broken, num_workers)
        self.tables, self.indices = tables, np.asarray(indices, dtype=np.int64)
        self.superpixel_root, self.num_superpixels = superpixel_root, num_superpixels
        self.cameras, self.num_sweeps, self.image_size, self.views = cameras, num_sweeps, image_size, VIEWS[frames]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Read one sample."""
        frame = int(self.indices[index])
        cameras = rng.permutation(len(CAMERAS))[: self.cameras]
        sample: Sample = {"token": self.tables.token[self.tables.lidar[frame]].decode()}
        for view, offset in zip(self.views, (0, -1, 1), strict=False):
            other = self.tables.neighbour(frame, offset)
            dense_too = view == "cur"
            sample.update(self._read_view(view, frame if other is None else other, cameras, rng, dense_too))
        return sample

    def _read_view(self, view: str, frame: int, cameras: NDArray[np.int64], rng: np.random.Generator, with_dense: bool) -> Sample:
        key = int(self.tables.lidar[frame])
        records = self._camera_records(frame, cameras)
        pictures = [read_image(self.tables.path(record), self.image_size) for record in records]
        native = pictures[0][1]
        for record, (_, size) in zip(records, pictures, strict=True):
            if size != native:
                raise BrokenRecordError(
                    self.tables.path(record), "image", f"is {size[1]} x {size[0]}, the frame's other images {native[1]} x {native[0]}"
                )
        images = torch.stack([picture for picture, _ in pictures])
        superpixels = torch.stack([self._read_superpixels(record, native) for record in records])
        flip = torch.from_numpy(rng.random(len(records)) < 0.5) if self.augment else torch.zeros(len(records), dtype=torch.bool)

        points = read_points(self.tables.path(key), columns=5)
        clouds = {view: points, **({"dense": self._dense(points, frame)} if with_dense else {})}
        result: Sample = {}
        for name, cloud in clouds.items():
            pairing_points, pixels = project_into_cameras(self.tables, cloud, key, records, native)
            resized = resize_pairs(pixels, native, self.image_size)
            pixels, ids, mirrored = flip_cameras(flip, resized, superpixels, images if name == view else None)
            if self.augment:
                cloud = transform_points(cloud, draw_augmentation(rng, (0.0, math.pi)))
            result[name] = {"points": cloud, "pairing_points": pairing_points, "pairing_images": pixels}
            if mirrored is not None:  # flipped as bytes, a quarter of the memory traffic
                result[name].update(images=mirrored.float().div_(255), superpixels=ids)
        return result

    def _camera_records(self, frame: int, cameras: NDArray[np.int64]) -> list[int]:
        records = self.tables.cameras[frame, cameras].tolist()
        if -1 in records:
            name = CAMERAS[cameras[records.index(-1)]]
            table = self.tables.root / self.tables.version / "sample_data.json"
            raise BrokenRecordError(
                table, "channel", f"the key frame of scan {self.tables.token[self.tables.lidar[frame]].decode()} has no {name} image"
            )
        return records

    def _read_superpixels(self, record: int, native: tuple[int, int]) -> Tensor:
        path = self.superpixel_root / f"{self.tables.token[record].decode()}.png"
        return resize_superpixels(read_superpixels(path, native, self.num_superpixels)[None], self.image_size)[0]

    def _dense(self, points: Tensor, frame: int) -> Tensor:
        sweeps = [int(record) for record in self.tables.sweeps[frame, : self.num_sweeps] if record >= 0]
        motions = np.array([sweep_to_key(self.tables, record, int(self.tables.lidar[frame])) for record in sweeps]).reshape(-1, 4, 4)
        return dense_cloud(points, [read_points(self.tables.path(record), columns=5) for record in sweeps], torch.from_numpy(motions))


def project_into_cameras(
    tables: NuScenesTables, points: Tensor, key: int, cameras: Sequence[int], native: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Pairs of the points of a key scan with the pixels of key images, by the poses of the tables.

    Args:
        tables: The release.
        points: (N, >= 3) float32 in the key scan's LiDAR frame.
        key: Record of the key scan.
        cameras: Records of the images.
        native: (height, width) of the images.

    Returns:
        ``pairing_points`` (M,) and ``pairing_images`` (M, 3), see ``project_points``.
    """
    lidar, sensors = tables.sensor[key], tables.sensor[list(cameras)]
    records = list(cameras)

    def tensor(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    return project_points(
        points,
        lidar2ego_rotation=tensor(tables.sensor_rotation[lidar]),
        lidar2ego_translation=tensor(tables.sensor_translation[lidar]),
        ego2global_rotation=tensor(tables.ego_rotation[key]),
        ego2global_translation=tensor(tables.ego_translation[key]),
        cam_sensor2ego_rotation=tensor(tables.sensor_rotation[sensors]),
        cam_sensor2ego_translation=tensor(tables.sensor_translation[sensors]),
        cam_ego2global_rotation=tensor(tables.ego_rotation[records]),
        cam_ego2global_translation=tensor(tables.ego_translation[records]),
        cam_intrinsic=tensor(tables.intrinsic[sensors]),
        image_height=native[0],
        image_width=native[1],
    )


def collate_pretrain(samples: Sequence[Sample]) -> Batch:
    """Pretraining batch.

    Args:
        samples: From :class:`NuScenesPretrainDataset`.

    Returns:
        ``token`` (list of B) and a dict per cloud (``cur``, ``prev``, ``next``, ``dense``): ``points`` (N, 4) float32,
        ``points_per_sample`` (B,), ``pairing_points`` (M,) point index local to the sample, ``pairing_images`` (M, 3) = camera local to
        the sample, row, column, ``pairs_per_sample`` (B,), all int64; and, but for ``dense``, ``images`` (B, c, 3, H, W) float32 in [0,
        1] and ``superpixels`` (B, c, H, W) int64.
    """
    batch: Batch = {"token": [sample["token"] for sample in samples]}
    for view in samples[0]:
        if view == "token":
            continue
        parts = [sample[view] for sample in samples]
        batch[view] = {**collate_cloud(parts), **collate_pairs(parts)}
        if "images" in parts[0]:
            batch[view]["images"] = torch.stack([part["images"] for part in parts])
            batch[view]["superpixels"] = torch.stack([part["superpixels"] for part in parts]).long()
    return batch


class NuScenesDataModule(DrivingDataModule):
    """nuScenes for image-to-LiDAR pretraining, LiDAR segmentation, and semi-supervised LiDAR segmentation.

    Batch: {"cur": {"points": (N, 4) float32, "images": (B, c, 3, H, W) float32, ...}, "prev": ..., "next": ..., "dense": ..., "token": ...}

    ``pretrain``: all keys in :func:`collate_pretrain`. ``segment``: those of
    :func:`~lit_methods.datamodules.driving.common.collate_segmentation`. ``semi_supervised``: in training ``labelled`` and ``unlabelled``
    parts (the latter with neighbours and without labels), otherwise as ``segment``. Validation and test read the official val scenes
    without augmentation; prediction reads the val scenes, or all scenes of v1.0-test.

    Args:
        root: Folder of the release (``<version>/``, ``samples/``, ``sweeps/``, ``lidarseg/``); null: the built-in procedural world, made
            in the user's cache.
        version: Folder of the tables: v1.0-trainval, v1.0-mini or v1.0-test. Ignored for the built-in world.
        mode: pretrain, segment or semi_supervised.
        superpixels: openseed: class ids, one meaning in all cameras, read from ``superpixel_root``; slic: segments of each image,
            computed once and cached there.
        superpixel_root: Folder of ``<sample_data token>.png``; null: ``superpixels/`` (slic: ``superpixels_slic<number>/``) in the root.
        num_superpixels: Number of superpixel ids; null: 17 for openseed, 150 for slic.
        cameras: Cameras per pretraining sample, drawn anew for each, 1 to 6.
        num_sweeps: Earlier sweeps in the dense cloud, >= 0; 0 leaves the key scan alone.
        image_size: Height and width that images are resized to, in pixels.
        frames: Key frames per pretraining sample: 1 (cur), 2 (cur, prev) or 3 (cur, prev, next).
        pretrain_split: slidr600: the 600 scenes that SLidR, Seal and SuperFlow pretrain on; train: all 700 training scenes.
        label_fraction: Percent of the training key frames that have labels: every (100 / x)-th.
        neighbours: Scans before and after each segmented scan that come with it, unlabelled.
        batch_size: Samples per process and step.
        num_workers: Processes that read data; 0 reads in the training process.
        seed: Seed of order and augmentation. The built-in world is always the same.
        on_broken: error: a broken file ends the run, naming the file; skip: in training the next good sample takes its place, in
            validation, test and prediction it is left out, which ``setup`` finds out by reading these files once; with a warning and a
            count.
        cache: Folder for the built-in world; null: the user's cache folder.

    Raises:
        ValueError: An argument is out of its range.
    """

    class_names = tuple(CLASSES)

    def __init__(
        self,
        root: Path | None = None,
        version: str = "v1.0-trainval",
        mode: Literal["pretrain", "segment", "semi_supervised"] = "pretrain",
        superpixels: Literal["openseed", "slic"] = "openseed",
        superpixel_root: Path | None = None,
        num_superpixels: int | None = None,
        cameras: int = 3,
        num_sweeps: int = 2,
        image_size: tuple[int, int] = (224, 448),
        frames: Literal[1, 2, 3] = 3,
        pretrain_split: Literal["slidr600", "train"] = "slidr600",
        label_fraction: LabelFraction = 100,
        neighbours: int = 0,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        on_broken: OnBroken = "error",
        cache: Path | None = None,
    ) -> None:
        super().__init__(
            label_fraction=label_fraction,
            neighbours=neighbours,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            on_broken=on_broken,
        )
        literals(NuScenesDataModule, locals())
        within("[1, 3]", "key frames", frames=frames)
        within(f"[1, {len(CAMERAS)}]", cameras=cameras)
        at_least(0, num_sweeps=num_sweeps)
        self.root, self.version, self.mode = data_path(root), version if root is not None else "v1.0-mini", mode
        self.superpixels, self.superpixel_root = superpixels, data_path(superpixel_root)
        self.num_superpixels = num_superpixels or (17 if superpixels == "openseed" else 150)
        self.cameras, self.num_sweeps, self.image_size, self.frames = cameras, num_sweeps, (image_size[0], image_size[1]), frames
        self.pretrain_split, self.cache = pretrain_split, user_path(cache)
        self.tables: NuScenesTables | None = None
        if mode == "pretrain":
            self.collate_train = self.collate_eval = collate_pretrain
        elif mode == "semi_supervised":
            self.collate_train = collate_semi_supervised
            self.collate_eval = collate_segmentation

    def check_root(self, stage: str = "fit") -> None:
        """Look for the tables and, where they are needed, for the superpixels."""
        if self.root is not None:
            tables_folder(self.root, self.version)
            if self.mode == "pretrain":
                self._check_superpixels(self._superpixel_folder())

    def _check_superpixels(self, folder: Path) -> None:
        if self.superpixels == "openseed" and not folder.is_dir():
            raise WrongRootError(
                f"no superpixel folder {folder}: expected <sample_data token>.png files as released with SuperFlow; give "
                "superpixel_root, or set superpixels=slic"
            )

    def prepare_data(self) -> None:
        """Make the built-in world if ``root`` is null; compute SLIC superpixels that are missing."""
        self._root()
        if self.mode == "pretrain" and self.superpixels == "slic":
            tables = self._tables()
            frames = sorted({frame for split in (self.pretrain_split, "val") for frame in self._frames(split)})
            used = {n for f in frames for offset in (-1, 0, 1) if (n := tables.neighbour(f, offset)) is not None}
            records = [int(record) for frame in sorted(used) for record in tables.cameras[frame] if record >= 0]
            compute_slic(
                [(tables.token[record].decode(), tables.path(record)) for record in records],
                self._superpixel_folder(),
                self.num_superpixels,
            )

    def read(self, part: Literal["train", "val", "test", "predict"]) -> SampleDataset:
        """Read the tables and choose the frames of a part."""
        pretrain, train = self.mode == "pretrain", part == "train"
        split: Split = (self.pretrain_split if pretrain else "train") if train else "val"
        chosen = self._predict_frames() if part == "predict" else self._frames(split)
        if pretrain:
            if train and not chosen:
                raise WrongRootError(f"no scene of {self.pretrain_split!r} in {self._root()}/{self.version}: check version and splits.json")
            return self._pretrain_set(chosen, augment=train)
        frames = NuScenesFrames(self._tables())
        if train:
            return self.segmentation_train_set(frames, chosen, self.mode == "semi_supervised")
        return self.segmentation_set(frames, chosen, augment=False, labelled=part != "predict")

    def write_labels(self, token: str, labels: Tensor, folder: Path) -> Path:
        """Write ``lidarseg/<split>/<token>_lidarseg.bin``: one uint8 per point, challenge classes 1..16 (training id + 1).

        Raises:
            ValueError: Ids outside 0..15, or not a vector of integers.
        """
        self.check_predictions(token, labels)
        name = plain_file_name(token, "predictions", "token")
        path = folder / "lidarseg" / self.predict_split / f"{name}_lidarseg.bin"
        write_bytes(path, (labels + 1).to(torch.uint8).cpu().numpy().tobytes())
        return path

    def close_predictions(self, folder: Path) -> None:
        """Write ``<split>/submission.json``, which declares what the predictions were made from: LiDAR alone."""
        inputs = {"use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}
        path = folder / self.predict_split / "submission.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"meta": inputs})

    @property
    def predict_split(self) -> str:
        """Name of the split that is predicted: "test" for v1.0-test, else "val" ("mini_val" for v1.0-mini)."""
        return "test" if self.version.endswith("test") else "mini_val" if self.version.endswith("mini") else "val"

    def _root(self) -> Path:
        if self.root is not None:
            return self.root
        from lit_methods.datamodules.driving.world import embedded_world

        return embedded_world(self.cache, seed=0)

    def _tables(self) -> NuScenesTables:
        if self.tables is None:
            self.tables = read_tables(self._root(), self.version, self.num_sweeps)
        return self.tables

    def _frames(self, split: Split) -> list[int]:
        tables = self._tables()
        return tables.frames_of(choose_scenes(tables.scene_names, split, self.version, tables.root))

    def _predict_frames(self) -> list[int]:
        return self._frames("test" if self.version.endswith("test") else "val")

    def _superpixel_folder(self) -> Path:
        default = "superpixels" if self.superpixels == "openseed" else f"superpixels_slic{self.num_superpixels}"
        return self.superpixel_root or self._root() / default

    def _pretrain_set(self, indices: Sequence[int], augment: bool) -> NuScenesPretrainDataset:
        folder = self._superpixel_folder()
        if len(indices):
            self._check_superpixels(folder)
        return NuScenesPretrainDataset(
            self._tables(),
            indices,
            superpixel_root=folder,
            num_superpixels=self.num_superpixels,
            cameras=self.cameras,
            num_sweeps=self.num_sweeps,
            image_size=self.image_size,
            frames=self.frames,
            seed=self.seed,
            augment=augment,
            on_broken=self.on_broken,
            num_workers=self.num_workers,
        )
