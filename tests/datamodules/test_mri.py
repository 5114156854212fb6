"""Scans: what is in a sample, the three releases, real brain slices, and what is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_methods.datamodules import CC359DataModule, FastMRIDataModule, PhantomScansDataModule, StanfordKneeDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.fake import write_fake
from lit_methods.datamodules.mri.base import fft2c, ifft2c
from lit_methods.datamodules.mri.files import Volume
from lit_methods.inverse_problems import mri

h5py = pytest.importorskip("h5py", reason="h5py isn't installed: pip install 'lit-methods[mri]'")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path / "cache"))


def prepared(kind: Any, stage: str = "fit", **words: Any) -> Any:
    data = kind(**words)
    data.setup(stage)
    return data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_fake(FastMRIDataModule, tmp_path / "release")
    return tmp_path / "release"


def file_of(root: Path, part: str = "multicoil_train") -> Path:
    return sorted((root / part).iterdir())[0]


def change(path: Path, name: str, value: Any) -> None:
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value


# ---- samples ----------------------------------------------------------------------------------------------------------------------------


def test_a_made_scan_is_its_image_seen_by_the_coils() -> None:
    """Without noise A x is the k-space; masks change with the epoch in training and never in validation; other seeds, other scans."""
    data = prepared(PhantomScansDataModule, noise=0.0, num_train=4, num_val=2, size=16)
    sample = data.train_set[0]
    operator = mri.MultiCoilMRI(sample["maps"][None], sample["mask"][None])
    torch.testing.assert_close(operator(sample["target"][None])[0], sample["kspace"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample["maps"].square().sum((0, -1)), torch.ones(16, 16))
    assert float(mri.magnitude(sample["target"]).max()) == pytest.approx(1.0, abs=1e-5)
    again = data.train_set[1, 0]
    assert not torch.equal(again["mask"], sample["mask"])
    assert torch.equal(again["target"], sample["target"])
    assert torch.equal(data.val_set[0, 0]["mask"], data.val_set[5, 0]["mask"])
    other = prepared(PhantomScansDataModule, noise=0.0, num_train=4, num_val=2, size=16, seed=1)
    assert not torch.equal(other.train_set[0]["target"], sample["target"])
    assert torch.equal(other.val_set[0]["kspace"], data.val_set[0]["kspace"])


def test_images_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "slices.npz"
    np.savez(path, image=np.random.default_rng(0).integers(1, 255, (10, 20, 24), dtype=np.uint8))
    data = prepared(PhantomScansDataModule, images=path, size=10)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [6, 2, 2]
    with pytest.raises(BrokenRecordError, match="smaller than size=32"):
        prepared(PhantomScansDataModule, images=path)
    np.savez(path, image=np.zeros((3, 40, 40)))
    with pytest.raises(BrokenRecordError, match="without positive values"):
        prepared(PhantomScansDataModule, images=path)
    np.savez(path, image=np.ones((2, 40, 40)))
    with pytest.raises(BrokenRecordError, match="too few for shares"):
        prepared(PhantomScansDataModule, images=path)
    with pytest.raises(ValueError, match="give one centre for each acceleration"):
        PhantomScansDataModule(acceleration=[4.0, 8.0])


# ---- releases ---------------------------------------------------------------------------------------------------------------------------


def test_fastmri_combines_to_the_magnitude_of_the_file(root: Path) -> None:
    """The target by estimated maps is the root of the sum of squares, exactly where those maps are unit; rss is the file's own."""
    sense, rss = (prepared(FastMRIDataModule, root=root, target=target) for target in ("sense", "rss"))
    assert len(sense.train_set) == 6
    assert len(sense.val_set) == 4
    assert [int(sense.train_set[k]["volume"]) for k in range(6)] == [0, 0, 1, 1, 2, 2]
    found, wanted = (mri.magnitude(data.train_set[1]["target"]) for data in (sense, rss))
    assert float((found - wanted).abs().max()) < 0.15
    assert float(max(mri.magnitude(rss.train_set[k]["target"]).max() for k in range(2))) == pytest.approx(1.0)
    smaller = prepared(FastMRIDataModule, root=root, crop=(16, 12), acceleration=1.0, centre=0.0)
    with h5py.File(file_of(root)) as file:
        coils, largest = ifft2c(file["kspace"][0]), file["reconstruction_rss"][()].max()
    np.testing.assert_allclose(
        torch.view_as_complex(mri.ifft2c(smaller.train_set[0]["kspace"])).numpy(), coils[:, 4:20, 6:18] / largest, rtol=1e-3, atol=1e-5
    )


def test_coil_maps_from_files(tmp_path: Path) -> None:
    words = write_fake(FastMRIDataModule, tmp_path / "release", maps=tmp_path / "maps")
    sample = prepared(FastMRIDataModule, **words).train_set[0]
    torch.testing.assert_close(sample["maps"].square().sum((0, -1)), torch.ones(24, 24))
    change(tmp_path / "maps" / file_of(words["root"]).name, "sensitivity_map", np.ones((2, 3, 24, 24), np.complex64))
    with pytest.raises(BrokenRecordError, match=r"sensitivity_map: is \(3, 24, 24\) for a slice whose k-space is \(4, 24, 24\)"):
        prepared(FastMRIDataModule, **words).train_set[0]
    (tmp_path / "maps" / file_of(words["root"]).name).unlink()
    with pytest.raises(BrokenRecordError, match="give a folder of maps"):
        prepared(FastMRIDataModule, **words).train_set[0]


def test_cc359_and_stanford_give_centred_kspace(tmp_path: Path) -> None:
    """Both fake releases hold the ellipses that fastMRI's writer draws: their energy lies in the middle, and the maps combine them."""
    for kind in (CC359DataModule, StanfordKneeDataModule):
        data = prepared(kind, **write_fake(kind, tmp_path / kind.__name__), acceleration=1.0, centre=0.0)
        sample = data.train_set[1]
        energy = sample["kspace"].square().sum((0, -1))
        assert energy[8:16, 8:16].sum() > 0.7 * energy.sum()
        image = mri.magnitude(sample["target"])
        assert image[6:18, 6:18].mean() > 2 * image[:3].mean()
    assert len(data.train_set) == 2 * 6


def test_interleaved_kspace_is_turned(tmp_path: Path) -> None:
    write_fake(CC359DataModule, tmp_path)
    path = sorted((tmp_path / "Train").iterdir())[0]
    with h5py.File(path) as file:
        stored = file["kspace"][0]
    plain = np.fft.ifft2((stored[..., ::2] + 1j * stored[..., 1::2]).transpose(2, 0, 1), norm="ortho")
    np.testing.assert_allclose(ifft2c(Volume(path, interleaved=True).kspace(0)), plain, atol=1e-5)
    assert fft2c(plain).dtype == np.complex64


def test_prospective_masks_are_kept(root: Path) -> None:
    data = prepared(FastMRIDataModule, "predict", root=root)
    sample = data.predict_set[0]
    assert "target" not in sample
    assert int(sample["mask"][0, 0, :, 0].sum()) == 9
    assert not sample["kspace"][:, ~sample["mask"][0, ..., 0]].any()


# ---- mistakes ---------------------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(root: Path) -> None:
    path = file_of(root)
    with h5py.File(path) as file:
        kspace = file["kspace"][()]
    padded = kspace.copy()
    padded[..., 20:] = 0
    change(path, "kspace", padded)
    with pytest.raises(BrokenRecordError, match="4 of 24 columns are 0"):
        prepared(FastMRIDataModule, root=root).train_set[0]
    sample = prepared(FastMRIDataModule, root=root, zero_columns="mask").train_set[0]
    assert not sample["mask"][:, :, 20:].any()
    change(path, "kspace", kspace)
    change(path, "reconstruction_rss", None)
    with pytest.raises(BrokenRecordError, match="reconstruction_rss: isn't in the file: set target=sense"):
        prepared(FastMRIDataModule, root=root, target="rss").train_set[0]
    prepared(FastMRIDataModule, root=root).train_set[0]
    change(path, "reconstruction_rss", np.ones((2, 20, 20), np.float32))
    with pytest.raises(BrokenRecordError, match=r"set crop=\[20, 20\]"):
        prepared(FastMRIDataModule, root=root, target="rss").train_set[0]
    kspace[0, 0, 0, 0] = np.nan
    change(path, "kspace", kspace)
    with pytest.raises(BrokenRecordError, match="kspace: has values that aren't finite"):
        prepared(FastMRIDataModule, root=root).train_set[0]
    change(path, "kspace", kspace[:, 0])
    with pytest.raises(BrokenRecordError, match="single-coil files need a coil axis"):
        prepared(FastMRIDataModule, root=root)
    change(path, "kspace", None)
    with pytest.raises(BrokenRecordError, match="kspace: isn't in the file"):
        prepared(FastMRIDataModule, root=root)


def test_masks_and_folders_that_do_not_fit(root: Path) -> None:
    test = file_of(root, "multicoil_test")
    change(test, "mask", np.random.default_rng(0).random((24, 24)) < 0.3)
    with pytest.raises(BrokenRecordError, match=r"mask: is 2-D, .*measures whole columns"):
        prepared(FastMRIDataModule, "predict", root=root).predict_set[0]
    assert prepared(FastMRIDataModule, "predict", root=root, mask="poisson").predict_set[0]["mask"].shape == (1, 24, 24, 1)
    change(test, "mask", np.ones(7, bool))
    with pytest.raises(BrokenRecordError, match=r"mask: is \(7,\)"):
        prepared(FastMRIDataModule, "predict", root=root).predict_set[0]
    change(file_of(root), "mask", np.ones(24, bool))
    with pytest.raises(BrokenRecordError, match="no full k-space to train with"):
        prepared(FastMRIDataModule, root=root)
    with pytest.raises(WrongRootError, match="no files to fit with"):
        prepared(FastMRIDataModule, root=root / "multicoil_val")
    (root / "multicoil_val" / "broken.h5").write_bytes(b"nothing")
    with pytest.raises(BrokenRecordError, match="can't be read as an HDF5 file"):
        prepared(FastMRIDataModule, "validate", root=root)


def test_ismrmrd_files_that_are_none(tmp_path: Path) -> None:
    words = write_fake(StanfordKneeDataModule, tmp_path / "release")
    path = sorted(words["root"].iterdir())[0]
    change(path, "dataset/data", np.zeros(3))
    with pytest.raises(BrokenRecordError, match="isn't a list of acquisitions"):
        prepared(StanfordKneeDataModule, **words)


# ---- real slices ------------------------------------------------------------------------------------------------------------------------


def test_the_real_brain_slices(test_data: Path) -> None:
    """88 columns were never measured; the target of the estimated maps is the file's own magnitude."""
    root = test_data / "mri_brain_8ch"
    with pytest.raises(BrokenRecordError, match="88 of 256 columns are 0"):
        prepared(FastMRIDataModule, "validate", root=root).val_set[0]
    data = prepared(FastMRIDataModule, "validate", root=root, zero_columns="mask", mask="gaussian_2d", centre=0.02)
    sample = data.val_set[0]
    assert sample["kspace"].shape == (8, 320, 256, 2)
    assert 0.1 < float(sample["mask"].float().mean()) < 0.26
    truth = data.val_set.volumes[0].rss(0)
    found = mri.magnitude(sample["target"]).numpy() * data.val_set.volumes[0].largest()
    assert np.linalg.norm(found - truth) < 0.1 * np.linalg.norm(truth)
    predicted = prepared(FastMRIDataModule, "predict", root=root, mask="poisson").predict_set[0]
    assert float(predicted["mask"].float().mean()) == pytest.approx(0.124, abs=0.01)
