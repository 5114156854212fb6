"""What the datamodules of MRI share: a scan becomes a sample."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.inverse_problems.masks import Kind, Mask, make_mask

Complex = NDArray[np.complex64]
_EVALUATED = 7_777  # begins the seeds of evaluation masks, which are the same for every seed and epoch
_TRAINED = 7_778


def fft2c(images: NDArray[np.complexfloating]) -> Complex:
    """Centred unitary transform over the last two axes."""
    shifted = np.fft.ifftshift(images, axes=(-2, -1))
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=(-2, -1)).astype(np.complex64)


def ifft2c(kspace: NDArray[np.complexfloating]) -> Complex:
    """Inverse of :func:`fft2c`."""
    shifted = np.fft.ifftshift(kspace, axes=(-2, -1))
    return np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1)).astype(np.complex64)


def root_sum_of_squares(coils: NDArray[np.complexfloating]) -> NDArray[np.float32]:
    """Coil images (C, H, W) as one magnitude (H, W)."""
    return np.sqrt((np.abs(coils) ** 2).sum(0)).astype(np.float32)


def as_pairs(values: NDArray[np.complexfloating]) -> Tensor:
    """Complex numbers as a tensor with a last axis of 2."""
    return torch.view_as_real(torch.from_numpy(np.ascontiguousarray(values.astype(np.complex64)))).clone()


class Masks(NamedTuple):
    """Which masks are drawn.

    Attributes:
        kind: Kind of mask.
        acceleration: About all samples over those that are measured; a sample draws one.
        centre: Fully measured middle, for each acceleration.
    """

    kind: Kind
    acceleration: tuple[float, ...]
    centre: tuple[float, ...]


class MaskedSamples(Samples):
    """Base: subclasses give a scan by its number; here its mask is drawn.

    Args:
        masks: Which.
        seed: Of the training masks; None: those of an evaluation, the same in every epoch.
    """

    def __init__(self, masks: Masks, seed: int | None) -> None:
        self.masks, self._seed = masks, seed

    def drawn_mask(self, shape: tuple[int, int], epoch: int, index: int) -> Mask:
        """The mask of a sample; where there are several accelerations, one of them by chance."""
        place = [_EVALUATED, index] if self._seed is None else [_TRAINED, self._seed, epoch, index]
        rng = np.random.default_rng(place)
        choice = int(rng.integers(len(self.masks.acceleration)))
        return make_mask(self.masks.kind, shape, self.masks.acceleration[choice], self.masks.centre[choice], rng)


def scan_sample(kspace: Complex, maps: Complex, mask: Mask, volume: int, target: Complex | None, maximum: float) -> dict[str, Tensor]:
    """A sample.

    Args:
        kspace: (C, H, W), scaled; what the mask leaves out is set to 0.
        maps: (C, H, W).
        mask: (H, W).
        volume: Number of the volume.
        target: (H, W); None: not known.
        maximum: The volume's largest magnitude in these units.
    """
    sample = {
        "kspace": as_pairs(kspace * mask),
        "maps": as_pairs(maps),
        "mask": torch.from_numpy(mask)[None, :, :, None],
        "volume": torch.tensor(volume),
        "maximum": torch.tensor(maximum, dtype=torch.float32),
    }
    return sample if target is None else sample | {"target": as_pairs(target)}


class ScansDataModule(LoaderDataModule):
    """Base of the datamodules of MRI: which masks they draw.

    Args:
        mask: ``gaussian_2d``, ``poisson``, ``gaussian_1d``, ``equispaced`` or ``random``.
        acceleration: One number or several, of which each training sample draws one.
        centre: Fully measured middle; one for each acceleration.
        batch_size: Slices per process and step.
        num_workers: Processes that read data.
        seed: Seed of masks and order.

    Raises:
        ValueError: A value lies outside its range, or there are more accelerations than middles or the other way round.
    """

    def __init__(
        self,
        mask: Kind,
        acceleration: float | Sequence[float],
        centre: float | Sequence[float],
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        checks.one_of(Kind, mask=mask)
        several = [tuple(value) if isinstance(value, Sequence) else (value,) for value in (acceleration, centre)]
        if len(several[0]) != len(several[1]) or not several[0]:
            raise ValueError(f"acceleration is {acceleration} and centre {centre}: give one centre for each acceleration")
        for one, middle in zip(*several, strict=True):
            checks.within("[1, inf)", acceleration=one)
            checks.share(centre=middle)
        self.masks = Masks(mask, *several)


__all__ = [
    "Complex",
    "MaskedSamples",
    "Masks",
    "ScansDataModule",
    "as_pairs",
    "fft2c",
    "ifft2c",
    "root_sum_of_squares",
    "scan_sample",
]
