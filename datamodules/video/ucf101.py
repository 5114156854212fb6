"""UCF101-24: 24 actions in videos of UCF101, with boxes; the authors' lists of labelled and unlabelled videos, or the corrected tubes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_methods.checks import literals, within
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pickles import ArraysOnly
from lit_methods.datamodules.reading import AGAIN, once, plain_file_name, read_bytes, read_matlab, read_text, whole_numbers
from lit_methods.datamodules.samples import OnBroken
from lit_methods.datamodules.video.clips import ActionClipsDataModule, ActionVideo, Part, drawn_share, filled_boxes
from lit_methods.datamodules.video.decoding import frame_count, read_frames

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Annotations = Literal["pickles", "tubes"]
CLASSES = (
    "Basketball", "BasketballDunk", "Biking", "CliffDiving", "CricketBowling", "Diving", "Fencing", "FloorGymnastics", "GolfSwing",
    "HorseRiding", "IceDancing", "LongJump", "PoleVault", "RopeClimbing", "SalsaSpin", "SkateBoarding", "Skiing", "Skijet",
    "SoccerJuggling", "Surfing", "TennisSwing", "TrampolineJumping", "VolleyballSpiking", "WalkingWithDog",
)  # fmt: skip
_MISSING = "the release is incomplete here, unpack its archive again"
_MAX_FRAME = 1 << 20


@dataclass(frozen=True, eq=False)
class BoxTube:
    """Boxes of one actor.

    Attributes:
        start: First frame, from 0.
        boxes: (n, 4) x, y, width, height in pixels from 0, one for each frame from ``start`` on.
        annotated: Frames that were annotated by hand, rising; the others were filled in.
        label: Class.
    """

    start: int
    boxes: Floats
    annotated: Ints
    label: int

    @property
    def frames(self) -> Ints:
        """(n,) frames with a box."""
        return self.start + np.arange(len(self.boxes))


def interpolated(tube: BoxTube) -> Floats:
    """Boxes of a tube that follow from those of its annotated frames alone: linear between them, and the nearest one before and behind.

    Returns:
        (n, 4), as ``boxes``; these themselves if no annotated frame is among the tube's frames.
    """
    known = np.intersect1d(tube.annotated, tube.frames)
    if not len(known):
        return tube.boxes
    sides = tube.boxes[known - tube.start]
    return np.stack([np.interp(tube.frames, known, sides[:, column]) for column in range(4)], axis=1)


@dataclass(frozen=True, eq=False)
class BoxedVideo:
    """A video file with tubes.

    Attributes:
        name: Class and file, without ending.
        label: Class.
        path: The file.
        tubes: What to find, at least one.
        source: File of the annotations, for messages.
        frames_known: Frames, where the annotations say it; None: counted in the file.
        sparse: Boxes follow from the annotated frames alone.
    """

    name: str
    label: int
    path: Path
    tubes: tuple[BoxTube, ...]
    source: Path
    frames_known: int | None = None
    sparse: bool = False
    _length: list[int] = field(default_factory=list)

    def length(self) -> int:
        """Frames of the file, counted once."""
        if not self._length:
            found = frame_count(self.path, "video", _MISSING)
            if self.frames_known is not None and found < self.frames_known:
                raise BrokenRecordError(
                    self.path, "video", f"has {found} frames, and {self.source.name} says {self.frames_known}: truncated, {AGAIN}"
                )
            last = max(int(tube.frames[-1]) for tube in self.tubes)
            if last > found:  # one frame behind the end is in the release itself
                raise BrokenRecordError(
                    self.path, "video", f"has {found} frames, and {self.source.name} has a box in frame {last} (from 0): truncated, {AGAIN}"
                )
            self._length.append(found)
        return self._length[0]

    def annotated(self) -> Ints:
        """Annotated frames of all tubes that the file has."""
        found = np.unique(np.concatenate([tube.annotated for tube in self.tubes]))
        found = found[found < self.length()]
        if not len(found):
            raise BrokenRecordError(
                self.source, f"annotated frames of {self.name}", f"all lie behind the end of its {self.length()} frames"
            )
        return found

    def covered(self) -> Ints:
        """Frames with a box that the file has."""
        found = np.unique(np.concatenate([tube.frames for tube in self.tubes]))
        return found[found < self.length()]

    def frames(self, numbers: Ints) -> NDArray[np.uint8]:
        """(N,) -> (N, H, W, 3)."""
        return read_frames(self.path, numbers, "video", _MISSING)

    def masks(self, numbers: Ints, height: int, width: int) -> NDArray[np.bool_]:
        """(N,) -> (N, H, W): all boxes, filled."""
        tubes = [(tube.start, interpolated(tube) if self.sparse else tube.boxes) for tube in self.tubes]
        boxes = [
            np.array([own[number - start] for start, own in tubes if start <= number < start + len(own)]).reshape(-1, 4)
            for number in numbers.tolist()
        ]
        return filled_boxes(boxes, height, width, self.source, f"boxes of {self.name}")


# ---- annotations -----------------------------------------------------------------------------------------------------------------------


class _AnnotationFile(ArraysOnly):
    owner = "list of annotations"


def _name(name: Any, source: Path, place: str) -> str:
    """Class and file of a video, which a path is made of."""
    text = str(name)
    parts = text.split("/")
    if len(parts) != 2:
        raise BrokenRecordError(source, place, f"the video is called {text[:80]!r}, expected class/video: {AGAIN}")
    for part in parts:
        plain_file_name(part, source, place)
    return text


def _number(value: Any, source: Path, place: str) -> int:
    """A single whole number."""
    found = whole_numbers(value, source, place).reshape(-1)
    if len(found) != 1:
        raise BrokenRecordError(source, place, f"has {len(found)} numbers, expected one: {AGAIN}")
    return int(found[0])


def _tube(start: Any, boxes: Any, annotated: Any, label: Any, source: Path, place: str) -> BoxTube:
    try:
        numbers = np.asarray(boxes, dtype=np.float64).reshape(len(boxes), -1)
        first, kind = (_number(value, source, f"{place}, {what}") for value, what in ((start, "first frame"), (label, "class")))
        known = np.unique(whole_numbers(annotated, source, f"{place}, annotated frames").reshape(-1))
    except BrokenRecordError:
        raise
    except (TypeError, ValueError, OverflowError) as problem:
        raise BrokenRecordError(source, place, f"is no tube ({problem}): another file, or damaged; {AGAIN}") from problem
    if numbers.shape[1:] != (4,) or not len(numbers) or not np.isfinite(numbers).all():
        raise BrokenRecordError(source, f"{place}, boxes", f"are {numbers.shape}, expected finite (n, 4) with n >= 1: {AGAIN}")
    if not 0 <= kind < len(CLASSES):
        raise BrokenRecordError(source, f"{place}, class", f"is {kind}, expected 0 to {len(CLASSES) - 1}: {AGAIN}")
    if not 0 <= first <= _MAX_FRAME or len(numbers) > _MAX_FRAME or (len(known) and not 0 <= known[0] <= known[-1] <= _MAX_FRAME):
        raise BrokenRecordError(source, f"{place}, frames", f"begin at {first}: expected 0 to {_MAX_FRAME}; {AGAIN}")
    return BoxTube(first, numbers, known if len(known) else first + np.arange(len(numbers)), kind)


def read_annotation_pickle(path: Path) -> dict[str, tuple[BoxTube, ...]]:
    """The authors' list of videos: class/video -> tubes.

    Each entry is a name and a list of (first frame, last frame, class, boxes, annotated frames[, a flag that isn't read]), frames from 0.
    Nothing in the pickle is run.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is damaged or of another form.
    """
    content = read_bytes(path, "annotations", _MISSING)
    try:
        found = _AnnotationFile(io.BytesIO(content), encoding="latin1").load()
    except Exception as problem:  # a broken pickle raises nearly anything
        reason = str(problem) or type(problem).__name__
        raise BrokenRecordError(
            path, "annotations", f"{len(content)} bytes can't be read ({reason}): truncated or no such list"
        ) from problem
    if not isinstance(found, list) or not all(isinstance(entry, list | tuple) and len(entry) == 2 for entry in found):
        raise BrokenRecordError(path, "annotations", f"is a {type(found).__name__}, expected a list of names with tubes: another file")
    once([str(entry[0]) for entry in found], path, "annotations", "video")
    videos = {}
    for number, (name, tubes) in enumerate(found):
        place = f"video {number}"
        if (
            not isinstance(tubes, list | tuple)
            or not tubes
            or not all(isinstance(one, list | tuple) and len(one) in (5, 6) for one in tubes)
        ):
            raise BrokenRecordError(path, place, f"has no tubes of 5 or 6 entries: {AGAIN}")
        read = tuple(_tube(one[0], one[3], one[4], one[2], path, f"{place}, tube {k}") for k, one in enumerate(tubes))
        for tube, one in zip(read, tubes, strict=True):
            last = _number(one[1], path, f"{place}, last frame")
            if last - tube.start + 1 != len(tube.boxes):
                raise BrokenRecordError(
                    path, place, f"has {len(tube.boxes)} boxes for the frames {tube.start} to {last}: expected one each, {AGAIN}"
                )
        videos[_name(name, path, place)] = read
    return videos


def read_tubes(path: Path) -> dict[str, tuple[int, tuple[BoxTube, ...]]]:
    """The corrected annotations ``finalAnnots.mat``: class/video -> frames of the video and tubes; frames and pixels from 0.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is damaged or of another form.
    """
    stored = read_matlab(path, ["annot"], "annotations", _MISSING).get("annot")
    names = () if stored is None else stored.dtype.names or ()
    if stored is None or not {"name", "num_imgs", "tubes"} <= set(names):
        raise BrokenRecordError(path, "annot", f"has the fields {', '.join(names) or 'none'}, expected name, num_imgs, tubes: another file")
    videos = {}
    for number, entry in enumerate(stored.reshape(-1)):
        place = f"annot {number}"
        try:
            name, count = str(entry["name"].reshape(-1)[0]), int(entry["num_imgs"].reshape(-1)[0])
            tubes = []
            for k, one in enumerate(entry["tubes"].reshape(-1)):
                first, last, kind = (int(one[key].reshape(-1)[0]) for key in ("sf", "ef", "class"))
                boxes = one["boxes"].astype(np.float64).reshape(-1, 4) - (1.0, 1.0, 0.0, 0.0)  # stored in bytes that would overflow
                if last - first + 1 != len(boxes):
                    raise BrokenRecordError(path, f"{place}, tube {k}", f"has {len(boxes)} boxes for the frames {first} to {last}: {AGAIN}")
                tubes.append(_tube(first - 1, boxes, np.arange(first - 1, last), kind - 1, path, f"{place}, tube {k}"))
        except BrokenRecordError:
            raise
        except Exception as problem:  # a field of another kind raises nearly anything
            raise BrokenRecordError(
                path, place, f"has no name, frames or tubes ({problem}): another file, or damaged; {AGAIN}"
            ) from problem
        if not tubes or not 0 < count <= _MAX_FRAME:
            raise BrokenRecordError(path, place, f"has {len(tubes)} tubes and {count} frames: expected one or more of both, {AGAIN}")
        if _name(name, path, place) in videos:
            raise BrokenRecordError(path, place, f"the video {name!r} stands twice: {AGAIN}")
        videos[name] = (count, tuple(tubes))
    return videos


def read_list(path: Path) -> list[str]:
    """Names class/video of a text file, one a line; an ending such as ``.avi`` and a number behind the name don't count.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: A name is no class/video, or stands twice.
    """
    lines = [line.split()[0] for line in read_text(path, "list of videos", _MISSING).splitlines() if line.strip()]
    names = [_name(line.removesuffix(".avi"), path, f"line {number + 1}") for number, line in enumerate(lines)]
    once(names, path, "list of videos", "video")
    return names


class UCF101ActionsDataModule(ActionClipsDataModule):
    """UCF101-24 from the released videos, with filled boxes as masks.

    Batch: {"labelled": {"clip": (B, 3, T, h, w) float32 in [0, 1], "mask": (B, 1, T, h, w) float32, "label": (B,) int64, ...}, "unlabelled": {"clip": (B, 3, T, h, w), "index": (B,) int64}}

    ``video`` (B,) int64 is the number of the video. Below ``root`` lie ``UCF101_Videos/<class>/<video>.avi`` and

    - ``pickles``: the authors' ``train_annots_20_labeled.pkl``, ``train_annots_80_unlabeled.pkl`` and ``test_annots.pkl``
    - ``tubes``: ``finalAnnots.mat`` with ``trainlist.txt`` and ``testlist.txt``; which videos are labelled is drawn, a share of each class

    Needs PyAV. Videos are read when they are asked for, and a clip's frames are those of its numbers.

    Args:
        root: Folder of the release.
        annotations: ``pickles`` or ``tubes``.
        labelled: Name of the list of labelled videos, for ``pickles``.
        unlabelled: Name of the list of unlabelled videos, for ``pickles``; None: there are none.
        test: Name of the list of test videos, for ``pickles``.
        labelled_share: Share of each class that is labelled, for ``tubes``; 1: all are.
        sparse: Boxes of labelled videos follow from the annotated frames alone, linear between them.
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
        seed: Seed of order, clips and crops, and of which videos are labelled.

    Raises:
        WrongRootError: The folder lacks videos or annotations.
        BrokenRecordError: A file is damaged.
    """  # noqa: E501

    def __init__(
        self,
        root: Path | None = None,
        annotations: Annotations = "pickles",
        labelled: str = "train_annots_20_labeled.pkl",
        unlabelled: str | None = "train_annots_80_unlabeled.pkl",
        test: str = "test_annots.pkl",
        labelled_share: float = 0.2,
        sparse: bool = False,
        frames: int = 8,
        stride: int = 2,
        image_size: Sequence[int] | None = (224, 224),
        resize: Sequence[int] | None = None,
        batch_size: int = 4,
        unlabelled_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        on_broken: OnBroken = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        literals(UCF101ActionsDataModule, locals())
        super().__init__(
            frames=frames, stride=stride, image_size=image_size, resize=resize, batch_size=batch_size, eval_batch_size=eval_batch_size,
            unlabelled_batch_size=unlabelled_batch_size, on_broken=on_broken, num_workers=num_workers, seed=seed,
        )  # fmt: skip
        within("(0, 1]", "a share", labelled_share=labelled_share)
        self.root = data_path(root)
        self.save_hyperparameters()
        self.class_names = CLASSES

    def check_root(self, stage: str = "fit") -> None:
        """Look for videos and annotations."""
        self.refuse_no_root()
        hp = self.hparams
        self.expect("UCF101_Videos", "unpack the videos of UCF101 there, a folder for each class", "videos")
        if hp["annotations"] == "tubes":
            needed = ["finalAnnots.mat", *(["trainlist.txt", "testlist.txt"] if stage == "fit" else ["testlist.txt"])]
        else:
            needed = [hp["test"], *([hp["labelled"], hp["unlabelled"]] if stage == "fit" else [])]
        for name in needed:
            if name is not None:
                self.expect(name, "copy the lists of annotations there", "videos")

    def read(self, part: Part) -> Sequence[ActionVideo]:
        """The videos of one part."""
        assert self.root is not None
        hp = self.hparams
        if hp["annotations"] == "pickles":
            name = {"labelled": hp["labelled"], "unlabelled": hp["unlabelled"]}.get(part, hp["test"])
            if name is None:
                return []
            source = self.root / name
            return [self._video(video, tubes, source, None) for video, tubes in read_annotation_pickle(source).items()]
        source = self.root / "finalAnnots.mat"
        known, listing = read_tubes(source), self.root / ("testlist.txt" if part in ("val", "test") else "trainlist.txt")
        names = [name for name in read_list(listing) if name.split("/")[0] in CLASSES]  # the lists are those of all 101 classes
        lost = [name for name in names if name not in known]
        if lost and len(lost) == len(names):
            raise BrokenRecordError(listing, "list of videos", f"none of {len(names)} videos is in {source.name}: give the lists of UCF101")
        names = [name for name in names if name in known]  # a few videos have no annotations, in the release itself
        if part in ("labelled", "unlabelled"):
            labels = [known[name][1][0].label for name in names]
            chosen = drawn_share(names, labels, hp["labelled_share"], self.seed)
            names = [name for name, own in zip(names, chosen, strict=True) if own == (part == "labelled")]
        return [self._video(name, known[name][1], source, known[name][0]) for name in names]

    def _video(self, name: str, tubes: tuple[BoxTube, ...], source: Path, frames: int | None) -> BoxedVideo:
        assert self.root is not None
        path = self.root / "UCF101_Videos" / f"{name}.avi"
        return BoxedVideo(name, tubes[0].label, path, tubes, source, frames, self.hparams["sparse"])


__all__ = [
    "CLASSES",
    "BoxTube",
    "BoxedVideo",
    "UCF101ActionsDataModule",
    "interpolated",
    "read_annotation_pickle",
    "read_list",
    "read_tubes",
]
