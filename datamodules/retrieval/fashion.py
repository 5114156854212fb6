"""FashionIQ, Shoes and Fashion200k: reference images with words, and the images that they ask for."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD, open_picture
from lit_methods.datamodules.reading import once, plain_file_name, read_json, read_text
from lit_methods.datamodules.retrieval.collection import Broken, OnBroken
from lit_methods.datamodules.retrieval.composed import Category, ComposedDataModule, Pair, QueriesAndGallery, TrainingPairs
from lit_methods.datamodules.retrieval.tokens import WordPieces, Words
from lit_methods.datamodules.vision.imagenet import seeded

Ints = NDArray[np.int64]
Name = Literal["fashioniq", "shoes", "fashion200k"]
Protocol = Literal["val", "original"]
FASHIONIQ = ("dress", "shirt", "toptee")
IMAGES = (".jpg", ".jpeg", ".png")
WAY = "correct the line, or set on_broken to skip"
FIRST = {
    "fashioniq": "captions/cap.<category>.val.json or captions_pairs/fashion_iq-val-cap-<category>.txt",
    "shoes": "shoes-cap-train.txt and shoes-cap-test.txt, or relative_captions_shoes.json with train_im_names.txt and eval_im_names.txt",
    "fashion200k": "labels/*_train_detect_all.txt, labels/*_test_detect_all.txt and test_queries.txt",
}


@dataclass
class Release:
    """What a reader gives: paths of images, which may not be there.

    Attributes:
        pairs: Training pairs.
        categories: Evaluated ones.
        captions: Of Fashion200k's training images, from which pairs are drawn: path -> caption.
    """

    pairs: list[Pair] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)
    captions: dict[Path, str] = field(default_factory=dict)


def _say(broken: Broken, error: BrokenRecordError) -> None:
    broken.say(Path(error.file), error.field, error.problem)


def _lines(file: Path, missing: str) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and text of the lines that aren't blank.

    Raises:
        BrokenRecordError: There is none.
    """
    text = read_text(file, missing=missing)
    if not text.strip():
        raise BrokenRecordError(file, "lines", "there is none, the file is empty: copy it again")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def _places(found: Sequence[Path]) -> tuple[list[Path], dict[Path, int]]:
    """Paths, each once, and their places."""
    paths = list(dict.fromkeys(found))
    return paths, {path: place for place, path in enumerate(paths)}


def _asked(name: str, pairs: Sequence[Pair], gallery: Sequence[Path]) -> Category:
    """Queries with one right image each."""
    paths, place = _places(gallery)
    own = np.arange(len(paths))
    wanted, reference = (np.array([place.get(getattr(pair, side), -1) for pair in pairs], np.int64) for side in ("target", "reference"))
    return Category(name, paths, own, own, [p.reference for p in pairs], [p.words for p in pairs], wanted, reference)


# ---- FashionIQ -------------------------------------------------------------------------------------------------------------------------


def _iq_records(file: Path, broken: Broken) -> Iterator[tuple[str, str, list[str]]]:
    """Candidate, target and the captions that aren't empty, of FashionIQ's JSON."""
    content = read_json(file, "captions")
    if not isinstance(content, list):
        raise BrokenRecordError(file, "captions", f"is {type(content).__name__}, expected a list of records: another file, copy it again")
    for number, record in enumerate(content):
        try:
            try:
                ids, said = [record["candidate"], record["target"]], record["captions"]
            except (KeyError, TypeError):
                have = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise BrokenRecordError(file, f"record {number}", f"has {have}, expected candidate, target, captions: {WAY}") from None
            yield _iq_record(file, f"record {number}", ids, said)
        except BrokenRecordError as error:
            _say(broken, error)


def _iq_record(file: Path, place: str, ids: list[Any], said: Any) -> tuple[str, str, list[str]]:
    for name, what in zip(ids, ("candidate", "target"), strict=True):
        if not isinstance(name, str):
            raise BrokenRecordError(file, f"{place}, {what}", f"is {type(name).__name__}, expected the id of an image: {WAY}")
        plain_file_name(name, file, f"{place}, {what}")
    if not isinstance(said, list) or len(said) != 2 or not all(isinstance(one, str) for one in said):
        raise BrokenRecordError(file, f"{place}, captions", f"expected two captions, got {str(said)[:80]}: {WAY}")
    words = [one.strip() for one in said if one.strip()]
    if not words:
        raise BrokenRecordError(file, f"{place}, captions", f"both captions are empty: {WAY}")
    if ids[0] == ids[1]:
        raise BrokenRecordError(file, f"{place}, target", f"{ids[0]!r} is the candidate, too: {WAY}")
    return ids[0], ids[1], words


def _iq_lines(file: Path, broken: Broken) -> Iterator[tuple[str, str, list[str]]]:
    """The same of ``captions_pairs``: two lines ``reference;target;caption`` a pair."""
    rows: list[tuple[int, str]] = list(_lines(file, "copy captions_pairs again"))
    for (number, first), (_, second) in zip(rows[::2], rows[1::2], strict=False):
        place = f"line {number}"
        try:
            parts = [line.split(";", 2) for line in (first, second)]
            if any(len(part) != 3 for part in parts) or parts[0][:2] != parts[1][:2]:
                raise BrokenRecordError(file, place, f"expected two lines reference;target;caption of the same images: {WAY}")
            ids = [Path(name).stem for name in parts[0][:2]]
            yield _iq_record(file, place, ids, [part[2] for part in parts])  # type: ignore[arg-type]
        except BrokenRecordError as error:
            _say(broken, error)
    if len(rows) % 2:
        broken.say(file, f"line {rows[-1][0]}", f"has no second caption, expected two lines a pair: {WAY}")


def read_fashioniq(root: Path, protocol: Protocol, categories: Sequence[str], broken: Broken) -> Release:
    """FashionIQ by its official JSON, or by ``captions_pairs``; each pair asks twice, "a and b" and "b and a".

    Images are ``image_data/<category>/<id>.jpg`` or ``images/<id>.jpg``, or ``.png``.
    """
    release = Release()
    for category in categories:
        folder = root / "image_data" / category
        if not folder.is_dir():
            folder = root / "images"
        there = {path.stem: path for path in listed(folder, endings=IMAGES)} if folder.is_dir() else {}
        for split in ("train", "val"):
            file = root / "captions" / f"cap.{category}.{split}.json"
            lines = root / "captions_pairs" / f"fashion_iq-{split}-cap-{category}.txt"
            if file.exists() or not lines.exists():
                if split == "train" and not file.exists():
                    continue
                records = list(_iq_records(file, broken))
            else:
                file = lines
                records = list(_iq_lines(file, broken))
            ids: list[str] | None = None
            if protocol == "original" and split == "val":
                table = root / "image_splits" / f"split.{category}.{split}.json"
                content = read_json(table, "split", "the original protocol ranks all images of the split: copy image_splits, or set val")
                if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
                    raise BrokenRecordError(table, "split", "expected a list of image ids: another file, copy it again")
                once(content, table, "split", "image")
                ids = [plain_file_name(one, table, "split") for one in content]
                known = set(ids)
                for place, record in enumerate(records):
                    if odd := [one for one in record[:2] if one not in known]:
                        broken.say(
                            file, f"pair {place}", f"image {odd[0]!r} isn't in {table.name}: copy both again, or set on_broken to skip"
                        )
                records = [record for record in records if known.issuperset(record[:2])]
            where = {one: there.get(one, folder / f"{one}.jpg") for record in records for one in record[:2]}
            pairs = [
                Pair(where[reference], where[target], " and ".join(words))
                for reference, target, both in records
                for words in ([both, both[::-1]] if len(both) > 1 else [both, both])
            ]
            if split == "train":
                release.pairs += pairs
            else:
                gallery = [there.get(one, folder / f"{one}.jpg") for one in ids] if ids is not None else sorted(where.values())
                release.categories.append(_asked(category, pairs, gallery))
    return release


# ---- Shoes -----------------------------------------------------------------------------------------------------------------------------


def _shoe(root: Path, name: str, file: Path, place: str) -> Path:
    """Path of an image from a path that somebody else's list has: what begins at ``attributedata`` counts."""
    parts = [part for part in re.split(r"[/\\]+", name.strip()) if part not in ("", ".")]
    if not parts or ".." in parts:
        raise BrokenRecordError(file, place, f"{name[:80]!r} is no path of an image below the root: {WAY}")
    return root.joinpath(*(parts[parts.index("attributedata") :] if "attributedata" in parts else parts))


def _shoe_pairs(root: Path, file: Path, broken: Broken) -> list[Pair]:
    pairs = []
    for number, line in _lines(file, f"expected {FIRST['shoes']}"):
        try:
            parts = line.split(";", 2)
            if len(parts) != 3 or not parts[2].strip():
                raise BrokenRecordError(file, f"line {number}", f"expected reference;target;caption, got {line[:80]!r}: {WAY}")
            reference, target = (_shoe(root, part, file, f"line {number}") for part in parts[:2])
            pairs.append(Pair(reference, target, parts[2].strip()))
        except BrokenRecordError as error:
            _say(broken, error)
    return pairs


def read_shoes(root: Path, broken: Broken) -> Release:
    """Shoes by lists of lines ``reference;target;caption``, or by ``relative_captions_shoes.json``.

    The gallery is all images of ``shoes-test-all.txt`` or ``eval_im_names.txt``, and those of the queries.
    """
    table = root / "relative_captions_shoes.json"
    if (root / "shoes-cap-train.txt").exists() or not table.exists():
        train, test = (_shoe_pairs(root, root / f"shoes-cap-{part}.txt", broken) for part in ("train", "test"))
        everything = root / "shoes-test-all.txt"
        shown = [_shoe(root, line, everything, f"line {number}") for number, line in _lines(everything, "")] if everything.exists() else []
    else:
        there = {path.name: path for path in listed(root / "attributedata", "**/*", IMAGES)}
        names = {
            part: [line for _, line in _lines(root / f"{part}_im_names.txt", f"expected {FIRST['shoes']}")] for part in ("train", "eval")
        }
        content = read_json(table, "captions")
        if not isinstance(content, list):
            raise BrokenRecordError(table, "captions", f"is {type(content).__name__}, expected a list of records: another file")
        found: dict[str, list[Pair]] = {"train": [], "eval": []}
        sets = {part: set(own) for part, own in names.items()}
        for number, record in enumerate(content):
            keys = ("ReferenceImageName", "ImageName", "RelativeCaption")
            if not isinstance(record, dict) or not all(isinstance(record.get(key), str) and record[key].strip() for key in keys):
                broken.say(table, f"record {number}", f"expected texts {', '.join(keys)}, got {str(record)[:80]}: {WAY}")
                continue
            reference, target, words = (record[key].strip() for key in keys)
            part = next((part for part, own in sets.items() if target in own), None)
            if part is None:
                broken.say(table, f"record {number}, ImageName", f"{target[:80]!r} is in neither list of names: {WAY}")
                continue
            where = [there.get(one, root / "attributedata" / Path(one).name) for one in (reference, target)]
            found[part].append(Pair(where[0], where[1], words))
        train, test = found["train"], found["eval"]
        shown = [there.get(one, root / "attributedata" / Path(one).name) for one in names["eval"]]
    gallery = [*shown, *(path for pair in test for path in (pair.reference, pair.target))]
    return Release(train, [_asked("shoes", test, gallery)])


# ---- Fashion200k -----------------------------------------------------------------------------------------------------------------------


def _200k_images(root: Path, split: str, broken: Broken) -> dict[Path, str]:
    """Image -> caption of the files ``labels/*_<split>_detect_all.txt``, whose lines are path, score, caption."""
    files = listed(root / "labels", f"*_{split}_*.txt")
    if not files:
        raise MissingFileError(root / "labels", f"*_{split}_*.txt", f"no such file: expected {FIRST['fashion200k']}")
    found: dict[Path, str] = {}
    for file in files:
        for number, line in _lines(file, ""):
            parts = line.split("\t")
            place = f"line {number}"
            if len(parts) != 3 or not parts[2].strip() or ".." in Path(parts[0]).parts or Path(parts[0]).is_absolute():
                broken.say(file, place, f"expected a path below the root, a score and a caption with tabs, got {line[:80]!r}: {WAY}")
            elif root / parts[0] in found:
                broken.say(file, place, f"the image {parts[0]!r} stands twice, expected once: {WAY}")
            else:
                found[root / parts[0]] = " ".join(parts[2].split())
    return found


def changed_words(source: str, target: str) -> str:
    """The words "replace a with b", of the first word of each caption that the other one lacks, the last one where none is lacking."""
    old, new = source.split(), target.split()
    first = next((word for word in old if word not in new), old[-1])
    return f"replace {first} with {next((word for word in new if word not in old), new[-1])}"


class OneWordPairs(TrainingPairs):
    """Pairs of images whose captions differ in one word, drawn anew in each epoch.

    Args:
        captions: Image -> caption.
        read: Place -> image.
        view: Image -> tensor.
        vocabulary: Makes tokens of words.
        max_length: Longest text.
        seed: Seed of draws and augmentation.
        skip: As :class:`TrainingPairs`.
    """

    def __init__(
        self, captions: dict[Path, str], read: Any, view: Any, vocabulary: Any, max_length: int, seed: int, skip: bool = False
    ) -> None:
        images: dict[str, list[Path]] = defaultdict(list)
        for path, caption in captions.items():
            images[caption].append(path)
        children: dict[str, dict[str, None]] = defaultdict(dict)  # caption without one of its words -> captions
        parents: dict[str, dict[str, None]] = defaultdict(dict)
        for caption in images:
            words = caption.split()
            for place in range(len(words)):
                parent = " ".join(words[:place] + words[place + 1 :])
                children[parent][caption] = parents[caption][parent] = None
        self.children = {parent: list(own) for parent, own in children.items() if len(own) > 1}
        self.parents = {caption: [parent for parent in own if parent in self.children] for caption, own in parents.items()}
        self.captions, self.images = captions, images
        self.sources = [path for path, caption in captions.items() if self.parents[caption]]
        super().__init__(self.sources, read, view, vocabulary, max_length, seed, skip)  # type: ignore[arg-type]

    def pair(self, epoch: int, index: int) -> Pair:
        """An image, and one of a caption that differs in a word."""
        rng = np.random.default_rng([self.seed, 3, epoch, index])
        source = self.captions[self.sources[index]]
        parents = self.parents[source]
        others = [caption for caption in self.children[parents[rng.integers(len(parents))]] if caption != source]
        target = others[rng.integers(len(others))]
        return Pair(self.sources[index], self.images[target][rng.integers(len(self.images[target]))], changed_words(source, target))


def read_fashion200k(root: Path, broken: Broken) -> Release:
    """Fashion200k: captions of all images, and the official test queries; any image of the target's caption is right."""
    train, test = (_200k_images(root, split, broken) for split in ("train", "test"))
    paths, place = _places(list(test))
    captions: dict[str, int] = {}
    labels = np.array([captions.setdefault(test[path], len(captions)) for path in paths], np.int64)
    queries: list[tuple[Path, str, int, int]] = []
    file = root / "test_queries.txt"
    for number, line in _lines(file, f"expected {FIRST['fashion200k']}"):
        names = line.split()
        known = [root / name for name in names if root / name in place]
        if len(names) != 2 or len(known) != 2:
            broken.say(file, f"line {number}", f"expected two images of the labels, got {line[:80]!r}: {WAY}")
            continue
        source, target = (test[path] for path in known)
        queries.append((known[0], changed_words(source, target), captions[target], captions[source]))
    wanted, references = (np.array([query[column] for query in queries], np.int64) for column in (2, 3))
    # a query's own caption comes last, all of its images, as the authors have it
    part = Category("fashion200k", paths, labels, labels, [q[0] for q in queries], [q[1] for q in queries], wanted, references)
    return Release([], [part], train)


# ---- built-in --------------------------------------------------------------------------------------------------------------------------


def made_garments(categories: Sequence[str]) -> tuple[Release, dict[Path, Image.Image]]:
    """Drawings of garments of four colours and four cuts, and pairs of them; in each category the same for training and evaluation."""
    colours = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (220, 200, 50)}
    cuts = ("short", "long", "striped", "checked")
    release = Release()
    drawings: dict[Path, Image.Image] = {}
    for split in ("train", "val"):
        for category in categories:
            kinds = [(Path(category, split, f"{colour}-{cut}"), colour, cut) for colour in colours for cut in cuts]
            for path, colour, cut in kinds:
                pixels = np.full((48, 48, 3), 255, np.uint8)
                pixels[6 : 24 if cut == "short" else 42, 12:36] = colours[colour]
                if cut in ("striped", "checked"):
                    pixels[8:42:8, 12:36] = 255
                if cut == "checked":
                    pixels[6:42, 14:36:8] = 255
                drawings[path] = Image.fromarray(pixels)
            step = {"train": (1, 5, 6), "val": (7, 10)}[split]
            pairs = [
                Pair(kinds[place][0], kinds[target][0], f"is {kinds[target][1]} and is {kinds[target][2]}")
                for place in range(len(kinds))
                for target in ((place + shift) % len(kinds) for shift in step)
            ]
            if split == "train":
                release.pairs += pairs
            else:
                release.categories.append(_asked(category, pairs, [path for path, _, _ in kinds]))
    return release, drawings


# ---- images ----------------------------------------------------------------------------------------------------------------------------


class FashionView:
    """A PIL image -> (3, S, S) float32, normalised; training: a random crop of 75 to 133 % of the area, mirrored in half of the cases.

    Args:
        size: S.
        augment: As in training; False: the square in the middle.
    """

    def __init__(self, size: int, augment: bool) -> None:
        from torchvision import transforms as T

        self.augment = augment
        first = (
            [T.RandomResizedCrop(size, scale=(0.75, 1.33)), T.RandomHorizontalFlip()]
            if augment
            else [T.Resize(round(size * 256 / 224)), T.CenterCrop(size)]
        )
        self.transform = T.Compose([*first, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __call__(self, image: Any, draw: tuple[int, int, int]) -> Tensor:
        if not self.augment:
            return self.transform(image)  # type: ignore[no-any-return]
        with seeded(draw):
            return self.transform(image)  # type: ignore[no-any-return]


def usable(paths: Sequence[Path], broken: Broken, decode: bool = False) -> set[Path]:
    """The images that are there.

    Args:
        paths: Images.
        broken: What is done with those that aren't: their names and number are told.
        decode: Look inside, too.

    Raises:
        MissingFileError: An image is missing, and nothing is to be skipped.
    """
    distinct = list(dict.fromkeys(paths))
    missing = [path for path in distinct if not path.exists()]
    if missing and broken.on_broken == "raise":
        raise MissingFileError(
            missing[0],
            "image",
            f"{len(missing)} of {len(distinct)} images aren't there, this is the first: their links may be dead; download them, or set "
            "on_broken to skip, which leaves out what names them",
        )
    for path in missing:
        broken.say(path.parent, f"image {path.name}", "no such file")
    found = set(distinct) - set(missing)
    if decode:
        for path in distinct:
            if path in found:
                try:
                    open_picture(path)
                except BrokenRecordError as error:
                    broken.say(path.parent, f"image {path.name}", error.problem)
                    found.discard(path)
    return found


def kept(part: Category, there: set[Path]) -> Category:
    """A category without the images that aren't there, and without the queries that name them or want none of what is left."""
    shown = [place for place, path in enumerate(part.gallery) if path in there]
    labels = part.labels[shown]
    known = set(labels.tolist())
    asked = [place for place, path in enumerate(part.queries) if path in there and int(part.wanted[place]) in known]
    return Category(
        part.name,
        [part.gallery[place] for place in shown],
        labels,
        part.identities[shown],
        [part.queries[place] for place in asked],
        [part.words[place] for place in asked],
        part.wanted[asked],
        part.references[asked],
    )


class FashionRetrievalDataModule(ComposedDataModule):
    """FashionIQ, Shoes or Fashion200k.

    Batch: {"reference": (B, 3, S, S) float32, "target": (B, 3, S, S) float32, "text_ids": (B, L) int64, "text_mask": (B, L) int64}

    Images are normalised by ImageNet's mean and deviation. Validation and test are both the validation (FashionIQ) or test queries.

    Batches of an evaluation: {"image": (B, 3, S, S) float32, "text_ids", "text_mask": (B, L) int64, "is_query": (B,) bool, "category",
    "index", "label", "identity": (B,) int64}.

    Images come as lists of links, some of them dead: those that are missing are named and counted, or left out with what names them.

    Args:
        root: Folder of the release. ``fashioniq``: ``captions/cap.<category>.<split>.json`` and ``image_splits/``, or
            ``captions_pairs/fashion_iq-<split>-cap-<category>.txt``, and ``image_data/<category>/`` or ``images/``. ``shoes``:
            ``shoes-cap-train.txt``, ``shoes-cap-test.txt`` and ``attributedata/``, or ``relative_captions_shoes.json`` with
            ``train_im_names.txt`` and ``eval_im_names.txt``. ``fashion200k``: ``labels/``, ``test_queries.txt`` and ``women/``. None:
            built-in drawings of garments of four colours and four cuts, in FashionIQ's categories, whatever ``name`` says.
        name: ``fashioniq``, ``shoes`` or ``fashion200k``.
        protocol: Gallery of FashionIQ: ``val``: the images that queries name; ``original``: all of the split, which is harder.
        categories: Of FashionIQ.
        image_size: Side S in pixels.
        tokenizer: Folder or hub name of a tokenizer of transformers; None: the words of the training texts.
        vocab_size: Most frequent words, without ``tokenizer``.
        max_length: L, tokens of a text.
        on_broken: ``raise`` at the first thing that can't be used; ``skip``: leave it out, count it and warn. Images of the evaluation are
            then read once in ``setup``, to leave out broken ones; in training the next good pair takes the place of a broken one.
        batch_size: Pairs per process and training step.
        eval_batch_size: Images per process and evaluation step.
        num_workers: Processes that read images.
        seed: Seed of order, draws and augmentation.

    Raises:
        ValueError: A value outside its range.
        WrongRootError: ``root`` doesn't hold the release.
        BrokenRecordError: A file is missing or wrong; the message names it and the line.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: Name = "fashioniq",
        protocol: Protocol = "val",
        categories: Sequence[str] = FASHIONIQ,
        image_size: int = 224,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        max_length: int = 32,
        on_broken: OnBroken = "raise",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        one_of(Name, name=name)
        one_of(Protocol, protocol=protocol)
        one_of(OnBroken, on_broken=on_broken)
        for place, category in enumerate(categories):
            one_of(FASHIONIQ, **{f"categories[{place}]": category})
        at_least(8, "pixels", image_size=image_size)
        at_least(3, "words", vocab_size=vocab_size)
        at_least(1, max_length=max_length)
        if not categories:
            raise ValueError(f"categories is empty: give some of {', '.join(FASHIONIQ)}")
        self.save_hyperparameters()
        self.root, self.release = data_path(root), name
        self._read: Any = None

    def check_root(self, stage: str = "fit") -> None:
        """Look for a file of the release.

        Raises:
            WrongRootError: There is none.
        """
        root = self.root
        if root is None:
            return
        names = {
            "fashioniq": ["captions", "captions_pairs"],
            "shoes": ["shoes-cap-train.txt", "relative_captions_shoes.json"],
            "fashion200k": ["test_queries.txt"],
        }[self.release]
        if not any((root / name).exists() for name in names):
            raise WrongRootError(f"root={str(root)!r} is no release of {self.release}: expected {FIRST[self.release]}")

    def setup(self, stage: str) -> None:
        """Read the lists, and look whether the images are there.

        Raises:
            WrongRootError: ``root`` doesn't hold the release.
            BrokenRecordError: Something can't be used, or nothing is left.
        """
        if self.val_set is not None:
            return
        self.check_root(stage)
        hp, broken = self.hparams, Broken(self.hparams["on_broken"])
        read: Any = open_picture
        if self.root is None:
            release, drawings = made_garments(hp["categories"])
            read = drawings.__getitem__
        elif self.release == "fashioniq":
            release = read_fashioniq(self.root, hp["protocol"], hp["categories"], broken)
        else:
            release = read_shoes(self.root, broken) if self.release == "shoes" else read_fashion200k(self.root, broken)
        self._read = read
        skip = hp["on_broken"] == "skip" and self.root is not None
        trained = [path for pair in release.pairs for path in (pair.reference, pair.target)] + list(release.captions)
        evaluated = [path for part in release.categories for path in (*part.gallery, *part.queries)]
        fresh = usable([*trained, *evaluated], broken) if self.root is not None else {*trained, *evaluated}
        if skip:
            fresh -= set(evaluated) - usable([path for path in evaluated if path in fresh], broken, decode=True)
        pairs = [pair for pair in release.pairs if pair.reference in fresh and pair.target in fresh]
        captions = {path: caption for path, caption in release.captions.items() if path in fresh}
        parts = [kept(part, fresh) for part in release.categories]
        broken.report()
        if empty := [part.name for part in parts if not part.queries]:
            raise BrokenRecordError(str(self.root), empty[0], "no query with images is left: see what is missing, and download its images")
        words = [pair.words for pair in pairs] or [f"replace with {caption}" for caption in captions.values()]
        words = words or [text for part in parts for text in part.words]
        self.vocabulary = Words(words, hp["vocab_size"]) if hp["tokenizer"] is None else WordPieces(hp["tokenizer"])
        shared = (read, FashionView(hp["image_size"], True), self.vocabulary, hp["max_length"], self.seed, skip)
        if pairs:
            self.train_set = TrainingPairs(pairs, *shared)
        elif captions:
            self.train_set = OneWordPairs(captions, *shared)
            if not len(self.train_set):
                raise BrokenRecordError(f"{self.root}/labels", "captions", "no two captions differ in one word: there is no pair")
        view = FashionView(hp["image_size"], False)
        self.val_set = self.test_set = QueriesAndGallery(parts, read, view, self.vocabulary, hp["max_length"])

    def pixels(self, place: Any) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 of an image, of at most 160 pixels."""
        image = self._read(place).copy()
        image.thumbnail((160, 160))
        return np.asarray(image)


__all__ = [
    "FASHIONIQ", "FashionRetrievalDataModule", "FashionView", "OneWordPairs", "Release", "changed_words", "kept", "made_garments",
    "read_fashion200k",
    "read_fashioniq", "read_shoes", "usable",
]  # fmt: skip
