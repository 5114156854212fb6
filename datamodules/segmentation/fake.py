"""Tiny releases of PASCAL VOC 2012, Synapse and ACDC in the layouts that are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, picture, text


def voc(
    root: Path, masks: Path, train: Sequence[str] = ("a", "b"), val: Sequence[str] = ("c",), lists: tuple[str, str] = ("trainaug", "val")
) -> None:
    """``JPEGImages``, ``SegmentationClass`` and ``ImageSets``, and a folder of masks of the training images; images differ in size.

    Args:
        root: The folder ``VOC2012``.
        masks: Folder of the training images' masks.
        train: Names of the training images.
        val: Names of the validation images.
        lists: Names of the two lists.
    """
    rng = np.random.default_rng(0)
    masks.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate([*train, *val]):
        size = ((20, 30), (25, 18), (16, 16))[place % 3]
        picture(root / "JPEGImages" / f"{name}.jpg", rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        mask = rng.choice([0, 3, 20, 255], size).astype(np.uint8)
        picture((masks if name in train else root / "SegmentationClass") / f"{name}.png", mask)
    for name, images in zip(lists, (train, val), strict=True):
        text(root / "ImageSets" / "Segmentation" / f"{name}.txt", *images)


def synapse(root: Path, slices: int = 3, side: int = 32, classes: int = 9) -> None:
    """``train_npz`` with slices of one case, and ``test_vol_h5`` with a volume of four slices."""
    import h5py

    (root / "train_npz").mkdir(parents=True)
    (root / "test_vol_h5").mkdir()
    rng = np.random.default_rng(0)
    for index in range(slices):
        image, label = rng.random((side, side), dtype=np.float32), rng.integers(0, classes, (side, side))
        np.savez(root / "train_npz" / f"case0005_slice{index:03d}.npz", image=image, label=label.astype(np.float32))
    with h5py.File(root / "test_vol_h5" / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = rng.random((4, side, side), dtype=np.float32), rng.integers(0, classes, (4, side, side))


def acdc(root: Path, patients: int = 10, slices: int = 2, side: int = 8, classes: int = 4) -> None:
    """``ACDC_training_slices`` and ``ACDC_training_volumes`` of some patients, one frame each."""
    import h5py

    rng = np.random.default_rng(0)
    for patient in range(1, patients + 1):
        image, label = rng.random((slices, side, side), dtype=np.float32), rng.integers(0, classes, (slices, side, side)).astype(np.uint8)
        frame = f"patient{patient:03d}_frame01"
        parts = {f"ACDC_training_volumes/{frame}.h5": (image, label)}
        parts |= {f"ACDC_training_slices/{frame}_slice_{k}.h5": (image[k], label[k]) for k in range(slices)}
        for name, (pixels, classes_of) in parts.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(root / name, "w") as file:
                file["image"], file["label"] = pixels, classes_of


# ---- what each datamodule gets ---------------------------------------------------------------------------------------------------------


def _voc(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    root = arguments["root"]
    masks = arguments.get("masks") or root / "masks"
    train, val = [f"2007_{k:06d}" for k in range(1, 13)], [f"2008_{k:06d}" for k in range(1, 4)]
    voc(root, masks, train, val, (arguments["train"], arguments["val"]))
    return {"root": root, "masks": masks}


def _organs(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    root, lists = arguments["root"], {}
    name = "acdc" if arguments["name"] == "acdc" else "synapse"
    if name == "synapse":
        synapse(root, 24)
        names = {"train_list": [f"case0005_slice{k:03d}" for k in range(24)], "val_list": ["case0001"], "test_list": ["case0001"]}
    else:
        acdc(root, slices=4, side=32)
        names = {"train_list": [f"patient001_frame01_slice_{k}" for k in range(4)], "val_list": ["patient008_frame01"]}
        names["test_list"] = ["patient009_frame01"]
    for key, entries in names.items():
        if arguments.get(key) is not None:
            text(arguments[key], *entries)
            lists[key] = arguments[key]
    return {"root": root, "name": name, **lists}


FAKES: dict[str, Writer] = {"NoisyMasksDataModule": _voc, "OrganSlicesDataModule": _organs}
__all__ = ["FAKES", "acdc", "synapse", "voc"]
