"""Clips of degraded and clean frames: made ones, folders of frames such as REDS, stills that are moved, and videos to restore."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.reading import file_size
from lit_methods.datamodules.restoration.blind import BlindDegradation, FaceDegradation
from lit_methods.datamodules.restoration.images import ENDINGS
from lit_methods.datamodules.restoration.staged import StagedLoader

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


# ---- the datamodule --------------------------------------------------------------------------------------------------------------------


class VideoRestorationDataModule(LoaderDataModule):
    """Clips of degraded and clean frames: moving videos for a consistency stage, shifted stills for details.

    Batch: {"lq": (B, T, 3, S, S) float32 in [-1, 1], "gt": (B, T, 3, S, S) float32 in [-1, 1], "index": (B,) int64, "name": list}

    The degraded frames are enlarged to the size of the clean ones.

    ``set_stage(1)`` lets training batches come from the stills from the next one on, ``set_stage(0)`` from the videos, 2 from both in turn.
    Predict batches have pairs of frames, ``lq`` (B, 2, 3, H, W), and no ``gt``.

    ``root: null``: moving textures, made as they are asked for. Else a folder with clean clips, folders of frames::

        root/train_sharp/000/00000000.png, root/val_sharp/000/00000000.png       REDS
        root/GT/<clip>/00000000.png, or root/train/GT, root/val/GT, root/test/GT

    and, for evaluation, degraded ones beside them, which are made where there are none: ``val_sharp_bicubic/X4``, or ``BIx4``, ``BDx4``,
    ``LQ`` beside ``GT``.

    Args:
        root: Folder of the above; None: made clips.
        train_list: Text file of folders of frames, one a line, for training, instead of those in ``root``.
        stills: Folder of images, or a text file of their paths, such as LSDIR's; None: the clips' frames, shifted.
        input: What ``predict`` restores: a folder of frames, a folder of such folders, or a video file, which needs the extra ``video``;
            None: the degraded frames of the test clips.
        hold_out: Names of clips that are for evaluation alone, where ``root`` has one folder for all.
        frames: T of training clips, 3 or more.
        size: S, side of a training square in pixels.
        eval_frames: Frames of an evaluation clip; None: all.
        eval_size: Side of the square that evaluation sees; None: whole frames.
        scale: Degraded files are this many times smaller.
        speed: Largest motion of stills and made clips, pixels a frame.
        degradation: What is done to clean frames; None: blur, a reduction by 4, and noise.
        per_clip: Samples of each clip, and of each still, in an epoch; of all made ones.
        num_eval: Made clips for validation, and for test.
        batch_size: Clips per process and training step.
        eval_batch_size: Clips per process and evaluation step, where they are of one size.
        num_workers: Processes that read data.
        seed: Seed of order, squares and degradations.

    Raises:
        ValueError: A number outside its range.
        WrongRootError: ``root``, ``stills`` or ``input`` holds nothing of the kind.
        BrokenRecordError: A file is broken, a clip too short, or its frames differ in size; the message names it.
    """

    def __init__(
        self,
        root: Path | None = None,
        train_list: Path | None = None,
        stills: Path | None = None,
        input: Path | None = None,
        hold_out: Sequence[str] = (),
        frames: int = 3,
        size: int = 32,
        eval_frames: int | None = 5,
        eval_size: int | None = None,
        scale: int = 4,
        speed: int = 2,
        degradation: BlindDegradation | None = None,
        per_clip: int = 256,
        num_eval: int = 8,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, eval_batch_size=eval_batch_size)
        checks.at_least(3, "frames", frames=frames)
        checks.at_least(2, "frames", eval_frames=eval_frames)
        checks.at_least(8, "pixels", size=size, eval_size=eval_size)
        checks.at_least(1, scale=scale, per_clip=per_clip, num_eval=num_eval)
        checks.at_least(0, "pixels", speed=speed)
        if isinstance(hold_out, str):
            raise ValueError(f"hold_out is the string {hold_out!r}: give a list of names, [{hold_out!r}]")
        self.root, self.train_list, self.stills, self.input = (data_path(path) for path in (root, train_list, stills, input))
        self.hold_out, self.frames, self.size, self.eval_frames, self.eval_size = list(hold_out), frames, size, eval_frames, eval_size
        self.scale, self.speed, self.per_clip, self.num_eval = scale, speed, per_clip, num_eval
        small = FaceDegradation(kernel_size=5, blur=(0.6, 1.0), downsample=(4.0, 4.0), noise=(5.0, 10.0), quality=None)
        self.degradation = small if degradation is None else degradation
        self.still_set: Any = None
        self.stage = 0
        self._loader: StagedLoader | None = None

    def set_stage(self, stage: int) -> None:
        """Training batches from the next one on: 0 videos, 1 stills, 2 in turn."""
        self.stage = stage
        if self._loader is not None:
            self._loader.stage = stage

    # ---- files -------------------------------------------------------------------------------------------------------------------------

    def check_root(self, stage: str = "fit") -> None:
        """Look for clips."""
        if self.root is not None and not any(self._clips(part) for part in ("train", "val", "test")) and self.input is None:
            raise WrongRootError(
                f"root={str(self.root)!r} holds no clips: give a folder with GT/<clip>/00000000.png, or REDS's train_sharp and val_sharp"
            )

    def _clips(self, part: str) -> list[list[Path]]:
        """Clean clips of a part."""
        assert self.root is not None
        for name in FOLDERS[part]:
            if (self.root / name).is_dir() and (clips := clips_in(self.root / name)):
                if self.hold_out and name == "GT":
                    held = [clip for clip in clips if clip[0].parent.name in self.hold_out]
                    if missing := sorted(set(self.hold_out) - {clip[0].parent.name for clip in held}):
                        raise WrongRootError(f"hold_out has {missing}, and {self.root / name} no such clip")
                    return [clip for clip in clips if clip not in held] if part == "train" else held
                return clips
        return []

    def _low(self, clips: list[list[Path]]) -> list[list[Path]] | None:
        """Degraded files of clean clips; None: there are none."""
        clean = clips[0][0].parent.parent
        names = (f"{clean.name}_bicubic/X{self.scale}", f"BIx{self.scale}", f"BDx{self.scale}", "LQ")
        folder = next((clean.parent / name for name in names if (clean.parent / name).is_dir()), None)
        if folder is None:
            return None
        low = [[folder / file.parent.name / file.name for file in clip] for clip in clips]
        for clip, found in zip(clips, low, strict=True):
            if missing := [file for file in found if not file.is_file()]:
                raise MissingFileError(
                    missing[0], "degraded frame", f"no such file for {clip[0].parent.name} (and {len(missing) - 1} more): unpack it there"
                )
        return low

    def _long_enough(self, clips: list[list[Path]], frames: int) -> list[list[Path]]:
        for clip in clips:
            if len(clip) < frames:
                raise BrokenRecordError(
                    clip[0].parent, "frames", f"the clip has {len(clip)} frames, expected {frames} or more: lower frames, or leave it out"
                )
        return clips

    def _still_files(self, clips: list[list[Path]]) -> list[Path]:
        if self.stills is None:
            return [file for clip in clips for file in clip]
        if self.stills.suffix == ".txt":
            return read_list(self.stills, "stills")
        files = listed(self.stills, "**/*", endings=ENDINGS) if self.stills.is_dir() else []
        if not files:
            raise WrongRootError(f"stills={str(self.stills)!r} holds no images: give a folder of them, or a text file of paths (.txt)")
        return files

    def setup(self, stage: str) -> None:
        """List the files, or make the clips."""
        if self.val_set is None and self.test_set is None:
            self.check_root(stage)
            if self.root is None and self.train_list is None:
                self._make()
            else:
                self._list(stage)
        if stage == "predict" and self.predict_set is None:
            self.predict_set = self._to_restore()

    def _make(self) -> None:
        size, speed, given = self.size, self.speed, self.degradation
        self.train_set = MadeClips(self.per_clip, self.frames, size, speed, given, (self.seed, 0), False, "clip")
        if self.stills is None:
            self.still_set = MadeClips(self.per_clip, self.frames, size, min(1, speed), given, (self.seed, 1), True, "still")
        else:
            self.still_set = ShiftedStills(self._still_files([]), self.frames, size, speed, self.per_clip, given, (self.seed, 1))
        side, frames = self.eval_size or size, self.eval_frames or self.frames
        self.val_set, self.test_set = (
            MadeClips(self.num_eval, frames, side, speed, given, (number,), False, name) for number, name in ((2, "val"), (3, "test"))
        )

    def _list(self, stage: str) -> None:
        given = self.degradation
        if self.train_list is not None:
            folders = read_list(self.train_list, "train_list")
            clips = [frames for folder in folders if folder.is_dir() for frames in clips_in(folder)]
            if not clips:
                raise BrokenRecordError(self.train_list, "train_list", "names no folder of frames: give one a line")
        else:
            clips = self._clips("train")
        if clips:
            clips = self._long_enough(clips, self.frames)
            self.train_set = ClipFiles(clips, self.frames, self.size, self.per_clip, given, (self.seed, 0))
            stills = self._still_files(clips)
            self.still_set = ShiftedStills(stills, self.frames, self.size, self.speed, self.per_clip, given, (self.seed, 1))
        for part in ("val", "test") if self.root is not None else ():
            if clips := self._clips(part):
                clips = self._long_enough(clips, 2)
                found = WholeClips(clips, self._low(clips), self.eval_frames, self.eval_size, self.scale, given, (2,))
                setattr(self, f"{part}_set", found)

    def _to_restore(self) -> Samples:
        if self.input is not None and self.input.suffix.lower() in VIDEOS:
            return VideoPairs(self.input, self.scale)
        if self.input is not None:
            clips = clips_in(self.input) if self.input.is_dir() else []
            if not clips:
                raise WrongRootError(
                    f"input={str(self.input)!r} holds no frames: give a folder of images, a folder of such folders, or a video "
                    f"({', '.join(VIDEOS)})"
                )
            return FramePairs(clips, self.scale)
        return ClipPairs(self.test_set)

    def train_dataloader(self) -> StagedLoader:
        """Batches of videos and of stills, by the stage."""
        if self.train_set is None:
            raise WrongRootError(f"root={str(self.root)!r} has no clips for training: give train_list, or leave some out of hold_out")
        self._loader = StagedLoader([self.loader(part, training=True) for part in (self.train_set, self.still_set)])
        self._loader.stage = self.stage
        return self._loader


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
    "VideoRestorationDataModule",
    "WholeClips",
    "clips_in",
    "degraded",
    "enlarge",
    "moving_textures",
    "read_frames",
    "read_list",
    "texture",
]
