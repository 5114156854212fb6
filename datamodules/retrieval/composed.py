"""Data sets for composed image retrieval: a reference image and words in training pairs and queries, images in a gallery."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.retrieval.tokens import Vocabulary, padded

Ints = NDArray[np.int64]
Read = Callable[[Any], Any]  # an image's place, such as its path -> the image
View = Callable[[Any, tuple[int, int, int]], Tensor]  # image as read, (seed, epoch, number) -> (C, H, W) float32


@dataclass(frozen=True)
class Pair:
    """A training example: two images and the words that lead from the first to the second."""

    reference: Any
    target: Any
    words: str


@dataclass(frozen=True)
class Category:
    """Queries that are asked in one gallery.

    Attributes:
        name: Its name.
        gallery: G places of images.
        labels: (G,) what a query may want.
        identities: (G,) what a query's own image is, so that it comes last.
        queries: Q places of reference images.
        words: Q texts.
        wanted: (Q,) labels.
        references: (Q,) identities.
    """

    name: str
    gallery: Sequence[Any] | Ints
    labels: Ints
    identities: Ints
    queries: Sequence[Any] | Ints
    words: Sequence[str]
    wanted: Ints
    references: Ints


class Composed(Samples):
    """Samples with words, which batches are cut to."""

    def __init__(self, read: Read, view: View, vocabulary: Vocabulary, max_length: int) -> None:
        self.read, self.view, self.vocabulary, self.max_length = read, view, vocabulary, max_length

    def tokens(self, words: str | None) -> dict[str, Tensor]:
        """``text_ids`` and ``text_mask`` (L,), padded; None: no words at all."""
        rows = [[]] if words is None else self.vocabulary.encode([words], self.max_length)
        ids, mask = padded(rows, next(iter(self.vocabulary.special_ids), 0), self.max_length)
        return {"text_ids": ids[0], "text_mask": mask[0]}

    @staticmethod
    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, cut to its longest text."""
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        longest = max(1, int(batch["text_mask"].sum(dim=1).max()))
        return batch | {name: batch[name][:, :longest] for name in ("text_ids", "text_mask")}


class TrainingPairs(Composed):
    """Pairs as ``reference``, ``target`` (C, H, W), ``text_ids`` and ``text_mask`` (L,).

    Args:
        pairs: All pairs.
        read: Place -> image.
        view: Image -> tensor, augmented.
        vocabulary: Makes tokens of words.
        max_length: L.
        seed: Seed of the augmentation.
        skip: A pair whose image can't be read is warned about, and the next good one takes its place.
    """

    def __init__(
        self, pairs: Sequence[Pair], read: Read, view: View, vocabulary: Vocabulary, max_length: int, seed: int, skip: bool = False
    ) -> None:
        super().__init__(read, view, vocabulary, max_length)
        self.pairs, self.seed, self.skip = pairs, seed, skip

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, epoch: int, index: int) -> Pair:
        """One pair, as an epoch sees it."""
        return self.pairs[index]

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One pair, or the next good one.

        Raises:
            BrokenRecordError: An image can't be read, or with ``skip`` none of all pairs can.
        """
        for step in range(len(self)):
            place = (index + step) % len(self)
            pair = self.pair(epoch, place)
            try:
                pictures = [self.read(image) for image in (pair.reference, pair.target)]
            except BrokenRecordError as problem:
                if not self.skip:
                    raise
                warnings.warn(f"pair {place} skipped, the next one takes its place: {problem}", stacklevel=2)
                continue
            images = [self.view(picture, (self.seed, epoch, 2 * place + which)) for which, picture in enumerate(pictures)]
            return {"reference": images[0], "target": images[1], **self.tokens(pair.words)}
        raise BrokenRecordError("data set", "pairs", f"all {len(self)} pairs have an image that can't be read: see the warnings above")


class QueriesAndGallery(Composed):
    """Queries and gallery images of all categories, evenly mixed, so that a few batches have some of both.

    Samples: ``image`` (C, H, W), ``text_ids`` and ``text_mask`` (L,), 0 for a gallery image, ``is_query``, ``category``, ``index``: place
    among the category's queries or gallery, ``label``: its own or the wanted one, ``identity``: its own or the reference's.

    Args:
        categories: What is evaluated.
        read: Place -> image.
        view: Image -> tensor.
        vocabulary: Makes tokens of words.
        max_length: L.
    """

    def __init__(self, categories: Sequence[Category], read: Read, view: View, vocabulary: Vocabulary, max_length: int) -> None:
        super().__init__(read, view, vocabulary, max_length)
        self.categories = list(categories)
        rows: list[tuple[float, bool, int, int]] = []
        for number, part in enumerate(self.categories):
            for is_query, size in ((True, len(part.queries)), (False, len(part.gallery))):
                rows += [((place + 0.5) / size, is_query, number, place) for place in range(size)]
        rows.sort(key=lambda row: row[0])
        self.is_query = np.array([row[1] for row in rows], bool)
        self.category, self.place = (np.array([row[column] for row in rows], np.int64) for column in (2, 3))

    def __len__(self) -> int:
        return len(self.place)

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One query, or one image of a gallery."""
        is_query, number, place = bool(self.is_query[index]), int(self.category[index]), int(self.place[index])
        part = self.categories[number]
        image = self.view(self.read((part.queries if is_query else part.gallery)[place]), (0, 0, index))
        label, identity = (part.wanted, part.references) if is_query else (part.labels, part.identities)
        return {
            "image": image,
            **self.tokens(part.words[place] if is_query else None),
            "is_query": torch.tensor(is_query),
            "category": torch.tensor(number),
            "index": torch.tensor(place),
            "label": torch.tensor(int(label[place])),
            "identity": torch.tensor(int(identity[place])),
        }


class ComposedDataModule(LoaderDataModule):
    """Base: subclasses fill ``vocabulary`` and the sets in ``setup``, and say how an image is shown.

    Attributes:
        vocabulary: Makes tokens, after ``setup``.
    """

    vocabulary: Any = None

    @property
    def tokens(self) -> list[str]:
        """Names of the V tokens."""
        return list(self.vocabulary.tokens)

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the evaluated categories, by their numbers."""
        return () if self.val_set is None else tuple(part.name for part in self.val_set.categories)

    def pixels(self, place: Any) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 of an image, to be looked at."""
        raise NotImplementedError

    def shown_query(self, category: int, index: int) -> tuple[NDArray[np.uint8], str]:
        """Reference image and words of a query."""
        part = self.val_set.categories[category]
        return self.pixels(part.queries[index]), part.words[index]

    def shown_image(self, category: int, index: int) -> NDArray[np.uint8]:
        """An image of a gallery."""
        return self.pixels(self.val_set.categories[category].gallery[index])


__all__ = ["Category", "Composed", "ComposedDataModule", "Pair", "QueriesAndGallery", "TrainingPairs"]
