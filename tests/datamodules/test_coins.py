"""Tiles of scikit-image's photograph of coins: their masks, the parts, shifted outlines."""

import numpy as np
import pytest
import skimage.data
from scipy import ndimage

from lit_methods.datamodules import NoisyMasksDataModule
from lit_methods.datamodules.segmentation.coins import coin_mask, coin_tiles


def test_the_mask_has_24_round_coins_that_are_brighter_than_the_rest():
    picture = skimage.data.coins()
    mask = coin_mask(picture)
    parts, number = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())[1:]
    assert (sizes > 500).sum() == 24, "the photograph shows four rows of six"
    assert sizes[sizes > 500].sum() > 0.99 * mask.sum()
    assert picture[mask].mean() > 1.5 * picture[~mask].mean()
    assert number >= 24


def test_tiles_are_parts_of_the_photograph_that_training_and_validation_do_not_share():
    picture, mask = skimage.data.coins() / 255, coin_mask(skimage.data.coins())
    (train, labels), (held_out, held_out_labels) = coin_tiles(True), coin_tiles(False)
    assert train.shape == (17 * 15, 1, 32, 32)
    assert held_out.shape == (9 * 4, 1, 32, 32)
    np.testing.assert_allclose(train[15 + 2, 0], picture[16:48, 32:64], atol=1e-6)
    np.testing.assert_array_equal(labels[15 + 2], mask[16:48, 32:64])
    np.testing.assert_allclose(held_out[4 + 3, 0], picture[32:64, 352:384], atol=1e-6)
    np.testing.assert_array_equal(held_out_labels[4 + 3], mask[32:64, 352:384])


def test_outlines_are_shifted_for_training_alone(tmp_path):
    data = NoisyMasksDataModule(name="coins")
    data.setup("fit")
    clean = np.stack([data.clean_labels(index) for index in range(len(data.train_set))])
    noisy = np.stack([data.train_set[(0, index)]["label"].numpy() for index in range(len(data.train_set))])
    np.testing.assert_array_equal(clean, coin_tiles(True)[1])
    assert 0.02 < (noisy != clean).mean() < 0.2
    np.testing.assert_array_equal(data.val_set[5]["label"].numpy(), coin_tiles(False)[1][5])
    assert data.class_names == ("background", "coin")
    with pytest.raises(ValueError, match="coins"):
        NoisyMasksDataModule(tmp_path, name="coins")
    with pytest.raises(ValueError, match="camvid"):
        NoisyMasksDataModule(name="camvid")
