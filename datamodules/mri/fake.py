"""Tiny releases of MRI: fastMRI, CC359 and Stanford's knees, with random ellipses in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer
from lit_methods.datamodules.mri.base import Complex, fft2c, ifft2c, root_sum_of_squares
from lit_methods.datamodules.mri.phantoms import coil_maps, make_phantoms, with_phase

_SIZE, _COILS, _SLICES = 24, 4, 2


def _scan(rng: np.random.Generator, slices: int = _SLICES, size: int = _SIZE, coils: int = _COILS) -> tuple[Complex, Complex]:
    """K-space and coil maps (slices, coils, H, W)."""
    images = with_phase(make_phantoms(slices, size, rng), rng)
    maps = np.stack([coil_maps(coils, (size, size), rng)] * slices)
    noise = rng.standard_normal((2, *maps.shape)) * 0.005
    return fft2c(maps * images[:, None]) + (noise[0] + 1j * noise[1]).astype(np.complex64), maps


def _file(path: Path) -> Any:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    return h5py.File(path, "w", track_order=True)


def _maps(arguments: Arguments, name: str, maps: Complex) -> None:
    if arguments.get("maps") is not None:
        with _file(arguments["maps"] / name) as file:
            file["sensitivity_map"] = maps


def _set(arguments: Arguments) -> dict[str, Any]:
    return {name: arguments[name] for name in ("root", "maps") if arguments.get(name) is not None}


def _fast_mri(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng, crop = np.random.default_rng(0), arguments.get("crop")
    size = _SIZE if crop is None else max(_SIZE, *(side + 4 for side in crop))  # a crop fits into the scan
    shape = {} if size == _SIZE else {"slices": 1, "size": size, "coils": 2}
    for folder, files in (("multicoil_train", 3), ("multicoil_val", 2), ("multicoil_test", 1)):
        for number in range(files):
            name = f"file_{folder[-5:].strip('_')}_{number}.h5"
            kspace, maps = _scan(rng, **shape)
            with _file(arguments["root"] / folder / name) as file:
                if folder == "multicoil_test":
                    mask = np.arange(size) % 4 == 0
                    mask[size // 2 - 2 : size // 2 + 2] = True
                    file["mask"], kspace = mask, kspace * mask
                else:
                    file["reconstruction_rss"] = np.stack([root_sum_of_squares(ifft2c(one)) for one in kspace])
                file["kspace"] = kspace
            _maps(arguments, name, maps)
    return _set(arguments) | ({} if crop is None else {"crop": crop})


def _cc359(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for folder, files in (("Train", 3), ("Val", 2)):
        for number in range(files):
            name = f"e{folder[0]}{number:05d}.h5"
            kspace, maps = _scan(rng)
            first = np.fft.fft2(ifft2c(kspace), norm="ortho").transpose(0, 2, 3, 1)
            with _file(arguments["root"] / folder / name) as file:
                file["kspace"] = np.stack([first.real, first.imag], -1).reshape(*first.shape[:3], -1).astype(np.float32)
            _maps(arguments, name, maps)
    return _set(arguments)


def _stanford(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    import h5py

    index = np.dtype([(name, "<u2") for name in _STEPS] + [("user", "<u2", (8,))])
    # a header has 340 bytes; what isn't read of it is left empty here
    head = np.dtype(
        [
            ("version", "<u2"),
            ("flags", "<u8"),
            ("number_of_samples", "<u2"),
            ("active_channels", "<u2"),
            ("idx", index),
            ("rest", "u1", (292,)),
        ]
    )
    record = np.dtype([("head", head), ("traj", h5py.vlen_dtype(np.float32)), ("data", h5py.vlen_dtype(np.float32))])
    rng = np.random.default_rng(0)
    for number in range(3):
        kspace, _ = _scan(rng, slices=6)  # across the readout
        shifted = np.fft.ifftshift(kspace, axes=0)
        kspace = np.fft.fftshift(np.fft.fft(shifted, axis=0, norm="ortho"), axes=0).astype(np.complex64)
        lines = np.zeros(_SIZE * _SIZE, record)
        for place in range(len(lines)):
            first, second = divmod(place, _SIZE)
            values = kspace[:, :, first, second].T
            lines[place]["head"]["number_of_samples"], lines[place]["head"]["active_channels"] = len(kspace), _COILS
            lines[place]["head"]["idx"]["kspace_encode_step_1"], lines[place]["head"]["idx"]["kspace_encode_step_2"] = first, second
            lines[place]["traj"] = np.zeros(0, np.float32)
            lines[place]["data"] = np.stack([values.real, values.imag], -1).astype(np.float32).reshape(-1)
        with _file(arguments["root"] / f"knee_{number}.h5") as file:
            file.create_group("dataset").create_dataset("data", data=lines)
    return {"root": arguments["root"]}


_STEPS = (
    "kspace_encode_step_1",
    "kspace_encode_step_2",
    "average",
    "slice",
    "contrast",
    "phase",
    "repetition",
    "set",
    "segment",
)
FAKES: dict[str, Writer] = {"FastMRIDataModule": _fast_mri, "CC359DataModule": _cc359, "StanfordKneeDataModule": _stanford}
__all__ = ["FAKES"]
