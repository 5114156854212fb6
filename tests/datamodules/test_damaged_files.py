"""Every file of every reader, damaged: an error names the file, or what is left is read as it stands."""

import json
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_roots import ROOTS, everything

from lit_methods.datamodules.driving.common import read_labels
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.label_store import LabelStore

EXPECTED = (ValueError, WrongRootError)  # BrokenRecordError is a ValueError

UNREAD = {  # files that lie there and that these settings don't ask for
    "generative imagenet": ("classes.txt",),
    "voc": ("SegmentationClass/a.png",),
    "acdc": ("ACDC_training_volumes/patient001.*", "ACDC_training_slices/patient010.*"),
    "fashioniq": ("image_splits/.*",),
    "few-shot imagenet": ("images/train/n02/.*",),
    "nuscenes": ("lidarseg/.*", "v1.0-mini/(category|log|map).json", "(samples|superpixels)/.*0061-0-0-.*"),
    "nuscenes segmented": ("(samples|superpixels)/.*CAM.*", "sweeps/.*", "v1.0-mini/(category|log|map).json"),
}


def kinds_of_files(root: Path) -> list[Path]:
    """One file of each folder and ending."""
    found: dict[tuple[Path, str], Path] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        alone = path.suffix in (".json", ".txt", ".csv", ".tsv", ".mat", ".npy")
        found.setdefault((path if alone else path.parent, path.suffix), path)
    return list(found.values())


LONG = {"imagenet", "nuscenes", "nuscenes segmented"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.thorough] if name in LONG else []) for name in ROOTS])
def test_a_damaged_file_is_named(name, tmp_path):
    write, make = ROOTS[name]
    root = tmp_path / "root"
    write(root)
    everything(make(root))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    silent = []
    for path in kinds_of_files(root):
        whole = path.read_bytes()
        cuts = [int(cut) for cut in rng.integers(1, len(whole), 3)] if len(whole) > 1 else []
        noise = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            noise[place] ^= int(rng.integers(1, 256))
        damages = {"empty": b"", **{f"cut at {cut}": whole[:cut] for cut in cuts}, "0xff": b"\xff" * 40, "noise": bytes(noise)}
        for damage, content in damages.items():
            path.write_bytes(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    everything(make(root))
            except EXPECTED as problem:
                if str(root) not in str(problem):
                    raise AssertionError(f"{path.relative_to(root)}, {damage}: no file is named: {problem}") from problem
            except Exception as problem:
                raise AssertionError(f"{path.relative_to(root)}, {damage}: {type(problem).__name__}: {problem}") from problem
            else:
                silent += [(path.relative_to(root).as_posix(), damage)] if damage in ("empty", "0xff") else []
            path.write_bytes(whole)
    unread = [re.compile(pattern) for pattern in UNREAD.get(name, ())]
    silent = [one for one in silent if not any(pattern.fullmatch(one[0]) for pattern in unread)]
    assert not silent, "damage that can't be overlooked was"


def npy(path, values):
    np.save(path, values)


def mat(path, **arrays):
    from scipy.io import savemat

    savemat(path, arrays)


def table(rows):
    found = np.zeros((1, len(rows)), dtype=[("relative_im_path", object), ("class", object)])
    found[0] = rows
    return found


def replaced(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def whole_number(path, value):
    """Ids of superpixels and masks as a picture of 16 bits."""
    Image.fromarray(np.full((20, 24), value, np.uint16)).save(path)


def no_turn(path):
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"rotation": [0, 0, 0, 0]} for row in rows]))


X = np.zeros((32, 32, 3, 2), np.uint8)
SPOILT = [  # root, file, how it is spoilt, what the message says
    ("ages", "agedb.csv", lambda p: replaced(p, "20,", "nan,"), r"line 2: expected an age of 0 to 200.*'nan'"),
    ("ages", "agedb.csv", lambda p: replaced(p, "21,", "-1,"), r"line 3: expected an age of 0 to 200"),
    ("sentences", "dev_new.tsv", lambda p: replaced(p, "2.5", "nan"), r"line 2: expected two sentences and a score of 0 to 5, got 'nan'"),
    ("movielens", "ratings.dat", lambda p: replaced(p, "::3::", "::inf::"), r"line 1: .*expected user, item, value"),
    ("recbole", "fake.inter", lambda p: replaced(p, "0\t1\t3", "0\t1e300\t3"), r"line 3: .*expected user, item, value"),
    ("depths", "test_balanced_mask.npy", lambda p: npy(p, np.full((1, 228, 304), np.nan)), r"mask: expected 0 and 1"),
    ("depths", "test_balanced_mask.npy", lambda p: npy(p, np.full((1, 228, 304), 7)), r"mask: expected 0 and 1"),
    ("svhn", "train_32x32.mat", lambda p: mat(p, X=X, y=np.array([[1], [np.nan]])), r"y: expected whole numbers"),
    ("svhn", "test_32x32.mat", lambda p: mat(p, X=X, y=np.array([[0], [3]])), r"y: labels go from 0 to 3, not from 1 to 10"),
    ("stl10", "stl10_binary/test_y.bin", lambda p: p.write_bytes(b"\1\0"), r"labels: labels go from 0 to 1, not from 1 to 10"),
    ("semi", "labels.txt", lambda p: p.write_text("0\n\u00b2\n"), r"line 2: '\u00b2' is no position in 0\.\.9"),
    ("tokens", "meta.json", lambda p: p.write_text('{"vocab_size": 0}'), r"vocab_size: 0, expected 1 or more"),
    ("tokens", "train.bin", lambda p: p.write_bytes(np.full(40, 50, "<u2").tobytes()), r"token 0: 50, but vocab_size is 50"),
    ("voc", "masks/a.png", lambda p: whole_number(p, 21), r"pixels: it has the class 21, and there are 21"),
    ("voc", "masks/a.png", lambda p: whole_number(p, 257), r"pixels: it has the class 257, and there are 21"),
    ("synapse", "train_npz/case0005_slice000.npz", lambda p: np.savez(p, image=np.full((8, 8), np.nan), label=np.ones((8, 8))), "finite"),
    ("synapse", "train_npz/case0005_slice000.npz", lambda p: np.savez(p, image=X[..., 0, 0], label=np.full((32, 32), 9)), "up to 9"),
    ("synapse", "train_npz/case0005_slice000.npz", lambda p: np.savez(p, image=np.array([["a"]]), label=np.ones((1, 1))), "numbers"),
    ("synapse", "train.txt", lambda p: p.write_text("\n"), r"train_list: the list is empty"),
    ("eurosat", "split_zhou_EuroSAT.json", lambda p: replaced(p, ', 0, "River"', ', -1, "River"'), r"train\[1\]|labels"),
    ("aircraft", "images_variant_test.txt", lambda p: replaced(p, "DC-10 30", "747"), r"line 2: '747' isn't in variants\.txt"),
    ("cub", "image_class_labels.txt", lambda p: replaced(p, "3 101", "3 0"), r"image 3: class 0 isn't in 1\.\.200"),
    ("cars", "cars_annos.mat", lambda p: mat(p, annotations=table([("a.jpg", 1), ("b.jpg", 197)])), r"class: expected .* 1\.\.196"),
    ("sop", "Ebay_train.txt", lambda p: replaced(p, "2 2 4", "2 nan 4"), r"line 3: expected an integer, got 'nan'"),
    ("latents", "latent_celeba_256/000000003.npy", lambda p: npy(p, np.full((4, 2, 2), np.inf)), r"latent 3: holds a NaN or an infinity"),
    ("latents", "latent_celeba_256/000000001.npy", lambda p: npy(p, np.full((4, 2, 2), "a")), r"array: holds <U1, expected one array"),
    ("latents", "latent_celeba_256_stat.npy", lambda p: npy(p, np.full((2, 4, 1, 1), np.nan)), r"statistics: .* must be finite"),
    ("shards", "negative.pt", lambda p: torch.save(torch.full((3, 4), np.nan), p), r"null_embedding: has numbers that aren't finite"),
    ("shards", "negative.pt", lambda p: torch.save(torch.ones(3, 5), p), r"null_embedding: is 5 wide, and the prompts 4"),
    ("shards", "negative.pt", lambda p: torch.save([1], p), r"null_embedding: holds a list"),
    ("kitti", "sequences/00/calib.txt", lambda p: replaced(p, "Tr: 0.0", "Tr: nan"), r"Tr: holds NaN or infinite numbers"),
    ("kitti", "sequences/08/poses.txt", lambda p: replaced(p, "0.000000000000e+00", "inf"), r"poses: holds NaN or infinite numbers"),
    ("kitti", "sequences/00/labels/000001.label", lambda p: p.write_bytes(np.full(5, 3, "<u4").tobytes()), r"labels: raw label 3"),
    ("nuscenes", "v1.0-mini/calibrated_sensor.json", lambda p: replaced(p, "0.9", "NaN"), r"row 0: translation holds NaN"),
    (
        "nuscenes",
        "v1.0-mini/sample_data.json",
        lambda p: replaced(p, '"token": "', '"token": 3, "t": "'),
        r"row 0: token is 3, expected a text",
    ),
    ("nuscenes", "v1.0-mini/ego_pose.json", no_turn, r"rotation: the pose .* is no rotation"),
]


@pytest.mark.parametrize("case", SPOILT, ids=[f"{place}-{name}" for place, (name, *_) in enumerate(SPOILT)])
def test_numbers_that_cannot_be_are_named(case, tmp_path):
    name, file, spoil, words = case
    write, make = ROOTS[name]
    write(tmp_path / "root")
    spoil(tmp_path / "root" / file)
    with pytest.raises(BrokenRecordError, match=words) as problem:
        everything(make(tmp_path / "root"))
    assert file in str(problem.value)


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_labels_in_arrays_are_whole_numbers_from_0_on(kind, tmp_path):
    np.save(tmp_path / "a.npy", np.full(3, -1, kind))
    words = "labels: holds float32, expected integers" if kind is np.float32 else r"labels: raw label -1"
    with pytest.raises(BrokenRecordError, match=words):
        read_labels(tmp_path / "a.npy", np.int64, -1, np.zeros(4, np.int64), 3)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("store.json", b"[1]", r"store\.json: format: \[1\] instead of 1"),
        ("store.json", b'{"format": 1, "dtype": "uint8"}', r"store\.json: fields: dtype, checksum and shapes"),
        ("store.json", b'{"format": 1, "dty', r"store\.json: file: no valid JSON"),
        ("generation.bin", b"", r"generation\.bin: labels: 0 bytes instead of 8"),
        ("original.bin", b"12", r"original\.bin: labels: 2 bytes instead of 12"),
        ("corrected-00000001/shards.json", b"[]", r"shards\.json: shards: expected a dictionary"),
        ("corrected-00000001/shard-00000.json", b"[7]", r"shard-00000\.json: index: expected images 0 to 1"),
        ("corrected-00000001/shard-00000.bin", b"1", r"shard-00000\.bin: labels: 1 bytes instead of 6"),
    ],
)
def test_a_damaged_label_store_is_named(file, content, words, tmp_path):
    store = LabelStore.create(tmp_path / "labels", [np.zeros((2, 3), np.uint8)] * 2)
    with store.writer(0) as writer:
        writer.write(1, np.ones((2, 3), np.uint8))
    store.publish()
    (tmp_path / "labels" / file).write_bytes(content)
    with pytest.raises(BrokenRecordError, match=words):
        LabelStore(tmp_path / "labels").current(1)
