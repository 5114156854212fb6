"""What the indoor datamodules share: scenes, their sparse labels in a label store, augmentation and loaders."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.folders import user_path
from lit_methods.datamodules.label_store import LabelStore
from lit_methods.runs.folder import run_dir

IGNORE = 255  # label of points that have none
Supervision = Literal["sparse", "full"]


class Scene(NamedTuple):
    """A room.

    Attributes:
        name: Name of the scene.
        points: (N, 9) float32: x, y, z in metres, z up; normal; colour in 0 to 1.
        labels: (N,) uint8 classes; 255: none.
        masks: (V, N) int32, mask of each point in each view; -1: none.
    """

    name: str
    points: NDArray[np.float32]
    labels: NDArray[np.uint8]
    masks: NDArray[np.int32]


class Labels(NamedTuple):
    """Labels of a scene as the label store holds them, a row each.

    Attributes:
        labels: (N,) classes, or 255.
        weights: (N,) float32, weight of the label in the loss.
    """

    labels: NDArray[np.uint8]
    weights: NDArray[np.float32]


def packed_labels(labels: NDArray[Any], weights: NDArray[Any]) -> NDArray[np.uint8]:
    """(2, N) for a :class:`~lit_methods.LabelStore`: classes, and weights in hundredths."""
    return np.stack([labels, np.rint(100 * np.asarray(weights))]).astype(np.uint8)


def unpacked_labels(stored: NDArray[np.uint8]) -> Labels:
    """The labels of :func:`packed_labels`."""
    return Labels(stored[0], stored[1].astype(np.float32) / 100)


def first_of_voxels(points: NDArray[np.floating[Any]], edge: float) -> NDArray[np.int64]:
    """Rows of the first point of each cubic voxel, in order.

    Args:
        points: (N, 3 or more) metres.
        edge: Metres.
    """
    cells = np.floor(points[:, :3] / edge).astype(np.int64)
    return np.sort(np.unique(cells, axis=0, return_index=True)[1])


class Augmentation(NamedTuple):
    """Random changes of a training scene; a scene is turned about z by any angle, too.

    Attributes:
        dropout: Share of points that is left out.
        tilt: Largest angle about x and y, degrees.
        scale: Largest relative change of size.
        jitter: Standard deviation of a point's place, metres.
        colour: Largest change of all colours, and of their contrast.
        elastic: Standard deviation of a smooth distortion, metres; 0: none.
    """

    dropout: float = 0.2
    tilt: float = 2.8
    scale: float = 0.1
    jitter: float = 0.005
    colour: float = 0.05
    elastic: float = 0.0


def augmented(points: NDArray[np.float32], rng: np.random.Generator, options: Augmentation) -> NDArray[np.float32]:
    """Turned, tilted, scaled, mirrored, jittered, distorted and recoloured points, in the same order.

    Args:
        points: (N, 9) as in :class:`Scene`.
        rng: Draws everything.
        options: How much.
    """
    angles = rng.uniform(-1, 1, 3) * [options.tilt, options.tilt, 180.0]
    mirror = np.append(np.where(rng.random(2) < 0.5, -1.0, 1.0), 1.0)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * mirror
    place = points[:, :3] @ turn.T * rng.uniform(1 - options.scale, 1 + options.scale)
    place = place + np.clip(rng.normal(0, 1, place.shape), -3, 3) * options.jitter
    if options.elastic:
        place = place + _smooth_noise(place, rng) * options.elastic
    colour = (points[:, 6:] - 0.5) * rng.uniform(1 - options.colour, 1 + options.colour) + 0.5
    colour = np.clip(colour + rng.uniform(-options.colour, options.colour, 3), 0, 1)
    return np.concatenate([place, points[:, 3:6] @ turn.T, colour], axis=1).astype(np.float32)


def _smooth_noise(place: NDArray[np.floating[Any]], rng: np.random.Generator, edge: float = 0.8) -> NDArray[np.floating[Any]]:
    """(N, 3) normal noise of a coarse grid, interpolated."""
    from scipy.ndimage import map_coordinates

    low = place.min(axis=0)
    sides = (np.ptp(place, axis=0) / edge).astype(int) + 2
    grid = rng.normal(0, 1, (3, *sides))
    return np.stack([map_coordinates(channel, ((place - low) / edge).T, order=1) for channel in grid], axis=1)


class IndoorScenes(Samples):
    """Scenes with their labels, as samples.

    Args:
        read: Index -> scene.
        number: Scenes.
        store: Labels of training scenes, as they are now; None: the scene's own.
        augmentation: Random changes; None: the scene as it is.
        max_points: Points of a sample at most: those nearest to a random one.
        seed: Seed of the random changes.
    """

    def __init__(
        self,
        read: Callable[[int], Scene],
        number: int,
        store: LabelStore | None = None,
        augmentation: Augmentation | None = None,
        max_points: int | None = None,
        seed: int = 0,
    ) -> None:
        self.read, self.number, self.store = read, number, store
        self.augmentation, self.max_points, self.seed = augmentation, max_points, seed

    def __len__(self) -> int:
        return self.number

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """Points and labels of a scene."""
        scene = self.read(index)
        points, labels, weights = scene.points, scene.labels, np.ones(len(scene.labels), dtype=np.float32)
        truth = scene.labels
        if self.store is not None:
            labels, weights = unpacked_labels(self.store.current(index))
        if self.augmentation is not None:
            rng = np.random.default_rng([self.seed, epoch, index])
            kept = np.flatnonzero(rng.random(len(points)) >= self.augmentation.dropout)
            kept = kept if len(kept) else np.arange(1)
            if self.max_points is not None and len(kept) > self.max_points:
                away = np.linalg.norm(points[kept, :3] - points[rng.choice(kept), :3], axis=1)
                kept = np.sort(kept[np.argpartition(away, self.max_points - 1)[: self.max_points]])
            points = augmented(points[kept], rng, self.augmentation)
            labels, weights, truth = labels[kept], weights[kept], truth[kept]
        found = {"points": points, "labels": labels.astype(np.int64), "weights": weights, "truth": truth.astype(np.int64)}
        return {**{name: torch.from_numpy(value) for name, value in found.items()}, "index": index, "token": scene.name}

    @staticmethod
    def collate(scenes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Clouds one after the other."""
        return {
            **{name: torch.cat([scene[name] for scene in scenes]) for name in ("points", "labels", "weights", "truth")},
            "points_per_sample": torch.tensor([len(scene["points"]) for scene in scenes]),
            "index": torch.tensor([scene["index"] for scene in scenes]),
            "token": [scene["token"] for scene in scenes],
        }


class IndoorDataModule(LoaderDataModule):
    """Base of the indoor datamodules: a subclass says how scenes are read, and which points of a training scene are labelled.

    Batches hold clouds one after the other. ``points`` (P, 9) float32: x, y, z in metres, normal, colour in 0 to 1; ``points_per_sample``
    (B,) int64; ``labels`` (P,) int64: 255 is none; ``weights`` (P,) float32 of the labels in the loss; ``truth`` (P,) int64: all labels,
    to measure with and never to learn from; ``index`` (B,) int64; ``token``: the scenes' names. For callbacks: ``label_store``, whose
    labels of a scene are (2, N): classes and weights in hundredths; ``correction_dataloader()``, the training scenes as they are;
    ``point_masks(index)``; and ``clean_labels(index)``, all labels of a training scene.

    Args:
        supervision: ``sparse``: the labelled points alone; ``full``: all labels, the upper bound.
        augmentation: Random changes of training scenes; None: none.
        max_points: Points of a training sample at most.
        labels_folder: Folder of the label store; None: ``labels`` in the run's folder. It is written anew at every fit.
        batch_size: Scenes per process and step.
        num_workers: Processes that read data.
        seed: Seed of order and augmentation.

    Attributes:
        class_names: Names of the classes 0, 1, ...
    """

    class_names: tuple[str, ...]
    label_store: LabelStore | None = None

    def __init__(
        self,
        *,
        supervision: Supervision,
        augmentation: Augmentation | None,
        max_points: int | None,
        labels_folder: Path | None,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=1, num_workers=num_workers, seed=seed)
        one_of(Supervision, supervision=supervision)
        at_least(1, max_points=max_points)
        self.supervision, self.augmentation, self.max_points = supervision, augmentation, max_points
        self.labels_folder = user_path(labels_folder)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._training: tuple[Callable[[int], Scene], int] | None = None

    def scenes(self, part: Literal["train", "val", "test"]) -> tuple[Callable[[int], Scene], int]:
        """How the scenes of a part are read, by index, and how many there are."""
        raise NotImplementedError

    def labelled(self, index: int) -> NDArray[np.int64]:
        """Rows of the labelled points of a training scene."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Look for the scenes; for a fit, write the label store."""
        parts: dict[str, tuple[Literal["train", "val", "test"], ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for part in parts.get(stage or "", ("test",)) if stage else ("train", "val", "test"):
            if getattr(self, f"{part}_set") is not None:
                continue
            read, number = self.scenes(part)
            if part == "train":
                self._training = (read, number)
                self.label_store = self._store(read, number)
                self.train_set = IndoorScenes(read, number, self.label_store, self.augmentation, self.max_points, self.seed)
            else:
                setattr(self, f"{part}_set", IndoorScenes(read, number))

    def _sparse(self, read: Callable[[int], Scene], number: int) -> Iterable[NDArray[np.uint8]]:
        for index in range(number):
            labels = read(index).labels
            if self.supervision == "sparse":
                rows = self.labelled(index)
                sparse = np.full_like(labels, IGNORE)
                sparse[rows] = labels[rows]
                labels = sparse
            yield packed_labels(labels, labels != IGNORE)

    def _store(self, read: Callable[[int], Scene], number: int) -> LabelStore:
        folder = self.labels_folder
        if folder is None and self.trainer is not None:
            folder = run_dir(self.trainer) / "labels"
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="labels-")
            folder = Path(self._scratch.name)
        if self.trainer is None or self.trainer.is_global_zero:
            LabelStore.create(folder, self._sparse(read, number))
        if self.trainer is not None:
            self.trainer.strategy.barrier("labels are written")
        return LabelStore(folder)

    def training_scene(self, index: int) -> Scene:
        """A training scene as it is, with all of its labels."""
        if self._training is None:
            raise RuntimeError(f"{type(self).__name__} has read no training scenes: call setup('fit') first (the Trainer does)")
        return self._training[0](index)

    def point_masks(self, index: int) -> NDArray[np.int32]:
        """(V, N) mask of each point of a training scene in each view; -1: none."""
        return self.training_scene(index).masks

    def clean_labels(self, index: int) -> NDArray[np.uint8]:
        """(N,) all labels of a training scene; 255: none."""
        return self.training_scene(index).labels

    def correction_dataloader(self) -> Any:
        """The training scenes as they are, in order, each once over all ranks, one at a time."""
        assert self._training is not None
        return self.loader(IndoorScenes(*self._training, self.label_store))


__all__ = [
    "IGNORE",
    "Augmentation",
    "IndoorDataModule",
    "IndoorScenes",
    "Labels",
    "Scene",
    "augmented",
    "first_of_voxels",
    "packed_labels",
    "unpacked_labels",
]
