"""The shared reader: what it refuses before it opens, before it makes room, and after it has converted."""

import io
import os
import pickle
import socket
import struct
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from corruptions import header_of_npy, huge_claim
from PIL import Image

from lit_methods import datamodules
from lit_methods.datamodules.driving.common import read_labels
from lit_methods.datamodules.driving.nuscenes_tables import read_tables
from lit_methods.datamodules.driving.superpixels import compute_slic
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.fake import write_fake
from lit_methods.datamodules.folders import listed
from lit_methods.datamodules.loaders import make_loader
from lit_methods.datamodules.matrices.idx import read_idx
from lit_methods.datamodules.pictures import MAX_PIXELS, open_picture
from lit_methods.datamodules.reading import (
    file_size,
    finite,
    once,
    plain_file_name,
    read_hdf5,
    read_json,
    read_matlab,
    read_npy,
    read_npz,
    read_tensors,
    read_text,
    whole_numbers,
)
from lit_methods.datamodules.vision.cifar import read_pickle
from lit_methods.hub import check_gguf
from lit_methods.runs.checkpoints import read_state_dict

READERS = {
    "text": read_text,
    "json": read_json,
    "npy": read_npy,
    "npz": read_npz,
    "hdf5": lambda path: read_hdf5(path, ("image",)),
    "matlab": lambda path: read_matlab(path, ("X",)),
    "tensors": lambda path: read_tensors(path, path, "tensor"),
    "picture": open_picture,
    "pickle": read_pickle,
    "idx": lambda path: read_idx(path, 3),
    "checkpoint": read_state_dict,
}


@pytest.mark.parametrize("read", READERS.values(), ids=list(READERS))
def test_what_is_no_file_is_never_opened(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, kind in (("pipe", "a named pipe"), ("socket", "a socket"), ("folder", "a folder")):
            start = time.monotonic()
            with pytest.raises((BrokenRecordError, IsADirectoryError), match=rf"{name}.* is {kind}"):
                read(tmp_path / name)
            assert time.monotonic() - start < 5
    with pytest.raises(BrokenRecordError, match="is a device"):
        read(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError, match="gone"):
        read(tmp_path / "gone")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty") if read is not read_text else pytest.raises(MissingFileError):
        read(tmp_path / ("empty" if read is not read_text else "gone"))


def test_names_that_no_file_can_have(tmp_path):
    for name in ("a\0b", "x" * 300):
        with pytest.raises(BrokenRecordError, match="can't be looked at"):
            file_size(tmp_path / name)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(BrokenRecordError, match="can't be looked at"):
        file_size(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(MissingFileError, match="no such file"):
        file_size(tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs another user")
def test_files_that_another_user_may_not_read(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.txt").write_text("a")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    own = os.geteuid()
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)
    (tmp_path / "closed").chmod(0)
    try:
        if own == 0:
            os.seteuid(65534)
        with pytest.raises(BrokenRecordError, match=r"a\.txt: file: may not be read by this user: chmod u\+r"):
            read_text(tmp_path / "a.txt")
        with pytest.raises(BrokenRecordError, match=r"its folder may not be entered"):
            read_text(tmp_path / "closed" / "a.txt")
        with pytest.raises(BrokenRecordError, match=r"closed: folder: may not be read"):
            listed(tmp_path / "closed")
    finally:
        os.seteuid(own)
        (tmp_path / "closed").chmod(0o755)


# ---- texts -----------------------------------------------------------------------------------------------------------------------------


def test_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\nan\ralle\n")
    assert read_text(path) == "Gr\u00fc\u00dfe\nan\nalle\n"
    for content, words in (
        ("Gr\u00fc\u00dfe".encode("latin-1"), r"byte 2 isn't UTF-8 text: truncated or no text"),
        ("Gr\u00fc\u00dfe".encode("utf-16"), r"byte 0 isn't UTF-8 text: it begins like UTF-16, convert it to UTF-8"),
        ("abc".encode("utf-16-le"), r"byte 1 is NUL"),
        (b"abc\n" + bytes(20), r"byte 4 is NUL"),
    ):
        path.write_bytes(content)
        with pytest.raises(BrokenRecordError, match=rf"a\.txt: list: {words}"):
            read_text(path, "list")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "without end|isn't JSON"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[" + "9" * 5000 + "]", "isn't JSON"),
        ('{"a": ', "isn't JSON"),
        (" \n", "is empty"),
    ],
)
def test_json(content, words, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BrokenRecordError, match=rf"a\.json: file: .*({words})"):
        read_json(tmp_path / "a.json")


# ---- claims ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1 << 50,), (1 << 40, 1 << 40), (5,), (3,), (-1,)])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_header_of_an_array_claims_what_the_file_has(shape, mapped, tmp_path):
    (tmp_path / "a.npy").write_bytes(header_of_npy(shape) + bytes(16))
    with pytest.raises(BrokenRecordError, match=r"a\.npy: array: "):
        read_npy(tmp_path / "a.npy", mapped=mapped)


def test_arrays_that_are_right(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    assert np.array_equal(read_npy(tmp_path / "a.npy"), values)
    assert np.array_equal(read_npy(tmp_path / "a.npy", mapped=True), values)
    np.savez_compressed(tmp_path / "a.npz", x=values, y=values[0])
    assert set(read_npz(tmp_path / "a.npz")) == {"x", "y"}
    assert np.array_equal(read_npz(tmp_path / "a.npz", ("x",))["x"], values)


@pytest.mark.parametrize(
    "array",
    [np.zeros(2, np.complex64), np.zeros(2, "datetime64[s]"), np.zeros(2, [("a", "f4")]), np.array(["a"]), np.array([b"a"])],
    ids=["complex", "dates", "structured", "texts", "bytes"],
)
def test_arrays_of_other_kinds(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(BrokenRecordError, match="expected one array of"):
        read_npy(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", x=array)
    with pytest.raises(BrokenRecordError, match=r"a\.npz: x: holds .*expected one array of"):
        read_npz(tmp_path / "a.npz")


def test_packed_files_may_not_become_much_larger(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        member.write(header_of_npy((300, 1 << 20), "|u1"))
        for _ in range(300):
            member.write(bytes(1 << 20))
    with pytest.raises(BrokenRecordError, match=r"a\.npz: x: claims 314,.* bytes, but the file has"):
        read_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros(4))
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:60])
    with pytest.raises(BrokenRecordError, match=r"can't be read as a \.npz file"):
        read_npz(tmp_path / "b.npz")


def test_a_picture_of_too_many_pixels(tmp_path):
    huge_claim(tmp_path / "a.png")
    start = time.process_time()
    with pytest.raises(BrokenRecordError, match=r"a\.png: image: "):
        open_picture(tmp_path / "a.png")
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "b.png")
    with pytest.raises(BrokenRecordError, match=rf"has {side} x {side} pixels, more than 67,108,864: cut it into pieces"):
        open_picture(tmp_path / "b.png")
    assert time.process_time() - start < 5


def test_hdf5_takes_nothing_from_elsewhere(tmp_path):
    path, image = tmp_path / "a.h5", np.arange(16.0).reshape(4, 4)
    (tmp_path / "secret").write_bytes(bytes(range(256)) * 4)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["image"] = image

    def refused(words: str) -> None:
        with pytest.raises(BrokenRecordError, match=rf"a\.h5: image: {words}"):
            read_hdf5(path, ("image", "label"))

    with h5py.File(path, "w") as file:
        file.create_dataset("image", (4, 4), "f4", external=[(str(tmp_path / "secret"), 0, 64)])
    refused("takes its values from other files")
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((4, 4), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "not-there.h5"), "image", (4, 4))
        file.create_virtual_dataset("image", layout)
    refused("takes its values from other files")
    with h5py.File(path, "w") as file:
        file["image"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "image")
    refused("is a link to elsewhere")
    with h5py.File(path, "w") as file:
        file["image"] = h5py.SoftLink("/image")
    refused("is a link to elsewhere")
    with h5py.File(path, "w") as file:
        file.create_group("image")
    refused("is a Group")
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (1 << 14, 1 << 14, 1 << 14), "f4")
    refused("claims .* bytes and has 0: it wasn't written whole")
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (64, 64), "f4", chunks=(8, 8), compression="gzip")[:8, :8] = 1
    refused("has 1 of 64 parts")
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (1 << 20, 1 << 20), "u1", chunks=(1 << 10, 1 << 20), compression="gzip")
    refused("claims")
    with h5py.File(path, "w") as file:
        file["image"] = np.array([b"a"])
    refused("holds")
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image, chunks=(3, 3), compression="gzip", shuffle=True, fletcher32=True)
        file["label"] = np.ones((4, 4), np.uint8)
    found = read_hdf5(path, ("image", "label"))
    assert np.array_equal(found["image"], image)
    assert np.array_equal(found["label"], np.ones((4, 4)))


def test_matlab_files_are_unpacked_within_limits(tmp_path):
    from scipy.io import savemat

    savemat(tmp_path / "a.mat", {"s": {"a": np.zeros((1 << 14, 1 << 15), np.uint8)}}, do_compression=True)
    with pytest.raises(BrokenRecordError, match=r"a\.mat: file: claims .* bytes, but the file has"):
        read_matlab(tmp_path / "a.mat", ("s",))
    savemat(tmp_path / "a.mat", {"X": np.arange(4)}, do_compression=True)
    assert read_matlab(tmp_path / "a.mat", ("X", "y"))["X"].tolist() == [[0, 1, 2, 3]]


def test_tensors_have_as_many_values_as_they_claim(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.ones(1).expand(1 << 40), path)
    with pytest.raises(BrokenRecordError, match=r"a\.pt: t: can't be read as a tensor .*has 4 bytes"):
        read_tensors(path, path, "t")
    torch.save(torch.arange(12.0).reshape(3, 4).T, path)
    assert read_tensors(path, path, "t")[3].tolist() == [3, 7, 11]
    buffer = io.BytesIO()
    torch.save(torch.arange(3), buffer, _use_new_zipfile_serialization=False)
    assert read_tensors(buffer.getvalue(), path, "t").tolist() == [0, 1, 2]
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    with pytest.raises(BrokenRecordError, match="it is packed"):
        read_tensors(tmp_path / "packed.pt", path, "t")


def nested(levels: int = 200):
    """A tuple of the one before twice, again and again: its hash takes 2^levels steps."""
    found = ()
    for _ in range(levels):
        found = (found, found)
    return found


def nested_key() -> bytes:
    steps = b"".join(b"0h" + bytes([k]) + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1]) for k in range(200))
    return b"\x80\x02})q\x00" + steps + b"K\x01s."


def test_keys_of_tuples_in_tuples_end(tmp_path):
    start = time.process_time()
    (tmp_path / "data_batch_1").write_bytes(nested_key())
    with pytest.raises(BrokenRecordError, match="keys that are no names"):
        read_pickle(tmp_path / "data_batch_1")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": {1.5: 2}}, 2))
    with pytest.raises(BrokenRecordError, match="keys that are no names"):
        read_pickle(tmp_path / "data_batch_1")
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", nested_key())
        archive.writestr("a/version", "3\n")
    for read in (lambda: read_tensors(path, path, "t"), lambda: read_state_dict(path)):
        with pytest.raises(ValueError, match="tuples in tuples"):
            read()
    assert time.process_time() - start < 5


def test_gguf_headers_are_walked_through(tmp_path):
    def text(word: bytes) -> bytes:
        return struct.pack("<Q", len(word)) + word

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    values = text(b"a") + struct.pack("<II", 4, 7) + text(b"b") + struct.pack("<IIQ", 9, 8, 2) + text(b"x") + text(b"y")
    tensor = text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)
    good = head + values + tensor + bytes(64)
    path = tmp_path / "a.gguf"
    path.write_bytes(good)
    check_gguf(str(tmp_path), {"gguf_file": "a.gguf"}, "x")
    check_gguf("owner/model", {}, "x")
    for content in (
        b"",
        b"no model",
        good[:40],
        head + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(64),
        head + struct.pack("<Q", 1 << 60) + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 2) + values,
        head + text(b"a") + struct.pack("<II", 99, 0) + bytes(64),
        head + values + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 40) + bytes(64),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x: .*a\.gguf can't be read as a GGUF file"):
            check_gguf(str(tmp_path), {"gguf_file": "a.gguf"}, "x")


# ---- numbers and names -----------------------------------------------------------------------------------------------------------------


def test_numbers_after_conversion():
    assert whole_numbers([1.0, 2.0], "a", "b").tolist() == [1, 2]
    for values in ([0.5], [np.nan], [np.inf], [1e30], np.array([1j]), np.array(["1"]), np.array([2**64 - 1], np.uint64)):
        with pytest.raises(BrokenRecordError, match="a: b: expected whole numbers"):
            whole_numbers(values, "a", "b")
    with np.errstate(over="ignore"), pytest.raises(BrokenRecordError, match=r"a: b: value \[1, 0\] is inf"):
        finite(np.array([[1.0], [1e300]]).astype(np.float32), "a", "b")
    once([1, 2], "a", "b")
    with pytest.raises(BrokenRecordError, match=r"the name '3' stands twice"):
        once([3, 1, 3], "a", "b")


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "a\\b", "..", ".", "", "a\0", "a\n", "c:a", "x" * 201])
def test_names_that_lead_elsewhere(name, tmp_path):
    with pytest.raises(BrokenRecordError, match=r"table: token: is .*plain name"):
        plain_file_name(name, "table", "token")
    with pytest.raises(BrokenRecordError):
        compute_slic([(name, tmp_path / "a.png")], tmp_path / "out", 5)
    data = datamodules.NuScenesDataModule(mode="segment")
    with pytest.raises(BrokenRecordError, match="plain name"):
        data.write_labels(name, torch.zeros(3, dtype=torch.int64), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert plain_file_name("n008-2018__LIDAR_TOP \u00e4", "table", "token")


def test_tables_of_nuscenes_that_lead_elsewhere_or_in_a_circle(tmp_path):
    root = tmp_path / "root"
    write_fake(datamodules.NuScenesDataModule, root, version="v1.0-mini", mode="segment")
    table = root / "v1.0-mini" / "sample_data.json"
    import json

    before = json.loads(table.read_text())
    assert read_tables(root, "v1.0-mini", 2)
    lidar = next(row for row in before if row["is_key_frame"] and "LIDAR_TOP" in row["filename"])
    table.write_text(json.dumps([row | {"token": "../../../out" if row is lidar else row["token"]} for row in before]))
    with pytest.raises(BrokenRecordError, match=r"sample_data\.json: token: is '\.\./\.\./\.\./out'"):
        read_tables(root, "v1.0-mini", 2)
    table.write_text(json.dumps([row | {"prev": row["token"]} for row in before]))
    with pytest.raises(BrokenRecordError, match=r"sample_data\.json: prev: leads from .* in a circle"):
        read_tables(root, "v1.0-mini", 2)
    table.write_text(json.dumps([*before, lidar]))
    with pytest.raises(BrokenRecordError, match=rf"row {len(before)}: the token .* stands in an earlier row"):
        read_tables(root, "v1.0-mini", 2)
    for key, value, words in (("timestamp", 1.5, "whole number"), ("timestamp", 10**30, "whole number"), ("is_key_frame", 1, "true or")):
        table.write_text(json.dumps([row | {key: value} for row in before]))
        with pytest.raises(BrokenRecordError, match=rf"row 0: {key} is .*{words}"):
            read_tables(root, "v1.0-mini", 2)


def test_complex_and_fractional_labels_of_points(tmp_path):
    for values in (np.zeros(3, np.complex64), np.full(3, 0.5), np.zeros(3, "datetime64[s]")):
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(BrokenRecordError, match="labels"):
            read_labels(tmp_path / "a.npy", np.uint8, 0xFF, np.zeros(32, np.int64), 3)


# ---- fewer samples than processes ------------------------------------------------------------------------------------------------------


def test_an_evaluation_of_fewer_samples_than_processes_is_refused_on_all_ranks_alike():
    said = set()
    for rank in range(3):
        with pytest.raises(ValueError, match=r"2 samples of an evaluation can't be dealt to 3 processes") as error:
            make_loader(range(2), 4, shuffle=False, seed=0, rank=rank, world_size=3)
        said.add(str(error.value))
    assert len(said) == 1
    assert [len(make_loader(range(3), 4, shuffle=False, seed=0, rank=rank, world_size=3)) for rank in range(3)] == [1, 1, 1]
