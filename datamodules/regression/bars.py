"""Noisy bars whose angle is the label: imbalanced regression in seconds."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, positive, within
from lit_methods.datamodules.base import Batches, Ints
from lit_methods.datamodules.regression.base import Labels, RegressionDataModule, Reweighting
from lit_methods.tasks.imbalanced_regression.weights import Kernel, Reweight

LABELS = 61  # 0 to 60
SIDE = 12  # pixels


def draw_bars(labels: NDArray[np.int64], noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """(N, 1, 12, 12) pictures of a bar through about the middle, at an angle of ``label * pi / 61``, with Gaussian noise."""
    grid = np.arange(SIDE) - (SIDE - 1) / 2
    angle = (labels * np.pi / LABELS)[:, None, None]
    offset = rng.uniform(-1.5, 1.5, (len(labels), 1, 1))
    distance = grid[None, None, :] * np.sin(angle) - grid[None, :, None] * np.cos(angle) - offset
    pictures = np.exp(-0.5 * distance**2) + rng.normal(0, noise, distance.shape)
    return pictures[:, None].astype(np.float32)


class _Bars(Batches):
    """Pictures in memory; a loader fetches a whole batch. Views are the picture with further noise, drawn for a whole epoch at once."""

    def __init__(self, pictures: Tensor, labels: Labels, views: int, view_noise: float, seed: int) -> None:
        self.pictures, self.labels, self.views, self.view_noise, self.seed = pictures, labels, views, view_noise, seed
        self._drawn: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def _noise(self, epoch: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != epoch:
            rng = np.random.default_rng([self.seed, 3, epoch])
            noise = rng.standard_normal((self.views, *self.pictures.shape), dtype=np.float32)
            self._drawn = epoch, torch.from_numpy(self.view_noise * noise)
        return self._drawn[1]

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Pictures with their labels and views."""
        chosen = torch.from_numpy(index)
        pictures = self.pictures[chosen]
        batch = {"image": pictures} | self.labels.rows(chosen)
        if self.views:
            noise = torch.empty(self.views, *pictures.shape)
            for epoch in np.unique(epochs).tolist():
                now = torch.from_numpy(epochs == epoch)
                noise[:, now] = self._noise(epoch)[:, chosen[now]]
            batch |= {f"view_{view + 1}": pictures + noise[view] for view in range(self.views)}
        return batch


class BarsDataModule(RegressionDataModule):
    """Pictures of 12 x 12 pixels with a noisy bar; the label, 0 to 60, is its angle in steps of pi / 61. There is nothing to download.

    Small labels are frequent in training (exponential, mean 9) and equally frequent in validation; labels of fewer than 20 training
    pictures are few-shot. Validation and test are the same pictures: choose nothing by the one to report it by the other.

    Batch: {"image": (B, 1, 12, 12) float32, "target": (B,) float32, "count": (B,) int64}

    ``count``: the training pictures with the same label. In training there is with ``reweight`` also ``weight``
    (B,) float32, and with ``views`` also ``view_1``, ``view_2``, ... (B, 1, 12, 12), the picture with further noise.

    Args:
        num_train: Training pictures.
        num_val: Validation pictures.
        mean_label: Mean of the exponential distribution of training labels, in steps.
        noise: Standard deviation of the noise; the bar's brightness is 1.
        views: Further views of a training picture; ConR needs 2.
        view_noise: Standard deviation of their noise.
        reweight: Weight of a training sample by its label: ``none``, ``inverse`` or ``sqrt_inv`` frequency.
        lds: Smooth the frequencies over neighbouring labels.
        lds_kernel: ``gaussian``, ``triang`` or ``laplace``.
        lds_kernel_size: Width of the kernel in labels, odd.
        lds_sigma: Standard deviation of the kernel in labels.
        batch_size: Pictures per process and step.
        num_workers: Processes that read data; the pictures lie in memory, so 0 is fastest.
        seed: Seed of training pictures, order and views. The validation pictures are the same for every seed.

    Raises:
        ValueError: A value lies outside its range.
    """

    def __init__(
        self,
        num_train: int = 1500,
        num_val: int = 1500,
        mean_label: float = 9.0,
        noise: float = 0.5,
        views: int = 0,
        view_noise: float = 0.2,
        reweight: Reweight = "none",
        lds: bool = False,
        lds_kernel: Kernel = "gaussian",
        lds_kernel_size: int = 5,
        lds_sigma: float = 2.0,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        rare = Reweighting(reweight, lds, lds_kernel, lds_kernel_size, lds_sigma)
        super().__init__(rare, 1.0, LABELS, batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(1, num_train=num_train, num_val=num_val)
        positive(mean_label=mean_label)
        within("[0, inf)", noise=noise, view_noise=view_noise, views=views)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Draw all pictures."""
        if self.train_set is not None:
            return
        hp, rng, fixed = self.hparams, np.random.default_rng([self.seed, 1]), np.random.default_rng([0, 2])
        share = np.exp(-np.arange(LABELS) / hp["mean_label"])
        train = rng.choice(LABELS, hp["num_train"], p=share / share.sum())
        held_out = fixed.permutation(np.arange(hp["num_val"]) % LABELS)
        labels, held_labels = self.known(train, [held_out])
        pictures = (torch.from_numpy(draw_bars(part, hp["noise"], draws)) for part, draws in ((train, rng), (held_out, fixed)))
        self.train_set = _Bars(next(pictures), labels, hp["views"], hp["view_noise"], self.seed)
        self.val_set = self.test_set = _Bars(next(pictures), held_labels, 0, 0.0, self.seed)


__all__ = ["LABELS", "BarsDataModule", "draw_bars"]
