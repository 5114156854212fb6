"""Two streams of crops of images and of their nearest neighbours: for learning dense and whole-image features without labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD, open_indices, open_picture
from lit_methods.datamodules.reading import read_json, read_npz, whole_numbers
from lit_methods.datamodules.vision.base import fixed_split
from lit_methods.datamodules.vision.crops import Crops, cut, draw_boxes, overlaps, recolour
from lit_methods.datamodules.vision.imagenet import class_folders, list_images
from lit_methods.datamodules.vision.scenes import draw_scenes

ENDINGS = (".jpg", ".jpeg", ".png")
_MEAN, _STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
_PIXELS = 72  # side of the built-in scenes
Ints = NDArray[np.int64]


def as_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div(255)


def normalised(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1], by ImageNet's mean and deviation."""
    return (images - _MEAN) / _STD


def nearest_by_spectrum(images: NDArray[np.uint8], number: int) -> Ints:
    """Nearest neighbours of small images by the size of their spectra, which shows textures and hides places and colours.

    Args:
        images: (N, S, S, 3).
        number: k, fewer than N.

    Returns:
        (N, k) int64, nearest first, without the image itself.
    """
    grey = images.mean(3, dtype=np.float32)
    spectra = np.log1p(np.abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True))))[:, : images.shape[1] // 2].reshape(len(images), -1)
    spectra -= spectra.mean(0)
    unit = torch.nn.functional.normalize(torch.from_numpy(spectra), dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(number, dim=1).indices.numpy()


def read_neighbours(path: Path, images: int, number: int) -> Ints:
    """Nearest neighbours of images from a file of ``lit neighbours``, or of the authors' kind.

    Args:
        path: ``.npz`` with ``nns`` (N, k) integers: places of the nearest images in the order of the sorted files.
        images: N.
        number: Neighbours that are needed.

    Returns:
        (N, number) int64; an image that is its own first neighbour is left out there.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: Another shape, a number that names no image, or too few of them.
    """
    found = read_npz(path, ["nns"], "neighbours", "make it by `lit neighbours FOLDER FILE`").get("nns")
    if found is None or found.ndim != 2 or len(found) != images:
        shape = None if found is None else found.shape
        raise BrokenRecordError(path, "nns", f"expected ({images}, k) integers, a row for each image, got {shape}: make it anew")
    nns = whole_numbers(found, path, "nns")
    if nns.size and (nns.min() < 0 or nns.max() >= images):
        raise BrokenRecordError(
            path, "nns", f"numbers from {nns.min()} to {nns.max()}, expected 0 to {images - 1}: it is of another folder"
        )
    if nns.shape[1] and (nns[:, 0] == np.arange(images)).all():
        nns = nns[:, 1:]
    if nns.shape[1] < number:
        raise BrokenRecordError(path, "nns", f"{nns.shape[1]} neighbours an image, expected {number}: make more, or lower neighbours")
    return nns[:, :number]


class Stream(NamedTuple):
    """Images with neighbours.

    Attributes:
        read: Index -> (H, W, 3) uint8.
        nearest: (N, k) neighbours.
    """

    read: Callable[[int], NDArray[np.uint8]]
    nearest: Ints


class CropSamples(Samples):
    """Crops of an image and of a neighbour, for the patches' stream and for the class tokens'.

    Args:
        streams: ``patch`` and ``cls``; the shorter one is begun anew within an epoch.
        crops: Their numbers and sizes.
        seed: Seed of crops, colours and the choice among the neighbours.
    """

    def __init__(self, streams: dict[str, Stream], crops: Crops, seed: int) -> None:
        self.streams, self.crops, self.seed = streams, crops, seed

    def __len__(self) -> int:
        return max(len(stream.nearest) for stream in self.streams.values())

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """Crops of both streams."""
        rng = np.random.default_rng([self.seed, 7, epoch, index])
        found: dict[str, Tensor] = {}
        for name, stream in self.streams.items():
            own = index % len(stream.nearest)
            pair = [own, int(rng.choice(stream.nearest[own]))]
            parts = [self._cropped(as_tensor(stream.read(image)), rng) for image in pair]
            found |= {f"{name}_{part}": torch.stack([one[part] for one in parts]) for part in parts[0]}
        del found["cls_boxes"]
        return found

    def _cropped(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        crops = self.crops
        height, width = image.shape[1:]
        boxes = draw_boxes(height, width, crops, rng)
        large = cut(image, boxes[: crops.large], crops.large_size)
        small = cut(image, boxes[crops.large :], crops.small_size)
        return {
            "global": normalised(large),
            "student": normalised(recolour(large, rng)),
            "local": normalised(recolour(small, rng)),
            "boxes": torch.from_numpy(overlaps(boxes, crops)),
        }


class ProbeSamples(Samples):
    """Whole images with a mask, a class, or both, by which fixed features are judged, in a fixed mixed order.

    Args:
        read: Index -> image (H, W, 3) uint8, mask (H, W) with -1 where it isn't known, class or -1.
        fit: (N,) whether a probe is fitted to the image; the others are judged.
        size: Side of the square in pixels.
    """

    def __init__(self, read: Callable[[int], tuple[NDArray[np.uint8], Ints, int]], fit: NDArray[np.bool_], size: int) -> None:
        self.read, self.fit, self.size = read, fit, size
        self.order = np.random.default_rng(0).permutation(len(fit))  # a few batches have both kinds

    def __len__(self) -> int:
        return len(self.fit)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image."""
        place = int(self.order[index])
        pixels, mask, label = self.read(place)
        image = cut(as_tensor(pixels), np.array([[0.0, 0.0, pixels.shape[1], pixels.shape[0]]]), self.size)[0]
        rows, columns = (((np.arange(self.size) + 0.5) * side / self.size).astype(np.int64) for side in mask.shape)
        small = torch.from_numpy(np.ascontiguousarray(mask[rows[:, None], columns], np.int64))
        return {"image": normalised(image), "mask": small, "label": label, "fit": bool(self.fit[place])}


class NeighbourCropsDataModule(LoaderDataModule):
    """Crops of images and of their nearest neighbours, from COCO for patches and from ImageNet for whole images, as CoTAP trains on.

    Batch: {"patch_global": (B, 2, G, 3, S, S) float32, "patch_student": (B, 2, G, 3, S, S) float32, "patch_local": (B, 2, L, 3, s, s) float32, "patch_boxes": (B, 2, G, V, 2, 4) float32, "cls_global": (B, 2, G, 3, S, S) float32, "cls_student": (B, 2, G, 3, S, S) float32, "cls_local": (B, 2, L, 3, s, s) float32}

    The first 2 are the image and its neighbour. ``global``: G large crops as they are, for the teacher; ``student``: the same with random
    colours; ``local``: L small ones with random colours; all normalised by ImageNet's mean and deviation. ``boxes``: what large crop g and
    crop v of V = G + L have in common, in pixels (x0, y0, x1, y1) of g and of v.

    Validation and test see whole images with ``image`` (B, 3, S, S), ``mask`` (B, S, S) int64, ``label`` (B,) int64 (-1: not known) and
    ``fit`` (B,) bool: whether a probe is fitted to the image or judged by it. They are ``num_probe`` images of ``train2017`` and of
    ``train``, and ``num_val`` of ``val2017`` and of ``val``.

    Args:
        root: COCO's folder: ``train2017`` and ``val2017`` with images, ``stuffthingmaps`` with their masks. None: built-in scenes of textured
            shapes, 72 pixels wide, for both streams.
        cls_root: ImageNet's folder: ``train/<class>`` and ``val/<class>``. None: the images of ``root`` once more, without classes.
        nearest: File with the nearest neighbours of ``train2017``, made by ``lit neighbours``; None only with built-in scenes.
        cls_nearest: File with those of ImageNet's ``train``; None where there is no ``cls_root``.
        neighbours: Nearest images that a neighbour is drawn from.
        class_map: JSON object id of a mask -> class, for coarser classes, -1 for none; None: ids as they stand. 255 never counts.
        image_size: S, side of a large crop, and of an image in validation, in pixels.
        local_size: s, side of a small crop in pixels.
        local_crops: L.
        global_scale: Smallest and largest share of the image's area in a large crop.
        local_scale: The same in a small crop.
        num_train: Built-in scenes for training.
        num_probe: Images that probes are fitted to, at most.
        num_val: Images that they are judged by, at most.
        batch_size: Images of each stream, per process and step.
        eval_batch_size: Images per process in validation; None: ``batch_size``.
        num_workers: Processes that read data.
        seed: Seed of the order, the crops and colours.

    Raises:
        WrongRootError: A folder isn't there, or what belongs to it isn't given.
        BrokenRecordError: A file can't be read; the message names it.
        ValueError: A number lies outside its range.
    """  # noqa: E501

    def __init__(
        self,
        root: Path | None = None,
        cls_root: Path | None = None,
        nearest: Path | None = None,
        cls_nearest: Path | None = None,
        neighbours: int = 7,
        class_map: Path | None = None,
        image_size: int = 224,
        local_size: int = 96,
        local_crops: int = 4,
        global_scale: tuple[float, float] = (0.25, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.1),
        num_train: int = 400,
        num_probe: int = 400,
        num_val: int = 200,
        batch_size: int = 28,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, eval_batch_size=eval_batch_size)
        checks.at_least(1, neighbours=neighbours, local_crops=local_crops, num_probe=num_probe, num_val=num_val)
        checks.at_least(2, "scenes", num_train=num_train)
        checks.at_least(4, "pixels", image_size=image_size, local_size=local_size)
        for name, (low, high) in {"global_scale": global_scale, "local_scale": local_scale}.items():
            checks.within("(0, 1]", "a share of the image", **{f"{name}[0]": low, f"{name}[1]": high})
            if low > high:
                raise ValueError(f"{name} is {(low, high)}: give the smaller share first")
        self.save_hyperparameters()
        self.root, self.cls_root = data_path(root), data_path(cls_root)
        self.nearest, self.cls_nearest = data_path(nearest), data_path(cls_nearest)
        self.class_map, self.neighbours, self.image_size = data_path(class_map), neighbours, image_size
        self.num_train, self.num_probe, self.num_val = num_train, num_probe, num_val
        self.crops = Crops(2, local_crops, image_size, local_size, global_scale, local_scale)

    def check_root(self, stage: str = "fit") -> None:
        """Look for the folders, and for the files that belong to them."""
        way = "unpack COCO's archives there"
        self.expect("train2017", way, "scenes")
        self.expect("val2017", way, "scenes")
        self.expect("stuffthingmaps", "unpack COCO-Stuff's stuffthingmaps_trainval2017.zip there", "scenes")
        if self.cls_root is not None and not (self.cls_root / "train").is_dir():
            raise WrongRootError(f"cls_root={str(self.cls_root)!r} has no train: give ImageNet's folder, or null for the images of root")
        for name, folder, file in (("nearest", self.root, self.nearest), ("cls_nearest", self.cls_root, self.cls_nearest)):
            if folder is not None and file is None:
                raise WrongRootError(f"{name} is null: make the neighbours of {str(folder)!r} by `lit neighbours`, and give the file")
            if folder is None and file is not None:
                raise WrongRootError(
                    f"{name}={str(file)!r} is given without the folder that it belongs to: give the folder, or null here, too"
                )

    def setup(self, stage: str) -> None:
        """List the files and read the neighbours."""
        if self.train_set is not None:
            return
        self.check_root(stage)
        if self.root is None:
            streams, self.val_set = self._built_in()
        else:
            streams, self.val_set = self._listed(self.root)
        if self.cls_root is not None:
            streams["cls"], judged = self._classes(self.cls_root)
            self.val_set = _Both([self.val_set, judged]) if self.root is not None else judged
        self.train_set, self.test_set = CropSamples(streams, self.crops, self.seed), self.val_set

    def _built_in(self) -> tuple[dict[str, Stream], ProbeSamples]:
        train, masks, labels = draw_scenes(self.num_train, _PIXELS, 2 * self.seed + 1)
        held, held_masks, held_labels = draw_scenes(self.num_val, _PIXELS, 0)
        probe = min(self.num_probe, len(train))
        images, all_masks, classes = (
            np.concatenate([a[:probe], b]) for a, b in ((train, held), (masks, held_masks), (labels, held_labels))
        )
        stream = Stream(train.__getitem__, nearest_by_spectrum(train, min(self.neighbours, len(train) - 1)))
        fit = np.arange(len(images)) < probe
        judged = ProbeSamples(lambda index: (images[index], all_masks[index], int(classes[index])), fit, self.image_size)
        return {"patch": stream, "cls": stream}, judged

    def _listed(self, root: Path) -> tuple[dict[str, Stream], ProbeSamples]:
        parts = {part: listed(root / part, endings=ENDINGS) for part in ("train2017", "val2017")}
        for part, files in parts.items():
            if not files:
                raise WrongRootError(f"{root / part} holds no image: expected {part}/*.jpg")
        assert self.nearest is not None
        stream = Stream(_reader(parts["train2017"]), read_neighbours(self.nearest, len(parts["train2017"]), self.neighbours))
        chosen = [
            parts[part][place]
            for part, most in (("train2017", self.num_probe), ("val2017", self.num_val))
            for place in np.sort(fixed_split(len(parts[part]), most)[0])
        ]
        table = None if self.class_map is None else read_class_map(self.class_map)

        def read(index: int) -> tuple[NDArray[np.uint8], Ints, int]:
            file = chosen[index]
            mask = root / "stuffthingmaps" / file.parent.name / f"{file.stem}.png"
            image, ids = np.asarray(open_picture(file)), open_indices(mask, "mask", "unpack stuffthingmaps anew").astype(np.int64)
            if ids.shape != image.shape[:2]:
                raise BrokenRecordError(mask, "mask", f"is {ids.shape} pixels and its image {image.shape[:2]}: unpack both anew")
            return image, mapped(ids, table, mask), -1

        fit = np.array([file.parent.name == "train2017" for file in chosen])
        return {"patch": stream, "cls": stream}, ProbeSamples(read, fit, self.image_size)

    def _classes(self, root: Path) -> tuple[Stream, ProbeSamples]:
        classes = class_folders(root / "train")
        files, labels = list_images(root / "train", classes)
        assert self.cls_nearest is not None
        stream = Stream(_reader([root / "train" / name for name in files]), read_neighbours(self.cls_nearest, len(files), self.neighbours))
        held, held_labels = list_images(root / "val", classes) if (root / "val").is_dir() else ([], np.zeros(0, np.int64))
        some, judged = (np.sort(fixed_split(len(part), most)[0]) for part, most in ((files, self.num_probe), (held, self.num_val)))
        paths = [root / "train" / files[k] for k in some] + [root / "val" / held[k] for k in judged]
        known, nothing = np.concatenate([labels[some], held_labels[judged]]), np.full((1, 1), -1, np.int64)
        reader = _reader(paths)
        fit = np.arange(len(paths)) < len(some)
        return stream, ProbeSamples(lambda index: (reader(index), nothing, int(known[index])), fit, self.image_size)


class _Both(Samples):
    """Data sets one behind the other."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def at(self, epoch: int, index: int) -> Any:
        """The sample of the part that it falls into."""
        for part in self.parts:
            if index < len(part):
                return part.at(epoch, index)
            index -= len(part)
        raise IndexError(index)


def _reader(files: Sequence[Path]) -> Callable[[int], NDArray[np.uint8]]:
    def read(index: int) -> NDArray[np.uint8]:
        picture: Image.Image = open_picture(files[index])
        return np.asarray(picture)

    return read


def read_class_map(path: Path) -> dict[int, int]:
    """Ids of masks and their classes, from a JSON object of whole numbers.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is something else.
    """
    found = read_json(path, "class_map", "give a JSON object id -> class, or null")
    try:
        table = {int(key): value for key, value in found.items()}
    except (AttributeError, ValueError):
        table = {}
    if not table or any(type(value) is not int or value < -1 for value in table.values()):
        raise BrokenRecordError(path, "class_map", 'expected an object of ids and classes, such as {"0": 3, "1": -1}')
    return table


def mapped(ids: Ints, table: dict[int, int] | None, path: Path) -> Ints:
    """Classes of a mask's ids, -1 for 255; by a table, where there is one.

    Raises:
        BrokenRecordError: An id that the table doesn't have; the message names the file.
    """
    if table is None:
        return np.where(ids == 255, -1, ids)
    lookup = np.full(max(256, *table) + 1, -2, np.int64)
    lookup[255] = -1
    lookup[list(table)] = list(table.values())
    found = lookup[np.minimum(ids, len(lookup) - 1)]
    if (found == -2).any():
        raise BrokenRecordError(path, "mask", f"has the id {ids[found == -2][0]}, which class_map doesn't name: add it, -1 for none")
    return found


__all__ = [
    "ENDINGS",
    "CropSamples",
    "NeighbourCropsDataModule",
    "ProbeSamples",
    "Stream",
    "mapped",
    "nearest_by_spectrum",
    "read_class_map",
    "read_neighbours",
]
