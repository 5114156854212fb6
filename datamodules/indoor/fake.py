"""Tiny releases of ScanNet and S3DIS: generated rooms as prepared arrays, with frames, masks and lists of labelled points."""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth, text
from lit_methods.datamodules.indoor.base import Scene
from lit_methods.datamodules.indoor.rooms import Views, make_room, noisy_masks, scene_of
from lit_methods.lidar.lifting import superpoints


def prepared(folder: Path, scene: Scene, segment: str) -> None:
    """``coord.npy``, ``color.npy``, ``normal.npy`` and the labels of a scene."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "coord.npy", scene.points[:, :3])
    np.save(folder / "normal.npy", scene.points[:, 3:6])
    np.save(folder / "color.npy", np.rint(255 * scene.points[:, 6:]).astype(np.uint8))
    np.save(folder / f"{segment}.npy", scene.labels.astype(np.int32))


def pose_of(views: Views, view: int) -> NDArray[np.float64]:
    """(4, 4) camera to world of a view."""
    pose = np.eye(4)
    pose[:3, :3] = views.rotation[view].T
    pose[:3, 3] = -views.rotation[view].T @ views.translation[view]
    return pose


def _matrix(path: Path, matrix: NDArray[np.float64]) -> None:
    text(path, *(" ".join(f"{value:.9g}" for value in row) for row in matrix))


def _four(intrinsic: NDArray[np.float64]) -> NDArray[np.float64]:
    found = np.eye(4)
    found[:3, :3] = intrinsic
    return found


def exported(folder: Path, views: Views) -> None:
    """Frames as ScanNet's tools export them, numbered 0, 20, 40, ..."""
    rng = np.random.default_rng(0)
    _matrix(folder / "intrinsic" / "intrinsic_depth.txt", _four(views.intrinsic))
    for view, depth in enumerate(views.depth):
        name = str(20 * view)
        picture(folder / "depth" / f"{name}.png", np.rint(1000 * depth).astype(np.uint16))
        picture(folder / "color" / f"{name}.jpg", smooth(rng, depth.shape[::-1]))
        _matrix(folder / "pose" / f"{name}.txt", pose_of(views, view))


def sens(path: Path, views: Views) -> None:
    """A ``.sens`` file whose frames are the views."""
    rng, (height, width) = np.random.default_rng(0), views.depth[0].shape
    matrices = [_four(views.intrinsic), np.eye(4), _four(views.intrinsic), np.eye(4)]
    parts = [struct.pack("<IQ", 4, 4), b"made", *(matrix.astype("<f4").tobytes() for matrix in matrices)]
    parts.append(struct.pack("<iiIIIIfQ", 2, 1, width, height, width, height, 1000.0, len(views.depth)))
    for view, depth in enumerate(views.depth):
        colours = BytesIO()
        Image.fromarray(smooth(rng, (width, height))).save(colours, "JPEG")
        packed = zlib.compress(np.rint(1000 * depth).astype("<u2").tobytes())
        parts.append(struct.pack("<16fQQQQ", *pose_of(views, view).ravel(), view, view, len(colours.getvalue()), len(packed)))
        parts += [colours.getvalue(), packed]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(parts))


def scannet(
    root: Path, scenes: Mapping[str, Sequence[str]] | None = None, points: int = 400, views: int = 2, lifted: bool = True
) -> dict[str, list[int]]:
    """Prepared scenes; with ``lifted`` frames (the first training scene's as a ``.sens`` file), masks and lifted masks of training scenes.

    Returns:
        Scene -> rows of its labelled points.
    """
    scenes = scenes or {
        "train": ["scene0000_00", "scene0001_00"],
        "val": ["scene0011_00", "scene0015_00"],
        "test": ["scene0707_00", "scene0708_00"],
    }
    listed: dict[str, list[int]] = {}
    for part, names in scenes.items():
        for number, name in enumerate(names):
            rng = np.random.default_rng([41, len(part), number])
            room, seen = make_room(rng, points, views)
            pixels = noisy_masks(seen, 0.0, rng)
            scene = scene_of(name, room, seen, pixels)
            prepared(root / part / name, scene, "segment20")
            if part != "train":
                continue
            listed[name] = rng.choice(len(scene.labels), 20, replace=False).tolist()
            if not lifted:  # what the datamodule reads alone
                continue
            if number == 0:
                sens(root / "frames" / f"{name}.sens", seen)
            else:
                exported(root / "frames" / name, seen)
            for view, mask in enumerate(pixels):
                picture(root / "masks" / name / f"{view if number == 0 else 20 * view}.png", (mask + 1).astype(np.uint16))
            (root / "lifted").mkdir(exist_ok=True)
            np.savez(root / "lifted" / f"{name}.npz", mask_ids=scene.masks)
    return listed


def s3dis(
    root: Path, points: int = 400, rooms: Sequence[str] = ("conferenceRoom_1", "office_1"), lifted: bool = True
) -> dict[str, list[int]]:
    """Prepared rooms of six areas; with ``lifted`` their superpoints as masks.

    Returns:
        Room, as ``Area_1-office_1`` -> rows of its labelled points.
    """
    listed = {}
    for area in range(1, 7):
        for number, name in enumerate(rooms):
            rng = np.random.default_rng([43, area, number])
            scene = scene_of(name, *make_room(rng, points, 1), None)
            prepared(root / f"Area_{area}" / name, scene, "segment")
            listed[f"Area_{area}-{name}"] = rng.choice(len(scene.labels), 20, replace=False).tolist()
            if not lifted:
                continue
            (root / "lifted").mkdir(exist_ok=True)
            masks = superpoints(scene.points[:, :3], scene.points[:, 3:6])[None]
            np.savez(root / "lifted" / f"Area_{area}-{name}.npz", mask_ids=masks)
    return listed


def _released(arguments: Arguments, listed: dict[str, list[int]]) -> dict[str, Any]:
    """The list of labelled points and the folder of lifted masks, where they were asked for."""
    found: dict[str, Any] = {"root": arguments["root"]}
    if arguments.get("labelled") is not None:
        path: Path = arguments["labelled"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(listed))
        else:
            import torch

            torch.save({name: np.array(rows) for name, rows in listed.items()}, path)
        found["labelled"] = path
    if arguments.get("masks") is not None and (arguments["root"] / "lifted").is_dir():
        (arguments["root"] / "lifted").rename(arguments["masks"])
        found["masks"] = arguments["masks"]
    return found


def _scannet(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    batch = max(2, int(arguments.get("batch_size") or 2), sizes.get("images", 0))
    names = {"train": batch, "val": 2, "test": 2}
    scenes = {part: [f"scene{100 * k + i:04d}_00" for i in range(number)] for k, (part, number) in enumerate(names.items())}
    return _released(arguments, scannet(arguments["root"], scenes, lifted=arguments["mask_source"] == "files"))


def _s3dis(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    batch = max(2, int(arguments.get("batch_size") or 2))
    return _released(
        arguments,
        s3dis(arguments["root"], rooms=[f"office_{k}" for k in range(1, 2 + (batch + 4) // 5)], lifted=arguments["mask_source"] == "files"),
    )


FAKES: dict[str, Writer] = {"ScanNetDataModule": _scannet, "S3DISDataModule": _s3dis}
__all__ = ["FAKES", "exported", "pose_of", "prepared", "s3dis", "scannet", "sens"]
