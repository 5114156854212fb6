"""Composed queries on images of numbered classes: an image of class c and the words "plus k" ask for any image of class c + k."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, one_of, within
from lit_methods.datamodules.base import Batches
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.matrices.idx import read_idx
from lit_methods.datamodules.retrieval.composed import Category, ComposedDataModule, QueriesAndGallery
from lit_methods.datamodules.retrieval.tokens import Words, padded
from lit_methods.datamodules.vision.base import fixed_split

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Name = Literal["digits", "fashion_mnist"]
CLASSES = 10


def _unchanged(image: Tensor, draw: tuple[int, int, int]) -> Tensor:
    return image


class ShiftedPairs(Batches):
    """Pairs that are drawn anew in each epoch: an image, k of 1 to K, and an image of the class that lies k further.

    Args:
        images: (N, 1, H, W) float32.
        labels: (N,) in 0..9.
        text_ids: (K, L) tokens of each k.
        text_mask: (K, L).
        pairs: Pairs of an epoch.
        seed: Seed of the draws.
    """

    def __init__(self, images: Tensor, labels: Ints, text_ids: Tensor, text_mask: Tensor, pairs: int, seed: int) -> None:
        self.images, self.labels, self.text_ids, self.text_mask = images, labels, text_ids, text_mask
        self.pairs, self.seed = pairs, seed
        self.order = np.argsort(labels, kind="stable")
        self.starts = np.searchsorted(labels[self.order], np.arange(CLASSES + 1))

    def __len__(self) -> int:
        return self.pairs

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Some pairs."""
        drawn = np.empty((len(index), 3))
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            drawn[mine] = np.random.default_rng([self.seed, 1, int(epoch)]).random((self.pairs, 3))[index[mine]]
        reference = (drawn[:, 0] * len(self.labels)).astype(np.int64)
        shift = (drawn[:, 1] * len(self.text_ids)).astype(np.int64)
        wanted = (self.labels[reference] + shift + 1) % CLASSES
        first, behind = self.starts[wanted], self.starts[wanted + 1]
        target = self.order[first + (drawn[:, 2] * (behind - first)).astype(np.int64)]
        return {
            "reference": self.images[torch.from_numpy(reference)],
            "target": self.images[torch.from_numpy(target)],
            "text_ids": self.text_ids[torch.from_numpy(shift)],
            "text_mask": self.text_mask[torch.from_numpy(shift)],
        }


class ShiftedClassesDataModule(ComposedDataModule):
    """Pairs with many right answers: an image of class c, "plus k", and an image of class (c + k) mod 10, drawn anew in each epoch.

    Batch: {"reference": (B, 1, H, W) float32, "target": (B, 1, H, W) float32, "text_ids": (B, 2) int64, "text_mask": (B, 2) int64}

    Images are in [0, 1]. The gallery is all held-out images, and every one of the right class is right. Each of them is the reference of
    one query, whose k is drawn once. Validation and test are the same: choose nothing by the one to report it by the other.

    Batches of an evaluation: {"image": (B, 1, H, W) float32, "text_ids", "text_mask": (B, L) int64, "is_query": (B,) bool, "category",
    "index", "label", "identity": (B,) int64}.

    Args:
        name: ``digits``: 1,797 grey images of 8 x 8 pixels that scikit-learn ships. ``fashion_mnist``: grey images of 28 x 28 pixels. None:
            digits without ``root``, Fashion-MNIST with one.
        root: Folder of Fashion-MNIST's four files, ``FashionMNIST/raw/train-images-idx3-ubyte.gz`` and so on, packed or not; None: digits.
        num_train: Images to train on, 10 or more: of digits the first of a fixed permutation, of Fashion-MNIST the first ones.
        num_gallery: Held-out images at most; None: all. Of digits they come from the last 797 of the permutation.
        max_shift: K, 1 to 9.
        pairs_per_epoch: Training pairs of an epoch.
        batch_size: Pairs per process and step.
        eval_batch_size: Images per process and evaluation step.
        num_workers: Processes that read data; 0 is fastest.
        seed: Seed of pairs, queries and order.

    Attributes:
        vocab_size: V: padding, an unknown word, "plus", and K numbers.

    Raises:
        ValueError: A number lies outside its range, or ``root`` and ``name`` don't fit together.
    """

    def __init__(
        self,
        name: Name | None = None,
        root: Path | None = None,
        num_train: int = 200,
        num_gallery: int | None = None,
        max_shift: int = 3,
        pairs_per_epoch: int = 640,
        batch_size: int = 32,
        eval_batch_size: int = 400,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        one_of(Name, name=name)
        if name is not None and (root is None) != (name == "digits"):
            raise ValueError(f"name is {name!r} and root is {root!r}: give fashion_mnist with the folder of its files, or digits with null")
        within("[10, 1000]" if root is None else "[10, inf)", "images", num_train=num_train)
        at_least(10, "images", num_gallery=num_gallery)
        within("[1, 9]", "a number", max_shift=max_shift)
        at_least(1, pairs_per_epoch=pairs_per_epoch)
        self.save_hyperparameters()
        self.root, self.name = data_path(root), "digits" if root is None else "fashion_mnist"
        self.vocab_size = 3 + max_shift
        self._images: Any = None

    def check_root(self, stage: str = "fit") -> None:
        """Look for the training images."""
        if self.root is not None:
            folder = "FashionMNIST/raw"
            name = f"{folder}/train-images-idx3-ubyte"
            if not (self.root / name).exists():
                self.expect(f"{name}.gz", f"put Fashion-MNIST's four files into {folder}", "digits")

    def _read(self) -> tuple[tuple[Floats, Ints], tuple[Floats, Ints]]:
        """Images (N, H, W) in [0, 1] and labels, of training and evaluation."""
        if self.root is None:
            from sklearn.datasets import load_digits

            digits = load_digits()
            images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
            first, last = fixed_split(len(labels), 1000)
            return (images[first], labels[first]), (images[last], labels[last])
        parts = []
        for part in ("train", "t10k"):
            stored = []
            for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
                plain = self.root / "FashionMNIST" / "raw" / f"{part}-{kind}-ubyte"
                stored.append(read_idx(plain if plain.exists() else plain.with_name(f"{plain.name}.gz"), dimensions))
            images, labels = stored
            if len(images) != len(labels) or (len(labels) and labels.max() >= CLASSES):
                raise BrokenRecordError(
                    plain, "labels", f"{len(labels)} labels for {len(images)} images, expected one of 0..9 each: copy the files again"
                )
            parts.append(((images / 255).astype(np.float32), labels.astype(np.int64)))
        return parts[0], parts[1]

    def setup(self, stage: str) -> None:
        """Read, split, draw the queries.

        Raises:
            WrongRootError: ``root`` lacks the files.
            BrokenRecordError: A file is broken, or a class has no training image.
        """
        if self.train_set is not None:
            return
        self.check_root(stage)
        hp = self.hparams
        (images, labels), (held, held_labels) = self._read()
        images, labels = images[: hp["num_train"]], labels[: hp["num_train"]]
        held, held_labels = held[: hp["num_gallery"]], held_labels[: hp["num_gallery"]]
        if len(missing := np.setdiff1d(np.arange(CLASSES), labels)):
            raise BrokenRecordError(
                str(self.root or "digits"), "labels", f"the first {len(labels)} training images have no class {missing[0]}: raise num_train"
            )
        words = [f"plus {k + 1}" for k in range(hp["max_shift"])]
        self.vocabulary = Words(words, self.vocab_size)
        ids, mask = padded(self.vocabulary.encode(words, 2), 0)
        self.train_set = ShiftedPairs(torch.from_numpy(images)[:, None], labels, ids, mask, hp["pairs_per_epoch"], self.seed)
        self._images = torch.from_numpy(held)[:, None]
        places = np.arange(len(held))
        shift = np.random.default_rng([self.seed, 2]).integers(hp["max_shift"], size=len(held))
        asked = [words[k] for k in shift]
        wanted = (held_labels + shift + 1) % CLASSES
        part = Category(str(self.name), places, held_labels, places, places, asked, wanted, places)
        self.val_set = QueriesAndGallery([part], self._images.__getitem__, _unchanged, self.vocabulary, 2)
        self.test_set = self.val_set

    def pixels(self, place: Any) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 of a held-out image."""
        grey = (255 * self._images[int(place), 0]).round().to(torch.uint8).numpy()
        return np.repeat(grey[..., None], 3, axis=2)


__all__ = ["ShiftedClassesDataModule", "ShiftedPairs"]
