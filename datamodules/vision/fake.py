"""Tiny releases of CIFAR, ImageNet, SVHN and STL-10 in their official layouts."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth, text

LABELLED = 150  # images in a list of labelled ones: more than a module has neighbours
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def cifar(root: Path, name: str = "cifar10", number: int = 40, protocol: int = 2) -> Path:
    """The files of CIFAR-10 or CIFAR-100 with ``number`` images each.

    Image k of a file is filled with k in red and the file's number in blue.

    Returns:
        The folder with the files.
    """
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    classes = 10 if ten else 100
    for order, file in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"] if ten else ["train", "test"]):
        data = np.zeros((number, 3, 32, 32), np.uint8)
        data[:, 0], data[:, 2] = np.arange(number)[:, None, None] % 256, order
        content = {b"data": data.reshape(number, -1), b"labels" if ten else b"fine_labels": [(k + order) % classes for k in range(number)]}
        (folder / file).write_bytes(pickle.dumps(content, protocol))
    names = [f"class {k}" for k in range(classes)]
    meta = {"label_names": names} if ten else {"fine_label_names": names, "coarse_label_names": []}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol))
    return folder


def imagenet(
    root: Path, classes: Sequence[str] = ("n01", "n02", "n03"), number: int = 2, num_val: int | None = None, class_list: Path | None = None
) -> None:
    """``train/<class>/`` and ``val/<class>/`` with JPEGs whose left half is red; ``number`` and ``num_val`` images in each class."""
    for part, count in (("train", number), ("val", number if num_val is None else num_val)):
        for label, name in enumerate(classes):
            for k in range(count):
                pixels = np.full((40, 60, 3), (20 + 60 * label) % 256, np.uint8)
                pixels[:, :30, 0] = (255 - 10 * k) % 256
                picture(root / part / name / f"{name}_{k}.JPEG", pixels)
    if class_list is not None:
        text(class_list, *classes)


def svhn(root: Path, train: int = 20, test: int = 10, extra: int = 0) -> None:
    """``train_32x32.mat``, ``test_32x32.mat`` and, where there are such images, ``extra_32x32.mat``; labels from 1 to 10."""
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", test), ("extra", extra)):
        if count:
            labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
            savemat(root / f"{part}_32x32.mat", {"X": rng.integers(256, size=(32, 32, 3, count), dtype=np.uint8), "y": labels})


def stl10(root: Path, train: int = 20, test: int = 10, unlabelled: int = 7) -> None:
    """``stl10_binary`` with images of 96 x 96 pixels, column by column, and labels from 1 to 10."""
    rng, folder = np.random.default_rng(0), root / "stl10_binary"
    text(folder / "class_names.txt", *STL10_CLASSES)
    for part, count in (("train", train), ("test", test), ("unlabeled", unlabelled)):
        (folder / f"{part}_X.bin").write_bytes(rng.integers(256, size=(count, 3, 96, 96), dtype=np.uint8).tobytes())
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes((np.arange(count) % 10 + 1).astype(np.uint8).tobytes())


# ---- what each datamodule gets ---------------------------------------------------------------------------------------------------------


def _cifar(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    files = 5 if arguments["name"] == "cifar10" else 1
    images = max(sizes.get("images", 0), 2 * (arguments.get("val_size") or 0))
    cifar(arguments["root"], arguments["name"], max(40 if files == 5 else 200, -(-images // files)))
    return {"root": arguments["root"]}


def _imagenet(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    class_list = arguments.get("class_list")
    imagenet(arguments["root"], [f"n{k:08d}" for k in range(1, 11)], max(4, -(-sizes.get("images", 0) // 10)), 2, class_list)
    return {"root": arguments["root"]} | ({} if class_list is None else {"class_list": class_list})


def _svhn(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    svhn(arguments["root"], max(100, sizes.get("images", 0)), 20, 50 if arguments["extra"] else 0)
    return {"root": arguments["root"]}


def _stl10(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    stl10(arguments["root"], 50, 20, max(20, sizes.get("images", 0) - 50))
    return {"root": arguments["root"]}


def _semi(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A list of labelled images alone; the images are those of the datamodule below, which has as many at least."""
    if arguments.get("label_list") is None:
        return {}
    text(arguments["label_list"], *map(str, range(LABELLED)))
    return {"label_list": arguments["label_list"]}


def coco(root: Path, train: int, val: int) -> None:
    """``train2017``, ``val2017`` and ``stuffthingmaps`` with small pictures and masks of ids 0, 1, ..., and 255 in a corner."""
    rng = np.random.default_rng(0)
    for part, number in (("train2017", train), ("val2017", val)):
        for k in range(number):
            mask = np.kron(rng.integers(0, 5, (4, 5), dtype=np.uint8), np.ones((9, 9), np.uint8))
            mask[:4, :4] = 255
            picture(root / part / f"{k:012d}.jpg", smooth(rng, mask.shape[::-1]))
            picture(root / "stuffthingmaps" / part / f"{k:012d}.png", mask)


def nearest(path: Path, images: int, number: int) -> None:
    """Neighbours as ``lit neighbours`` writes them: the next images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, nns=(np.arange(images)[:, None] + np.arange(1, number + 1)) % images)


def _neighbour_crops(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    root, number = arguments["root"], arguments["neighbours"]
    images = max(arguments["batch_size"], number + 1, sizes.get("images", 0), 10)
    coco(root, images, 4)
    found = {"root": root, "nearest": arguments.get("nearest") or root / "nearest.npz"}
    nearest(found["nearest"], images, number)
    if arguments.get("cls_root") is not None:
        imagenet(arguments["cls_root"], ("n01", "n02"), -(-images // 2), 2)
        found |= {"cls_root": arguments["cls_root"], "cls_nearest": arguments.get("cls_nearest") or root / "cls_nearest.npz"}
        nearest(found["cls_nearest"], 2 * -(-images // 2), number)
    if arguments.get("class_map") is not None:
        text(arguments["class_map"], '{"0": 0, "1": 0, "2": 1, "3": 2, "4": -1}')
        found["class_map"] = arguments["class_map"]
    return found


FAKES: dict[str, Writer] = {
    "CIFARDataModule": _cifar,
    "ImageNetDataModule": _imagenet,
    "NeighbourCropsDataModule": _neighbour_crops,
    "SVHNDataModule": _svhn,
    "STL10DataModule": _stl10,
    "SemiSupervisedDataModule": _semi,
}
__all__ = ["FAKES", "LABELLED", "cifar", "coco", "imagenet", "nearest", "stl10", "svhn"]
