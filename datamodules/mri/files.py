"""Released multi-coil k-space: fastMRI, Calgary-Campinas (CC359), Stanford's knees. All becomes centred k-space of a unitary transform."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods import checks
from lit_methods.arguments import handed_on
from lit_methods.datamodules.cache import cache_folder, making_folder
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.mri.base import (
    Complex,
    MaskedSamples,
    Masks,
    ScansDataModule,
    fft2c,
    ifft2c,
    root_sum_of_squares,
    scan_sample,
)
from lit_methods.datamodules.reading import AGAIN, hdf5_shapes, read_hdf5, reading
from lit_methods.inverse_problems.masks import Kind, Mask, described
from lit_methods.inverse_problems.mri import estimate_maps

Target = Literal["sense", "rss"]
ZeroColumns = Literal["refuse", "mask"]
_SAMPLE = 1  # version of the built-in samples
_WHOLE_COLUMNS = ("gaussian_1d", "equispaced", "random")


def cropped(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """The middle (..., h, w) of (..., H, W)."""
    top, left = ((have - want) // 2 for have, want in zip(values.shape[-2:], size, strict=True))
    return values[..., top : top + size[0], left : left + size[1]]


def _finite(values: NDArray[Any], path: Path, field: str) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise BrokenRecordError(path, field, f"has values that aren't finite: {AGAIN}")
    return values


class Volume:
    """A file of the layout of fastMRI: ``kspace`` (slices, coils, H, W), and what may stand beside it.

    Args:
        path: The file.
        interleaved: ``kspace`` is real, (slices, H, W, 2 coils), frequency 0 first: CC359's layout.
    """

    def __init__(self, path: Path, interleaved: bool = False) -> None:
        self.path, self.interleaved = path, interleaved
        shapes = hdf5_shapes(path, ("kspace", "reconstruction_rss", "mask"), kinds="biufc")
        if "kspace" not in shapes:
            raise BrokenRecordError(path, "kspace", f"isn't in the file, which has {sorted(shapes)}: give files of multi-coil k-space")
        shape = shapes["kspace"]
        words = "(slices, H, W, 2 x coils)" if interleaved else "(slices, coils, H, W)"
        if len(shape) != 4 or (interleaved and shape[3] % 2) or not all(shape):
            way = "single-coil files need a coil axis of 1" if len(shape) == 3 else AGAIN
            raise BrokenRecordError(path, "kspace", f"is {shape}, expected {words}: {way}")
        self.slices = shape[0]
        self.shape = (shape[3] // 2, *shape[1:3]) if interleaved else shape[1:]
        self.rss_shape = shapes.get("reconstruction_rss")
        self.has_mask = "mask" in shapes
        self._largest: float | None = None

    def kspace(self, index: int) -> Complex:
        """Centred k-space of a slice, (C, H, W)."""
        kinds = "f" if self.interleaved else "c"
        found = read_hdf5(self.path, ("kspace",), kinds=kinds, part=index)["kspace"]
        with np.errstate(over="ignore"):  # checked behind the conversion
            if not self.interleaved:
                return _finite(found.astype(np.complex64), self.path, "kspace")
            found = _finite(found.astype(np.float32), self.path, "kspace")
        pairs = (found[..., ::2] + 1j * found[..., 1::2]).transpose(2, 0, 1)
        return fft2c(np.fft.ifft2(pairs, norm="ortho"))  # frequency 0 first, the image's middle in the middle (mem)

    def mask(self) -> Mask:
        """The file's own mask, (W,) or (H, W)."""
        return read_hdf5(self.path, ("mask",))["mask"] != 0

    def rss(self, index: int) -> NDArray[np.float32]:
        """The file's root of the sum of squares."""
        found = read_hdf5(self.path, ("reconstruction_rss",), part=index)["reconstruction_rss"]
        with np.errstate(over="ignore"):
            return _finite(found.astype(np.float32), self.path, "reconstruction_rss")

    def largest(self) -> float:
        """The volume's largest magnitude, > 0: that of ``reconstruction_rss``, or of all slices where there is none."""
        if self._largest is None:
            if self.rss_shape is not None:
                whole = read_hdf5(self.path, ("reconstruction_rss",))["reconstruction_rss"]
                self._largest = float(_finite(whole, self.path, "reconstruction_rss").max(initial=0))
            else:
                self._largest = max(float(root_sum_of_squares(ifft2c(self.kspace(k))).max()) for k in range(self.slices))
            if self._largest <= 0:
                raise BrokenRecordError(self.path, "kspace", f"is 0 everywhere: {AGAIN}")
        return self._largest


class _Slices(MaskedSamples):
    """Slices of volumes; what they need to be read goes along to a worker."""

    def __init__(self, volumes: Sequence[Volume], options: dict[str, Any], words: Masks, seed: int | None, own_masks: bool) -> None:
        super().__init__(words, seed)
        self.volumes, self.own_masks = list(volumes), own_masks
        self.options = options
        self.places = [(number, index) for number, volume in enumerate(self.volumes) for index in range(volume.slices)]

    def __len__(self) -> int:
        return len(self.places)

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """A slice with its mask."""
        number, place = self.places[index]
        volume, crop = self.volumes[number], self.options["crop"]
        kspace = volume.kspace(place) / volume.largest()
        if not self.own_masks and crop is not None:
            if kspace.shape[1] < crop[0] or kspace.shape[2] < crop[1]:
                raise BrokenRecordError(volume.path, "kspace", f"is {kspace.shape[1:]}, smaller than crop={crop}: give a smaller crop")
            kspace = fft2c(cropped(ifft2c(kspace), crop))
        shape = kspace.shape[1:]
        if self.options["alike"] is not None and kspace.shape != self.options["alike"]:
            raise BrokenRecordError(
                volume.path, "kspace", f"gives {kspace.shape}, other files {self.options['alike']}: set batch_size=1, or crop"
            )
        acquired = self._acquired(kspace, volume.path)
        mask = self._own_mask(volume, shape) if self.own_masks else self.drawn_mask(shape, epoch, index) & acquired
        maps = self._maps(volume, place, kspace)
        target = None if self.own_masks else self._target(volume, place, kspace, maps)
        return scan_sample(kspace, maps, mask, number, target, 1.0)

    def _acquired(self, kspace: Complex, path: Path) -> Mask:
        """Columns that were measured at all, (W,)."""
        columns: Mask = np.abs(kspace).max((0, 1)) > 0
        if not columns.all() and not self.own_masks and self.options["zero_columns"] == "refuse" and self.options["crop"] is None:
            missing, all_columns = int((~columns).sum()), len(columns)
            raise BrokenRecordError(
                path,
                "kspace",
                f"{missing} of {all_columns} columns are 0: padded or not measured, and a mask would count them as measured; set "
                "zero_columns=mask to leave them out of every mask, or crop the images",
            )
        return columns

    def _own_mask(self, volume: Volume, shape: tuple[int, int]) -> Mask:
        found, kind = volume.mask(), self.masks.kind
        if found.shape not in (shape, shape[1:]):
            raise BrokenRecordError(
                volume.path, "mask", f"is {found.shape} and k-space {shape}: expected (W,) or (H, W) of the same size, {AGAIN}"
            )
        if described(found) == "2-D" and kind in _WHOLE_COLUMNS:
            raise BrokenRecordError(
                volume.path,
                "mask",
                f"is 2-D, {found.shape}, but mask={kind!r} measures whole columns: set mask to gaussian_2d or poisson",
            )
        return np.broadcast_to(found, shape).copy()

    def _maps(self, volume: Volume, place: int, kspace: Complex) -> Complex:
        folder, lines = self.options["maps"], self.options["calibration"]
        if folder is None:
            pairs = torch.view_as_real(torch.from_numpy(np.ascontiguousarray(kspace)))[None]
            estimated: Complex = torch.view_as_complex(estimate_maps(pairs, lines)[0]).numpy()
            return estimated
        path = folder / volume.path.name
        fields = read_hdf5(path, ("sensitivity_map",), "coil maps", "give a folder of maps with the names of the k-space", "c", place)
        if "sensitivity_map" not in fields:
            raise BrokenRecordError(path, "sensitivity_map", "isn't in the file: expected coil maps (slices, coils, H, W), complex")
        with np.errstate(over="ignore"):
            maps: Complex = _finite(fields["sensitivity_map"].astype(np.complex64), path, "sensitivity_map")
        if maps.ndim == 3 and maps.shape[0] == len(kspace) and all(a >= b for a, b in zip(maps.shape[1:], kspace.shape[1:], strict=True)):
            maps = cropped(maps, kspace.shape[1:]) if self.options["crop"] is not None else maps
        if maps.shape != kspace.shape:
            raise BrokenRecordError(
                path,
                "sensitivity_map",
                f"is {maps.shape} for a slice whose k-space is {kspace.shape}: expected the same; give the maps of this file, or maps=null",
            )
        size = np.sqrt((np.abs(maps) ** 2).sum(0))
        unit: Complex = (maps / np.where(size > 0, size, 1)).astype(np.complex64)
        return unit

    def _target(self, volume: Volume, place: int, kspace: Complex, maps: Complex) -> Complex:
        if self.options["target"] == "sense":
            combined: Complex = (maps.conj() * ifft2c(kspace)).sum(0)
            return combined
        if volume.rss_shape is None:
            raise BrokenRecordError(
                volume.path, "reconstruction_rss", "isn't in the file: set target=sense, which combines the full k-space by the coil maps"
            )
        found = volume.rss(place)
        if found.shape != kspace.shape[1:]:
            raise BrokenRecordError(
                volume.path,
                "reconstruction_rss",
                f"is {found.shape} and the images {kspace.shape[1:]}: set crop={list(found.shape)}, or target=sense",
            )
        return (found / volume.largest()).astype(np.complex64)


class KSpaceFilesDataModule(ScansDataModule):
    """Base: subclasses say in which folders the parts lie, or which files belong to which, and how they are read."""

    _interleaved = False
    _way = ""
    _folders: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        root: Path | None,
        mask: Kind,
        acceleration: float | Sequence[float],
        centre: float | Sequence[float],
        maps: Path | None,
        calibration: int,
        target: Target,
        crop: tuple[int, int] | None,
        zero_columns: ZeroColumns,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(mask, acceleration, centre, batch_size, num_workers, seed)
        checks.one_of(Target, target=target)
        checks.one_of(ZeroColumns, zero_columns=zero_columns)
        checks.at_least(2, calibration=calibration)
        if crop is not None:
            checks.at_least(8, height=crop[0], width=crop[1])
        self.root, self.maps = data_path(root), data_path(maps)
        self.calibration, self.target, self.zero_columns = calibration, target, zero_columns
        self.crop = None if crop is None else (int(crop[0]), int(crop[1]))

    def files(self, part: str) -> list[Path]:
        """The files of ``train``, ``val`` or ``predict``; none: there is no such part."""
        folder = self._given() / self._folders[part] if part in self._folders else None
        return listed(folder, endings=(".h5",)) if folder is not None and folder.is_dir() else []

    def _given(self) -> Path:
        if self.root is None:  # the built-in sample is read by the same code
            folder = cache_folder() / "mri" / f"{type(self).__name__}-{_SAMPLE}"
            if not folder.is_dir():
                from lit_methods.datamodules.mri.fake import FAKES

                with making_folder(folder) as work:
                    FAKES[type(self).__name__]({"root": work}, {})
            return folder
        if not self.root.is_dir():
            raise WrongRootError(f"root={str(self.root)!r} is no folder: give {self._way}")
        return self.root

    def check_root(self, stage: str = "fit") -> None:
        """Look for the files."""
        part = {"fit": "train", "predict": "predict"}.get(stage, "val")
        if not self.files(part) and not (part == "predict" and self.files("val")):
            raise WrongRootError(f"root={str(self.root)!r} has no files to {stage} with: give {self._way}")

    def setup(self, stage: str) -> None:
        """Look into all files, without reading values.

        Raises:
            WrongRootError: The layout isn't there.
            BrokenRecordError: A file can't be used.
        """
        self.check_root(stage)
        if stage == "fit" and self.train_set is None:
            self.train_set = self._slices("train", self.seed)
        if self.val_set is None and self.files("val"):
            self.val_set = self.test_set = self._slices("val", None)
        if stage == "predict" and self.predict_set is None and self.files("predict"):
            self.predict_set = self._slices("predict", None)

    def volumes(self, paths: Sequence[Path]) -> list[Volume]:
        """The files, opened once."""
        return [Volume(path, self._interleaved) for path in paths]

    def _slices(self, part: str, seed: int | None) -> _Slices:
        volumes = self.volumes(self.files(part))
        masked = [volume.path for volume in volumes if volume.has_mask]
        own = part == "predict" and len(masked) == len(volumes)
        if masked and not own:
            raise BrokenRecordError(
                masked[0], "mask", f"the file was measured with a mask, so that it has no full k-space to {part} with: use it for predict"
            )
        first = volumes[0].shape if own or self.crop is None else (volumes[0].shape[0], *self.crop)
        options = {
            "maps": self.maps,
            "calibration": self.calibration,
            "target": self.target,
            "crop": self.crop,
            "zero_columns": self.zero_columns,
            "alike": first if self.batch_size > 1 else None,
        }
        return _Slices(volumes, options, self.masks, seed, own)


class FastMRIDataModule(KSpaceFilesDataModule):
    """Slices of fastMRI's multi-coil knees or brains, masked after the fact.

    Batch: {"kspace": (B, C, H, W, 2) float32, "maps": (B, C, H, W, 2) float32, "mask": (B, 1, H, W, 1) bool, "volume": (B,) int64, "maximum": (B,) float32, "target": (B, H, W, 2) float32}

    ``root`` has ``multicoil_train``, ``multicoil_val`` and, for ``predict``, ``multicoil_test`` with files ``*.h5``: ``kspace`` (slices,
    coils, H, W), ``reconstruction_rss``; those of the test have ``mask`` and no target, and keep it. Validation and test are
    ``multicoil_val``, since the test's targets aren't public. A volume is scaled by the largest value of ``reconstruction_rss``, or of its
    own where that isn't there. Without a folder of coil maps they are estimated from the middle of k-space, before masking. The data are
    released by NYU under an agreement of their own. Needs ``pip install 'lit-methods[segmentation]'`` for HDF5.

    Args:
        root: The release; null: a few slices of random ellipses in its layout.
        mask: ``gaussian_2d``, ``poisson``, ``gaussian_1d``, ``equispaced`` or ``random``.
        acceleration: One number or several, of which each training sample draws one.
        centre: Fully measured middle: a share of the columns, or half-axes of an ellipse as a share of the side; one for each acceleration.
        maps: Folder of files of the same names with ``sensitivity_map`` (slices, coils, H, W); null: estimated.
        calibration: Side of the middle of k-space that maps are estimated from, in samples.
        target: ``sense``: the full k-space combined by the maps, complex; ``rss``: the file's ``reconstruction_rss``.
        crop: Height and width to crop the coil images to, before masking; null: as measured.
        zero_columns: Columns of k-space that are 0 in a whole slice: ``refuse``, or ``mask``: leave them out of every mask.
        batch_size: Slices per process and step; more than 1 needs slices of one shape.
        num_workers: Processes that read data.
        seed: Seed of masks and order.

    Raises:
        ValueError: A value lies outside its range.
    """  # noqa: E501

    _way = "a folder with multicoil_train and multicoil_val of fastMRI"
    _folders: ClassVar[dict[str, str]] = {"train": "multicoil_train", "val": "multicoil_val", "predict": "multicoil_test"}

    def __init__(
        self,
        root: Path | None = None,
        mask: Kind = "equispaced",
        acceleration: float | list[float] = 4.0,
        centre: float | list[float] = 0.08,
        maps: Path | None = None,
        calibration: int = 24,
        target: Target = "sense",
        crop: tuple[int, int] | None = None,
        zero_columns: ZeroColumns = "refuse",
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(**handed_on(KSpaceFilesDataModule, locals()))
        self.save_hyperparameters(ignore=["root", "maps"])  # a path would block a strict resume


class CC359DataModule(KSpaceFilesDataModule):
    """Slices of the Calgary-Campinas (CC359) 12-coil brains, masked after the fact.

    Batch: {"kspace": (B, C, H, W, 2) float32, "maps": (B, C, H, W, 2) float32, "mask": (B, 1, H, W, 1) bool, "volume": (B,) int64, "maximum": (B,) float32, "target": (B, H, W, 2) float32}

    ``root`` has ``Train`` and ``Val`` with files ``*.h5``: ``kspace`` (slices, H, W, 24), real and imaginary parts of 12 coils in turn,
    already transformed along the third direction (mem). Its first frequency is 0; it is turned to centred k-space here. Needs
    ``pip install 'lit-methods[segmentation]'`` for HDF5.

    Args:
        root: The release; null: a few slices of random ellipses in its layout.
        mask: ``gaussian_2d``, ``poisson``, ``gaussian_1d``, ``equispaced`` or ``random``.
        acceleration: One number or several, of which each training sample draws one.
        centre: Fully measured middle: half-axes of an ellipse as a share of the side, or a share of the columns; one for each acceleration.
        maps: Folder of files of the same names with ``sensitivity_map`` (slices, coils, H, W); null: estimated.
        calibration: Side of the middle of k-space that maps are estimated from, in samples.
        target: ``sense``: the full k-space combined by the maps; ``rss``: the file's ``reconstruction_rss``, which the release lacks.
        crop: Height and width to crop the coil images to, before masking; null: as measured.
        zero_columns: Columns of k-space that are 0 in a whole slice, as in the release: ``mask``: leave them out of every mask; ``refuse``.
        batch_size: Slices per process and step; more than 1 needs slices of one shape.
        num_workers: Processes that read data.
        seed: Seed of masks and order.

    Raises:
        ValueError: A value lies outside its range.
    """  # noqa: E501

    _interleaved = True
    _way = "a folder with Train and Val of the multi-coil Calgary-Campinas data"
    _folders: ClassVar[dict[str, str]] = {"train": "Train", "val": "Val"}

    def __init__(
        self,
        root: Path | None = None,
        mask: Kind = "poisson",
        acceleration: float | list[float] = 5.0,
        centre: float | list[float] = 0.02,
        maps: Path | None = None,
        calibration: int = 24,
        target: Target = "sense",
        crop: tuple[int, int] | None = None,
        zero_columns: ZeroColumns = "mask",
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(**handed_on(KSpaceFilesDataModule, locals()))
        self.save_hyperparameters(ignore=["root", "maps"])  # a path would block a strict resume


class StanfordKneeDataModule(KSpaceFilesDataModule):
    """Slices of Stanford's fully sampled knees (mridata.org), masked after the fact.

    Batch: {"kspace": (B, C, H, W, 2) float32, "maps": (B, C, H, W, 2) float32, "mask": (B, 1, H, W, 1) bool, "volume": (B,) int64, "maximum": (B,) float32, "target": (B, H, W, 2) float32}

    ``root`` has ISMRMRD files ``*.h5`` with ``dataset/data``. Three-dimensional scans are transformed along the readout and become slices
    across it, both of whose directions are phase-encoded; of two-dimensional ones the slices are as measured. Each file is sorted once and
    kept in the cache of this package, about as large as it is. Files are dealt in the order of their names: 80 % for training, the rest for
    validation and test, at least one. Needs ``pip install 'lit-methods[segmentation]'`` for HDF5.

    Args:
        root: Folder of the files; null: a few slices of random ellipses in their layout.
        mask: ``gaussian_2d``, ``poisson``, ``gaussian_1d``, ``equispaced`` or ``random``.
        acceleration: One number or several, of which each training sample draws one.
        centre: Fully measured middle: half-axes of an ellipse as a share of the side, or a share of the columns; one for each acceleration.
        maps: Folder of files of the same names with ``sensitivity_map`` (slices, coils, H, W); null: estimated.
        calibration: Side of the middle of k-space that maps are estimated from, in samples.
        target: ``sense``: the full k-space combined by the maps; ``rss``: root of the sum of squares, which isn't in these files.
        crop: Height and width to crop the coil images to, before masking; null: as measured.
        zero_columns: Columns of k-space that are 0 in a whole slice: ``mask``: leave them out of every mask; ``refuse``.
        batch_size: Slices per process and step; more than 1 needs slices of one shape.
        num_workers: Processes that read data.
        seed: Seed of masks and order.

    Raises:
        ValueError: A value lies outside its range.
    """  # noqa: E501

    _way = "a folder of Stanford's knees, ISMRMRD files *.h5"

    def __init__(
        self,
        root: Path | None = None,
        mask: Kind = "gaussian_2d",
        acceleration: float | list[float] = 12.0,
        centre: float | list[float] = 0.02,
        maps: Path | None = None,
        calibration: int = 24,
        target: Target = "sense",
        crop: tuple[int, int] | None = None,
        zero_columns: ZeroColumns = "mask",
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(**handed_on(KSpaceFilesDataModule, locals()))
        self.save_hyperparameters(ignore=["root", "maps"])  # a path would block a strict resume

    def files(self, part: str) -> list[Path]:
        """Those of its share; there is none for ``predict``."""
        found = listed(self._given(), endings=(".h5",))
        kept = min(len(found) - 1, round(0.8 * len(found)))
        return {"train": found[:kept], "val": found[kept:], "predict": []}[part]

    def volumes(self, paths: Sequence[Path]) -> list[Volume]:
        """The files, sorted into the cache at first."""
        return [Volume(self._sorted(path)) for path in paths]

    @staticmethod
    def _sorted(path: Path) -> Path:
        """The file in fastMRI's layout."""
        with reading(path, "file", "an ISMRMRD file"):
            state = path.stat()
        name = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
        folder = cache_folder() / "ismrmrd" / name
        if not folder.is_dir():
            kspace = read_ismrmrd(path)
            import h5py

            with making_folder(folder) as work, h5py.File(work / path.name, "w") as file:
                file.create_dataset("kspace", data=kspace)
        return folder / path.name


def read_ismrmrd(path: Path) -> Complex:
    """Centred k-space (slices, C, H, W) of an ISMRMRD file: H and W are phase-encoded, or readout and phase-encoded in two dimensions.

    Sizes are those of what was measured; noise scans and repetitions are left out.

    Raises:
        ImportError: h5py isn't installed.
        MissingFileError: There is no such file.
        BrokenRecordError: It has no ``dataset/data`` of acquisitions of one shape.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path.name} is an HDF5 file, which needs h5py: pip install 'lit-methods[segmentation]'") from error
    with reading(path, "file", "an ISMRMRD file"), h5py.File(path, "r") as file:
        group = file.get("dataset") if isinstance(file.get("dataset", getlink=True), h5py.HardLink) else None
        data = group.get("data") if isinstance(group, h5py.Group) and isinstance(group.get("data", getlink=True), h5py.HardLink) else None
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external or not {"head", "data"} <= set(data.dtype.names or ()):
            raise BrokenRecordError(path, "dataset/data", "isn't a list of acquisitions with head and data: expected an ISMRMRD file")
        if data.size * 340 > path.stat().st_size:  # bytes of a header
            raise BrokenRecordError(path, "dataset/data", f"claims {data.size:,} acquisitions, more than the file can hold: {AGAIN}")
        head, values = data["head"].reshape(-1), data["data"].reshape(-1)
    noise = (head["flags"] & (1 << 18)) != 0
    first = ~noise & (head["idx"]["repetition"] == 0)
    head, values = head[first], values[first]
    if not len(head):
        raise BrokenRecordError(path, "dataset/data", "has no acquisitions: expected fully sampled k-space")
    samples, coils = int(head["number_of_samples"][0]), int(head["active_channels"][0])
    if any(len(line) != 2 * samples * coils for line in values) or not samples * coils:
        raise BrokenRecordError(path, "dataset/data", f"has acquisitions of other lengths than {coils} coils x {samples} samples: {AGAIN}")
    lines = _finite(np.stack(list(values)).astype(np.float32), path, "dataset/data").reshape(len(head), coils, samples, 2)
    steps = [head["idx"][name].astype(np.int64) for name in ("kspace_encode_step_1", "kspace_encode_step_2", "slice")]
    sizes = [int(step.max()) + 1 for step in steps]
    whole = sizes[0] * sizes[1] * sizes[2]
    if whole > 2 * len(head) + 4096:
        raise BrokenRecordError(path, "dataset/data", f"has {len(head)} lines of {whole}: expected fully sampled k-space, {AGAIN}")
    kspace = np.zeros((sizes[2], coils, samples, sizes[0], sizes[1]), np.complex64)
    kspace[steps[2], :, :, steps[0], steps[1]] = lines[..., 0] + 1j * lines[..., 1]
    if sizes[1] == 1:
        return kspace[..., 0]
    shifted = np.fft.ifftshift(kspace[0], axes=1)
    readout = np.fft.fftshift(np.fft.ifft(shifted, axis=1, norm="ortho"), axes=1)
    return readout.transpose(1, 0, 2, 3).astype(np.complex64)


__all__ = ["CC359DataModule", "FastMRIDataModule", "StanfordKneeDataModule", "Volume", "read_ismrmrd"]
