"""Pairs of low and high resolution: layouts, errors, draws, and the reduction itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import SuperResolutionDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.superres.fake import pairs
from lit_methods.datamodules.superres.pairs import augment, cut, downsample, low_resolution_file, photographs, read_rgb, to_luma
from lit_methods.tasks.superres.metrics import luminance


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The layout of the releases at x2, both ways of naming; sides that are no multiples of 2."""
    pairs(tmp_path, ["DIV2K"], 2, (53, 40), number=2)
    pairs(tmp_path, ["Flickr2K", "benchmark/Set5", "benchmark/Set14"], 2, (53, 40))
    return tmp_path


def data(root: Path | None = None, **kwargs: object) -> SuperResolutionDataModule:
    return SuperResolutionDataModule(root, **{"test": ["Set5", "Set14"], "patch_size": 16, "batch_size": 2, **kwargs})  # type: ignore[arg-type]


def test_the_layout_of_the_releases_is_read(root):
    module = data(root)
    module.setup("fit")
    assert len(module.train_set) == 3
    batch = next(iter(module.train_dataloader()))
    assert batch["lr"].shape == (2, 3, 8, 8)
    assert batch["hr"].shape == (2, 3, 16, 16)
    assert batch["lr"].dtype == torch.float32
    assert 0 <= float(batch["lr"].min()) < float(batch["lr"].max()) <= 1
    (whole,) = module.val_dataloader()
    assert whole["hr"].shape == (1, 3, 40, 52), "cut to a multiple of the scale"
    assert whole["lr"].shape == (1, 3, 20, 26)
    assert whole["name"] == ["set5_1"]
    expected = read_rgb(root / "benchmark/Set5/HR/set5_1.png", "")[:40, :52]
    assert torch.equal((whole["hr"][0] * 255).round().to(torch.uint8), torch.from_numpy(expected.copy()).permute(2, 0, 1))
    module.setup("test")
    assert [next(iter(one))["name"] for one in module.test_dataloader()] == [["set5_1"], ["set14_1"]]
    assert module.test_names == ("Set5", "Set14")


def test_patches_of_a_pair_belong_together_and_follow_from_seed_epoch_and_index(root):
    module = data(root, patches_per_image=50)
    module.setup("fit")
    sample = module.train_set[3, 7]
    again, other_epoch, other_index = module.train_set[3, 7], module.train_set[4, 7], module.train_set[3, 10]
    assert torch.equal(sample["hr"], again["hr"])
    assert not torch.equal(sample["hr"], other_epoch["hr"])
    assert not torch.equal(sample["hr"], other_index["hr"])
    assert sample["name"] == other_index["name"] == "0002"
    for index in range(20):
        one = module.train_set[0, index]
        small = torch.nn.functional.interpolate(one["hr"][None], size=(8, 8), mode="bicubic", antialias=True)[0].clamp(0, 1)
        inside = (slice(None), slice(2, -2), slice(2, -2))  # the kernel reaches over the border of the patch
        assert float((small[inside] - one["lr"][inside]).abs().max()) < 0.006, "the low-resolution patch is that of the other"


def test_all_eight_symmetries_are_drawn():
    low = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    high = low.repeat(3, 0).repeat(3, 1)
    seen = set()
    for seed in range(200):
        a, b = augment(low, high, 2, 3, np.random.default_rng(seed))
        assert np.array_equal(a.repeat(3, 0).repeat(3, 1), b)
        seen.add(a.tobytes())
    assert len(seen) == 8


def test_batches_dont_depend_on_workers_and_go_on_after_a_resume():
    def batches(module: SuperResolutionDataModule, state: dict | None = None) -> list[torch.Tensor]:
        module.setup("fit")
        loader = module.train_dataloader()
        if state:
            loader.load_state_dict(state)
        return [batch["hr"] for batch in loader]

    kwargs = {"patches_per_image": 3, "batch_size": 4, "color": "luma"}
    plain = batches(data(**kwargs))
    assert len(plain) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, batches(data(num_workers=1, **kwargs)), strict=True))
    module = data(**kwargs)
    module.setup("fit")
    loader = module.train_dataloader()
    for _ in zip(range(2), loader, strict=False):
        state = loader.state_dict()
    rest = batches(data(**kwargs), state)
    assert len(rest) == 1
    assert torch.equal(rest[0], plain[2])


def test_the_built_in_photographs_are_split_by_columns():
    train, held_out = photographs(2, luma=False, train=True), photographs(2, luma=False, train=False)
    import skimage.data

    whole = skimage.data.astronaut()
    assert [name for *_, name in train] == ["astronaut", "camera", "chelsea", "coffee", "rocket"]
    assert np.array_equal(train[0][1], whole[:, :358])
    assert np.array_equal(held_out[0][1], whole[:, 358:])
    assert all(low.shape[0] * 2 == high.shape[0] and low.shape[1] * 2 == high.shape[1] for low, high, _ in train + held_out)
    module = data(color="luma")
    module.setup("validate")
    assert next(iter(module.val_dataloader()))["hr"].shape[1] == 1
    assert module.test_names == ("photographs",)


def test_luma_is_the_rounded_luminance_of_the_metrics():
    pixels = picture(8, 8)
    expected = luminance(torch.tensor(pixels).permute(2, 0, 1)[None]).round()[0, 0].numpy()
    assert np.array_equal(to_luma(pixels)[..., 0], expected.astype(np.uint8))
    assert to_luma(pixels[..., :1]).shape == (8, 8, 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_reduction_is_pillows_bicubic(scale):
    pixels = picture(24, 36, 3)
    for channel in range(3):  # as floats: of bytes Pillow rounds twice
        plane = Image.fromarray(pixels[..., channel].astype(np.float32), mode="F")
        theirs = np.asarray(plane.resize((36 // scale, 24 // scale), Image.Resampling.BICUBIC)).clip(0, 255).round()
        assert np.abs(downsample(pixels, scale)[..., channel] - theirs).max() <= 1


def test_the_reduction_is_matlabs_but_for_the_edges(test_data):
    """Set5 with reductions by MATLAB's imresize."""
    folder = test_data / "set5"
    if not folder.is_dir():
        pytest.skip("LIT_METHODS_TEST_DATA has no set5")
    for high_file in sorted((folder / "HR").glob("*.png")):
        high, low = read_rgb(high_file, ""), read_rgb(low_resolution_file(high_file, 4), "")
        difference = np.abs(downsample(cut(high, 4), 4).astype(int) - low)[2:-2, 2:-2]
        assert difference.max() <= 2, high_file  # MATLAB rounds twice: after rows and after columns
        assert difference.mean() < 0.2, high_file
        assert np.abs(low[3:-1, 2:-2].astype(int) - low[2:-2, 2:-2]).mean() > 10 * difference.mean(), "a shift would show"


def test_set5_is_read_in_the_other_layout(test_data, tmp_path):
    if not (test_data / "set5").is_dir():
        pytest.skip("LIT_METHODS_TEST_DATA has no set5")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "Set5").symlink_to(test_data / "set5")
    module = data(tmp_path, scale=4, test=["Set5"])
    module.setup("test")
    samples = list(module.test_dataloader()[0])
    assert len(samples) == 5
    assert all(s["hr"].shape[2] == 4 * s["lr"].shape[2] for s in samples)


# ---- what is wrong with files ----------------------------------------------------------------------------------------------------------


def test_a_missing_low_resolution_file_is_named_or_computed(root):
    gone = root / "DIV2K/DIV2K_train_LR_bicubic/X2/0002x2.png"
    gone.unlink()
    with pytest.raises(MissingFileError, match=r"0002x2\.png") as caught:
        data(root).setup("fit")
    assert str(gone) in str(caught.value)
    assert "make_lr=true" in str(caught.value)
    module = data(root, make_lr=True)
    module.setup("fit")
    assert len(module.train_set) == 3
    low, high, _ = module.train_set.read(1)
    assert np.array_equal(low, downsample(high, 2))


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(WrongRootError, match=r"Urban100 has no folder HR .* unpack Urban100 there"):
        data(root, test=["Urban100"]).setup("test")
    with pytest.raises(WrongRootError, match="DIV2K has no folder HR"):
        data(tmp_path / "nowhere").setup("fit")
    (root / "benchmark/Empty/HR").mkdir(parents=True)
    with pytest.raises(WrongRootError, match=r"holds no image: expected \*\.png"):
        data(root, val="Empty").setup("validate")


def test_broken_images_and_wrong_sizes_are_named(root):
    file = root / "benchmark/Set5/LR_bicubic/X2/set5_1x2.png"
    save(file, picture(10, 10))
    module = data(root)
    module.setup("validate")
    with pytest.raises(BrokenRecordError, match=r"set5_1x2\.png: size: 10 x 10 pixels, expected 26 x 20"):
        module.val_set[0, 0]
    file.write_bytes(b"no image")
    with pytest.raises(BrokenRecordError, match=r"set5_1x2\.png: low resolution: can't be decoded"):
        module.val_set[0, 0]
    content = (root / "benchmark/Set5/HR/set5_1.png").read_bytes()
    (root / "benchmark/Set5/HR/set5_1.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(BrokenRecordError, match=r"set5_1\.png: high resolution: can't be decoded"):
        module.val_set[0, 0]
    big = data(root, patch_size=64)
    big.setup("fit")
    with pytest.raises(ValueError, match="26 x 20 pixels at low resolution, fewer than a patch of 32: lower patch_size"):
        big.train_set[0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"patch_size": 15}, "patch_size=15 must be a multiple of scale=2"),
        ({"color": "grey"}, "color is 'grey': give one of rgb, luma"),
        ({"test": "Set5"}, r"write \['DIV2K'\]"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data(**arguments)


def test_other_pictures_of_scikit_image_by_name():
    data = SuperResolutionDataModule(pictures=["coins", "brick"], color="luma", patch_size=16)
    data.setup("fit")
    assert {data.train_set[(0, index)]["name"] for index in range(2)} == {"coins", "brick"}
    assert [batch["name"] for batch in data.val_dataloader()] == [["coins"], ["brick"]]
    with pytest.raises(ValueError, match="pictures"):
        SuperResolutionDataModule(pictures=["lena"])
