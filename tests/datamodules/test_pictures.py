"""Image files are opened in one place, which says what is wrong with them and keeps every mode's meaning."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules.driving.common import read_image as read_driving_image
from lit_methods.datamodules.driving.superpixels import read_superpixels
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.generative.latents import _pixels
from lit_methods.datamodules.pictures import open_indices, open_listed, open_picture
from lit_methods.datamodules.regression import ages, nyud2
from lit_methods.datamodules.segmentation.noisy_masks import read_mask, read_picture
from lit_methods.datamodules.superres.pairs import read_rgb
from lit_methods.datamodules.vision.imagenet import read_image


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


# ---- pictures --------------------------------------------------------------------------------------------------------------------------


def of_depth(path):
    """The image of a pair of NYUD2."""
    depth = path.with_name("depth.png")
    with Image.open(path) as picture:
        Image.new("L", picture.size).save(depth)
    return np.asarray(nyud2._read([(path, depth)], nyud2._STORED[0], 0)[0])


READERS = {  # every reader of photographs: file -> (H, W, 3) in 0 to 255
    "imagenet, generative, semi": lambda path: np.asarray(read_image(path.parent, [path.name], 0)),
    "few-shot, retrieval": lambda path: np.asarray(open_listed([path], 0)),
    "ages": lambda path: np.asarray(ages._open(path.parent, [path.name], 0)),
    "depth": of_depth,
    "voc": lambda path: read_picture(path).transpose(1, 2, 0) * 255,
    "super-resolution": lambda path: read_rgb(path, "high resolution"),
    "latents": lambda path: (_pixels(path, 16, False).permute(1, 2, 0).numpy() + 1) * 127.5,
    "driving": lambda path: read_driving_image(path, (16, 16))[0].permute(1, 2, 0).numpy(),
}
RAMP = np.linspace(0, 65535, 256).reshape(16, 16)


def transparent() -> Image.Image:
    """Opaque red above, green that nobody sees below."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8], pixels[8:] = (200, 10, 10, 255), (0, 255, 0, 0)
    return Image.fromarray(pixels)


def with_key() -> Image.Image:
    """The same with a palette, one of whose colours is transparent."""
    picture = Image.fromarray(np.repeat([0, 1], 128).reshape(16, 16).astype(np.uint8))
    picture.putpalette([200, 10, 10, 0, 255, 0])
    picture.info["transparency"] = 1
    return picture


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_keeps_the_meaning_of_a_mode_or_refuses(reader, tmp_path):
    read = READERS[reader]

    def of(picture: Image.Image, name: str, **options):
        picture.save(tmp_path / name, **options)
        return read(tmp_path / name).astype(float)

    for order, name in (("<u2", "grey.png"), ("<u2", "little.tif"), (">u2", "big.tif")):
        found = of(Image.fromarray(RAMP.astype(order)), name)
        assert np.abs(found - RAMP[..., None] / 257).max() <= 1, f"65535 is white: {name}"
    on_white = np.repeat([[200, 10, 10], [255, 255, 255]], 128, axis=0).reshape(16, 16, 3)
    for picture, name, options in (
        (transparent(), "rgba.png", {}),
        (with_key(), "palette.png", {"transparency": 1}),
    ):
        assert np.abs(of(picture, name, **options) - on_white).max() <= 1, name
    grey = np.full((16, 16, 2), (90, 255), np.uint8)
    grey[8:, :, 1] = 0
    assert np.abs(of(Image.fromarray(grey, "LA"), "la.png")[:, :, 0] - np.repeat([90, 255], 8)[:, None]).max() <= 1
    checks = np.indices((16, 16)).sum(0) % 2
    assert np.abs(of(Image.fromarray(checks.astype(bool)), "bits.png") - 255 * checks[..., None]).max() <= 1
    ink = Image.fromarray(np.full((16, 16, 4), (255, 0, 255, 0), np.uint8), "CMYK")
    assert np.abs(of(ink, "ink.tif") - (0, 255, 0)).max() <= 1
    for values, mode in ((RAMP.astype(np.int32), "I"), ((RAMP / 65535).astype(np.float32), "F")):
        with pytest.raises(BrokenRecordError, match=rf"numbers\.tif: .*: mode {mode} of Pillow \(TIFF\) has no known range.*convert"):
            of(Image.fromarray(values), "numbers.tif")


# ---- numbers in pictures ---------------------------------------------------------------------------------------------------------------


def of_few_bits(path, values, bits):
    """Grey PNG of 2 or 4 bits, which Pillow reads but doesn't write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    each = 8 // bits
    packed = (values.reshape(height, width // each, each) << (bits * np.arange(each)[::-1])).sum(-1).astype(np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


NUMBERS = {  # every reader of class indices and the like
    "mask": lambda path: read_mask(path, 16),
    "superpixels": lambda path: read_superpixels(path, (4, 4), 16).numpy(),
}


@pytest.mark.parametrize("reader", NUMBERS)
def test_indices_are_never_scaled(reader, tmp_path):
    read, path = NUMBERS[reader], tmp_path / "ids.png"
    ids = np.arange(16).reshape(4, 4)
    for bits in (2, 4):
        of_few_bits(path, ids % 2**bits, bits)
        assert read(path).tolist() == (ids % 2**bits).tolist()
    for picture, options in (
        (Image.fromarray(ids.astype(np.uint8)), {}),
        (Image.fromarray(ids.astype(np.uint16)), {}),
        (Image.fromarray(ids.astype(np.uint8), "P"), {"transparency": 3}),
    ):
        if picture.mode == "P":
            picture.putpalette(list(range(48)))
        picture.save(path, **options)
        assert read(path).tolist() == ids.tolist()
    Image.fromarray(ids % 2 == 1).save(path)
    assert read(path).tolist() == (ids % 2).tolist()
    for picture, ending, words in (
        (Image.fromarray(ids.astype(np.float32)), "tif", "got mode F"),
        (Image.fromarray(ids.astype(np.int32) - 3), "tif", "it has the number -3: expected 0 and more"),
        (Image.new("RGB", (4, 4)), "png", "got mode RGB .*not colours"),
        (Image.new("LA", (4, 4)), "png", "got mode LA"),
    ):
        picture.save(tmp_path / f"ids.{ending}")
        with pytest.raises(BrokenRecordError, match=words):
            read(tmp_path / f"ids.{ending}")


def test_depths_are_metres_in_the_bits_of_the_benchmark_alone(tmp_path):
    image, depth = tmp_path / "a.jpg", tmp_path / "depth.png"
    Image.new("RGB", (8, 8)).save(image)
    steps = np.full((8, 8), 200)
    for kind, stored, metres in ((np.uint8, nyud2._STORED[0], 200 * 10 / 255), (np.uint16, nyud2._STORED[1], 0.2)):
        Image.fromarray(steps.astype(kind)).save(depth)
        assert np.asarray(nyud2._read([(image, depth)], stored, 0)[1]) == pytest.approx(np.full((8, 8), metres))
        (other,) = (one for one in nyud2._STORED if one is not stored)
        with pytest.raises(BrokenRecordError, match=r"depth\.png: depth: expected one channel"):
            nyud2._read([(image, depth)], other, 0)


def test_indices_as_tensors_keep_their_kind(tmp_path):
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "a.png")
    assert open_indices(tmp_path / "a.png", "ids", "").max() == 300
    assert read_superpixels(tmp_path / "a.png", (2, 2), 301).dtype == torch.int64


def test_a_png_whose_check_sum_is_wrong_is_broken(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(path, compress_level=0)
    content = bytearray(path.read_bytes())
    content[900:1100] = bytes(200)  # within rows that are stored as they are: nothing in them looks wrong
    path.write_bytes(content)
    with pytest.raises(BrokenRecordError, match=r"a\.png: image: can't be decoded \(the check sum of IDAT is wrong\)"):
        open_picture(path)
    with pytest.raises(BrokenRecordError, match="check sum"):
        open_indices(path, "mask", "missing")
