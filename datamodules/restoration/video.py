"""Clips of degraded and clean frames: made ones, folders of frames such as REDS, stills that are moved, and videos to restore."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.restoration.blind import BlindDegradation, FaceDegradation
from lit_methods.datamodules.restoration.clips import (
    FOLDERS,
    VIDEOS,
    ClipFiles,
    ClipPairs,
    FramePairs,
    MadeClips,
    ShiftedStills,
    VideoPairs,
    WholeClips,
    clips_in,
    read_list,
)
from lit_methods.datamodules.restoration.images import ENDINGS
from lit_methods.datamodules.restoration.staged import StagedLoader


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


__all__ = ["VideoRestorationDataModule"]
