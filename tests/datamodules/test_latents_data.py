"""LatentDataModule: layouts, statistics, encoding once, broken files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lit_methods.datamodules import LatentDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.generative.fake import latents as write_latents
from lit_methods.datamodules.generative.latents import channel_statistics, encode_folder, read_statistics

SHAPE = (4, 3, 3)


@pytest.fixture
def latents():
    return np.random.default_rng(0).normal(2.0, 3.0, (20, *SHAPE)).astype(np.float32)


def prepared(root, **kwargs):
    data = LatentDataModule(**{"root": root, "name": "faces", "num_val": 5, "batch_size": 5, "latent_factor": 0.5, **kwargs})
    data.prepare_data()
    data.setup("fit")
    return data


def images_of(loader):
    return torch.cat([batch["image"] for batch in loader])


def test_files_and_one_array_are_the_same_data(tmp_path, latents):
    write_latents(tmp_path / "a", latents, "faces")
    write_latents(tmp_path / "b", latents, "faces", whole=True)
    one, other = prepared(tmp_path / "a"), prepared(tmp_path / "b")
    assert isinstance(other.train_set.files.whole, np.memmap)
    first, second = images_of(one.train_dataloader()), images_of(other.train_dataloader())
    assert first.shape == (15, *SHAPE)
    assert torch.equal(first, second)
    assert torch.equal(one.val_set.images, other.val_set.images)
    assert len(one.val_set) == 5


def test_latents_are_standardised_by_the_training_part_without_their_factor(tmp_path, latents):
    write_latents(tmp_path, latents, "faces")
    data = prepared(tmp_path)
    train = torch.from_numpy(latents[:15]) / 0.5
    torch.testing.assert_close(data.latent_mean, train.mean((0, 2, 3))[:, None, None])
    torch.testing.assert_close(data.latent_std, train.std((0, 2, 3), correction=0)[:, None, None])
    x = images_of(data.train_dataloader())
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.full((4,), 0.5))
    torch.testing.assert_close(data.val_set.images, (torch.from_numpy(latents[15:]) / 0.5 - data.latent_mean) / data.latent_std * 0.5)


def test_the_authors_statistics_are_read(tmp_path, latents):
    write_latents(tmp_path, latents, "faces")
    mean, std = torch.randn(SHAPE), torch.rand(SHAPE) + 0.1
    np.save(tmp_path / "faces_stat.npy", {"mean": mean, "std": std})
    data = prepared(tmp_path)
    assert torch.equal(data.latent_mean, mean)
    assert torch.equal(data.latent_std, std)
    assert torch.equal(data.val_set.images[0], (torch.from_numpy(latents[15]) / 0.5 - mean) / std * 0.5)
    np.save(tmp_path / "faces_stat.npy", {"mean": mean.numpy(), "std": std.numpy()})
    assert torch.equal(read_statistics(tmp_path / "faces_stat.npy", SHAPE)[1], std)


class Attack:
    def __reduce__(self):
        return print, ("code of the file was run",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"mean": Attack(), "std": 1}, "builtins.print"),
        (np.zeros((2, 4, 1, 1)), "above 0"),
        (np.ones((2, 3, 1, 1)), "statistics"),
        (np.full((2, 4, 1, 1), np.nan), "finite"),
        ({"mean": np.zeros(4)}, "no mean and std"),
    ],
)
def test_broken_statistics_are_named_and_never_run(content, says, tmp_path, capsys):
    file = tmp_path / "faces_stat.npy"
    np.save(file, content)
    with pytest.raises(BrokenRecordError, match=says) as caught:
        read_statistics(file, SHAPE)
    assert caught.value.file == str(file)
    assert "was run" not in capsys.readouterr().out
    with pytest.raises(MissingFileError):
        read_statistics(tmp_path / "none.npy", SHAPE)


def test_a_truncated_statistics_file_is_named(tmp_path):
    file = tmp_path / "faces_stat.npy"
    np.save(file, {"mean": torch.zeros(SHAPE), "std": torch.ones(SHAPE)})
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BrokenRecordError, match="faces_stat"):
        read_statistics(file, SHAPE)


def test_statistics_of_chunks_are_those_of_all(latents):
    whole = torch.from_numpy(latents)
    found = channel_statistics(iter(whole.split(7)))
    torch.testing.assert_close(found[0].flatten(), whole.mean((0, 2, 3)))
    torch.testing.assert_close(found[1].flatten(), whole.std((0, 2, 3), correction=0))


class Shrink(nn.Module):
    def encode(self, images):
        assert images.min() >= -1
        return nn.functional.avg_pool2d(images, 4)


def test_images_are_encoded_once_mirrored_ones_behind(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "images" / ("sub" if number > 2 else "") / f"{number}.png")
    settings = {"images": tmp_path / "images", "image_size": 8, "mirrored": True, "num_val": 2, "batch_size": 2}
    data = prepared(tmp_path / "latents", autoencoder=Shrink(), **settings)
    stored = np.load(tmp_path / "latents" / "faces.npy")
    assert stored.shape == (12, 3, 2, 2)
    expected = nn.functional.avg_pool2d(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, 4) * 0.5
    torch.testing.assert_close(torch.from_numpy(stored[:6]), expected)
    torch.testing.assert_close(torch.from_numpy(stored[6:]), expected.flip(3))
    assert len(data.train_set) == 10

    class Never(nn.Module):
        def encode(self, images):
            raise AssertionError("encoded twice")

    again = prepared(tmp_path / "latents", autoencoder=Never(), **settings)
    assert torch.equal(again.val_set.images, data.val_set.images)


def test_broken_images_and_latents_are_named(tmp_path, latents):
    (tmp_path / "images").mkdir()
    with pytest.raises(WrongRootError, match="no image"):
        encode_folder(tmp_path / "images", tmp_path / "x.npy", Shrink(), 8, 1.0)
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(BrokenRecordError, match=r"a\.png"):
        encode_folder(tmp_path / "images", tmp_path / "x.npy", Shrink(), 8, 1.0)
    assert not (tmp_path / "x.npy").exists()
    with pytest.raises(WrongRootError, match="images="):
        prepared(tmp_path)
    latents[3, 0, 1, 1] = np.nan
    write_latents(tmp_path, latents, "faces")
    with pytest.raises(BrokenRecordError, match=r"000000003\.npy.*NaN"):
        prepared(tmp_path)
    np.save(tmp_path / "faces" / "000000003.npy", latents[0, :2])
    with pytest.raises(BrokenRecordError, match=r"000000003\.npy.*expected an array"):
        prepared(tmp_path)
    (tmp_path / "faces" / "000000003.npy").write_bytes(b"short")
    with pytest.raises(BrokenRecordError, match=r"000000003\.npy.*can't be read"):
        prepared(tmp_path)


def test_digits_need_no_files():
    data = LatentDataModule(batch_size=50, num_samples=9)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (50, 4, 4, 4)
    assert len(data.train_set) == 1500
    assert len(batch["label"]) == 50
    torch.testing.assert_close(data.train_set.images.std((0, 2, 3), correction=0), torch.full((4,), 0.5))
    assert sum(len(batch["label"]) for batch in data.predict_dataloader()) == 9


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_val": 0}, r"num_val is 0.*\[1, inf\)"),
        ({"latent_factor": 0.0}, r"\(0, inf\)"),
        ({"images": "x"}, "give both"),
        ({"num_val": 20}, "leaves none"),
    ],
)
def test_wrong_arguments_are_named(wrong, says, tmp_path, latents):
    write_latents(tmp_path, latents, "faces")
    with pytest.raises(ValueError, match=says):
        prepared(tmp_path, **wrong)
