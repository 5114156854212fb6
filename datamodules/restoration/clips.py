"""Samples of clips: made ones, folders of frames such as REDS, stills that are moved, pairs of a video that is restored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.datamodules.base import Samples
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import listed
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.reading import file_size
from lit_methods.datamodules.restoration.blind import BlindDegradation
from lit_methods.datamodules.restoration.images import ENDINGS

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".gif")
# part -> folders of clean clips, the first that is there counts
FOLDERS = {
    "train": ("train_sharp", "train/GT", "GT"),
    "val": ("val_sharp", "val/GT", "GT"),
    "test": ("test/GT", "val_sharp", "val/GT", "GT"),
}
Floats = NDArray[np.float32]


# ---- what is done to frames ------------------------------------------------------------------------------------------------------------


def enlarge(frames: Tensor, size: Sequence[int]) -> Tensor:
    """Frames (N, C, h, w) in [0, 1] to height and width ``size``, bicubic, clipped."""
    return F.interpolate(frames, list(size), mode="bicubic", align_corners=False).clamp(0, 1)


def degraded(clean: Tensor, degradation: BlindDegradation, rng: np.random.Generator) -> Tensor:
    """Frames (T, C, H, W) in [0, 1] -> the same degraded, at their own size."""
    return enlarge(degradation(clean, rng).float(), clean.shape[-2:])


def _sample(clean: Tensor, low: Tensor, index: int, name: str) -> dict[str, Any]:
    return {"lq": low * 2 - 1, "gt": clean * 2 - 1, "index": index, "name": name}


# ---- made clips ------------------------------------------------------------------------------------------------------------------------


def texture(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Stripes, a chequered pattern or dots in two colours, turned, with sharp edges: (3, height, width) in [0, 1]."""
    kind, angle, length = int(rng.integers(3)), rng.uniform(0, np.pi), rng.uniform(9, 20)
    first, second = rng.uniform(0, 1, (2, 3, 1, 1)).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    u = (np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / length
    v = (np.cos(angle) * y - np.sin(angle) * x) * 2 * np.pi / length
    wave = np.sin(u) if kind == 0 else np.sin(u) * np.sin(v) if kind == 1 else np.sin(u) + np.sin(v) - 0.8
    share = np.clip(0.5 + wave * length / 4, 0, 1).astype(np.float32)  # an edge is about a pixel wide
    made: Floats = first * share + second * (1 - share)
    return made


def moving_textures(rng: np.random.Generator, frames: int, size: int, speed: int, still: bool = False) -> Floats:
    """A disc with a texture before another texture, each moving evenly by whole pixels.

    Args:
        rng: Draws everything.
        frames: T.
        size: Side of a frame in pixels.
        speed: Largest motion in each direction, pixels a frame.
        still: Both move alike: a picture that is shifted.

    Returns:
        (T, 3, size, size) in [0, 1].
    """
    margin = speed * frames
    side = size + 2 * margin
    back, front = texture(rng, side, side), texture(rng, side, side)
    v_back, v_front = rng.integers(-speed, speed + 1, (2, 2))
    v_front = v_back if still else v_front
    centre, radius = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.2, 0.35) * size
    y, x = np.mgrid[:size, :size]
    clip = np.empty((frames, 3, size, size), dtype=np.float32)
    for t in range(frames):
        (top, left), (above, beside) = margin - v_back * t, margin - v_front * t
        moved = centre + v_front * (t - frames // 2)
        mask = np.clip(radius - np.hypot(y - moved[0], x - moved[1]) + 0.5, 0, 1).astype(np.float32)
        clip[t] = mask * front[:, above : above + size, beside : beside + size] + (1 - mask) * back[:, top : top + size, left : left + size]
    return clip


class MadeClips(Samples):
    """Clips of :func:`moving_textures`.

    Args:
        number: Clips of an epoch.
        frames: T.
        size: Side of a frame.
        speed: Largest motion, pixels a frame.
        degradation: What is done to them.
        seed: Numbers that, with epoch and index, decide everything.
        still: See :func:`moving_textures`.
        name: Begins the names.
    """

    def __init__(
        self, number: int, frames: int, size: int, speed: int, degradation: BlindDegradation, seed: Sequence[int], still: bool, name: str
    ) -> None:
        self.number, self.frames, self.size, self.speed = number, frames, size, speed
        self.degradation, self.seed, self.still, self.name = degradation, list(seed), still, name

    def __len__(self) -> int:
        return self.number

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A clip."""
        rng = np.random.default_rng([*self.seed, epoch, index])
        clean = torch.from_numpy(moving_textures(rng, self.frames, self.size, self.speed, self.still))
        return _sample(clean, degraded(clean, self.degradation, rng), index, f"{self.name}{index:03d}")


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def clips_in(folder: Path) -> list[list[Path]]:
    """Frames of each clip below a folder, sorted; a folder that holds frames itself is one clip."""
    if frames := listed(folder, endings=ENDINGS):
        return [frames]
    return [frames for below in listed(folder) if below.is_dir() and (frames := listed(below, endings=ENDINGS))]


def read_frames(files: Sequence[Path], box: tuple[int, int, int, int] | None = None) -> Tensor:
    """Frames of one clip as (T, 3, H, W) in [0, 1].

    Args:
        files: Image files of one size.
        box: Left, top, right and lower end of what is read; None: all.

    Raises:
        BrokenRecordError: A frame is no image, or of another size than the first one.
    """
    frames, size = [], None
    for file in files:
        picture = open_picture(file, "frame", "copy the clip again")
        size = size or picture.size
        if picture.size != size:
            raise BrokenRecordError(
                file,
                "size",
                f"{picture.width} x {picture.height} pixels, and {files[0].name} of the same clip has {size[0]} x {size[1]}: the frames of "
                "a video must have one size; put others into a folder of their own",
            )
        frames.append(np.asarray(picture if box is None else picture.crop(box)))
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1).float() / 255


def read_list(file: Path, given: str) -> list[Path]:
    """Paths in a text file, one a line; relative ones start at the file's folder.

    Raises:
        WrongRootError: There is no such file.
        BrokenRecordError: It isn't text, it is empty, or a path isn't there.
    """
    try:
        file_size(file, given, "give a text file of paths, one a line")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise WrongRootError(f"{given}={str(file)!r} is no file: give a text file of paths, one a line") from None
    except UnicodeDecodeError:
        raise BrokenRecordError(file, given, "is no text: give paths, one a line") from None
    paths = [file.parent / Path(line).expanduser() for line in lines if line and not line.startswith("#")]
    if not paths:
        raise BrokenRecordError(file, given, "has no path: give one a line")
    for number, path in enumerate(paths):
        if not path.exists():
            raise BrokenRecordError(file, f"path {number + 1}", f"{path} isn't there: correct the list, or unpack the data")
    return paths


def _position(picture: tuple[int, int], size: int, rng: np.random.Generator, file: Path) -> tuple[int, int, int, int]:
    """A random square of a picture of (width, height)."""
    if min(picture) < size:
        raise BrokenRecordError(file, "size", f"{picture[0]} x {picture[1]} pixels are fewer than size={size}: lower it, or leave it out")
    left, top = (int(rng.integers(side - size + 1)) for side in picture)
    return left, top, left + size, top + size


class ClipFiles(Samples):
    """Training clips out of folders of frames: a start, a square and a mirror image, which follow from (seed, epoch, index).

    Args:
        clips: Files of each clip, ``frames`` or more.
        frames: T.
        size: Side of the square.
        per_clip: Samples of each clip in an epoch.
        degradation: What is done to them.
        seed: Numbers that, with epoch and index, decide everything.
    """

    def __init__(
        self, clips: list[list[Path]], frames: int, size: int, per_clip: int, degradation: BlindDegradation, seed: Sequence[int]
    ) -> None:
        self.clips, self.frames, self.size, self.per_clip = clips, frames, size, per_clip
        self.degradation, self.seed = degradation, list(seed)

    def __len__(self) -> int:
        return len(self.clips) * self.per_clip

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A clip."""
        rng = np.random.default_rng([*self.seed, epoch, index])
        files = self.clips[index % len(self.clips)]
        start = int(rng.integers(len(files) - self.frames + 1))
        chosen = files[start : start + self.frames]
        box = _position(open_picture(chosen[0], "frame", "copy the clip again").size, self.size, rng, chosen[0])
        clean = read_frames(chosen, box)
        clean = clean.flip(-1) if rng.integers(2) else clean
        clean = clean.flip(0) if rng.integers(2) else clean  # the other way through time
        return _sample(clean, degraded(clean, self.degradation, rng), index, f"{chosen[0].parent.name}/{chosen[0].stem}")


class ShiftedStills(Samples):
    """Stills as videos: the square that is cut out moves evenly over the picture.

    Args:
        files: Image files.
        frames: T.
        size: Side of the square.
        speed: Largest motion, pixels a frame.
        per_still: Samples of each file in an epoch.
        degradation: What is done to them.
        seed: Numbers that, with epoch and index, decide everything.
    """

    def __init__(
        self, files: list[Path], frames: int, size: int, speed: int, per_still: int, degradation: BlindDegradation, seed: Sequence[int]
    ) -> None:
        self.files, self.frames, self.size, self.speed, self.per_still = files, frames, size, speed, per_still
        self.degradation, self.seed = degradation, list(seed)

    def __len__(self) -> int:
        return len(self.files) * self.per_still

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A clip."""
        rng = np.random.default_rng([*self.seed, epoch, index])
        file = self.files[index % len(self.files)]
        picture = open_picture(file, "still", "copy the stills again")
        room = [side - self.size for side in picture.size]
        _position(picture.size, self.size, rng, file)
        most = [min(self.speed, space // (self.frames - 1)) for space in room]
        step = [int(rng.integers(-m, m + 1)) for m in most]
        way = [s * (self.frames - 1) for s in step]
        start = [int(rng.integers(max(0, -w), space - max(0, w) + 1)) for w, space in zip(way, room, strict=True)]
        pixels = np.asarray(picture)
        parts = []
        for t in range(self.frames):
            left, top = (begin + t * s for begin, s in zip(start, step, strict=True))
            parts.append(pixels[top : top + self.size, left : left + self.size])
        clean = torch.from_numpy(np.stack(parts)).movedim(-1, 1).float() / 255
        clean = clean.flip(-1) if rng.integers(2) else clean
        return _sample(clean, degraded(clean, self.degradation, rng), index, file.stem)


class WholeClips(Samples):
    """Clips for evaluation, fixed: the first frames, all of them or a square from their middle; degraded files where there are some.

    Args:
        clips: Files of the clean clips.
        low: Files of the degraded ones; None: ``degradation`` makes them.
        frames: At most so many frames; None: all.
        size: Side of the square; None: the whole frames, one clip a batch.
        scale: Clean frames are this many times larger than degraded files.
        degradation: What is done without files.
        seed: Numbers that, with the index, decide the degradation.
    """

    def __init__(
        self,
        clips: list[list[Path]],
        low: list[list[Path]] | None,
        frames: int | None,
        size: int | None,
        scale: int,
        degradation: BlindDegradation,
        seed: Sequence[int],
    ) -> None:
        self.clips, self.low, self.frames, self.size, self.scale = clips, low, frames, size, scale
        self.degradation, self.seed = degradation, list(seed)
        if size is None or len({len(clip[:frames]) for clip in clips}) > 1:
            self.batch_size = 1  # clips differ

    def __len__(self) -> int:
        return len(self.clips)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A clip."""
        files, rng = self.clips[index][: self.frames], np.random.default_rng([*self.seed, index])
        clean = read_frames(files)
        height, width = (side // self.scale * self.scale for side in clean.shape[-2:])
        if self.low is None:
            low = degraded(clean, self.degradation, rng)
        else:
            given = read_frames(self.low[index][: self.frames])
            wanted = (clean.shape[-2] // self.scale, clean.shape[-1] // self.scale)
            if tuple(given.shape[-2:]) != wanted:
                raise BrokenRecordError(
                    self.low[index][0],
                    "size",
                    f"{given.shape[-1]} x {given.shape[-2]} pixels, expected {wanted[1]} x {wanted[0]}: the size of {files[0]} divided by "
                    f"scale={self.scale}",
                )
            low = enlarge(given, (height, width))
        clean, low = clean[..., :height, :width], low[..., :height, :width]
        if self.size is not None:
            if min(height, width) < self.size:
                raise BrokenRecordError(files[0], "size", f"{width} x {height} pixels are fewer than eval_size={self.size}: lower it")
            top, left = (height - self.size) // 2, (width - self.size) // 2
            clean, low = (part[..., top : top + self.size, left : left + self.size].contiguous() for part in (clean, low))
        return _sample(clean, low, index, files[0].parent.name)


# ---- videos to restore -----------------------------------------------------------------------------------------------------------------


class FramePairs(Samples):
    """Each frame with the one before it, enlarged: what predict restores. The first frame stands before itself.

    Args:
        clips: Files of each clip.
        scale: Enlargement.
    """

    batch_size = 1  # clips differ in size

    def __init__(self, clips: list[list[Path]], scale: int) -> None:
        self.pairs = [(clip[max(0, place - 1)], file) for clip in clips for place, file in enumerate(clip)]
        self.scale = scale

    def __len__(self) -> int:
        return len(self.pairs)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A pair."""
        first, second = self.pairs[index]
        frames = read_frames([first, second])
        low = enlarge(frames, [side * self.scale for side in frames.shape[-2:]])
        return {"lq": low * 2 - 1, "index": index, "name": f"{second.parent.name}/{second.stem}"}


class VideoPairs(Samples):
    """The same out of a video file, by PyAV; frames are decoded one after the other.

    Args:
        file: The video.
        scale: Enlargement.

    Raises:
        ImportError: PyAV is not installed; the message names the extra.
        BrokenRecordError: The file is no video, or has no frame.
    """

    batch_size = 1

    def __init__(self, file: Path, scale: int) -> None:
        self.file, self.scale = file, scale
        file_size(file, "video", "give a video or a folder of frames")
        with self._opened() as container:
            self.count = sum(1 for _ in container.decode(video=0))
        if not self.count:
            raise BrokenRecordError(file, "video", "has no frame: copy it again")
        self._container: Any = None
        self._frames: Any = None
        self._next, self._last = 0, (-1, None)

    def _opened(self) -> Any:
        try:
            import av
        except ImportError as error:
            raise ImportError('reading a video needs PyAV: pip install "lit-methods[video]", or give a folder of frames') from error
        try:
            container = av.open(str(self.file))
        except av.error.FFmpegError as error:
            raise BrokenRecordError(self.file, "video", f"can't be decoded ({error}): truncated or no video, copy it again") from error
        if not container.streams.video:
            container.close()
            raise BrokenRecordError(self.file, "video", "holds no video, only sound or the like: give another file")
        return container

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the file itself."""
        return vars(self) | {"_container": None, "_frames": None, "_next": 0, "_last": (-1, None)}

    def _frame(self, index: int) -> NDArray[np.uint8]:
        if self._last[0] == index:
            return self._last[1]  # type: ignore[return-value]
        if self._frames is None or index < self._next:
            self._container = self._opened()
            self._frames, self._next = self._container.decode(video=0), 0
        found = None
        while self._next <= index:
            found = next(self._frames)
            self._next += 1
        pixels: NDArray[np.uint8] = found.to_ndarray(format="rgb24")  # type: ignore[union-attr]
        self._last = (index, pixels)  # type: ignore[assignment]
        return pixels

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A pair."""
        first, second = self._frame(max(0, index - 1)), self._frame(index)
        if first.shape != second.shape:
            raise BrokenRecordError(
                self.file,
                f"frame {index}",
                f"{second.shape[1]} x {second.shape[0]} pixels, the one before {first.shape[1]} x {first.shape[0]}: the frames of a video "
                "must have one size; cut it there",
            )
        frames = torch.from_numpy(np.stack([first, second])).movedim(-1, 1).float() / 255
        low = enlarge(frames, [side * self.scale for side in frames.shape[-2:]])
        return {"lq": low * 2 - 1, "index": index, "name": f"{self.file.stem}/{index:08d}"}


class ClipPairs(Samples):
    """Frames of evaluation clips, each with the one before it, without the clean ones.

    Args:
        clips: Samples with ``lq`` (T, 3, H, W), of one length.
    """

    batch_size = 1

    def __init__(self, clips: Samples) -> None:
        self.clips = clips
        self.counts = [len(clips[index]["lq"]) for index in range(len(clips))]

    def __len__(self) -> int:
        return sum(self.counts)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A pair."""
        clip, place = 0, index
        while place >= self.counts[clip]:
            place -= self.counts[clip]
            clip += 1
        found = self.clips[clip]
        return {"lq": found["lq"][[max(0, place - 1), place]], "index": index, "name": f"{found['name']}/{place:08d}"}


__all__ = [
    "ClipFiles",
    "ClipPairs",
    "FramePairs",
    "MadeClips",
    "ShiftedStills",
    "VideoPairs",
    "WholeClips",
    "clips_in",
    "degraded",
    "enlarge",
    "moving_textures",
    "read_frames",
    "read_list",
    "texture",
]
