"""Ways in which a file of a release gets broken, and what reading it then comes to: in a process of its own, with limits."""

import hashlib
import io
import json
import os
import re
import select
import shutil
import signal
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_methods import datamodules

SECONDS, MEMORY = 10.0, 1 << 30  # what a trial may take
PICTURES = (".png", ".jpg", ".jpeg")
TEXTS = (".txt", ".csv", ".tsv", ".json", ".dat", ".data", ".inter", ".train", ".test", ".lst", ".jsonl", ".trec")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n(x) show\nshowpage\n%%EOF\n"


class Unfit(Exception):
    """This kind of corruption doesn't exist for this kind of file."""


def is_text(path: Path) -> bool:
    return path.suffix.lower() in TEXTS or path.name == "qrels"


def header_of_npy(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, Any]]) -> None:
    """Arrays of a .npy, .npz, .h5, .mat file or of a pickle or tar file, changed."""
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except ValueError:
            raise Unfit from None
        found = list(change({"array": array}).values())
        if not found:
            raise Unfit
        np.save(path, found[0])
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            found = change(dict(arrays))
        np.savez(path, **found)
    elif path.suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            found = change({name: file[name][()] for name in file})
        with h5py.File(path, "w") as file:
            for name, value in found.items():
                file[name] = value
    elif path.suffix == ".mat":
        from scipy.io import loadmat, savemat

        stored = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
        savemat(path, change(stored))
    elif path.suffix == ".safetensors":
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(path, "pt") as stream:
            notes = stream.metadata()
        changed = change({name: tensor.float().numpy() for name, tensor in load_file(path).items()})
        save_file({name: torch.tensor(value) for name, value in changed.items()}, path, notes)
    elif path.suffix == ".pt":
        found = change({"tensor": torch.load(path, weights_only=True).float().numpy()})
        if not found or next(iter(found.values())).dtype.kind not in "biufc":
            raise Unfit
        torch.save(torch.tensor(next(iter(found.values()))), path)
    elif path.suffix == ".tar":
        import tarfile

        with tarfile.open(path) as tar:
            parts = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        first = next(name for name in parts if name.endswith(".pth"))
        found = change({first: torch.load(io.BytesIO(parts[first]), weights_only=True).float().numpy()})
        with tarfile.open(path, "w") as tar:
            for name, content in parts.items():
                if name == first:
                    if not found:
                        continue
                    buffer = io.BytesIO()
                    values = next(iter(found.values()))
                    torch.save(torch.tensor(values) if values.dtype.kind in "biuf" else values.tolist(), buffer)
                    content = buffer.getvalue()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    elif not path.suffix and path.read_bytes()[:1] == b"\x80":
        import pickle

        content = pickle.loads(path.read_bytes(), encoding="latin1")
        arrays = {str(key): np.asarray(value) for key, value in content.items() if key in ("data", "labels", "fine_labels")}
        if not arrays:
            raise Unfit
        changed = change(arrays)
        path.write_bytes(pickle.dumps({key: value for key, value in content.items() if key not in arrays} | changed, 2))
    else:
        raise Unfit


# ---- the kinds -------------------------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    content = path.read_bytes()
    half = content[: len(content) // 2]
    cut = 1 + len(half) - len(half.rstrip(b"\n")) if is_text(path) else 3  # within a line, within a number
    path.write_bytes(half[: max(0, len(half) - cut)])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start, stop = len(content) // 3, max(len(content) // 3 + 1, len(content) // 2)
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def random_bytes(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes())


def other_media(path: Path) -> None:
    buffer = io.BytesIO()
    if path.suffix.lower() in PICTURES:
        buffer.write(EPS)
    else:
        Image.new("RGB", (9, 7)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())


def complex_values(path: Path) -> None:
    rewritten(path, lambda arrays: {name: array.astype(np.complex64) for name, array in arrays.items()})


def dates(path: Path) -> None:
    if path.suffix in (".h5", ".mat", ".safetensors"):
        raise Unfit
    rewritten(path, lambda arrays: {name: np.zeros(array.shape, "datetime64[s]") for name, array in arrays.items()})


def fractions(path: Path) -> None:
    """Labels and other whole numbers get a fraction."""

    def change(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        found = {k: v.astype(np.float64) + 0.5 if v.dtype.kind in "iu" else v for k, v in arrays.items()}
        if all(found[k] is arrays[k] for k in arrays):
            raise Unfit
        return found

    rewritten(path, change)


def utf16(path: Path) -> None:
    if not is_text(path):
        raise Unfit
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16"))


def utf16_without_mark(path: Path) -> None:
    if not is_text(path):
        raise Unfit
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16-le"))


def latin1(path: Path) -> None:
    if not is_text(path):
        raise Unfit
    text = path.read_text(encoding="utf-8")
    changed = re.sub(r"[A-Za-z](?=[^A-Za-z]*$)", "ü", text, count=1) if re.search("[A-Za-z]", text) else text + "ü"
    path.write_bytes(changed.encode("latin-1"))


def mark(path: Path) -> None:
    if not is_text(path):
        raise Unfit
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def windows(path: Path) -> None:
    if not is_text(path):
        raise Unfit
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def repeated_rows(path: Path) -> None:
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if isinstance(content, list) and content:
            content.append(content[-1])
        elif isinstance(content, dict) and (lists := [value for value in content.values() if isinstance(value, list) and value]):
            lists[0].append(lists[0][-1])
        else:
            raise Unfit
        path.write_text(json.dumps(content))
    elif is_text(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join([*lines, lines[-1]]), encoding="utf-8")
    else:
        rewritten(path, lambda arrays: {k: np.concatenate([v, v[-1:]]) if v.ndim else v for k, v in arrays.items()})


def missing(path: Path) -> None:
    path.unlink()


def without_key(path: Path) -> None:
    """A column, a key or a named array is gone."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        first = content[0] if isinstance(content, list) and content else content
        if not isinstance(first, dict) or not first:
            raise Unfit
        del first[next(iter(first))]
        path.write_text(json.dumps(content))
    elif path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(dict(list(record.items())[1:])) + "\n" for record in records), encoding="utf-8")
    elif is_text(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        for sign in ("\t", "::", ",", " "):
            if all(sign in line for line in lines if line):
                break
        else:
            raise Unfit
        path.write_text("".join(line.partition(sign)[2] + "\n" for line in lines), encoding="utf-8")
    else:
        if path.suffix == ".npy":
            raise Unfit
        rewritten(path, lambda arrays: dict(list(arrays.items())[1:]))


def other_size(path: Path) -> None:
    if path.suffix.lower() in PICTURES:
        with Image.open(path) as picture:
            smaller = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)), 0)
            form = picture.format
        smaller.save(path, form)
    elif is_text(path):
        raise Unfit
    elif path.suffix in (".bin", ".label") or not path.suffix:
        content = path.read_bytes()
        if content[:1] == b"\x80":
            rewritten(path, lambda arrays: {k: v[:-1] if k == "data" else v for k, v in arrays.items()})
        else:
            path.write_bytes(content[:-3])
    else:
        rewritten(path, lambda arrays: {k: v[..., :-1] if number == 0 and v.ndim else v for number, (k, v) in enumerate(arrays.items())})


def _with_number(path: Path, word: str) -> None:
    text = path.read_text(encoding="utf-8")
    places = list(re.finditer(r"(?<![\w.\"'/-])-?\d+(\.\d+)?(?![\w.\"'/-])", text))
    if not places:
        raise Unfit
    last = places[len(places) // 2]
    path.write_text(text[: last.start()] + word + text[last.end() :], encoding="utf-8")


def not_a_number(path: Path) -> None:
    if is_text(path):
        return _with_number(path, "NaN")
    if path.suffix in (".bin", ".label"):
        content = bytearray(path.read_bytes())
        content[:4] = struct.pack("<f", float("nan"))
        path.write_bytes(content)
        return None

    def change(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        found = {}
        for name, array in arrays.items():
            found[name] = array.astype(np.float32 if array.dtype.itemsize < 8 else np.float64) if array.dtype.kind in "iufb" else array
            if found[name].dtype.kind == "f":
                found[name].reshape(-1)[-1:] = np.nan
        return found

    return rewritten(path, change)


def infinite(path: Path) -> None:
    """1e300, which float32 doesn't have."""
    if is_text(path):
        return _with_number(path, "1e300")

    def change(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        found = {}
        for name, array in arrays.items():
            found[name] = array.astype(np.float64) if array.dtype.kind in "iufb" else array
            if found[name].dtype.kind == "f":
                found[name].reshape(-1)[-1:] = 1e300
        return found

    return rewritten(path, change)


def huge_claim(path: Path) -> None:
    """A header that claims terabytes, or gigabytes in a small packed file."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        import zlib

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
        packed = zlib.compress(bytes(7501) * 100, 1)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    elif suffix == ".npy":
        path.write_bytes(header_of_npy((1 << 40, 4, 2, 2)) + bytes(64))
    elif suffix == ".npz":
        with np.load(path) as arrays:
            names = arrays.files
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    member.write(header_of_npy((320, 1 << 20), "|u1"))
                    for _ in range(20):
                        member.write(bytes(1 << 24))
    elif suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            names = list(file)
        with h5py.File(path, "w") as file:
            for name in names:
                file.create_dataset(name, shape=(1 << 12, 1 << 12, 1 << 12), chunks=(1, 1 << 12, 1 << 12), dtype="f4", compression="gzip")
    elif suffix == ".safetensors":
        content = json.dumps({"activation": {"dtype": "F32", "shape": [1 << 40, 8], "data_offsets": [0, 1 << 45]}}).encode()
        path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(64))
    elif suffix == ".tar":
        rewritten(path, lambda arrays: {k: v for k, v in arrays.items()})
        content = bytearray(path.read_bytes())
        content[124:136] = b"77777777777\0"
        content[148:156] = b"        "
        content[148:156] = b"%06o\0 " % sum(content[:512])
        path.write_bytes(content)
    elif is_text(path):
        _with_number(path, "1" + "0" * 30)
    elif path.name.endswith("ubyte"):
        content = bytearray(path.read_bytes())
        content[4:8] = b"\x7f\xff\xff\xff"
        path.write_bytes(content)
    elif suffix == ".mat":
        from scipy.io import loadmat, savemat

        stored = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
        savemat(path, {name: np.zeros((1 << 15, 10_000), np.uint8) for name in list(stored)[:1]}, do_compression=True)
    else:
        raise Unfit


def deep(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text("[" * 200_000 + "]" * 200_000)
    elif not path.suffix and path.read_bytes()[:1] == b"\x80":  # a key of tuples in tuples, whose hash takes for ever
        path.write_bytes(b"\x80\x02})q\x00" + _nested() + b"K\x01s.")
    else:
        raise Unfit


def _nested(levels: int = 60) -> bytes:
    """Each tuple has the one before twice; BINGET, BINGET, TUPLE2, BINPUT."""
    levels_of = (b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1]) for k in range(levels))
    return b"0" + b"0".join(levels_of)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


KINDS: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "empty": empty,
    "zeroed": zeroed,
    "random": random_bytes,
    "other media": other_media,
    "complex": complex_values,
    "dates": dates,
    "fractions": fractions,
    "utf-16": utf16,
    "utf-16 without mark": utf16_without_mark,
    "latin-1": latin1,
    "mark": mark,
    "windows": windows,
    "repeated rows": repeated_rows,
    "missing": missing,
    "without key": without_key,
    "other size": other_size,
    "nan": not_a_number,
    "1e300": infinite,
    "huge claim": huge_claim,
    "deep": deep,
    "pipe": pipe,
    "folder": folder,
}


# ---- reading -------------------------------------------------------------------------------------------------------------------------


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in value:
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            _feed(digest, one)
    elif isinstance(value, torch.Tensor):
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    else:
        digest.update(str(value).encode())


def read_all(name: str, given: dict[str, Any]) -> str:
    """A digest of all that a datamodule reads."""
    digest = hashlib.sha256()
    data = getattr(datamodules, name)(**given)
    data.check_root("fit")
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    for part in ("train", "val", "test"):
        loaders = getattr(data, f"{part}_dataloader")()
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            for _, batch in zip(range(100), loader, strict=False):
                _feed(digest, batch)
    return digest.hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: ``equal``, ``differs``, ``error``, ``late``, ``died``; the error's class and message; seconds and memory."""

    kind: str
    error: str = ""
    message: str = ""
    field: str = ""
    seconds: float = 0.0
    memory: int = 0

    def clear(self, path: Path) -> bool:
        """An error of ours that names the file or its partner of the same name, or data that are as before; in time and memory."""
        if self.seconds > SECONDS or self.memory > MEMORY:
            return False
        if self.kind == "equal":
            return True
        known = self.error in ("BrokenRecordError", "MissingFileError", "WrongRootError", "NotThereError", "ValueError", "RuntimeError")
        named = path.name in self.message or path.stem in self.message or str(path.parent) in self.message
        named = named or self.error == "MissingFileError"  # what a broken list names
        return self.kind == "error" and known and (named or "the list" in self.message)  # a file that a broken list names


def trial(name: str, given: dict[str, Any], before: str) -> Outcome:
    """Read in a fork, with limits."""
    read_end, write_end = os.pipe()
    start = time.perf_counter()
    own = _resident()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        status = 0
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = read_all(name, given)
                    answer = {"kind": "equal" if found == before else "differs"}
                except BaseException as error:
                    said = str(error)[:3000].encode("utf-8", "replace").decode()
                    answer = {"kind": "error", "error": type(error).__name__, "message": said, "field": str(getattr(error, "field", ""))}
            os.write(write_end, json.dumps(answer).encode())
        except BaseException:
            status = 3
        finally:
            os._exit(status)
    os.close(write_end)
    ready, _, _ = select.select([read_end], [], [], SECONDS + 2)
    content = b""
    if ready:
        while block := os.read(read_end, 1 << 16):
            content += block
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read_end)
    _, _, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    memory = max(0, usage.ru_maxrss * 1024 - own)
    if not ready:
        return Outcome("late", seconds=time.perf_counter() - start, memory=memory)
    if not content:
        return Outcome("died", seconds=seconds, memory=memory)
    return Outcome(**json.loads(content), seconds=seconds, memory=memory)


def _resident() -> int:
    """Bytes of this process's own memory, which a fork begins with; pages of files it maps anew."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class Broken:
    """A file that is broken inside the block; afterwards the whole folder is as it was."""

    def __init__(self, root: Path, path: Path, break_it: Callable[[Path], None]) -> None:
        self.root, self.path, self.break_it = root, path, break_it

    def __enter__(self) -> None:
        self.before, self.there = self.path.read_bytes(), set(self.root.rglob("*"))
        try:
            self.break_it(self.path)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, TypeError):  # arrays of other things than numbers
                raise Unfit from error
            raise

    def __exit__(self, *_: object) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(self.before)
        for new in sorted(set(self.root.rglob("*")) - self.there, reverse=True):
            shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)


def representatives(root: Path) -> list[Path]:
    """First and last file of each folder and ending; of a tree of class folders one of the first and last ones."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        relative = path.relative_to(root)
        place = re.sub(r"\d+", "#", relative.parent.as_posix()) if len(relative.parts) > 2 else relative.parent.as_posix()
        many = path.suffix in (".bin", ".npy", ".npz", ".h5", ".label")
        stem = re.sub(r"[\d_-]+", "#", path.stem) if many else path.stem
        if path.suffix.lower() in PICTURES:
            stem, place = "", relative.parts[0]
        groups.setdefault((place, f"{stem}{path.suffix}"), []).append(path)
    return [one for group in groups.values() for one in dict.fromkeys((group[0], group[-1]))]
