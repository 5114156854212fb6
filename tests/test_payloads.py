"""Files that would run code or write elsewhere: nothing of it happens, and each is refused by name."""

import contextlib
import io
import json
import os
import pickle
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import payloads
import pytest
import torch

from lit_methods.callbacks.fine_tuning.delta import load_delta
from lit_methods.callbacks.sparse_autoencoders.feature_recovery import _read_array
from lit_methods.callbacks.sparsity.masksparsity.core import load_masks
from lit_methods.datamodules.driving.common import read_points
from lit_methods.datamodules.driving.kitti import read_label_map
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.generative.latents import LatentFiles, read_statistics
from lit_methods.datamodules.generative.shards import read_index, read_tensor
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.reading import read_hdf5, read_matlab, read_npz, read_tensors
from lit_methods.datamodules.regression.nyud2 import read_mask
from lit_methods.datamodules.segmentation.organs import read_record
from lit_methods.datamodules.vision.cifar import read_pickle
from lit_methods.runs.checkpoints import UnreadableCheckpoint, check_readable, read_state_dict, read_weights
from lit_methods.sparse_autoencoders.saelens import load_saelens

EVIL = "from pathlib import Path\nPath('ran').touch()\n\n\ndef run():\n    Path('ran').touch()\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module that would make ``ran`` when it is imported."""
    folder = tmp_path / "work" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    Path("evil_of_the_folder.py").write_text(EVIL)
    return folder


def _as_it_is(program: bytes) -> bytes:
    return program


def _member(program: bytes) -> bytes:
    return payloads.archive({"image.npy": payloads.object_array(program), "label.npy": payloads.object_array(program)})


def _shard(path: Path) -> Any:
    return [read_tensor(record, "latent.pth") for record in read_index(path, ["latent.pth"])]


def _tar(program: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("a.latent.pth")
        member.size = len(program)
        tar.addfile(member, io.BytesIO(program))
    return buffer.getvalue()


def _delta(path: Path) -> Any:
    path.with_name(f"{path.name}.json").write_text(json.dumps({"format": "lit-methods delta 1", "entries": {}}))
    return load_delta(path)


def _autoencoder(path: Path) -> Any:
    (path.parent / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": 2, "d_sae": 4}))
    return load_saelens(path.parent)


READERS: dict[str, tuple[str, Callable[[bytes], bytes], Callable[[Path], Any]]] = {  # file, what a pickle is wrapped in, reader
    "cifar": ("data_batch_1", _as_it_is, read_pickle),
    "statistics": ("stat.npy", payloads.object_array, lambda path: read_statistics(path, (4, 2, 2))),
    "latents": ("latent.npy", payloads.object_array, lambda path: LatentFiles(path.parent, "latent")),
    "points": ("a.npy", payloads.object_array, lambda path: read_points(path, 4)),
    "depth mask": ("mask.npy", payloads.object_array, lambda path: read_mask(path, 1)),
    "directions": ("truth.npy", payloads.object_array, _read_array),
    "organs": ("a.npz", _member, read_record),
    "channel masks": ("a.npz", _member, load_masks),
    "channel masks of torch": ("a.pt", payloads.torch_archive, load_masks),
    "shard": ("a.tar", lambda program: _tar(payloads.torch_archive(program)), _shard),
    "shard, old form": ("a.tar", lambda program: _tar(payloads.torch_legacy(program)), _shard),
    "tensors": ("a.pt", _as_it_is, lambda path: read_tensors(path, path, "tensor")),
    "checkpoint": ("a.ckpt", payloads.torch_archive, read_state_dict),
    "checkpoint, old form": ("a.ckpt", payloads.torch_legacy, read_state_dict),
    "checkpoint to resume": ("a.ckpt", payloads.torch_archive, check_readable),
    "teacher": ("a.pth", payloads.torch_archive, read_weights),
    "teacher called safetensors": ("a.safetensors", payloads.torch_archive, read_weights),
    "delta called safetensors": ("a.safetensors", _as_it_is, _delta),
    "autoencoder called safetensors": ("sae_weights.safetensors", _as_it_is, _autoencoder),
    "volume called HDF5": ("a.h5", _as_it_is, lambda path: read_hdf5(path, ("image", "label"))),
    "digits called MATLAB": ("a.mat", _as_it_is, lambda path: read_matlab(path, ("X",))),
    "picture": ("a.png", _as_it_is, open_picture),
}
MANY = ("cifar", "statistics", "tensors", "checkpoint")  # have all programs; the others every eleventh


@pytest.mark.parametrize("name", READERS)
def test_nothing_runs(name: str, here: Path, tmp_path: Path) -> None:
    file, wrapped, read = READERS[name]
    mark, before = here / "ran", {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    tried = 0
    for number, (title, program) in enumerate(payloads.programs(mark)):
        if name not in MANY and number % 11:
            continue
        tried += 1
        path = tmp_path / "work" / file
        path.write_bytes(wrapped(program))
        found, said = {}, str(path)
        try:
            found = read(path)
        except (ValueError, UnreadableCheckpoint) as error:
            said = str(error)
        assert str(path) in said, title
        assert isinstance(found, dict), (title, found)
        assert all(isinstance(value, str | int) for value in found.values()), "numbers and texts are no harm"
        assert not mark.exists(), title
    assert tried >= (300 if name in MANY else 30)
    after = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    assert {path.name for path in after - before} <= {file, "cfg.json", f"{file}.json"}


def test_the_programs_do_run_where_they_are_let(here: Path) -> None:
    mark, ran = here / "ran", set()
    for title, program in payloads.programs(mark):
        if title.split()[0] in ("builtins.exec", "builtins.open", "os.system", "evil_of_the_folder.run"):
            with contextlib.suppress(Exception):
                pickle.loads(program)
            if mark.exists():
                ran.add(title)
                mark.unlink()
    assert len(ran) >= 16, "the tests below would prove nothing"


def test_a_label_map_with_tags_is_refused(here: Path) -> None:
    for tag in ("!!python/object/apply:os.system ['touch ran']", "!!python/object/new:os.system ['touch ran']", "!!python/name:os.system"):
        Path("map.yaml").write_text(f"name: {tag}\n")
        with pytest.raises(BrokenRecordError, match=r"map\.yaml: keys: isn't YAML"):
            read_label_map("map.yaml")
    assert not Path("ran").exists()


def test_archives_that_lead_elsewhere_write_nothing(here: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer)
    content = buffer.getvalue()
    with tarfile.open("a.tar", "w") as tar:
        for name in ("../../out.latent.pth", "/tmp/lit-methods-out.latent.pth", "in/../../../out2.latent.pth"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind, name in (
            (tarfile.SYMTYPE, "link.latent.pth"),
            (tarfile.LNKTYPE, "hard.latent.pth"),
            (tarfile.FIFOTYPE, "pipe.latent.pth"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    records = read_index(Path("a.tar"), ["latent.pth"])
    assert len(records) == 3, "links and pipes are no samples"
    assert all(torch.equal(read_tensor(record, "latent.pth"), torch.ones(2)) for record in records)
    number = io.BytesIO()
    np.save(number, np.ones((2, 2), np.float32))
    Path("b.npz").write_bytes(payloads.archive({"../../image.npy": number.getvalue(), "image.npy": number.getvalue()}))
    assert list(read_npz(Path("b.npz"), ("image",))) == ["image"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, here / "b.npz"])
    assert not Path("/tmp/lit-methods-out.latent.pth").exists()


def test_no_program_is_started_for_a_picture(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gs", "gswin64c", "gswin32c"):
        (here / name).write_text(f"#!/bin/sh\ntouch {here}/ran\n")
        (here / name).chmod((here / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\n(x) show\nshowpage\n%%EOF\n"
    contents = {
        "eps": eps,
        "eps behind a header": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(eps).to_bytes(4, "little") + bytes(18) + eps,
        "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
        "emf": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "html": b"<html><script>1</script></html>",
        "psd": b"8BPS" + bytes(60),
        "zip": payloads.archive({"a.png": b"x"}),
    }
    for kind, content in contents.items():
        for ending in ("jpg", "png"):
            Path(f"a.{ending}").write_bytes(content)
            with pytest.raises(BrokenRecordError, match=rf"a\.{ending}: image: can't be decoded"):
                open_picture(Path(f"a.{ending}"))
            assert not Path("ran").exists(), kind
