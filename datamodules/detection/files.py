"""Detection data: shapes that are drawn, and COCO, LVIS, PASCAL VOC and what has their layouts."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.broken import Broken, OnBroken
from lit_methods.datamodules.detection.readers import VOC_CLASSES, Table, read_coco, read_voc
from lit_methods.datamodules.detection.samples import DetectionSamples, Record, View
from lit_methods.datamodules.detection.shapes import SHAPES, draw_detection_shapes
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed, user_path
from lit_methods.datamodules.pictures import open_picture, picture_size

Layout = Literal["coco", "lvis", "voc"]
SPLITS = {"coco": ("train2017", "val2017"), "lvis": ("lvis_v1_train", "lvis_v1_val"), "voc": ("trainval", "test")}
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def repeat_factors(records: Sequence[Record], num_classes: int, threshold: float, seed: int = 0) -> NDArray[np.int64]:
    """How often each image stands in an epoch, so that rare classes are seen more (LVIS, arXiv:1908.03195).

    The factor of an image is that of its rarest class, max(1, sqrt(threshold / share of images with the class)); the part behind the point
    is a chance.

    Args:
        records: N images.
        num_classes: K.
        threshold: Share of images below which a class is rare.
        seed: Of the chances.

    Returns:
        (N,) >= 1.
    """
    share = class_images(records, num_classes) / max(1, len(records))
    factor = np.maximum(1.0, np.sqrt(threshold / np.maximum(share, 1e-12)))
    wanted = np.array([factor[record.labels].max(initial=1.0) for record in records])
    chance = np.random.default_rng([seed, 17]).random(len(records))
    return (wanted.astype(np.int64) + (chance < wanted % 1)).astype(np.int64)


def class_images(records: Sequence[Record], num_classes: int) -> NDArray[np.int64]:
    """How many images each class is in: (K,)."""
    count = np.zeros(num_classes, np.int64)
    for record in records:
        count[np.unique(record.labels)] += 1
    return count


def _read_file(record: Record, place: int) -> Image.Image:
    assert record.file is not None
    image = open_picture(record.file)
    if record.size is not None and image.size != record.size:
        raise BrokenRecordError(
            record.file,
            "image",
            f"has {image.width} x {image.height} pixels, and its table says {record.size[0]} x {record.size[1]}: copy it again",
        )
    return image


def _read_array(pixels: NDArray[np.uint8], record: Record, place: int) -> Image.Image:
    return Image.fromarray(pixels[place])


def _drawn(number: int, size: int, most: int, num_classes: int, seed: int, view: View, draw_seed: int) -> DetectionSamples:
    """Shapes in memory as samples."""
    images, boxes, labels = draw_detection_shapes(number, size, most, num_classes, draw_seed)
    records = []
    for place, (corners, kinds) in enumerate(zip(boxes, labels, strict=True)):
        there = kinds >= 0
        records.append(Record(f"shapes_{place:05d}", corners[there], kinds[there], np.zeros(there.sum(), bool)))
    return DetectionSamples(records, partial(_read_array, images), view, seed=seed)


class DetectionShapesDataModule(LoaderDataModule):
    """Made images with one to three filled rectangles, ellipses and triangles of any colour.

    Batch: {"image": (B, 3, S, S) float32 in [0, 1], "boxes": (B, G, 4) float32 corners in pixels, "label": (B, G) int64 -1 without a box, "ignore": (B, G) bool, "size": (B, 2) float32 width and height, "original_size": (B, 2) float32, "index": (B,) int64, "name": list of B strings}

    Args:
        image_size: Side S in pixels.
        num_train: Training images.
        num_val: Validation images.
        num_test: Test images.
        most: Shapes of an image at most.
        num_classes: 2 (rectangles, ellipses) or 3 (triangles, too).
        flip: Training images are mirrored in half of the cases.
        batch_size: Images per process and training step.
        eval_batch_size: Images per process and evaluation step; None: ``batch_size``.
        num_workers: Processes that read data.
        seed: Seed of images, order and mirroring.
    """  # noqa: E501

    def __init__(
        self,
        image_size: int = 64,
        num_train: int = 1000,
        num_val: int = 100,
        num_test: int = 100,
        most: int = 3,
        num_classes: int = 3,
        flip: bool = True,
        batch_size: int = 16,
        eval_batch_size: int | None = 50,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, eval_batch_size=eval_batch_size)
        checks.at_least(16, "pixels", image_size=image_size)
        checks.at_least(1, num_train=num_train, num_val=num_val, num_test=num_test, most=most)
        if num_classes not in (2, 3):
            raise ValueError(f"num_classes is {num_classes}: give 2 (rectangles, ellipses) or 3 (triangles, too)")
        self.image_size, self.most, self.flip = image_size, most, flip
        self.numbers = {"train": num_train, "val": num_val, "test": num_test}
        self.class_names = list(SHAPES[:num_classes])

    def setup(self, stage: str) -> None:
        """Draw the images."""
        if self.train_set is not None:
            return
        for place, (part, number) in enumerate(self.numbers.items()):
            view = View(flip=self.flip and part == "train")
            draw_seed = 3 * self.seed + place
            samples = _drawn(number, self.image_size, self.most, len(self.class_names), self.seed, view, draw_seed)
            setattr(self, f"{part}_set", samples)


class DetectionDataModule(LoaderDataModule):
    """Images with boxes in the layouts of COCO, LVIS and PASCAL VOC; without a root, shapes that are drawn.

    Batch: {"image": (B, 3, H, W) float32 in [0, 1], "boxes": (B, G, 4) float32 corners in pixels, "label": (B, G) int64 -1 without a box, "ignore": (B, G) bool, "size": (B, 2) float32 width and height before the padding, "original_size": (B, 2) float32 those of the file, "index": (B,) int64, "name": list of B strings}

    ``coco``: ``annotations/instances_<split>.json`` and the images in the folder ``<split>`` (``train2017``, ``val2017``), or in ``images``.
    ``lvis``: ``<split>.json`` (``lvis_v1_train``, ``lvis_v1_val``) at the root or in ``annotations``, and COCO's images at the root.
    ``voc``: ``Annotations``, ``ImageSets/Main/<split>.txt`` (``trainval``, ``test``), ``JPEGImages``. Crowds and difficult objects are
    boxes to ignore.

    Args:
        root: Folder of the release; None: shapes of 64 pixels, 200 to train on and 50 each to validate and test.
        layout: ``coco``, ``lvis`` or ``voc``.
        train: Training split; None: the layout's.
        val: Validation split; None: the layout's.
        test: Test split; None: that of the validation.
        images: Folder of all images below the root, for ``coco`` and ``lvis``; None: the layout's.
        class_names: Names of the classes, for ``voc``; None: PASCAL VOC's 20.
        sides: Lengths of the shorter side in training, of which one is drawn; none: images as they are.
        eval_side: Length of the shorter side in evaluation; None: as they are.
        longest: Largest length of the longer side.
        crop: Least and largest side of random crops, taken in half of the cases before resizing; None: no crops.
        flip: Training images are mirrored in half of the cases.
        repeat_threshold: Share of images below which a class is rare, whose images then stand in an epoch more often (LVIS: 0.001); 0: off.
        predict: Folder of images for ``lit predict``; None: the test images.
        on_broken: ``raise`` at the first thing that can't be used; ``skip``: leave it out, count it and warn. Images of the evaluation are
            then read once in ``setup``, to leave out broken ones; in training the next good image takes the place of a broken one.
        batch_size: Images per process and training step.
        eval_batch_size: Images per process and evaluation step; None: ``batch_size``.
        num_workers: Processes that read data.
        seed: Seed of order, views and repeats.

    Attributes:
        class_names: Names of the classes, by label.
        class_images: (K,) how many training images each class is in.
        broken: What was left out.

    Raises:
        ValueError: A value outside its range.
        WrongRootError: ``root`` doesn't hold the release.
        BrokenRecordError: A file is missing or wrong; the message names it and the entry.
    """  # noqa: E501

    def __init__(
        self,
        root: Path | None = None,
        layout: Layout = "coco",
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        images: str | None = None,
        class_names: Sequence[str] | None = None,
        sides: Sequence[int] = (),
        eval_side: int | None = None,
        longest: int = 1333,
        crop: tuple[int, int] | None = None,
        flip: bool = True,
        repeat_threshold: float = 0.0,
        predict: Path | None = None,
        on_broken: OnBroken = "raise",
        batch_size: int = 2,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, eval_batch_size=eval_batch_size)
        checks.literals(DetectionDataModule, locals())
        checks.at_least(1, "pixels", eval_side=eval_side, longest=longest, **{f"sides[{k}]": side for k, side in enumerate(sides)})
        checks.share(repeat_threshold=repeat_threshold)
        if crop is not None and not 1 <= crop[0] <= crop[1]:
            raise ValueError(f"crop is {list(crop)}: give the least and the largest side in pixels, such as [384, 600]")
        if class_names is not None and layout != "voc":
            raise ValueError(f"class_names are given for layout='{layout}', whose tables name the classes: leave them out")
        if images is not None and layout == "voc":
            raise ValueError("images is given for layout='voc', whose images lie in JPEGImages: leave it out")
        self.root, self.layout, self.images = data_path(root), layout, images
        own_train, own_val = SPLITS[layout]
        self.splits = {"train": train or own_train, "val": val or own_val, "test": test or val or own_val}
        self.given_names = list(class_names) if class_names is not None else list(VOC_CLASSES)
        self.view = View(tuple(sides), longest, crop, flip)
        self.eval_view = View(() if eval_side is None else (eval_side,), longest)
        self.repeat_threshold, self.predict, self.on_broken = repeat_threshold, data_path(predict), on_broken
        self.broken = Broken(on_broken)
        self.class_images: NDArray[np.int64] | None = None
        self._names: list[str] | None = None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, by label; None: ``setup`` hasn't read them."""
        return self._names

    def _table_file(self, split: str) -> Path:
        assert self.root is not None
        if self.layout == "voc":
            return self.root / "ImageSets" / "Main" / f"{split}.txt"
        if self.layout == "coco":
            return self.root / "annotations" / f"instances_{split}.json"
        below = self.root / "annotations" / f"{split}.json"
        return below if below.is_file() else self.root / f"{split}.json"

    def check_root(self, stage: str = "fit") -> None:
        """Look for the tables of the splits that the stage needs, and for the folder of ``predict``."""
        if stage == "predict" and self.predict is not None:
            if not self.predict.is_dir():
                raise WrongRootError(f"predict={str(self.predict)!r} is no folder: give one with images")
            return
        if self.root is None:
            return
        parts = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
        for part in parts:
            file = self._table_file(self.splits[part])
            if not file.is_file():
                raise WrongRootError(
                    f"root={str(self.root)!r} has no {file.relative_to(self.root)}: give the folder of a release in the layout of "
                    f"{self.layout}, the names of its splits (train, val, test), or root=null for built-in shapes"
                )

    def setup(self, stage: str) -> None:
        """Read the tables of the stage, or draw the shapes."""
        if stage == "predict" and self.predict is not None:
            self._folder()
            return
        if self.root is None:
            self._shapes()
            return
        self.check_root(stage)
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            if getattr(self, f"{part}_set") is None:
                self._read_part(part)
        self.broken.report()

    def _read_table(self, split: str) -> Table:
        assert self.root is not None
        file = self._table_file(split)
        if self.layout == "voc":
            return read_voc(self.root, split, self.given_names, self.broken)
        below = self.images if self.images is not None else (split if self.layout == "coco" else ".")
        return read_coco(file, self.root / below, self.broken, lvis=self.layout == "lvis")

    def _read_part(self, part: str) -> None:
        table = self._read_table(self.splits[part])
        if self._names is not None and table.class_names != self._names:
            odd = next((a, b) for a, b in zip([*self._names, None], [*table.class_names, None], strict=False) if a != b)
            raise BrokenRecordError(
                self._table_file(self.splits[part]), "categories", f"differ from those of another split ({odd[0]!r} there, {odd[1]!r} here)"
            )
        self._names = table.class_names
        records = table.records
        if part != "train" and self.on_broken == "skip":
            records = [record for record in records if self._can_be_read(record)]
        if not records:
            raise BrokenRecordError(
                self._table_file(self.splits[part]), "images", "no image is left: give another split, or look at the warnings"
            )
        repeats = None
        if part == "train":
            self.class_images = class_images(records, len(table.class_names))
            if self.repeat_threshold:
                repeats = repeat_factors(records, len(table.class_names), self.repeat_threshold, self.seed)
        view = self.view if part == "train" else self.eval_view
        skip = part == "train" and self.on_broken == "skip"
        setattr(self, f"{part}_set", DetectionSamples(records, _read_file, view, repeats, skip, self.seed))

    def _can_be_read(self, record: Record) -> bool:
        try:
            _read_file(record, 0)
        except BrokenRecordError as error:
            self.broken.say(Path(error.file), error.field, error.problem)
            return False
        return True

    def _folder(self) -> None:
        """Images without truth."""
        assert self.predict is not None
        self.check_root("predict")
        files = listed(self.predict, endings=ENDINGS)
        stems = Counter(file.stem for file in files)  # results are named after images: a.png and a.jpg keep their endings
        nothing = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
        records = []
        for file in files:
            try:
                picture_size(file)
            except BrokenRecordError as error:
                self.broken.say(file, error.field, error.problem)
                continue
            records.append(Record(file.stem if stems[file.stem] == 1 else file.name, *nothing, user_path(file)))
        self.broken.report()
        if not records:
            raise WrongRootError(f"predict={str(self.predict)!r} holds no images: give a folder of {', '.join(ENDINGS)} files")
        if self.root is None:
            self._names = list(SHAPES)
        elif self._names is None and self.layout == "voc":
            self._names = self.given_names
        self.predict_set = DetectionSamples(records, _read_file, self.eval_view, seed=self.seed)

    def _shapes(self) -> None:
        if self.train_set is not None:
            return
        self._names = list(SHAPES)
        for place, (part, number) in enumerate({"train": 200, "val": 50, "test": 50}.items()):
            view = self.view if part == "train" else self.eval_view
            drawn = _drawn(number, 64, 3, len(SHAPES), self.seed, view, 3 * self.seed + place)
            setattr(self, f"{part}_set", drawn)
            if part == "train":
                self.class_images = class_images(drawn.records, len(SHAPES))


__all__ = ["DetectionDataModule", "DetectionShapesDataModule", "class_images", "repeat_factors"]
