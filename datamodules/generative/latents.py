"""Latents of an autoencoder, stored once and standardised: sLCT's data (arXiv:2502.01441)."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_methods.checks import at_least, positive
from lit_methods.consistency_models.latents import DigitAutoencoder, standardise
from lit_methods.datamodules.base import Batches, Ints
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.generative.base import Batch, GenerativeDataModule, Tensors
from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule, adm_crop
from lit_methods.datamodules.pickles import ArraysOnly, ordered
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.reading import file_size, read_npy, refuse_bombs, whole_tensor
from lit_methods.files import replacing

IMAGE_KINDS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_WAY = "encode the images again"
CHUNK = 256  # latents, or images to encode, at a time


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def latent_files(root: Path, name: str) -> list[Path]:
    """``<name>.npy``, or the files of the folder ``name``.

    Raises:
        WrongRootError: There is neither.
    """
    whole = root / f"{name}.npy"
    files = [whole] if os.path.lexists(whole) else listed(root / name, "*.npy")
    if not files:
        raise WrongRootError(
            f"root={str(root)!r} has neither {name}.npy nor {name}/*.npy: give images= and autoencoder= to encode them, or root=null "
            "for the built-in digits"
        )
    return files


def image_files(images: Path) -> list[Path]:
    """All images below a folder, sorted by path.

    Raises:
        WrongRootError: There is none.
    """
    files = listed(images, "**/*", sorted(IMAGE_KINDS))
    if not files:
        raise WrongRootError(f"images={str(images)!r} has no image ({', '.join(sorted(IMAGE_KINDS))}): give the folder that holds them")
    return files


class LatentFiles:
    """Latents on disk, read when they are asked for: ``<name>.npy`` (N, C, H, W), memory-mapped, or a folder of files, one a latent.

    Args:
        root: Folder.
        name: Name of the file or folder in it.

    Raises:
        WrongRootError: There is neither.
        BrokenRecordError: A file is no array of the right shape, or not finite.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.whole: NDArray[Any] | None = None
        self.files: list[Path] = []
        self.file = root / f"{name}.npy"
        if os.path.lexists(self.file):
            self.whole = read_npy(self.file, "array", _WAY, kinds="iuf", mapped=True)
            if self.whole.ndim != 4:
                raise BrokenRecordError(
                    self.file, "latents", f"expected an array (N, C, H, W), got {self.whole.shape}: encode the images again"
                )
            self.shape: tuple[int, ...] = self.whole.shape[1:]
            return
        self.files = latent_files(root, name)
        self.shape = _one(self.files[0], None).shape

    def __len__(self) -> int:
        return len(self.files) if self.whole is None else len(self.whole)

    def __getitem__(self, index: Sequence[int]) -> Tensor:
        """(B, C, H, W) float32, as stored."""
        if self.whole is None:
            found = np.stack([_one(self.files[k], self.shape) for k in index])
        else:
            with np.errstate(over="ignore"):  # infinite then, and found below
                found = np.asarray(self.whole[np.asarray(index)], dtype=np.float32)
        good = np.isfinite(found).reshape(len(found), -1).all(1)
        if not good.all():
            wrong = index[int(np.flatnonzero(~good)[0])]
            where = self.file if self.whole is not None else self.files[wrong]
            raise BrokenRecordError(where, f"latent {wrong}", "holds a NaN or an infinity: encode that image again")
        return torch.from_numpy(found)


def _one(file: Path, shape: tuple[int, ...] | None) -> NDArray[np.float32]:
    found = read_npy(file, "array", _WAY, kinds="iuf")
    found = found[0] if found.ndim == 4 and len(found) == 1 else found
    if found.ndim != 3 or (shape is not None and found.shape != shape):
        raise BrokenRecordError(file, "latent", f"expected an array {shape or '(C, H, W)'}, got {found.shape}: encode that image again")
    with np.errstate(over="ignore"):
        return found.astype(np.float32)


def _storage(content: bytes) -> Any:
    refuse_bombs(content)
    return torch.load(io.BytesIO(content), weights_only=True)


def _tensor(storage: Any, *layout: Any) -> Tensor:
    return whole_tensor(torch._utils._rebuild_tensor_v2(storage, *layout))  # type: ignore[no-any-return]


class _Statistics(ArraysOnly):
    """Reads {"mean": tensor, "std": tensor} as NumPy pickles it, and nothing that could run code."""

    owner = "file of statistics"

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch.storage", "_load_from_bytes"): _storage,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): ordered,
        }
        return known[module, name] if (module, name) in known else super().find_class(module, name)


def read_statistics(file: Path, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents (C, H, W), in their own scale.

    Args:
        file: An array (2, C, 1, 1) or (2, C, H, W), or the authors' pickled ``{"mean": ..., "std": ...}`` of (C, H, W) tensors.
        shape: C, H, W.

    Raises:
        BrokenRecordError: Anything else; a pickle that asks for code isn't run.
    """
    missing = "copy it beside the latents, or let prepare_data compute it"
    try:
        file_size(file, "statistics", missing)
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            pickled = header(stream)[2].hasobject
            found: Any = _Statistics(stream).load() if pickled else read_npy(file, "statistics", missing, "remove it, to have it computed")
        if pickled:  # an array of one object: the unpickler gives its shell
            found = found.item()
        pair = (found["mean"], found["std"]) if isinstance(found, dict) else (found[0], found[1])
        mean, std = (torch.as_tensor(part, dtype=torch.float32) for part in pair)
        mean, std = mean.reshape(mean.shape[-3:]), std.reshape(std.shape[-3:])
        torch.broadcast_shapes(mean.shape, tuple(shape))
    except BrokenRecordError:
        raise
    except Exception as problem:
        raise BrokenRecordError(
            file, "statistics", f"no mean and std for latents of {tuple(shape)} ({problem}): remove it, to have it computed"
        ) from problem
    if mean.shape[0] != shape[0] or not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise BrokenRecordError(
            file, "statistics", f"mean and std of {tuple(mean.shape)} must be finite, std above 0: remove it, to have it computed"
        )
    return mean, std


def channel_statistics(batches: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over batches (B, C, H, W), in one pass: (C, 1, 1) float32 each.

    Raises:
        ValueError: There is no batch.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        wide = batch.double()
        total, squares = total + wide.sum((0, 2, 3)), squares + wide.square().sum((0, 2, 3))
        count += wide.numel() // wide.shape[1]
    if not count:
        raise ValueError("there are no latents to take statistics of")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]


@torch.no_grad()
def encode_folder(images: Path, target: Path, autoencoder: nn.Module, size: int, factor: float, mirrored: bool = False) -> int:
    """Encode all images below a folder into one array (N, C, h, w) float32, on the GPU if there is one.

    Args:
        images: Folder; sorted by path.
        target: ``.npy`` file; it is there when it is whole.
        autoencoder: With ``encode``.
        size: Images are cropped and resized to (size, size), as ADM does it.
        factor: What the latents are multiplied with.
        mirrored: Add the latents of the mirrored images behind.

    Returns:
        N.

    Raises:
        WrongRootError: There is no image.
        BrokenRecordError: An image can't be read.
    """
    files = image_files(images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = autoencoder.to(device).eval()
    work = [(file, turned) for turned in ((False, True) if mirrored else (False,)) for file in files]
    stored = None
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.tmp"):  # by a run that was killed; they are large
        left.unlink()
    with replacing(target) as partial:
        for start in range(0, len(work), CHUNK):
            pixels = torch.stack([_pixels(file, size, turned) for file, turned in work[start : start + CHUNK]])
            latents = torch.cat([autoencoder.encode(few.to(device)) * factor for few in pixels.split(16)]).float().cpu().numpy()  # type: ignore[operator]
            if stored is None:
                stored = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(len(work), *latents.shape[1:]))
            stored[start : start + len(latents)] = latents
            rank_zero_info(f"{target.name}: {start + len(latents)} of {len(work)} images are encoded")
        assert stored is not None
        stored.flush()
        del stored
    autoencoder.cpu()
    return len(work)


def _pixels(file: Path, size: int, turned: bool) -> Tensor:
    found = np.asarray(adm_crop(open_picture(file), size), dtype=np.float32)
    pixels = torch.from_numpy(found).permute(2, 0, 1) / 127.5 - 1
    return pixels.flip(2) if turned else pixels


# ---- the datamodule --------------------------------------------------------------------------------------------------------------------


class StoredLatents(Batches):
    """Latents on disk, standardised when they are read. A loader fetches a whole batch in one go.

    Args:
        files: Where they are.
        index: Indices of the chosen latents.
        mean: (C, 1, 1) or (C, H, W), of latents without ``factor``.
        std: (C, 1, 1) or (C, H, W), of latents without ``factor``.
        factor: Factor of the stored latents; it is divided out first.
    """

    def __init__(self, files: LatentFiles, index: range, mean: Tensor, std: Tensor, factor: float) -> None:
        self.files, self.index, self.mean, self.std, self.factor = files, index, mean, std, factor

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Standardised latents; the same in every epoch."""
        return {"image": standardise(self.files[[self.index[k] for k in index]] / self.factor, self.mean, self.std)}


class LatentDataModule(GenerativeDataModule):
    """Latents of a frozen autoencoder, encoded once, with mean 0 and standard deviation 0.5: (z - mean) / std * 0.5.

    Batch: {"image": (B, C, H, W) float32, "label": (B,) int64 in 0..9}

    Only the built-in digits have labels. Give the module the same ``autoencoder``, so that it can show what it draws; it takes
    ``latent_mean`` and ``latent_std`` over.

    Layout of ``root``, as the authors of sLCT have it: ``<root>/<name>/000000000.npy``, ... one latent (C, H, W) a file, and
    ``<root>/<name>_stat.npy``. Or ``<root>/<name>.npy``, all latents (N, C, H, W), which is memory-mapped. If there is neither and
    ``images`` is given, ``prepare_data`` encodes these into the latter. Missing statistics are computed for each channel of the training
    latents, and stored.

    Args:
        root: Folder of the latents. None: built-in digits of 16 x 16 pixels, encoded by ``DigitAutoencoder`` (4 x 4 x 4).
        name: Name of the data set in it.
        images: Folder of images, encoded once if there are no latents yet.
        autoencoder: Autoencoder that encodes the images.
        image_size: Side of the images that are encoded.
        mirrored: Encode the mirrored images, too, as sLCT does for LSUN Church.
        latent_factor: Factor of the stored latents; statistics are those without it.
        num_val: Latents at the end that are for validation and not for training.
        batch_size: Latents per process and step.
        val_batch_size: Latents per process and validation step.
        num_samples: Samples that ``lit predict`` draws, at most ``num_val``.
        num_workers: Processes that read data.
        seed: Seed of the order.

    Raises:
        WrongRootError: Neither latents nor images.
        BrokenRecordError: A file is missing, truncated or wrong; the message names it and the field.
        ValueError: ``num_val`` leaves nothing, or another number is out of range.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        root: Path | None = None,
        name: str = "latent_celeba_256",
        images: Path | None = None,
        autoencoder: nn.Module | None = None,
        image_size: int = 256,
        mirrored: bool = False,
        latent_factor: float = 0.18215,
        num_val: int = 297,
        batch_size: int = 128,
        val_batch_size: int = 128,
        num_samples: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_samples=num_samples, num_workers=num_workers, seed=seed)
        at_least(1, "latents for validation", num_val=num_val)
        positive(latent_factor=latent_factor)
        if images is not None and (root is None or autoencoder is None):
            raise ValueError("images are encoded by autoencoder into root: give both")
        self.root, self.images = (data_path(path) for path in (root, images))
        self.save_hyperparameters(ignore=["autoencoder"])
        self.autoencoder = autoencoder

    @property
    def _statistics(self) -> Path:
        assert self.root is not None
        return self.root / f"{self.hparams['name']}_stat.npy"

    def _split(self, count: int) -> tuple[range, range]:
        border = count - self.hparams["num_val"]
        if border < 1:
            raise ValueError(f"num_val={self.hparams['num_val']} of {count} latents leaves none for training: give less")
        return range(border), range(border, count)

    def _to_encode(self) -> bool:
        """Whether there are images and no latents yet."""
        assert self.root is not None
        name = self.hparams["name"]
        return self.images is not None and not any(os.path.lexists(self.root / there) for there in (f"{name}.npy", name))

    def check_root(self, stage: str = "fit") -> None:
        """Look for latents, or for images that can be encoded."""
        if self.root is None:
            return
        if self._to_encode():
            assert self.images is not None
            image_files(self.images)
        else:
            latent_files(self.root, self.hparams["name"])

    def prepare_data(self) -> None:
        """Encode, and compute statistics, unless both are there."""
        hp = self.hparams
        if self.root is None:
            return
        if self._to_encode():
            assert self.images is not None
            assert self.autoencoder is not None
            target = self.root / f"{hp['name']}.npy"
            encode_folder(self.images, target, self.autoencoder, hp["image_size"], hp["latent_factor"], hp["mirrored"])
        if not os.path.lexists(self._statistics):
            files = LatentFiles(self.root, hp["name"])
            train = self._split(len(files))[0]
            chunks = (files[train[start : start + CHUNK]] / hp["latent_factor"] for start in range(0, len(train), CHUNK))
            with replacing(self._statistics) as partial, partial.open("wb") as file:
                np.save(file, np.stack([found.numpy() for found in channel_statistics(chunks)]))

    def setup(self, stage: str) -> None:
        """Open the files, read the validation latents."""
        if self.train_set is not None:
            return
        if self.root is None:
            return self._setup_digits()
        files = LatentFiles(self.root, self.hparams["name"])
        self.latent_mean, self.latent_std = read_statistics(self._statistics, files.shape)
        settings = (self.latent_mean, self.latent_std, self.hparams["latent_factor"])
        train, val = (StoredLatents(files, index, *settings) for index in self._split(len(files)))
        self.train_set = train
        self.val_set = Tensors(val.batch(np.zeros(len(val), np.int64), np.arange(len(val)))["image"])

    def _setup_digits(self) -> None:
        data = GenerativeDigitsDataModule(image_size=DigitAutoencoder.SIZE, num_train=1797 - self.hparams["num_val"])
        data.setup("fit")
        assert data.train_set is not None
        assert data.val_set is not None
        coder = self.autoencoder or DigitAutoencoder()
        with torch.no_grad():
            train, val = (coder.encode(part.images) for part in (data.train_set, data.val_set))  # type: ignore[operator]
        self.latent_mean, self.latent_std = channel_statistics(iter([train]))
        self.train_set = Tensors(standardise(train, self.latent_mean, self.latent_std), data.train_set.labels)
        self.val_set = Tensors(standardise(val, self.latent_mean, self.latent_std), data.val_set.labels)
