"""JHMDB-21: 21 actions of single persons, with masks from fitted puppets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.reading import AGAIN, once, plain_file_name, read_matlab, read_text
from lit_methods.datamodules.samples import OnBroken
from lit_methods.datamodules.video.clips import ActionClipsDataModule, ActionVideo, Part

Ints = NDArray[np.int64]
CLASSES = (
    "brush_hair", "catch", "clap", "climb_stairs", "golf", "jump", "kick_ball", "pick", "pour", "pullup", "push", "run", "shoot_ball",
    "shoot_bow", "shoot_gun", "sit", "stand", "swing_baseball", "throw", "walk", "wave",
)  # fmt: skip
_MISSING = "the release is incomplete here, unpack its archive again"


def picture_frames(paths: Sequence[Path], numbers: Ints, field_name: str = "frame") -> NDArray[np.uint8]:
    """Frames that are image files.

    Args:
        paths: One for each frame of a video.
        numbers: (N,) frames from 0.
        field_name: What a file is to the data set, for messages.

    Returns:
        (N, H, W, 3) RGB.

    Raises:
        BrokenRecordError: A file is missing or broken, or has another size than the first.
    """
    found = [np.asarray(open_picture(paths[number], field_name, _MISSING)) for number in numbers.tolist()]
    for number, frame in zip(numbers.tolist(), found, strict=True):
        if frame.shape != found[0].shape:
            sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (found[0], frame))
            raise BrokenRecordError(paths[number], field_name, f"frames of {sizes} pixels in one video: {AGAIN}")
    return np.stack(found)


@dataclass(frozen=True, eq=False)
class PuppetVideo:
    """Frames as images, masks in a MATLAB file.

    Attributes:
        name: Class and video.
        label: Class.
        folder: Folder of the frames ``00001.png`` and so on.
        mask: File with ``part_mask`` (H, W, L).
    """

    name: str
    label: int
    folder: Path
    mask: Path
    _paths: list[Path] = field(default_factory=list)

    def paths(self) -> list[Path]:
        """The frames' files, listed once.

        Raises:
            MissingFileError: The folder isn't there, has no frame, or one is missing between others.
        """
        if not self._paths:
            found = listed(self.folder, endings=(".png", ".jpg", ".jpeg")) if self.folder.is_dir() else []
            if not found:
                raise MissingFileError(self.folder, "frames", f"no images are there: {_MISSING}")
            try:
                numbers = [int(path.stem) for path in found]
            except ValueError:
                raise BrokenRecordError(self.folder, "frames", "have names that are no numbers, expected 00001.png and so on") from None
            once(numbers, self.folder, "frames", "frame")
            ordered = sorted(zip(numbers, found, strict=True))
            for place, (number, path) in enumerate(ordered):
                if number != ordered[0][0] + place:
                    lost = self.folder / f"{ordered[0][0] + place:05d}{path.suffix}"
                    raise MissingFileError(lost, "frame", f"no such file, but there are later ones: {_MISSING}")
            self._paths.extend(path for _, path in ordered)
        return self._paths

    def length(self) -> int:
        """Frames."""
        return len(self.paths())

    def annotated(self) -> Ints:
        """All frames."""
        return np.arange(self.length())

    def covered(self) -> Ints:
        """All of them."""
        return self.annotated()

    def frames(self, numbers: Ints) -> NDArray[np.uint8]:
        """(N,) -> (N, H, W, 3)."""
        return picture_frames(self.paths(), numbers)

    def masks(self, numbers: Ints, height: int, width: int) -> NDArray[np.bool_]:
        """(N,) -> (N, H, W).

        Raises:
            BrokenRecordError: The file is damaged, or its masks don't fit the frames.
        """
        stored: Any = read_matlab(self.mask, ["part_mask"], "masks", _MISSING).get("part_mask")
        if stored is None or getattr(stored, "ndim", 0) not in (2, 3) or stored.dtype.kind not in "biuf":
            raise BrokenRecordError(self.mask, "part_mask", f"isn't there, or isn't (H, W, L) numbers: another file, or damaged; {AGAIN}")
        masks = stored.reshape(*stored.shape[:2], -1)
        if masks.shape != (height, width, self.length()):
            size = f"{self.length()} frames of {width} x {height} pixels"
            wrong = f"is {masks.shape}, expected {(height, width, self.length())} for {size}: they belong to different videos or releases"
            raise BrokenRecordError(self.mask, "part_mask", wrong)
        if masks.dtype.kind == "f" and not np.isfinite(masks).all():
            raise BrokenRecordError(self.mask, "part_mask", f"has values that aren't finite: {AGAIN}")
        return np.ascontiguousarray(masks[:, :, numbers].transpose(2, 0, 1) > 0)


class JHMDBActionsDataModule(ActionClipsDataModule):
    """JHMDB-21 from the released frames and puppet masks.

    Batch: {"labelled": {"clip": (B, 3, T, h, w) float32 in [0, 1], "mask": (B, 1, T, h, w) float32, "label": (B,) int64, ...}, "unlabelled": {"clip": (B, 3, T, h, w), "index": (B,) int64}}

    ``video`` (B,) int64 is the number of the video. Below ``root`` lie ``Rename_Images/<class>/<video>/00001.png`` and so on,
    ``puppet_mask/<class>/<video>/puppet_mask.mat``, and the authors' lists of videos, a class/video on each line.

    Args:
        root: Folder of the release.
        labelled: Name of the list of labelled videos.
        unlabelled: Name of the list of unlabelled videos; None: there are none.
        test: Name of the list of test videos.
        frames: T.
        stride: Step between the frames of a clip.
        image_size: Height and width that are cut out of the frames.
        resize: Height and width that frames are brought to before; None: they stay.
        batch_size: Labelled clips per process and step.
        unlabelled_batch_size: Unlabelled clips per process and step; None: ``batch_size``.
        eval_batch_size: Clips per process and evaluation step; None: ``batch_size``.
        on_broken: ``error``: a broken video ends the run, naming the file; ``skip``: the next good one takes its place, in evaluation it is
            left out; both are counted and told.
        num_workers: Processes that read data, for each of the two training loaders.
        seed: Seed of order, clips and crops.

    Raises:
        WrongRootError: The folder lacks frames, masks or lists.
        BrokenRecordError: A file is damaged.
    """  # noqa: E501

    def __init__(
        self,
        root: Path | None = None,
        labelled: str = "jhmdb_classes_list_per_20_labeled.txt",
        unlabelled: str | None = "jhmdb_classes_list_per_80_unlabeled.txt",
        test: str = "testlist.txt",
        frames: int = 8,
        stride: int = 2,
        image_size: Sequence[int] | None = (224, 224),
        resize: Sequence[int] | None = (256, 256),
        batch_size: int = 4,
        unlabelled_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        on_broken: OnBroken = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            frames=frames, stride=stride, image_size=image_size, resize=resize, batch_size=batch_size, eval_batch_size=eval_batch_size,
            unlabelled_batch_size=unlabelled_batch_size, on_broken=on_broken, num_workers=num_workers, seed=seed,
        )  # fmt: skip
        self.root = data_path(root)
        self.save_hyperparameters()
        self.class_names = CLASSES

    def check_root(self, stage: str = "fit") -> None:
        """Look for frames, masks and lists."""
        self.refuse_no_root()
        hp = self.hparams
        for name in ("Rename_Images", "puppet_mask", hp["test"], *([hp["labelled"], hp["unlabelled"]] if stage == "fit" else [])):
            if name is not None:
                self.expect(name, "unpack the archives of JHMDB there, and copy the lists of videos", "videos")

    def read(self, part: Part) -> Sequence[ActionVideo]:
        """The videos of one part."""
        assert self.root is not None
        name = {"labelled": self.hparams["labelled"], "unlabelled": self.hparams["unlabelled"]}.get(part, self.hparams["test"])
        if name is None:
            return []
        source = self.root / name
        videos: list[ActionVideo] = []
        lines = [line.strip() for line in read_text(source, "list of videos", _MISSING).splitlines() if line.strip()]
        once(lines, source, "list of videos", "video")
        for number, line in enumerate(lines):
            kind, _, video = line.partition("/")
            if kind not in CLASSES:
                raise BrokenRecordError(source, f"line {number + 1}", f"is {line[:80]!r}, expected class/video, of the 21 classes: {AGAIN}")
            plain_file_name(video, source, f"line {number + 1}")
            folder, mask = self.root / "Rename_Images" / kind / video, self.root / "puppet_mask" / kind / video / "puppet_mask.mat"
            videos.append(PuppetVideo(line, CLASSES.index(kind), folder, mask))
        return videos


__all__ = ["CLASSES", "JHMDBActionsDataModule", "PuppetVideo", "picture_frames"]
