"""Weights of samples by how rare their label is: re-weighting and label distribution smoothing, LDS (arXiv:2102.09554).

Golden vectors come from YyzHarry/imbalanced-regression@a6fdc45, agedb-dir/datasets.py (``_prepare_weights``) and utils.py.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_methods import checks

Reweight = Literal["none", "inverse", "sqrt_inv"]
Kernel = Literal["gaussian", "triang", "laplace"]


def smoothing_kernel(kernel: Kernel, size: int, sigma: float) -> NDArray[np.float64]:
    """A symmetric window of ``size`` bins, before it is normalised.

    Args:
        kernel: ``gaussian``: a unit impulse filtered by scipy's ``gaussian_filter1d``, which reflects at the ends of the window;
            ``triang``: a triangle; ``laplace``: exp(-|x| / sigma) / (2 sigma).
        size: Odd, at least 1.
        sigma: Width of ``gaussian`` and ``laplace`` in bins, > 0.

    Returns:
        (size,) > 0, largest in the middle.

    Raises:
        ValueError: An unknown kernel, an even size, or a width of 0 or less.
    """
    checks.one_of(Kernel, kernel=kernel)
    checks.positive(sigma=sigma)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size is {size}: give an odd number of bins")
    offsets = np.arange(size) - size // 2
    if kernel == "triang":
        return 1 - np.abs(offsets) / (size // 2 + 1)
    if kernel == "laplace":
        return np.exp(-np.abs(offsets) / sigma) / (2 * sigma)
    from scipy.ndimage import gaussian_filter1d

    window: NDArray[np.float64] = gaussian_filter1d((offsets == 0).astype(np.float64), sigma)
    return window


def label_weights(
    labels: NDArray[Any],
    reweight: Reweight = "sqrt_inv",
    lds: bool = False,
    kernel: Kernel = "gaussian",
    kernel_size: int = 5,
    sigma: float = 2.0,
    num_bins: int = 121,
) -> NDArray[np.float32]:
    """Weight of each sample: one over the frequency of its label, scaled so that the weights sum to the number of samples.

    Args:
        labels: (N,) bins >= 0, integers or numbers whose whole part counts; those past the last bin count there.
        reweight: ``inverse``: of the count, clipped to 5 to 1000; ``sqrt_inv``: of its square root; ``none``: all weights are 1.
        lds: Smooth the (transformed) counts over neighbouring bins first, with a kernel of largest value 1 and zeros beyond the ends. Under
            ``inverse`` the smoothed counts are truncated to integers, as in the authors' code.
        kernel: Kernel of LDS.
        kernel_size: In bins, odd.
        sigma: In bins.
        num_bins: Labels lie in 0 to ``num_bins - 1``.

    Returns:
        (N,) float32 > 0, of mean 1.

    Raises:
        ValueError: There are no labels, one is negative or not finite, or ``reweight`` is unknown.
    """
    labels = np.asarray(labels)
    checks.one_of(Reweight, reweight=reweight)
    if labels.ndim != 1 or not labels.size or not np.isfinite(labels).all() or labels.min() < 0:
        raise ValueError(f"labels are {labels.shape} {labels.dtype}: expected one finite number of 0 or more for each sample")
    if reweight == "none":
        return np.ones(len(labels), np.float32)
    bins = np.minimum(labels.astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    frequency: NDArray[Any] = np.clip(counts, 5, 1000) if reweight == "inverse" else np.sqrt(counts)
    if lds:
        from scipy.ndimage import convolve1d

        window = smoothing_kernel(kernel, kernel_size, sigma)
        frequency = convolve1d(frequency, weights=window / window.max(), mode="constant")  # keeps the dtype
    weights = (1 / frequency[bins]).astype(np.float32)
    return weights * (len(weights) / weights.sum())


__all__ = ["Kernel", "Reweight", "label_weights", "smoothing_kernel"]
