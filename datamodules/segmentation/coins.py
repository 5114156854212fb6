"""The photograph of old coins that scikit-image ships, as tiles with masks."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

COINS = ("background", "coin")
_BORDER = 256  # columns of the photograph left of it are for training


def coin_mask(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where coins lie, (H, W): a watershed on the edges from what is surely dark and surely bright, holes filled.

    The thresholds, 30 and 150 of 255, are for scikit-image's photograph of coins.
    """
    from skimage.filters import sobel
    from skimage.segmentation import watershed

    sure = np.where(picture < 30, 1, np.where(picture > 150, 2, 0))
    return ndimage.binary_fill_holes(watershed(sobel(picture), sure) == 2)


def coin_tiles(train: bool, size: int = 32, stride: int = 16) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Grey tiles of the photograph with their masks.

    Args:
        train: Tiles of the left two thirds, which overlap; False: of the rest, side by side.
        size: Side in pixels.
        stride: Pixels from one training tile to the next.

    Returns:
        (N, 1, size, size) in [0, 1], and (N, size, size) of 0 and 1.
    """
    import skimage.data

    picture = np.asarray(skimage.data.coins())
    columns, step = (slice(0, _BORDER), stride) if train else (slice(_BORDER, None), size)

    def tiles(array: NDArray[np.generic]) -> NDArray[np.generic]:
        windows = np.lib.stride_tricks.sliding_window_view(array[:, columns], (size, size))
        return windows[::step, ::step].reshape(-1, size, size)

    return tiles(picture)[:, None].astype(np.float32) / np.float32(255), tiles(coin_mask(picture)).astype(np.uint8)


__all__ = ["COINS", "coin_mask", "coin_tiles"]
