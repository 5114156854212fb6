"""YouTube-VOS: videos of objects with masks at every fifth frame; which videos count as labelled is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.checks import within
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pictures import open_indices
from lit_methods.datamodules.reading import AGAIN, plain_file_name, read_json
from lit_methods.datamodules.samples import OnBroken
from lit_methods.datamodules.video.clips import ActionClipsDataModule, ActionVideo, Part, drawn_share
from lit_methods.datamodules.video.jhmdb import picture_frames

Ints = NDArray[np.int64]
_MISSING = "the release is incomplete here, unpack its archive again"


@dataclass(frozen=True, eq=False)
class ObjectVideo:
    """An object of a video, in frames that have a mask.

    Attributes:
        name: Video and object.
        label: Category.
        pictures: Frames with an annotation.
        drawings: Their masks, an image of object numbers for each.
        number: The object's number in the masks.
    """

    name: str
    label: int
    pictures: tuple[Path, ...]
    drawings: tuple[Path, ...]
    number: int

    def length(self) -> int:
        """Annotated frames: the others don't count."""
        return len(self.pictures)

    def annotated(self) -> Ints:
        """All of them."""
        return np.arange(len(self.pictures))

    def covered(self) -> Ints:
        """All of them."""
        return self.annotated()

    def frames(self, numbers: Ints) -> NDArray[np.uint8]:
        """(N,) -> (N, H, W, 3)."""
        return picture_frames(self.pictures, numbers)

    def masks(self, numbers: Ints, height: int, width: int) -> NDArray[np.bool_]:
        """(N,) -> (N, H, W).

        Raises:
            BrokenRecordError: A mask is broken, or has another size than the frames.
        """
        found = np.empty((len(numbers), height, width), dtype=bool)
        for own, number in zip(found, numbers.tolist(), strict=True):
            drawn = open_indices(self.drawings[number], "mask", _MISSING)
            if drawn.shape != (height, width):
                sizes = f"{drawn.shape[1]} x {drawn.shape[0]}"
                raise BrokenRecordError(
                    self.drawings[number],
                    "mask",
                    f"has {sizes} pixels, and its frame {width} x {height}: they belong to different releases",
                )
            own[:] = drawn == self.number
        return found


def read_meta(path: Path) -> dict[str, dict[int, tuple[str, tuple[str, ...]]]]:
    """``meta.json``: video -> object -> category and names of its annotated frames.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is damaged or of another form.
    """
    stored = read_json(path, "videos", _MISSING)
    videos = stored.get("videos") if isinstance(stored, Mapping) else None
    if not isinstance(videos, Mapping) or not videos:
        raise BrokenRecordError(path, "videos", f"isn't there or is empty, expected objects of each video: {AGAIN}")
    found: dict[str, dict[int, tuple[str, tuple[str, ...]]]] = {}
    for name, video in videos.items():
        plain_file_name(name, path, "videos")
        objects = video.get("objects") if isinstance(video, Mapping) else None
        if not isinstance(objects, Mapping) or not objects:
            raise BrokenRecordError(path, f"videos, {name}", f"has no objects: {AGAIN}")
        found[name] = {}
        for number, entry in objects.items():
            place = f"videos, {name}, object {str(number)[:20]}"
            frames = entry.get("frames") if isinstance(entry, Mapping) else None
            category = entry.get("category") if isinstance(entry, Mapping) else None
            if not str(number).isdecimal() or not 0 < int(number) < 256 or not isinstance(category, str) or not category:
                raise BrokenRecordError(path, place, f"has no number from 1 to 255 and category: {AGAIN}")
            if not isinstance(frames, Sequence) or isinstance(frames, str) or not frames or not all(isinstance(one, str) for one in frames):
                raise BrokenRecordError(path, f"{place}, frames", f"isn't a list of names: {AGAIN}")
            for frame in frames:
                plain_file_name(frame, path, f"{place}, frames")
            if list(frames) != sorted(set(frames)):
                raise BrokenRecordError(path, f"{place}, frames", f"don't rise: {AGAIN}")
            found[name][int(number)] = (category, tuple(frames))
    return found


class YouTubeVOSDataModule(ActionClipsDataModule):
    """YouTube-VOS from the released frames and masks; each video counts with its object that is annotated longest.

    Batch: {"labelled": {"clip": (B, 3, T, h, w) float32 in [0, 1], "mask": (B, 1, T, h, w) float32, "label": (B,) int64, ...}, "unlabelled": {"clip": (B, 3, T, h, w), "index": (B,) int64}}

    ``label`` is the category of the object, in alphabetical order; ``video`` (B,) int64 is the number of the video. Below ``root`` lie
    ``train/meta.json``, ``train/JPEGImages/<video>/00000.jpg`` and ``train/Annotations/<video>/00000.png``. Frames without a mask don't
    count: neighbours in a clip are five frames of the camera apart. The released validation has masks of the first frames alone, so
    videos of ``train`` are held out.

    Args:
        root: Folder of the release.
        labelled_share: Share of the training videos of each category that is labelled; 1: all are.
        held_out: Share of the videos of each category that validation and test see.
        frames: T.
        stride: Step between the annotated frames of a clip.
        image_size: Height and width that are cut out of the frames.
        resize: Height and width that frames are brought to before; None: they stay.
        batch_size: Labelled clips per process and step.
        unlabelled_batch_size: Unlabelled clips per process and step; None: ``batch_size``.
        eval_batch_size: Clips per process and evaluation step; None: ``batch_size``.
        on_broken: ``error``: a broken video ends the run, naming the file; ``skip``: the next good one takes its place, in evaluation it is
            left out; both are counted and told.
        num_workers: Processes that read data, for each of the two training loaders.
        seed: Seed of order, clips and crops, and of which videos are labelled; those that are held out are always the same.

    Raises:
        WrongRootError: The folder lacks videos.
        BrokenRecordError: A file is damaged.
    """  # noqa: E501

    def __init__(
        self,
        root: Path | None = None,
        labelled_share: float = 0.2,
        held_out: float = 0.1,
        frames: int = 8,
        stride: int = 1,
        image_size: Sequence[int] | None = (224, 224),
        resize: Sequence[int] | None = (256, 448),
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
        within("(0, 1]", "a share", labelled_share=labelled_share)
        within("(0, 1)", "a share", held_out=held_out)
        self.root = data_path(root)
        self.save_hyperparameters()
        self._parts: dict[Part, list[ActionVideo]] = {}

    def check_root(self, stage: str = "fit") -> None:
        """Look for frames and masks."""
        self.refuse_no_root()
        for name in ("train/meta.json", "train/JPEGImages", "train/Annotations"):
            self.expect(name, "unpack train.zip of YouTube-VOS there", "videos")

    def read(self, part: Part) -> Sequence[ActionVideo]:
        """The videos of one part."""
        assert self.root is not None
        if not self._parts:
            folder = self.root / "train"
            meta = read_meta(folder / "meta.json")
            chosen: dict[str, Any] = {name: max(objects.items(), key=lambda one: len(one[1][1])) for name, objects in meta.items()}
            self.class_names = tuple(sorted({category for _, (category, _) in chosen.values()}))
            videos: list[ActionVideo] = [
                ObjectVideo(
                    f"{name}, object {number}",
                    self.class_names.index(category),
                    tuple(folder / "JPEGImages" / name / f"{frame}.jpg" for frame in frames),
                    tuple(folder / "Annotations" / name / f"{frame}.png" for frame in frames),
                    number,
                )
                for name, (number, (category, frames)) in sorted(chosen.items())
            ]
            held = drawn_share([one.name for one in videos], [one.label for one in videos], self.hparams["held_out"], 0)
            test = [one for one, out in zip(videos, held, strict=True) if out]
            train = [one for one, out in zip(videos, held, strict=True) if not out]
            names, labels = [one.name for one in train], [one.label for one in train]
            known = drawn_share(names, labels, self.hparams["labelled_share"], self.seed)
            labelled = [one for one, own in zip(train, known, strict=True) if own]
            unlabelled = [one for one, own in zip(train, known, strict=True) if not own]
            self._parts = {"labelled": labelled, "unlabelled": unlabelled, "val": test, "test": test}
        return self._parts[part]


__all__ = ["ObjectVideo", "YouTubeVOSDataModule", "read_meta"]
