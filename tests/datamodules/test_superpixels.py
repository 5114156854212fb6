"""Reading superpixel files, SLIC and its cache."""

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules.driving.superpixels import compute_slic, read_superpixels, slic_superpixels, write_superpixels
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError


def quadrants(height=90, width=160):
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (250, 10, 10)
    image[: height // 2, width // 2 :] = (10, 250, 10)
    image[height // 2 :, : width // 2] = (10, 10, 250)
    image[height // 2 :, width // 2 :] = (240, 240, 20)
    return image


def test_written_ids_are_read_back(tmp_path):
    ids = np.arange(20 * 30).reshape(20, 30) % 200
    write_superpixels(tmp_path / "a.png", ids)
    read = read_superpixels(tmp_path / "a.png", (20, 30), 200)
    assert read.dtype == torch.uint8
    assert torch.equal(read.long(), torch.from_numpy(ids))
    write_superpixels(tmp_path / "b.png", ids * 5)  # needs 16 bits
    wide = read_superpixels(tmp_path / "b.png", (20, 30), 1000)
    assert wide.dtype == torch.int64
    assert torch.equal(wide, torch.from_numpy(ids * 5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]  # no temporary file is left


def test_ids_must_be_smaller_than_their_number(tmp_path):
    write_superpixels(tmp_path / "a.png", np.full((4, 6), 16))
    assert read_superpixels(tmp_path / "a.png", (4, 6), 17).max() == 16
    with pytest.raises(BrokenRecordError, match=r"a\.png: superpixels: holds id 16, but num_superpixels=16 allows 0\.\.15"):
        read_superpixels(tmp_path / "a.png", (4, 6), 16)


def test_files_that_are_no_id_maps(tmp_path):
    Image.fromarray(quadrants()).save(tmp_path / "rgb.png")
    with pytest.raises(BrokenRecordError, match=r"rgb\.png: superpixels: expected one channel of integer ids, got mode RGB"):
        read_superpixels(tmp_path / "rgb.png", (90, 160), 17)
    (tmp_path / "broken.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:70])
    with pytest.raises(BrokenRecordError, match=r"broken\.png: superpixels: can't be decoded"):
        read_superpixels(tmp_path / "broken.png", (90, 160), 17)
    with pytest.raises(MissingFileError, match="superpixels=slic"):
        read_superpixels(tmp_path / "none.png", (90, 160), 17)


def test_segments_follow_the_edges_and_stay_below_the_bound():
    image = quadrants()
    for bound in (8, 40):
        ids = slic_superpixels(image, bound)
        assert ids.shape == (90, 160)
        assert set(np.unique(ids)) == set(range(ids.max() + 1))
        assert bound / 4 < ids.max() + 1 <= bound
    quadrant = (np.arange(90) >= 45)[:, None] * 2 + (np.arange(160) >= 80)[None]
    counts = np.zeros((ids.max() + 1, 4))
    np.add.at(counts, (ids, quadrant), 1)
    purity = counts.max(axis=1).sum() / counts.sum()
    assert purity > 0.95  # segments keep to one colour; a grid of the same number that ignores the image reaches less
    grid = (np.arange(90) // 13)[:, None] * 6 + (np.arange(160) // 27)[None]
    blind = np.zeros((grid.max() + 1, 4))
    np.add.at(blind, (grid, quadrant), 1)
    assert purity > blind.max(axis=1).sum() / blind.sum() + 0.03


@pytest.fixture
def images(tmp_path):
    for k in range(3):
        Image.fromarray(np.roll(quadrants(180, 640), 9 * k, axis=1)).save(tmp_path / f"{k}.jpg")
    return [(f"token{k}", tmp_path / f"{k}.jpg") for k in range(3)]


def test_the_cache_is_resumed(tmp_path, images):
    cache = tmp_path / "cache"
    assert compute_slic(images[:1], cache, 30) == 1
    before = (cache / "token0.png").stat().st_mtime_ns
    assert compute_slic(images, cache, 30) == 2
    assert (cache / "token0.png").stat().st_mtime_ns == before
    assert compute_slic(images, cache, 30) == 0
    ids = [read_superpixels(cache / f"token{k}.png", (180, 640), 30) for k in range(3)]  # native size although SLIC ran at 512
    assert all(10 < value.max() < 30 for value in ids)
    assert not torch.equal(ids[1], ids[2])
    with pytest.raises(MissingFileError, match=r"9\.jpg: image: no such file"):
        compute_slic([("token9", tmp_path / "9.jpg")], cache, 30)


@pytest.mark.usefixtures("forked_python")
def test_worker_processes_give_the_same_and_report_broken_images(tmp_path, images):
    compute_slic(images[:2], tmp_path / "serial", 30, num_processes=1)
    images[2][1].write_bytes(b"nothing")
    with pytest.raises(BrokenRecordError, match=r"2\.jpg: image: can't be decoded"):
        compute_slic(images, tmp_path / "parallel", 30, num_processes=2)
    for k in range(2):
        name = f"token{k}.png"
        assert (tmp_path / "parallel" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()
    assert not (tmp_path / "parallel" / "token2.png").exists()
