"""Tiny releases of videos: prompts of long ones, and actions of UCF101-24, JHMDB-21 and YouTube-VOS in their layouts."""

import json
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth, text
from lit_methods.datamodules.video.decoding import write_video
from lit_methods.datamodules.video.jhmdb import CLASSES as JHMDB
from lit_methods.datamodules.video.ucf101 import CLASSES as UCF

_FRAMES = 20  # of a video
_SIDE = 12  # pixels of the square that moves


def _byte(value: int) -> NDArray[np.uint8]:
    """A number as MATLAB stores it, (1, 1)."""
    return np.full((1, 1), value, dtype=np.uint8)


def _prompts(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    lines = ("a boat on a lake | a boat in the rain | a boat at night", "a horse stands | a horse walks | a horse gallops")
    text(arguments["root"] / "prompts.txt", *lines)
    return {"root": arguments["root"]}


def _size(arguments: Arguments) -> tuple[int, int]:
    """Height and width of frames from which the crop can be taken, even."""
    wanted = arguments.get("image_size") or (16, 24)
    return tuple(max(16, side + side % 2) for side in wanted)  # type: ignore[return-value]


def _moving(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Frames (L, H, W, 3) of a square over a picture, and its left upper corners (L, 2), x and y."""
    back, colour = smooth(rng, (width, height)), rng.integers(0, 256, 3, dtype=np.uint8)
    places = np.stack([np.linspace(0, side - _SIDE, _FRAMES).astype(np.int64) for side in (width, height)], axis=1)
    frames = np.repeat(back[None], _FRAMES, axis=0)
    for frame, (x, y) in zip(frames, places, strict=True):
        frame[y : y + _SIDE, x : x + _SIDE] = colour
    return frames, places


def _ucf101(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng, root = np.random.default_rng(0), arguments["root"]
    height, width = _size(arguments)
    parts: dict[str, list[Any]] = {"labelled": [], "unlabelled": [], "test": []}
    stored, lists = [], {"trainlist.txt": [], "testlist.txt": []}  # type: ignore[var-annotated]
    for part, per_class in (("labelled", 1), ("unlabelled", 2), ("test", 1)):
        for kind in range(2):
            for number in range(per_class):
                name = f"{UCF[kind]}/v_{UCF[kind]}_{part}_c{number + 1:02d}"
                frames, places = _moving(rng, height, width)
                write_video(root / "UCF101_Videos" / f"{name}.avi", frames)
                boxes = np.column_stack([places, np.full((_FRAMES, 2), _SIDE)])
                known = list(range(0, _FRAMES, 4))
                parts[part].append((name, [(0, _FRAMES - 1, kind, boxes.tolist(), known, int(part == "labelled"))]))
                tubes = np.empty((1, 1), dtype=[(key, "O") for key in ("ef", "sf", "class", "boxes")])
                tubes[0, 0] = (_byte(_FRAMES), _byte(1), _byte(kind + 1), np.add(boxes, (1, 1, 0, 0)).astype(np.int16))
                stored.append((_byte(_FRAMES), name, tubes))
                lists["testlist.txt" if part == "test" else "trainlist.txt"].append(f"{name}.avi")
    if arguments.get("annotations") == "tubes":
        from scipy.io import savemat

        annot = np.empty((1, len(stored)), dtype=[(key, "O") for key in ("num_imgs", "name", "tubes")])
        annot[0] = stored
        savemat(root / "finalAnnots.mat", {"annot": annot}, do_compression=True)
        for name, lines in lists.items():
            text(root / name, *lines)
        return {"root": root}
    for part, entries in parts.items():
        if arguments.get(part) is not None:
            (root / arguments[part]).write_bytes(pickle.dumps(entries, protocol=2))
    return {"root": root}


def _jhmdb(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    from scipy.io import savemat

    rng, root = np.random.default_rng(0), arguments["root"]
    height, width = _size(arguments)
    for part, per_class in (("labelled", 1), ("unlabelled", 2), ("test", 1)):
        lines = []
        for kind in JHMDB[:2]:
            for number in range(per_class):
                name = f"{kind}/{part}_{number}"
                frames, places = _moving(rng, height, width)
                masks = np.zeros((height, width, _FRAMES), dtype=np.uint8)
                for frame, (x, y) in enumerate(places):
                    masks[y : y + _SIDE, x : x + _SIDE, frame] = 1 + frame % 3  # parts of the body
                    picture(root / "Rename_Images" / name / f"{frame + 1:05d}.png", frames[frame])
                folder = root / "puppet_mask" / name
                folder.mkdir(parents=True)
                savemat(folder / "puppet_mask.mat", {"part_mask": masks}, do_compression=True)
                lines.append(name)
        if arguments.get(part) is not None:
            text(root / arguments[part], *lines)
    return {"root": root}


def _youtube_vos(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng, root = np.random.default_rng(0), arguments["root"] / "train"
    height, width = _size(arguments)
    videos = {}
    for number in range(12):
        name, category = f"{number:010x}", ("ape", "boat")[number % 2]
        frames, places = _moving(rng, height, width)
        listed = [f"{frame * 5:05d}" for frame in range(_FRAMES)]
        for frame, (x, y) in enumerate(places):
            picture(root / "JPEGImages" / name / f"{listed[frame]}.jpg", frames[frame])
            drawn = Image.new("P", (width, height))
            drawn.putpalette([0, 0, 0, 236, 95, 103, 249, 145, 87])
            drawn.paste(1, (int(x), int(y), int(x) + _SIDE, int(y) + _SIDE))
            path = root / "Annotations" / name / f"{listed[frame]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(path)
        videos[name] = {"objects": {"1": {"category": category, "frames": listed}, "2": {"category": "sign", "frames": listed[:3]}}}
    text(root / "meta.json", json.dumps({"videos": videos}))
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {
    "VideoPromptsDataModule": _prompts,
    "UCF101ActionsDataModule": _ucf101,
    "JHMDBActionsDataModule": _jhmdb,
    "YouTubeVOSDataModule": _youtube_vos,
}
