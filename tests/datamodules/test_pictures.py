"""Image files are opened in one place, which says what is wrong with them."""

import numpy as np
import pytest
from PIL import Image

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.pictures import open_picture


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_truncated_and_missing_files_are_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    assert open_picture(path).size == (40, 40)
    for content in (path.read_bytes()[:600], b"", b"no image at all"):
        path.write_bytes(content)
        with pytest.raises(BrokenRecordError, match=rf"a\.{ending}: photo: can't be decoded .*copy it again"):
            open_picture(path, "photo")
    path.unlink()
    with pytest.raises(MissingFileError, match=rf"a\.{ending}: photo: no such file: unpack it"):
        open_picture(path, "photo", "unpack it")


def test_modes(tmp_path):
    indices = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    mask = Image.fromarray(indices)
    mask.putpalette([200, 100, 0] * 256)
    mask.save(tmp_path / "mask.png")
    assert np.array_equal(np.array(open_picture(tmp_path / "mask.png", mode=None)), indices), "class indices, not colours"
    assert np.array(open_picture(tmp_path / "mask.png")).tolist() == [[[200, 100, 0]] * 2] * 2
