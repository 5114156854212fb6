"""What the datamodules of labelled actions share: videos with masks, clips out of them, few labels beside many videos without."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from numpy.typing import NDArray

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.samples import OnBroken, SampleDataset

Ints = NDArray[np.int64]
Part = Literal["labelled", "unlabelled", "val", "test"]


class ActionVideo(Protocol):
    """A video with an action."""

    @property
    def name(self) -> str:
        """Of the video, for messages."""

    @property
    def label(self) -> int:
        """Class."""

    def length(self) -> int:
        """Frames."""

    def annotated(self) -> Ints:
        """Frames that somebody annotated, rising, at least one: training clips lie around them."""

    def covered(self) -> Ints:
        """Frames with something to find, rising: the annotated ones, and those that were filled in between."""

    def frames(self, numbers: Ints) -> NDArray[np.uint8]:
        """(N,) frame numbers -> (N, H, W, 3)."""

    def masks(self, numbers: Ints, height: int, width: int) -> NDArray[np.bool_]:
        """(N,) frame numbers -> (N, H, W), the foreground."""


# ---- which frames ----------------------------------------------------------------------------------------------------------------------


def clip_around(centre: int, length: int, frames: int, stride: int) -> Ints:
    """Frames of a clip around one: every ``stride``-th, every one if the clip would begin before the video.

    Args:
        centre: Frame that the clip is around.
        length: Frames of the video.
        frames: T of the clip.
        stride: Step.

    Returns:
        (T,) numbers in 0..length - 1; of a video that is shorter than the clip the last frame is repeated.
    """
    start = centre - frames * stride // 2
    if start < 0 or length < frames * stride:
        stride = 1
        start = max(0, centre - frames // 2)
    start = max(0, min(start, length - frames * stride))
    return np.minimum(start + stride * np.arange(frames), length - 1)


def clips_of_all(length: int, frames: int, stride: int) -> list[Ints]:
    """Clips that have each frame of a video once: (T,) numbers each, -1 behind the end."""
    clips = []
    for block in range(0, length, frames * stride):
        for offset in range(stride):
            numbers = block + offset + stride * np.arange(frames)
            if numbers[0] < length:
                clips.append(np.where(numbers < length, numbers, -1))
    return clips


# ---- samples ---------------------------------------------------------------------------------------------------------------------------


class Clips(SampleDataset):
    """Clips of videos.

    Samples: ``clip`` (3, T, h, w) float32 in [0, 1]; ``mask`` (1, T, h, w) float32, 0 or 1, ``label`` and ``video``, its number, where
    labels are asked for; ``index``.

    Args:
        videos: The videos.
        frames: T.
        stride: Step between frames.
        size: h and w, which are cut out: at random in training, of the middle in evaluation; None: whole frames.
        resize: Height and width that frames are brought to before; None: they stay.
        kind: ``train``: around an annotated frame that is drawn; ``one``: around the middle one; ``all``: all frames.
        labels: Whether masks and classes are read.
        seed: Of what is drawn.
        on_broken: ``error`` raises; ``skip`` takes the next good clip in training, and leaves a broken one out in evaluation.
        num_workers: Worker processes that may read the clips, for the count of broken ones.
    """

    def __init__(
        self,
        videos: Sequence[ActionVideo],
        frames: int,
        stride: int,
        size: tuple[int, int] | None,
        resize: tuple[int, int] | None,
        kind: Literal["train", "one", "all"],
        labels: bool = True,
        seed: int = 0,
        on_broken: OnBroken = "error",
        num_workers: int = 0,
    ) -> None:
        self.videos, self.frames, self.stride, self.size, self.resize, self.kind, self.labels = (
            videos,
            frames,
            stride,
            size,
            resize,
            kind,
            labels,
        )
        self.places: list[tuple[int, Ints | None]] = [(number, None) for number in range(len(videos))]
        if kind == "all":
            self.places = [(number, clip) for number, video in enumerate(videos) for clip in self._clips(video, on_broken)]
        super().__init__(len(self.places), seed, kind == "train", on_broken, num_workers)

    def _clips(self, video: ActionVideo, on_broken: OnBroken) -> list[Ints | None]:
        """Clips of a video that have something to find; of a broken one a place that is found to be broken when it is read."""
        try:
            covered = video.covered()
            return [clip for clip in clips_of_all(video.length(), self.frames, self.stride) if np.isin(clip, covered).any()]
        except BrokenRecordError:
            if on_broken == "error":
                raise
            return [None]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Read one clip."""
        number, chosen = self.places[index]
        video = self.videos[number]
        if chosen is None:
            annotated = video.annotated()
            centre = int(rng.choice(annotated)) if self.kind == "train" else int(annotated[len(annotated) // 2])
            chosen = clip_around(centre, video.length(), self.frames, self.stride)
        inside = chosen >= 0
        pixels = video.frames(chosen[inside])
        height, width = pixels.shape[1:3]
        clip = torch.zeros(3, self.frames, height, width)
        clip[:, torch.from_numpy(inside)] = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 255
        sample: dict[str, Any] = {"clip": clip, "index": index}
        if self.labels:
            mask = torch.zeros(1, self.frames, height, width)
            mask[0, torch.from_numpy(inside)] = torch.from_numpy(video.masks(chosen[inside], height, width)).float()
            sample |= {"mask": mask, "label": video.label, "video": number}
        return self._cut(sample, video.name, rng)

    def _cut(self, sample: dict[str, Any], name: str, rng: np.random.Generator) -> dict[str, Any]:
        """Resize and cut out clip and mask alike."""
        parts = [key for key in ("clip", "mask") if key in sample]
        if self.resize is not None and tuple(sample["clip"].shape[2:]) != self.resize:
            for key in parts:
                options: dict[str, Any] = {"mode": "nearest"} if key == "mask" else {"mode": "bilinear", "antialias": True}
                sample[key] = F.interpolate(sample[key].transpose(0, 1), self.resize, **options).transpose(0, 1).clamp(0, 1)
        if self.size is not None:
            room = [have - want for have, want in zip(sample["clip"].shape[2:], self.size, strict=True)]
            if min(room) < 0:
                have = tuple(sample["clip"].shape[2:])
                raise BrokenRecordError(name, "frames", f"have {have} pixels, and {self.size} are cut out: give resize, or image_size")
            top, left = (int(rng.integers(free + 1)) if self.kind == "train" else free // 2 for free in room)
            for key in parts:
                sample[key] = sample[key][:, :, top : top + self.size[0], left : left + self.size[1]].contiguous()
        return sample


# ---- datamodule ------------------------------------------------------------------------------------------------------------------------


class ActionClipsDataModule(LoaderDataModule):
    """Base of the datamodules of actions: labelled and unlabelled clips side by side, whole videos in the test.

    An epoch is one pass over the unlabelled videos; labelled ones start again as often as needed. Validation sees one clip of each test
    video, test and predict all its frames. Subclasses give :meth:`read`.

    Args:
        frames: T of a clip.
        stride: Step between the frames of a clip, 1 where it would begin before the video.
        image_size: Height and width that are cut out of the frames; None: whole frames, which must then be of one size.
        resize: Height and width that frames are brought to before; None: they stay.
        batch_size: Labelled clips per process and step.
        unlabelled_batch_size: Unlabelled clips per process and step; None: ``batch_size``.
        eval_batch_size: Clips per process and evaluation step; None: ``batch_size``.
        on_broken: What to do about a broken video.
        num_workers: Processes that read data, for each of the two training loaders.
        seed: Seed of order, clips and crops.

    Attributes:
        class_names: Names of the classes.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        frames: int,
        stride: int,
        image_size: Sequence[int] | None,
        resize: Sequence[int] | None,
        batch_size: int,
        unlabelled_batch_size: int | None,
        eval_batch_size: int | None,
        on_broken: OnBroken,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        at_least(1, frames=frames, stride=stride, unlabelled_batch_size=unlabelled_batch_size)
        one_of(OnBroken, on_broken=on_broken)
        for name, sides in (("image_size", image_size), ("resize", resize)):
            if sides is not None and (len(sides) != 2 or min(sides) < 1):
                raise ValueError(f"{name} is {list(sides)}: give height and width, such as [224, 224]")
        self._clip = (frames, stride, _pair(image_size), _pair(resize))
        self._unlabelled_size = batch_size if unlabelled_batch_size is None else unlabelled_batch_size
        self.on_broken = on_broken
        self.unlabelled_set: Clips | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def refuse_no_root(self) -> None:
        """Raise unless a root is given, for data sets without a built-in sample.

        Raises:
            WrongRootError: There is none.
        """
        if getattr(self, "root", None) is None:
            name = type(self).__name__
            raise WrongRootError(f"{name} has no built-in sample: give root=<folder of the release>, or use MovingShapesDataModule")

    def read(self, part: Part) -> Sequence[ActionVideo]:
        """The videos of one part; none where there is no such part."""
        raise NotImplementedError

    def clips(self, part: Part) -> Clips:
        """The clips of one part."""
        kinds: dict[Part, Literal["train", "one", "all"]] = {"labelled": "train", "unlabelled": "train", "val": "one", "test": "all"}
        options: dict[str, Any] = {"seed": self.seed, "on_broken": self.on_broken, "num_workers": self.num_workers}
        dataset = Clips(self.read(part), *self._clip, kinds[part], part != "unlabelled", **options)
        if part in ("val", "test") and self.on_broken == "skip" and len(dataset):
            dataset.leave_out_broken(part)
        return dataset

    def setup(self, stage: str | None = None) -> None:
        """Read the lists of videos of a stage."""
        self.check_root(stage or "fit")
        if stage in ("fit", None) and self.train_set is None:
            self.train_set, unlabelled = self.clips("labelled"), self.clips("unlabelled")
            if not len(self.train_set):
                raise WrongRootError(f"root={str(getattr(self, 'root', None))!r} has no labelled video: look at the list of labelled ones")
            self.unlabelled_set = unlabelled if len(unlabelled) else None
        if stage in ("fit", "validate", None) and self.val_set is None:
            self.val_set = self.clips("val")
        if stage in ("test", "predict", None) and self.test_set is None:
            self.test_set = self.clips("test")

    def train_dataloader(self) -> CombinedLoader:
        """Labelled and unlabelled batches side by side, resumable; labelled ones alone where all videos are."""
        loaders = {"labelled": self.loader(self.data_of("train"), training=True)}
        if self.unlabelled_set is not None:
            loaders["unlabelled"] = self.loader(self.unlabelled_set, self._unlabelled_size, training=True)
        return CombinedLoader(loaders, mode="max_size_cycle")


def _pair(sides: Sequence[int] | None) -> tuple[int, int] | None:
    return None if sides is None else (sides[0], sides[1])


def filled_boxes(boxes: Sequence[NDArray[Any]], height: int, width: int, file: Any, field: str) -> NDArray[np.bool_]:
    """Boxes of frames as masks.

    Args:
        boxes: For each frame (n, 4) x, y, width, height in pixels, from 0.
        height: Of the frames.
        width: Of the frames.
        file: Where the boxes come from, for the message.
        field: What they are called there, for the message.

    Returns:
        (N, H, W).

    Raises:
        BrokenRecordError: A box isn't finite, has no area, or lies outside the image, by more than a pixel even in part.
    """
    masks = np.zeros((len(boxes), height, width), dtype=bool)
    for number, own in enumerate(boxes):
        for box in own:
            if not np.isfinite(box).all() or min(box[2:]) <= 0:
                raise BrokenRecordError(file, field, f"the box {_listed(box)} (x, y, width, height) has no area: repair or leave it out")
            left, top = box[:2]
            right, bottom = left + box[2], top + box[3]
            if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
                size = f"{width} x {height} pixels"
                wrong = f"the box {_listed(box)} (x, y, width, height) lies outside the image of {size}: of another video, or broken"
                raise BrokenRecordError(file, field, wrong)
            rows = slice(max(0, round(float(top))), round(float(bottom)))
            masks[number, rows, max(0, round(float(left))) : round(float(right))] = True
    return masks


def _listed(box: NDArray[Any]) -> list[float]:
    return [round(float(value), 1) for value in box]


def drawn_share(names: Sequence[str], labels: Sequence[int], share: float, seed: int) -> list[bool]:
    """Which videos are labelled: the same share of each class, at least one, by a seeded shuffle."""
    chosen = np.zeros(len(names), dtype=bool)
    of = np.asarray(labels)
    for label in np.unique(of):
        mine = np.flatnonzero(of == label)
        number = max(1, round(share * len(mine)))
        chosen[np.random.default_rng([seed, int(label)]).permutation(mine)[:number]] = True
    found: list[bool] = chosen.tolist()
    return found


__all__ = ["ActionClipsDataModule", "ActionVideo", "Clips", "clip_around", "clips_of_all", "drawn_share", "filled_boxes"]
