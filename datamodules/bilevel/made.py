"""Bilevel problems for training hyperparameters: quadratics, logistic regression of digits, noisy images; built in, or files."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Whole
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.matrices.idx import mnist_files, read_mnist
from lit_methods.datamodules.pictures import open_picture
from lit_methods.seeds import own_seed

Batch = dict[str, Tensor]


class BilevelDataModule(LoaderDataModule):
    """Base: subclasses write :meth:`problems`; a training batch is the whole problem, ``steps_per_epoch`` times in an epoch.

    Every rank gets the whole problem.

    Args:
        steps_per_epoch: Upper iterations between two validations.
        num_workers: Processes that read data; everything lies in memory, so 0 is fastest.
        seed: Seed of the draws.

    Attributes:
        problem: The training problem after ``setup``.

    Raises:
        ValueError: A number lies outside its range.
    """

    problem: Batch | None = None

    def __init__(self, steps_per_epoch: int, num_workers: int, seed: int) -> None:
        super().__init__(batch_size=1, num_workers=num_workers, seed=seed)
        checks.at_least(1, steps_per_epoch=steps_per_epoch)
        self.steps_per_epoch = steps_per_epoch

    def problems(self, generator: torch.Generator) -> tuple[Batch, Batch]:
        """The training problem and the one of validation and test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Draw."""
        if self.train_set is not None:
            return
        generator = torch.Generator().manual_seed(own_seed(type(self).__name__, self.seed))
        self.problem, held = self.problems(generator)
        self.train_set = Whole(self.problem, self.steps_per_epoch)
        self.val_set = self.test_set = Whole(held, 1)

    def train_dataloader(self) -> Any:
        """The whole problem on every rank."""
        return self.whole_loader()

    def val_dataloader(self) -> Any:
        """The whole problem of validation on every rank."""
        return self.whole_loader("val")

    def test_dataloader(self) -> Any:
        """The same."""
        return self.whole_loader("test")

    def predict_dataloader(self) -> Any:
        """The same."""
        return self.whole_loader("test")


class QuadraticBilevelDataModule(BilevelDataModule):
    """A quadratic in both levels, whose optimum is known.

    Batch: {"A1": (K, N) float64, "A2": (K, N) float64, "A3": (K, M) float64, "b1": (K) float64, "b2": (K) float64}

    A1, A2 and A3 are uniform in [0, 1), b1 = A1 x + noise and b2 = A2 x + A3 theta + noise for normal x and theta.

    Args:
        rows: Rows of the matrices.
        unknowns: n, entries of x; null: as many as hyperparameters.
        hyperparameters: m, entries of theta.
        noise: Its standard deviation.
        steps_per_epoch: Upper iterations between two validations.
        num_workers: Processes that read data.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        rows: int = 200,
        unknowns: int | None = None,
        hyperparameters: int = 10,
        noise: float = 0.01,
        steps_per_epoch: int = 10,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(steps_per_epoch, num_workers, seed)
        checks.at_least(1, rows=rows, unknowns=unknowns, hyperparameters=hyperparameters)
        checks.at_least(0, noise=noise)
        unknowns = hyperparameters if unknowns is None else unknowns
        if rows < unknowns:
            raise ValueError(f"rows is {rows} and unknowns {unknowns}: the lower level needs as many rows as unknowns")
        self.rows, self.unknowns, self.hyperparameters, self.noise = rows, unknowns, hyperparameters, noise

    def problems(self, generator: torch.Generator) -> tuple[Batch, Batch]:
        """One problem for all parts."""
        options: Any = {"generator": generator, "dtype": torch.float64}
        a1, a2 = (torch.rand(self.rows, self.unknowns, **options) for _ in range(2))
        a3 = torch.rand(self.rows, self.hyperparameters, **options)
        x, theta = torch.randn(self.unknowns, **options), torch.randn(self.hyperparameters, **options)
        noises = [self.noise * torch.randn(self.rows, **options) for _ in range(2)]
        batch = {"A1": a1, "A2": a2, "A3": a3, "b1": a1 @ x + noises[0], "b2": a2 @ x + a3 @ theta + noises[1]}
        return batch, batch


class WeightDecayDataModule(BilevelDataModule):
    """Digits for a logistic regression whose weight decays are learned: rows to fit, rows to choose decays by, and rows to test.

    Batch: {"features": (N, P) float64, "label": (N) int64, "val_features": (M, P) float64, "val_label": (M) int64}

    scikit-learn's 1,797 real digits of 8 x 8 pixels, or its 569 samples of breast tissue (30 features, 2 classes), standardised by the rows
    to fit; or MNIST's digits, reduced to 12 x 12 pixels in [0, 1] as in the paper.

    Args:
        name: ``digits`` or ``breast_cancer``.
        shares: Shares of the rows to fit, and of those to choose by; the rest is for testing.
        root: Folder with MNIST's files (``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, or those of ``t10k``; also ``.gz``, also
            in ``MNIST/raw`` below it), which are taken in the place of ``name``; null: what ``name`` says.
        samples: Rows that are drawn from MNIST's; null: all of them.
        steps_per_epoch: Upper iterations between two validations.
        num_workers: Processes that read data.
        seed: Seed of the split.
    """

    def __init__(
        self,
        name: Literal["digits", "breast_cancer"] = "digits",
        shares: tuple[float, float] = (0.4, 0.3),
        root: Path | None = None,
        samples: int | None = None,
        steps_per_epoch: int = 10,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(steps_per_epoch, num_workers, seed)
        checks.literals(WeightDecayDataModule, locals())
        checks.within("(0, 1)", "a share", fit=shares[0], choose=shares[1])
        if sum(shares) >= 1:
            raise ValueError(f"shares are {shares}: leave something for testing")
        checks.at_least(10, "rows", samples=samples)
        self.name, self.shares, self.root, self.samples = name, tuple(shares), data_path(root), samples

    def check_root(self, stage: str = "fit") -> None:
        """See whether there are MNIST's files.

        Raises:
            WrongRootError: There are none.
        """
        if self.root is not None:
            mnist_files(self.root)

    def _rows(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features (N, P) float64 and labels (N,) of all rows."""
        if self.root is not None:
            pixels, digits = read_mnist(self.root)
            chosen = torch.randperm(len(digits), generator=generator)[: self.samples]
            images = torch.from_numpy(pixels.copy())[chosen, None].double() / 255
            return F.adaptive_avg_pool2d(images, 12).flatten(1), torch.from_numpy(digits.astype(np.int64))[chosen]
        from sklearn import datasets

        read = datasets.load_digits if self.name == "digits" else datasets.load_breast_cancer
        features, label = (torch.from_numpy(np.asarray(values)) for values in read(return_X_y=True))
        return features.double(), label.long()

    def problems(self, generator: torch.Generator) -> tuple[Batch, Batch]:
        """The rows to fit and to choose by; in evaluation those to test, too."""
        features, label = self._rows(generator)
        order = torch.randperm(len(label), generator=generator)
        counts = [int(share * len(label)) for share in self.shares]
        fit, choose, test = order.split([*counts, len(label) - sum(counts)])
        scaled = features
        if self.root is None:  # MNIST's pixels stay in [0, 1]
            scaled = (features - features[fit].mean(0)) / features[fit].std(0).clamp(min=1e-3)
        batch = {"features": scaled[fit], "label": label[fit], "val_features": scaled[choose], "val_label": label[choose]}
        return batch, batch | {"test_features": scaled[test], "test_label": label[test]}


class NoisyImagesDataModule(BilevelDataModule):
    """Images with normal noise, and without, for denoisers whose parameters are learned; other images for validation and test.

    Batch: {"noisy": (N, 1, H, W) float64, "clean": (N, 1, H, W) float64}

    Args:
        root: Folder of PNG files, such as Kodak's 24; null: images by ``name``. Sorted by name, the first ones are for training; of each
            the middle counts, in grey.
        name: ``blocks``: made, piecewise constant; ``photographs``: tiles of scikit-image's camera and astronaut, grey.
        size: Pixels of a side.
        number: Images to train with, and as many for evaluation; with ``root`` what is left over, up to as many.
        noise: Standard deviation, where pixels are in [0, 1].
        steps_per_epoch: Upper iterations between two validations.
        num_workers: Processes that read data.
        seed: Seed of images and noise.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: Literal["blocks", "photographs"] = "blocks",
        size: int = 32,
        number: int = 4,
        noise: float = 0.1,
        steps_per_epoch: int = 10,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(steps_per_epoch, num_workers, seed)
        checks.literals(NoisyImagesDataModule, locals())
        checks.at_least(8, "pixels", size=size)
        checks.at_least(1, number=number)
        checks.at_least(0, noise=noise)
        self.root, self.name, self.size, self.number, self.noise = data_path(root), name, size, number, noise

    def problems(self, generator: torch.Generator) -> tuple[Batch, Batch]:
        """Two halves of the images."""
        clean = self._read(self.root) if self.root else (self._blocks if self.name == "blocks" else self._photographs)(generator)
        noisy = clean + self.noise * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        halves = zip(noisy.split(self.number), clean.split(self.number), strict=True)
        train, held = ({"noisy": one, "clean": other} for one, other in halves)
        return train, held

    def _read(self, root: Path) -> Tensor:
        files = listed(root, endings=(".png",)) if root.is_dir() else []
        if len(files) <= self.number:
            raise MissingFileError(root, "PNG files", f"there are {len(files)}: give a folder with more than number = {self.number}")
        tiles = []
        for file in files[: 2 * self.number]:
            grey = np.asarray(open_picture(file, "image", "copy the release again").convert("L"))
            top, left = ((side - self.size) // 2 for side in grey.shape)
            if min(top, left) < 0:
                size = f"{grey.shape[1]} x {grey.shape[0]} pixels are fewer than size = {self.size}"
                raise BrokenRecordError(file, "size", f"{size}: lower it, or leave the file out")
            tiles.append(torch.from_numpy(grey[top : top + self.size, left : left + self.size] / 255.0))
        return torch.stack(tiles)[:, None]

    def _blocks(self, generator: torch.Generator) -> Tensor:
        images = torch.zeros(2 * self.number, 1, self.size, self.size, dtype=torch.float64)
        for image in images:
            for _ in range(6):
                top, left = torch.randint(self.size - 3, (2,), generator=generator).tolist()
                high, wide = torch.randint(3, self.size // 2 + 3, (2,), generator=generator).tolist()
                image[0, top : top + high, left : left + wide] = torch.rand(1, generator=generator, dtype=torch.float64)
        return images

    def _photographs(self, generator: torch.Generator) -> Tensor:
        import skimage.color
        import skimage.data

        pictures = [skimage.data.camera() / 255.0, skimage.color.rgb2gray(skimage.data.astronaut())]
        tiles = []
        for picture in pictures:  # one for training, one for evaluation
            corners = torch.randint(512 - self.size, (self.number, 2), generator=generator).tolist()
            tiles += [torch.from_numpy(picture[top : top + self.size, left : left + self.size].copy()) for top, left in corners]
        return torch.stack(tiles)[:, None].double()
