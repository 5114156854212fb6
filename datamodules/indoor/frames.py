"""Posed depth images of a scene: ScanNet's ``.sens`` files, or frames that its tools have exported."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.folders import listed
from lit_methods.datamodules.pictures import open_indices, open_picture
from lit_methods.datamodules.reading import file_size, read_text

LARGEST_DEPTH = 20.0  # metres, in a room
_HEAD = struct.Struct("<iiIIIIfQ")  # of a .sens file: compressions, sizes of colour and depth, units of a metre, frames
_FRAME = struct.Struct("<16fQQQQ")
_LARGEST_FRAME = 1 << 26  # bytes


class Frame(NamedTuple):
    """A view of a scene.

    Attributes:
        name: Number of the frame, as in the files' names.
        depth: (H, W) metres; 0: none.
        rotation: (3, 3) world to camera.
        translation: (3,) world to camera, metres.
    """

    name: str
    depth: NDArray[np.float64]
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]


def checked_depth(depth: NDArray[np.float64], file: Path, field: str = "depth") -> NDArray[np.float64]:
    """Depths in metres, if they can be those of a room.

    Raises:
        BrokenRecordError: None is above 0, or they are on another scale: metres in place of millimetres, say.
    """
    seen = depth[depth > 0]
    if not seen.size:
        raise BrokenRecordError(file, field, "no pixel has a depth: leave the frame out, or export it again")
    middle = float(np.median(seen))
    if not 0.1 <= middle <= LARGEST_DEPTH:
        raise BrokenRecordError(
            file,
            field,
            f"the median depth is {middle:.4g} m, expected 0.1 to {LARGEST_DEPTH:g}: 16-bit millimetres are expected, or set depth_scale",
        )
    return depth


def world_to_camera(pose: NDArray[np.float64], file: Path, field: str = "pose") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotation and translation of the inverse of a camera's pose.

    Args:
        pose: (4, 4) camera to world, metres.
        file: Where it stands.
        field: What it is there.

    Raises:
        BrokenRecordError: It isn't finite, as where the tracking was lost, or isn't a rotation and a translation.
    """
    if pose.shape != (4, 4):
        raise BrokenRecordError(file, field, f"{pose.shape} numbers, expected 4 lines of 4: export it again")
    if not np.isfinite(pose).all():
        raise BrokenRecordError(file, field, "it isn't finite: the camera was lost there, leave the frame out")
    turn = pose[:3, :3]
    wrong = float(np.abs(turn @ turn.T - np.eye(3)).max())
    if wrong > 1e-2 or np.linalg.det(turn) < 0 or np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-4:
        raise BrokenRecordError(
            file,
            field,
            f"it isn't rigid (R R^T differs from 1 by {wrong:.3g}, determinant {np.linalg.det(turn):.3g}, last line {pose[3].tolist()}): "
            "expected camera to world, a rotation and a translation in metres",
        )
    return turn.T, -turn.T @ pose[:3, 3]


def read_matrix(path: Path, field: str) -> NDArray[np.float64]:
    """Four lines of four numbers.

    Raises:
        MissingFileError: No such file.
        BrokenRecordError: Something else stands in it.
    """
    rows = [line.split() for line in read_text(path, field, "export the scene again").splitlines() if line.strip()]
    try:
        if [len(row) for row in rows] != [4] * 4:
            raise ValueError(f"lines of {[len(row) for row in rows]} words")
        return np.array(rows, dtype=np.float64)
    except ValueError as problem:
        raise BrokenRecordError(path, field, f"expected 4 lines of 4 numbers ({problem}): export it again") from problem


def checked_intrinsic(intrinsic: NDArray[np.float64], file: Path) -> NDArray[np.float64]:
    """(3, 3) of a camera's matrix.

    Raises:
        BrokenRecordError: Focal lengths aren't positive numbers of pixels.
    """
    found = intrinsic[:3, :3]
    if not np.isfinite(found).all() or min(found[0, 0], found[1, 1]) < 1 or abs(found[2, 2] - 1) > 1e-4:
        raise BrokenRecordError(file, "intrinsic", f"focal lengths {found[0, 0]:g} and {found[1, 1]:g}: expected pixels, as 4 x 4 matrix")
    return found


class ExportedFrames:
    """Frames in a folder of a scene: ``depth/<n>.png``, ``pose/<n>.txt``, ``color/<n>.jpg``, ``intrinsic/intrinsic_depth.txt``.

    Args:
        folder: Of the scene.
        depth_scale: Units of the depth images in a metre.
    """

    def __init__(self, folder: Path, depth_scale: float = 1000.0) -> None:
        self.folder, self.depth_scale = folder, depth_scale
        path = folder / "intrinsic" / "intrinsic_depth.txt"
        self.intrinsic = checked_intrinsic(read_matrix(path, "intrinsic"), path)
        self.names = [path.stem for path in sorted(listed(folder / "depth", endings=(".png",)), key=_by_number)]
        if not self.names:
            raise MissingFileError(folder / "depth", "depth", "no frames: export the scene's .sens file, or name it by frames")

    def frame(self, name: str) -> Frame:
        """One view.

        Raises:
            MissingFileError: One of its files isn't there.
            BrokenRecordError: One of them can't be right.
        """
        path = self.folder / "depth" / f"{name}.png"
        depth = open_indices(path, "depth", "a frame is named and has no depth image: export the scene again")
        pose = self.folder / "pose" / f"{name}.txt"
        return Frame(name, checked_depth(depth / self.depth_scale, path), *world_to_camera(read_matrix(pose, "pose"), pose))

    def picture(self, name: str) -> Image.Image:
        """Colours of one view."""
        folder = self.folder / "color"
        found = [path for ending in (".jpg", ".png") if (path := folder / f"{name}{ending}").exists()]
        return open_picture(found[0] if found else folder / f"{name}.jpg", "color", "export the scene's colours, too")


class SensFile:
    """A ``.sens`` file of ScanNet, version 4: depths as 16-bit integers packed by zlib, colours as JPEG.

    The header and the frames' places are read at once, their pixels one by one.

    Args:
        path: The file.

    Raises:
        BrokenRecordError: It is of another version, truncated, or packed in another way.
    """

    def __init__(self, path: Path) -> None:
        self.path, size = path, file_size(path, "file", "download the scene's .sens file")
        with path.open("rb") as file:

            def take(number: int) -> bytes:
                found = file.read(number)
                if len(found) < number:
                    raise BrokenRecordError(path, "header", "truncated: download it again")
                return found

            version, letters = struct.unpack("<IQ", take(12))
            if version != 4 or letters > 1024:
                raise BrokenRecordError(path, "version", f"{version}, expected 4: is it a .sens file of ScanNet?")
            take(letters)
            matrices = np.frombuffer(take(4 * 64), dtype="<f4").astype(np.float64).reshape(4, 4, 4)  # colour, its place, depth, its place
            self.intrinsic = checked_intrinsic(matrices[2], path)
            colour, depth, _, _, self.width, self.height, self.depth_scale, frames = _HEAD.unpack(take(_HEAD.size))
            if (colour, depth) != (2, 1):
                raise BrokenRecordError(path, "compression", f"{colour} and {depth}, expected JPEG colours (2) and packed depths (1)")
            if frames * _FRAME.size > size or not 0 < self.width * self.height <= _LARGEST_FRAME or not self.depth_scale > 0:
                raise BrokenRecordError(
                    path, "header", f"{frames} frames of {self.width} x {self.height} in {size} bytes: download it again"
                )
            self._places: dict[str, tuple[NDArray[np.float64], int, int, int]] = {}
            for number in range(frames):
                *pose, _, _, colours, depths = _FRAME.unpack(take(_FRAME.size))
                place = file.tell()
                if place + colours + depths > size:
                    raise BrokenRecordError(path, f"frame {number}", "truncated: download it again")
                self._places[str(number)] = (np.array(pose).reshape(4, 4), place, colours, depths)
                file.seek(place + colours + depths)
        self.names = list(self._places)

    def _read(self, name: str, start: int, number: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(number)

    def frame(self, name: str) -> Frame:
        """One view.

        Raises:
            BrokenRecordError: It isn't there, or can't be right.
        """
        if name not in self._places:
            raise BrokenRecordError(self.path, f"frame {name}", f"there are frames 0 to {len(self.names) - 1}: name one of them")
        pose, place, colours, depths = self._places[name]
        field, size = f"frame {name}, depth", 2 * self.width * self.height
        try:
            unpacked = zlib.decompressobj().decompress(self._read(name, place + colours, depths), size + 1)
        except zlib.error as problem:
            raise BrokenRecordError(self.path, field, f"can't be unpacked ({problem}): download it again") from problem
        if len(unpacked) != size:
            raise BrokenRecordError(self.path, field, f"{len(unpacked)} bytes of {self.width} x {self.height} pixels: download it again")
        depth = np.frombuffer(unpacked, dtype="<u2").reshape(self.height, self.width) / self.depth_scale
        return Frame(name, checked_depth(depth, self.path, field), *world_to_camera(pose, self.path, f"frame {name}, pose"))

    def picture(self, name: str) -> Image.Image:
        """Colours of one view."""
        _, place, colours, _ = self._places[name]
        try:
            with Image.open(io.BytesIO(self._read(name, place, colours)), formats=("JPEG",)) as picture:
                return picture.convert("RGB")
        except Exception as problem:
            raise BrokenRecordError(self.path, f"frame {name}, color", f"can't be decoded ({problem}): download it again") from problem


Frames = ExportedFrames | SensFile


def open_frames(folder: Path, scene: str, depth_scale: float = 1000.0) -> Frames:
    """The frames of a scene: ``<scene>.sens``, ``<scene>/<scene>.sens``, or exported ones in ``<scene>/``.

    Raises:
        MissingFileError: None of them is there.
    """
    for path in (folder / f"{scene}.sens", folder / scene / f"{scene}.sens"):
        if path.is_file():
            return SensFile(path)
    if not (folder / scene).is_dir():
        raise MissingFileError(folder / scene, "frames", f"neither this folder nor {scene}.sens is there: give the scenes' frames")
    return ExportedFrames(folder / scene, depth_scale)


def _by_number(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdigit() else -1, path.stem)


def chosen_views(names: Sequence[str], every: int, most: int) -> list[str]:
    """Every n-th frame; where these are too many, as many as allowed, evenly."""
    found = list(names[::every])
    if len(found) > most:
        found = [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]
    return found


def read_masks(path: Path, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Masks of a view: a PNG of 8 or 16 bits with the mask's number at each pixel, 0 where none is.

    Args:
        path: The file.
        shape: Height and width of the view's depth image.

    Returns:
        (H, W) numbers from 0 on; -1: none.

    Raises:
        MissingFileError: No such file.
        BrokenRecordError: It is no image of one channel, or of another size.
    """
    found = open_indices(path, "masks", "make it by lit lift --source sam2, or leave the view out")
    if found.shape != shape:
        raise BrokenRecordError(
            path, "masks", f"{found.shape[0]} x {found.shape[1]} pixels, and the depth image has {shape[0]} x {shape[1]}: resize it"
        )
    return found.astype(np.int64) - 1


def lift_scene(
    points: NDArray[np.floating[Any]],
    frames: Frames,
    names: Sequence[str],
    masks: Callable[[str, tuple[int, int]], NDArray[np.int64]],
    delta: float = 0.05,
) -> NDArray[np.int32]:
    """The mask of each point in each view, a view at a time.

    Args:
        points: (N, 3) metres, in the frames' world.
        frames: Of the scene.
        names: The views.
        masks: Name of a view and size of its depth image -> (H, W) masks, -1: none.
        delta: Largest difference of depths of a visible point, metres.

    Returns:
        (V, N); -1: none.
    """
    import torch

    from lit_methods.lidar.lifting import link_points, masks_at_points

    world, intrinsic = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float64)), torch.from_numpy(frames.intrinsic.copy())
    found = np.full((len(names), len(points)), -1, dtype=np.int32)
    for row, name in zip(found, names, strict=True):
        frame = frames.frame(name)
        rotation, translation, depth = (
            torch.from_numpy(np.ascontiguousarray(part))[None] for part in (frame.rotation, frame.translation, frame.depth)
        )
        link = link_points(world, intrinsic, rotation, translation, depth, delta)
        row[:] = masks_at_points(link, torch.from_numpy(masks(name, frame.depth.shape))[None])[0].numpy()  # type: ignore[arg-type]
    return found


__all__ = [
    "ExportedFrames",
    "Frame",
    "Frames",
    "SensFile",
    "checked_depth",
    "chosen_views",
    "lift_scene",
    "open_frames",
    "read_masks",
    "world_to_camera",
]
