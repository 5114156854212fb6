"""Files of data, read in one place: looked at before they are opened, checked after they are converted, and named when they are wrong.

Every reader raises a :class:`~lit_methods.datamodules.errors.BrokenRecordError` that names file and field, whatever is wrong: no such file,
a folder or a named pipe in its place, no permission, another encoding, truncated, of another kind, or a header that claims more than the
file can hold. What a header claims is compared with the size of the file before memory is asked for. Nothing in a file is executed.

Images are read by :func:`~lit_methods.datamodules.pictures.open_picture`, tables by :mod:`lit_methods.datamodules.tables`.
"""

import contextlib
import io
import json
import math
import os
import pickletools
import stat
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError

INCOMPLETE = "the release is incomplete here, copy it again"
AGAIN = "copy the file again"
UNPACKED = 1 << 28  # bytes that a packed file may always become; more only if the file itself is large
RATIO = 20  # of unpacked to packed bytes beyond that: photographs and volumes have 1 to 4
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_TUPLES = 8  # levels of tuples in tuples that a checkpoint may have; a hundred would take for ever to compare
_LARGEST = float(np.finfo(np.float32).max)
_NUMBERS = {"b": "bools", "i": "integers", "u": "integers", "f": "real numbers"}


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def file_size(path: Path, field: str = "file", missing: str = INCOMPLETE) -> int:
    """Bytes of a file, which is looked at and not opened: to open a named pipe would wait for ever.

    Args:
        path: The file.
        field: What it is to the data set, for messages; so in all readers below.
        missing: What to do where there is no such file, for the message; so in all readers below.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is a folder, a named pipe or a device, or may not be read.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(path, field, f"no such file: {missing}") from None
    except PermissionError:
        raise BrokenRecordError(path, field, f"its folder may not be entered: chmod u+x {path.parent}, or ask its owner") from None
    except (OSError, ValueError) as problem:  # a name that is too long or has a NUL, links in a circle
        raise BrokenRecordError(path, field, f"can't be looked at ({problem}): the name is broken, or the disk is") from problem
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise BrokenRecordError(path, field, f"is {kind}, expected a file: {missing}")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise BrokenRecordError(path, field, f"may not be read by this user: chmod u+r {path}, or ask its owner")
    return found.st_size


@contextlib.contextmanager
def reading(path: Path, field: str, kind: str, way: str = AGAIN, missing: str = INCOMPLETE) -> Iterator[None]:
    """Say of what a library raises inside which file it was; the file is looked at before.

    Args:
        path: The file.
        field: What it is to the data set.
        kind: What it should be, such as ``a .npy file``.
        way: What to do if it isn't.
        missing: What to do where there is no such file.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: Anything else went wrong.
    """
    file_size(path, field, missing)
    try:
        yield
    except (BrokenRecordError, ImportError):
        raise
    except FileNotFoundError:  # since a moment ago
        raise MissingFileError(path, field, f"no such file: {missing}") from None
    except Exception as problem:  # a broken file makes libraries raise nearly anything
        reason = str(problem).strip().partition("\n")[0][:120] or type(problem).__name__
        raise BrokenRecordError(path, field, f"can't be read as {kind} ({reason}): it is truncated or another file, {way}") from problem


def read_bytes(path: Path, field: str = "file", missing: str = INCOMPLETE) -> bytes:
    """The bytes of a file.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no file, or can't be read.
    """
    with reading(path, field, "a file", missing=missing):
        return path.read_bytes()


def read_text(path: Path, field: str = "file", missing: str = INCOMPLETE) -> str:
    r"""The text of a file in UTF-8, without a byte order mark, with ``\n`` for all ends of lines.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It isn't UTF-8, or has NUL bytes.
    """
    content = read_bytes(path, field, missing)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        way = f"truncated or no text, {AGAIN}"
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            way = "it begins like UTF-16, convert it to UTF-8"
        raise BrokenRecordError(path, field, f"byte {problem.start} isn't UTF-8 text: {way}") from problem
    if (place := content.find(b"\0")) >= 0:
        raise BrokenRecordError(path, field, f"byte {place} is NUL: UTF-16, which is to be converted to UTF-8, or damaged; {AGAIN}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def read_json(path: Path, field: str = "file", missing: str = INCOMPLETE) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no JSON, nested too deeply, or has a key twice in one object.
    """
    text = read_text(path, field, missing)
    if not text.strip():
        raise BrokenRecordError(path, field, f"is empty: {AGAIN}")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        raise BrokenRecordError(path, field, f"can't be read, it isn't JSON but lists in lists without end: {AGAIN}") from None
    except ValueError as problem:
        raise BrokenRecordError(path, field, f"can't be read, it isn't JSON ({problem}): truncated or another file, {AGAIN}") from problem


# ---- what is in tables -----------------------------------------------------------------------------------------------------------------


def plain_file_name(name: str, file: Path | str, field: str) -> str:
    """A name out of a table that becomes a part of the name of a file that is written.

    Args:
        name: The name.
        file: Where it stands, for the message.
        field: Where in the file, for the message.

    Returns:
        The name.

    Raises:
        BrokenRecordError: It is empty, too long, ``..``, or has slashes, colons or control characters: it could lead into another folder.
    """
    fine = 0 < len(name.encode("utf-8", "replace")) <= 200 and name not in (".", "..") and name.isprintable()
    if not fine or any(sign in name for sign in "/\\:"):
        raise BrokenRecordError(
            file, field, f"is {name[:80]!r}, which files are named after: expected a plain name without slashes, {AGAIN}"
        )
    return name


def once(names: Sequence[Any], file: Path | str, field: str, what: str = "name") -> None:
    """Raise if something stands twice that tells records apart.

    Args:
        names: What must differ, such as ids.
        file: Where they stand, for the message.
        field: Where in the file, for the message.
        what: What they are, for the message.

    Raises:
        BrokenRecordError: The first one that stands twice.
    """
    if len(set(names)) < len(names):
        seen: set[Any] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BrokenRecordError(file, field, f"the {what} {str(twice)[:80]!r} stands twice, expected once: {AGAIN}")


def whole_numbers(values: Any, file: Path | str, field: str) -> NDArray[np.int64]:
    """Integers, also such as are stored as fractions without a part behind the point.

    Args:
        values: Numbers of any type.
        file: Where they stand, for the message.
        field: Where in the file, for the message.

    Raises:
        BrokenRecordError: They are no real numbers, have fractions, or don't fit into 64 bits.
    """
    stored = np.asarray(values)
    if stored.dtype.kind not in "biuf":
        raise BrokenRecordError(file, field, f"expected whole numbers, got {stored.dtype}: {AGAIN}")
    with np.errstate(invalid="ignore"):
        found = stored.astype(np.int64)
    if bool((found != stored).any()):
        wrong = stored[found != stored].reshape(-1)[0]
        raise BrokenRecordError(file, field, f"expected whole numbers, got {wrong}: {AGAIN}")
    return found


def is_finite(value: Any) -> bool:
    """Whether a value out of JSON is a number, and one that 32 bits can hold: neither NaN, nor infinite, nor 1e300."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def finite(values: NDArray[Any], file: Path | str, field: str, way: str = AGAIN) -> NDArray[Any]:
    """The values, as they were converted.

    Raises:
        BrokenRecordError: One is NaN or infinite; the message tells its place.
    """
    if values.dtype.kind == "f" and values.size and not np.isfinite(values).all():
        place = np.unravel_index(int(np.argmin(np.isfinite(values))), values.shape)
        where = ", ".join(str(int(k)) for k in place)
        raise BrokenRecordError(file, field, f"value [{where}] is {values[place]}, expected finite numbers of {values.dtype}: {way}")
    return values


# ---- arrays ----------------------------------------------------------------------------------------------------------------------------


def unpacked_size(claimed: int, size: int, file: Path | str, field: str) -> None:
    """Raise if a packed file claims to become much more than it is.

    Args:
        claimed: Bytes that are to be unpacked.
        size: Bytes of the file.
        file: The file, for the message.
        field: The part of it, for the message.

    Raises:
        BrokenRecordError: More than 256 MiB and more than twenty times the file.
    """
    if claimed > max(UNPACKED, RATIO * size):
        raise BrokenRecordError(
            file, field, f"claims {claimed:,} bytes, but the file has {size:,}: damaged, or made to fill the memory; {AGAIN}"
        )


def _npy_header(stream: Any, kinds: str, file: Path, field: str) -> int:
    """Bytes of the array behind the header that is read from the stream."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version}, expected 1.0 or 2.0")
    if dtype.kind not in kinds:
        expected = " or ".join(dict.fromkeys(_NUMBERS[kind] for kind in kinds if kind in _NUMBERS))
        raise BrokenRecordError(file, field, f"holds {dtype}, expected one array of {expected}: another file, or prepared in another way")
    if any(side < 0 for side in shape):
        raise ValueError(f"shape {shape}")
    return math.prod(shape) * dtype.itemsize


def read_npy(
    path: Path,
    field: str = "array",
    missing: str = INCOMPLETE,
    way: str = AGAIN,
    kinds: str = "biuf",
    mapped: bool = False,
) -> NDArray[Any]:
    """The array of a ``.npy`` file; its values aren't looked at.

    Args:
        path: The file.
        field: What it is to the data set, for messages.
        missing: What to do where there is no such file, for the message.
        way: What to do if it is broken, for the message.
        kinds: NumPy's kinds of dtypes that are allowed.
        mapped: Map it instead of reading it.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no ``.npy`` file of one array of numbers, or the header claims more or less than the file holds.
    """
    with reading(path, field, "a .npy file", way, missing):
        with path.open("rb") as stream:
            claimed = _npy_header(stream, kinds, path, field)
            held = os.fstat(stream.fileno()).st_size - stream.tell()
        if claimed != held:
            raise BrokenRecordError(path, field, f"its header claims {claimed:,} bytes and {held:,} follow: truncated or damaged, {way}")
        found: NDArray[Any] = np.load(path, mmap_mode="r" if mapped and claimed else None, allow_pickle=False)
        return found


def read_npz(
    path: Path, names: Collection[str] | None = None, field: str = "file", missing: str = INCOMPLETE, kinds: str = "biuf"
) -> dict[str, NDArray[Any]]:
    """Arrays of a ``.npz`` file; their values aren't looked at.

    Args:
        path: The file.
        names: Those that are wanted; None: all.
        field: What the file is to the data set, for messages.
        missing: What to do where there is no such file, for the message.
        kinds: NumPy's kinds of dtypes that are allowed.

    Returns:
        Name -> array, of those that the file has.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no ``.npz`` file, holds no numbers, or claims more than it can hold.
    """
    found: dict[str, NDArray[Any]] = {}
    with reading(path, field, "a .npz file", missing=missing), zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if not member.filename.endswith(".npy") or (names is not None and name not in names):
                continue
            if name in found:
                raise BrokenRecordError(path, name, f"stands twice in the file: {AGAIN}")
            unpacked_size(member.file_size, size, path, name)
            with archive.open(member) as stream:
                claimed = _npy_header(stream, kinds, path, name)
                held = member.file_size - stream.tell()
            if claimed != held:
                raise BrokenRecordError(path, name, f"its header claims {claimed:,} bytes and {held:,} follow: damaged, {AGAIN}")
            found[name] = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
    return found


def read_hdf5(
    path: Path,
    names: Collection[str],
    field: str = "file",
    missing: str = INCOMPLETE,
    kinds: str = "biuf",
    part: Any = (),
) -> dict[str, NDArray[Any]]:
    """Data sets of numbers at the top of an HDF5 file; their values aren't looked at.

    Args:
        path: The file.
        names: Data sets that are wanted.
        field: What the file is to the data set, for messages.
        missing: What to do where there is no such file, for the message.
        kinds: NumPy's kinds of dtypes that are allowed; ``c`` is complex.
        part: Index of what is wanted of each, such as a slice's number; (): all.

    Returns:
        Name -> array, of those that the file has.

    Raises:
        ImportError: h5py isn't installed.
        MissingFileError: There is no such file.
        BrokenRecordError: It is no HDF5 file; a data set lies in another file (external, virtual, or behind a link), wasn't written whole,
            holds no numbers, claims more than the file can hold, or has no such part.
    """
    with _hdf5(path, names, field, missing, kinds) as found:
        return {name: data[part] for name, data in found.items()}


def hdf5_shapes(
    path: Path, names: Collection[str], field: str = "file", missing: str = INCOMPLETE, kinds: str = "biuf"
) -> dict[str, tuple[int, ...]]:
    """Shapes of data sets at the top of an HDF5 file, with the arguments and errors of :func:`read_hdf5`, without reading values."""
    with _hdf5(path, names, field, missing, kinds) as found:
        return {name: tuple(data.shape) for name, data in found.items()}


@contextlib.contextmanager
def _hdf5(path: Path, names: Collection[str], field: str, missing: str, kinds: str) -> Iterator[dict[str, Any]]:
    """The data sets of an open file."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path.name} is an HDF5 file, which needs h5py: pip install 'lit-methods[segmentation]'") from error
    found = {}
    with reading(path, field, "an HDF5 file", missing=missing), h5py.File(path, "r") as file:
        size = path.stat().st_size
        for name in names:
            link = file.get(name, getlink=True)
            if link is None:
                continue
            if not isinstance(link, h5py.HardLink):
                raise BrokenRecordError(path, name, f"is a link to elsewhere ({type(link).__name__}): copy the data into the file")
            data = file[name]
            if not isinstance(data, h5py.Dataset) or data.shape is None:
                raise BrokenRecordError(path, name, f"is a {type(data).__name__} without values, expected a data set: {AGAIN}")
            if data.is_virtual or data.external:
                raise BrokenRecordError(path, name, "takes its values from other files: copy the data into the file")
            if data.dtype.kind not in kinds:
                raise BrokenRecordError(path, name, f"holds {data.dtype}, expected numbers: {AGAIN}")
            stored = data.id.get_storage_size()
            if data.chunks is None and stored != data.nbytes:
                raise BrokenRecordError(path, name, f"claims {data.nbytes:,} bytes and has {stored:,}: it wasn't written whole, {AGAIN}")
            if stored > size:
                raise BrokenRecordError(path, name, f"claims {stored:,} bytes, but the file has {size:,}: damaged, {AGAIN}")
            unpacked_size(data.nbytes, size, path, name)
            if data.chunks is not None:
                unpacked_size(math.prod(data.chunks) * data.dtype.itemsize, size, path, name)
                parts = math.prod(-(-side // chunk) for side, chunk in zip(data.shape, data.chunks, strict=True))
                if data.id.get_num_chunks() != parts:
                    raise BrokenRecordError(
                        path,
                        name,
                        f"has {data.id.get_num_chunks()} of {parts} parts, and zeros elsewhere: it wasn't written whole, {AGAIN}",
                    )
            found[name] = data
        yield found


def read_matlab(path: Path, names: Sequence[str], field: str = "file", missing: str = INCOMPLETE) -> dict[str, Any]:
    """Variables of a MATLAB file, up to version 7.2; their values aren't looked at.

    Args:
        path: The file.
        names: Variables that are wanted.
        field: What the file is to the data set, for messages.
        missing: What to do where there is no such file, for the message.

    Returns:
        Name -> array, of those that the file has.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no such file, or claims more than it can hold.
    """
    from scipy.io import loadmat, whosmat

    with reading(path, field, "a MATLAB file", missing=missing):
        size = path.stat().st_size
        for name, shape, kind in whosmat(str(path)):
            if name in names:
                bits = int("".join(filter(str.isdigit, kind)) or 64)
                unpacked_size(math.prod(shape) * (bits // 8 or 8), size, path, name)
        _inflate(path, size, field)
        loaded = loadmat(str(path), variable_names=list(names))
        return {name: loaded[name] for name in names if name in loaded}


def _inflate(path: Path, size: int, field: str) -> None:
    """Unpack the variables of a MATLAB 5 file piece by piece, to see how large they become: structures don't say it."""
    total = 0
    with path.open("rb") as file:
        head = file.read(128)
        order = "little" if head[126:128] == b"IM" else "big"
        while len(tag := file.read(8)) == 8:
            kind, length = (int.from_bytes(tag[k : k + 4], order) for k in (0, 4))  # type: ignore[arg-type]
            if kind != 15:  # not packed
                file.seek(length, os.SEEK_CUR)
                continue
            unpacker, left = zlib.decompressobj(), length
            while left > 0 and (block := file.read(min(left, 1 << 16))):
                left -= len(block)
                while block:
                    total += len(unpacker.decompress(block, 1 << 22))
                    unpacked_size(total, size, path, field)
                    block = unpacker.unconsumed_tail


# ---- tensors ---------------------------------------------------------------------------------------------------------------------------


def read_tensors(source: Path | bytes, file: Path, field: str, way: str = AGAIN, missing: str = INCOMPLETE) -> Any:
    """What ``torch.save`` wrote, on the CPU, without running any code that the file may hold.

    Args:
        source: The file, or a part of it.
        file: The file, for messages.
        field: What it is to the data set, for messages.
        way: What to do if it is broken, for the message.
        missing: What to do where there is no such file, for the message.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It holds something else than tensors, numbers, strings, lists and dictionaries, or claims more than it has.
    """
    import torch

    with reading(file, field, "a tensor of torch.save", way, missing):
        refuse_bombs(source)
        found = torch.load(io.BytesIO(source) if isinstance(source, bytes) else source, map_location="cpu", weights_only=True)
        return whole_tensor(found) if isinstance(found, torch.Tensor) else found


def whole_tensor(tensor: Any) -> Any:
    """A tensor that has as many values as it claims.

    Raises:
        ValueError: Strides of 0 let it claim more: to look at it would fill the memory.
    """
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise ValueError(f"a tensor of {tuple(tensor.shape)} has {held:,} bytes")
    return tensor


def refuse_bombs(source: Path | bytes) -> None:
    """Raise if a file of ``torch.save`` would fill the memory or never end, although nothing in it is run.

    torch writes its zip files unpacked, and its pickles have no tuples of tuples of tuples, whose comparison would take for ever.

    Args:
        source: A file or its content.

    Raises:
        ValueError: It would; the message says why.
        OSError: It can't be read.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        if not zipfile.is_zipfile(stream):
            stream.seek(0)
            for _ in range(5):  # the old format: five pickles, then the numbers
                if not _shallow(stream):
                    return
            return
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(m.file_size for m in members) > size:
                raise ValueError("it is packed, which torch.save never does")
            for member in members:
                if member.filename.rpartition("/")[2].endswith(".pkl"):
                    with archive.open(member) as pickled:
                        _shallow(pickled)


def _shallow(stream: Any) -> bool:
    """Whether a pickle follows; raises if it has tuples in tuples beyond any use."""
    stack: list[int] = []  # levels of tuples of each object; -1: a mark
    memo: dict[Any, int] = {}
    try:
        for code, value, _ in pickletools.genops(stream):
            name = code.name
            if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
                continue
            if name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[value])
                continue
            if name == "MARK":
                stack.append(-1)
                continue
            before = code.stack_before
            popped: list[int] = []
            if pickletools.markobject in before:
                while (top := stack.pop()) != -1:
                    popped.append(top)
                before = before[: before.index(pickletools.markobject)]
            for _ in before:
                popped.append(stack.pop())
            if name == "DUP":
                stack += popped * 2
                continue
            level = 1 + max(popped, default=0) if "TUPLE" in name else 0
            if level > _TUPLES:
                raise ValueError(f"it has tuples in tuples, more than {_TUPLES} levels of them")
            stack += [level] * len([kind for kind in code.stack_after if kind is not pickletools.markobject])
    except (IndexError, KeyError, UnicodeDecodeError, OverflowError):  # no pickle: its reader says so
        return False
    except ValueError as problem:
        if "levels" in str(problem):
            raise
        return False
    return True


__all__ = [
    "AGAIN",
    "INCOMPLETE",
    "file_size",
    "finite",
    "hdf5_shapes",
    "is_finite",
    "once",
    "plain_file_name",
    "read_bytes",
    "read_hdf5",
    "read_json",
    "read_matlab",
    "read_npy",
    "read_npz",
    "read_tensors",
    "read_text",
    "reading",
    "refuse_bombs",
    "unpacked_size",
    "whole_numbers",
    "whole_tensor",
]
