"""Labels on disk that training changes: the original annotations, and the current ones, which every process and worker sees.

A folder holds ``store.json`` (shapes, dtype, checksum), ``original.bin``, ``generation.bin`` and, once something was corrected, one folder
``corrected-<generation>`` with a shard from each writer. A generation is written whole beside the old one and then switched to, so a reader
sees all of it or nothing of it; readers, persistent workers too, look at the memory-mapped number of the generation at every access.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.folders import listed, user_path
from lit_methods.files import replacing, write_atomically

_FORMAT = 1


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(path, "file", "the label store isn't whole: remove its folder, it is made anew from the annotations")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BrokenRecordError(path, "file", f"no valid JSON ({error}): remove the store's folder, it is made anew") from error


def _map(path: Path, size: int, dtype: str) -> NDArray[Any]:
    if not path.is_file():
        raise MissingFileError(path, "file", "the label store isn't whole: remove its folder, it is made anew from the annotations")
    found, expected = path.stat().st_size, size * np.dtype(dtype).itemsize
    if found != expected:
        raise BrokenRecordError(
            path, "labels", f"{found} bytes instead of {expected}: truncated, remove the store's folder, it is made anew"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype=dtype)


def _checksum(labels: NDArray[Any]) -> int:
    found, block = 0, 1 << 24
    for start in range(0, len(labels), block):
        found = zlib.crc32(np.ascontiguousarray(labels[start : start + block]).tobytes(), found)
    return found


class LabelWriter:
    """Writes the next generation's labels of some images; made by :meth:`LabelStore.writer`, used as a context."""

    def __init__(self, store: "LabelStore", shard: int) -> None:
        self._store = store
        self._folder = store.folder / "next"
        self._folder.mkdir(exist_ok=True)
        self._base = self._folder / f"shard-{shard:05d}"
        self._file = open(self._base.with_suffix(".bin"), "wb")  # noqa: SIM115  (closed at the end of the context)
        self._index: list[int] = []

    def write(self, index: int, labels: NDArray[Any]) -> None:
        """Give an image new labels of the shape and range that the store has.

        Raises:
            ValueError: Another shape, or a value that the store's dtype can't hold.
        """
        shape, dtype = self._store.shape(index), self._store.dtype
        if labels.shape != shape:
            raise ValueError(f"labels of image {index} are {labels.shape}: the store has {shape}")
        packed = labels.astype(dtype)
        if not np.array_equal(packed, labels):
            raise ValueError(f"labels of image {index} go from {labels.min()} to {labels.max()}: the store's dtype is {dtype}")
        self._file.write(np.ascontiguousarray(packed).tobytes())
        self._index.append(int(index))

    def __enter__(self) -> "LabelWriter":
        """``with store.writer(rank) as writer``."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The list of images comes last: a shard without one is not read."""
        self._file.close()
        if kind is None:
            write_atomically(self._base.with_suffix(".json"), json.dumps(self._index))


class LabelStore:
    """Original and current labels of every image, by index; any sizes.

    Ranks on one machine, or on a shared file system, use one folder. It pickles as its folder's name, and opens in a worker process without
    reading the labels.

    Args:
        folder: Made by :meth:`create`.
        verify: Read the original labels once and compare them with the store's checksum, about a second per gigabyte. Where the newest
            corrected labels can't be read and those before them can, go back to these with a warning that names both.

    Raises:
        MissingFileError: A file isn't there.
        BrokenRecordError: A file is truncated, damaged or not readable, or the number of the generation isn't that of the labels which are
            there; the message names the file.
    """

    def __init__(self, folder: Path | str, verify: bool = True) -> None:
        self.folder = user_path(folder)
        about = _read_json(self.folder / "store.json")
        format = about.get("format") if isinstance(about, dict) else about
        if format != _FORMAT:
            raise BrokenRecordError(self.folder / "store.json", "format", f"{format!r} instead of {_FORMAT}: remove the folder")
        try:
            self.dtype: str = str(np.dtype(about["dtype"]))
            self.checksum: int = about["checksum"]
            self._shapes = np.asarray(about["shapes"], dtype=np.int64).reshape(-1, 2)
        except (KeyError, TypeError, ValueError) as problem:
            raise BrokenRecordError(
                self.folder / "store.json", "fields", f"dtype, checksum and shapes are expected ({problem!r}): remove the folder"
            ) from problem
        self._ends = np.concatenate([[0], self._shapes.prod(axis=1).cumsum()])
        self._original = _map(self.folder / "original.bin", int(self._ends[-1]), self.dtype)
        if verify and (found := _checksum(self._original)) != self.checksum:
            raise BrokenRecordError(
                self.folder / "original.bin",
                "checksum",
                f"{found} instead of {self.checksum}: the labels are damaged, remove the store's folder, it is made anew",
            )
        _map(self.folder / "generation.bin", 1, "<i8")  # says what is wrong with it
        self._number = np.memmap(self.folder / "generation.bin", dtype="<i8", mode="r+", shape=(1,))
        if verify:
            self._check_generation()
        self._seen = -1
        self._corrected: dict[int, NDArray[Any]] = {}

    @classmethod
    def create(cls, folder: Path | str, labels: Iterable[NDArray[Any]], dtype: str = "uint8") -> "LabelStore":
        """Write the original annotations, on one process, and open the store; an earlier store in the folder is replaced.

        Args:
            folder: Created if need be.
            labels: (H, W) integers of each image, in order of the index.
            dtype: Integer type that holds every label, the one for ignored pixels too.
        """
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("store.json", "original.bin", ".*.tmp", "*.part", "generation.bin", "next", "corrected-*")
        earlier = [path for name in names for path in folder.glob(name)]
        if strange := sorted(set(listed(folder)) - set(earlier)):
            raise ValueError(f"{folder} is to hold labels and has {strange[0].name} in it: give an empty or a new folder")
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shapes, checksum = [], 0
        with replacing(folder / "original.bin") as partial, partial.open("wb") as file:
            for index, one in enumerate(labels):
                packed = np.ascontiguousarray(one).astype(dtype)
                if one.ndim != 2 or not np.array_equal(packed, one):
                    raise ValueError(f"labels of image {index} are {one.shape} {one.dtype}: expected (H, W) in the range of {dtype}")
                data = packed.tobytes()
                shapes.append(list(one.shape))
                checksum = zlib.crc32(data, checksum)
                file.write(data)
        write_atomically(folder / "generation.bin", np.zeros(1, dtype="<i8").tobytes())
        about = {"format": _FORMAT, "dtype": dtype, "checksum": checksum, "shapes": shapes}
        write_atomically(folder / "store.json", json.dumps(about))  # last: without it there is no store
        return cls(folder, verify=False)  # just written

    def __len__(self) -> int:
        return len(self._shapes)

    def __getstate__(self) -> dict[str, Any]:
        """The folder alone: a worker process opens the files for itself."""
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open anew; whoever opened it first has read the labels."""
        self.__init__(state["folder"], verify=False)  # type: ignore[misc]

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of an image's labels."""
        return int(self._shapes[index][0]), int(self._shapes[index][1])

    def original(self, index: int) -> NDArray[Any]:
        """(H, W) copy of the annotation."""
        return np.array(self._original[self._ends[index] : self._ends[index + 1]]).reshape(self.shape(index))

    @property
    def generation(self) -> int:
        """How often the current labels were replaced."""
        return int(self._number[0])

    def current(self, index: int) -> NDArray[Any]:
        """(H, W) copy of the labels as they are now."""
        if self.generation != self._seen:
            self._open()
        found = self._corrected.get(int(index))
        return self.original(index) if found is None else np.array(found).reshape(self.shape(index))

    def changed(self) -> list[int]:
        """The images whose current labels aren't the original ones, in order."""
        if self.generation != self._seen:
            self._open()
        return sorted(self._corrected)

    def _generations(self) -> list[int]:
        """Numbers of the generations that are on the disk, in order."""
        names = [path.name.partition("-")[2] for path in self.folder.glob("corrected-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def _check_generation(self) -> None:
        """Refuse a number that isn't that of the newest labels: a damaged one would drop all corrections, or bring older ones back.

        Where the number is right and its labels can't be read, go back to those before it, with a warning.
        """
        number, newest = self.generation, max(self._generations(), default=0)
        if newest - number not in (0, 1):  # 1: a run ended before it switched to what it had written
            raise BrokenRecordError(
                self.folder / "generation.bin",
                "generation",
                f"{number}, and the newest corrected labels are {newest}: it is damaged. Remove the store's "
                "folder: it is made anew from the annotations, and a resumed run writes its checkpoint's corrections into it",
            )
        if number > 1 and (problem := self._problem(number)) is not None and self._problem(number - 1) is None:
            bad, good = self._folder_of(number), self._folder_of(number - 1)
            warnings.warn(f"{bad} can't be read, so the labels are those of {good}, the correction before it: {problem}", stacklevel=3)
            self._number[0] = number - 1  # every process reads the same labels
            self._number.flush()

    def _problem(self, generation: int) -> Exception | None:
        """Why the labels of a generation can't be read; None where they can."""
        try:
            self._read(self._folder_of(generation))
        except (BrokenRecordError, MissingFileError) as problem:
            return problem
        return None

    def _folder_of(self, generation: int) -> Path:
        return self.folder / f"corrected-{generation:08d}"

    def _open(self) -> None:
        for _ in range(10):  # a newer generation may come while this one is opened
            number = self.generation
            try:
                self._corrected = self._read(self._folder_of(number)) if number else {}
            except MissingFileError:
                if number == self.generation:
                    raise
                continue
            self._seen = number
            return
        raise RuntimeError(f"the labels in {self.folder} change faster than they can be opened: does another run write there?")

    def _read(self, folder: Path) -> dict[int, NDArray[Any]]:
        shards: dict[str, int] = _read_json(folder / "shards.json")
        if not isinstance(shards, dict):
            raise BrokenRecordError(folder / "shards.json", "shards", "expected a dictionary: remove the store's folder, it is made anew")
        found: dict[int, NDArray[Any]] = {}
        for name, count in shards.items():
            index = _read_json(folder / f"{name}.json")
            if not isinstance(index, list) or not all(type(i) is int and 0 <= i < len(self) for i in index):
                raise BrokenRecordError(
                    folder / f"{name}.json", "index", f"expected images 0 to {len(self) - 1}: remove the store's folder"
                )
            if len(index) != count:
                raise BrokenRecordError(
                    folder / f"{name}.json", "index", f"{len(index)} images instead of {count}: remove the store's folder"
                )
            sizes = self._shapes[np.asarray(index, dtype=np.int64)].prod(axis=1) if count else np.zeros(0, dtype=np.int64)
            labels = _map(folder / f"{name}.bin", int(sizes.sum()), self.dtype)
            ends = np.concatenate([[0], sizes.cumsum()])
            found |= {i: labels[start:end] for i, start, end in zip(index, ends[:-1], ends[1:], strict=True)}
        return found

    # ---- writing ---------------------------------------------------------------------------------------------------------------------

    def clear_next(self) -> None:
        """Forget what an interrupted pass has written. On one process, before any writer is made."""
        shutil.rmtree(self.folder / "next", ignore_errors=True)

    def writer(self, shard: int) -> LabelWriter:
        """A writer of the next generation; each process has a shard of its own."""
        return LabelWriter(self, shard)

    def publish(self, keep: Sequence[int] = ()) -> int:
        """Switch to what the writers have written: images that nobody wrote have their original labels again.

        To be called on one process, when all writers are closed.

        Args:
            keep: Images whose current labels stay, unless they were written.

        Returns:
            The new generation.
        """
        folder = self.folder / "next"
        folder.mkdir(exist_ok=True)
        shards = {path.stem: _read_json(path) for path in sorted(folder.glob("shard-*.json"))}
        written = {i for index in shards.values() for i in index}
        if kept := [i for i in keep if i not in written]:
            shard = len(list(folder.glob("shard-*.bin"))) + 90_000
            with self.writer(shard) as writer:
                for i in kept:
                    writer.write(i, self.current(i))
            shards[f"shard-{shard:05d}"] = _read_json(folder / f"shard-{shard:05d}.json")
        write_atomically(folder / "shards.json", json.dumps({name: len(index) for name, index in shards.items()}))
        number = self.generation + 1
        shutil.rmtree(self._folder_of(number), ignore_errors=True)  # of a run that ended before it switched
        os.replace(folder, self._folder_of(number))
        self._number[0] = number
        self._number.flush()
        for old in self._generations():
            if old < number - 1:  # a worker may just open the last one
                shutil.rmtree(self._folder_of(old), ignore_errors=True)
        return number

    def reset(self) -> None:
        """Back to the original labels. On one process."""
        self.clear_next()
        self.publish()

    def state_dict(self) -> dict[str, Any]:
        """The current labels of the changed images, compressed, and the checksum of the originals: tensors, numbers and lists."""
        index, packer = self.changed(), zlib.compressobj(1)
        parts = [packer.compress(self.current(i).tobytes()) for i in index]
        data = b"".join([*parts, packer.flush()])
        return {"checksum": self.checksum, "index": index, "labels": torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the labels those of ``state``. On one process.

        Raises:
            ValueError: They belong to other annotations.
        """
        if state["checksum"] != self.checksum:
            raise ValueError(
                f"the corrected labels in the checkpoint belong to other annotations than those in {self.folder}: give the same data"
            )
        unpacker, data = zlib.decompressobj(), state["labels"].cpu().numpy().tobytes()
        self.clear_next()
        with self.writer(0) as writer:
            for i in state["index"]:
                shape = self.shape(i)
                size = shape[0] * shape[1] * np.dtype(self.dtype).itemsize
                block = b""
                while len(block) < size:
                    more = unpacker.decompress(data, size - len(block))
                    if not more:
                        raise ValueError("the corrected labels in the checkpoint end too soon: use another checkpoint")
                    block, data = block + more, unpacker.unconsumed_tail
                writer.write(i, np.frombuffer(block, dtype=self.dtype).reshape(shape))
        self.publish()


__all__ = ["LabelStore", "LabelWriter"]
