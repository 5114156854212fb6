"""FashionIQ, Shoes, Fashion200k and the classes that are shifted: layouts, protocols, dead links, ten kinds of bad input each."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lit_methods.datamodules import FashionRetrievalDataModule, ShiftedClassesDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.matrices.idx import write_idx
from lit_methods.datamodules.retrieval.collection import Broken
from lit_methods.datamodules.retrieval.fake import fashion200k, fashioniq, shoes
from lit_methods.datamodules.retrieval.fashion import changed_words, read_fashion200k, read_fashioniq, read_shoes

REAL = os.environ.get("LIT_METHODS_TEST_DATA")
OPTIONS = {"image_size": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    root = tmp_path_factory.mktemp("releases")
    fashioniq(root / "fashioniq", 6, categories=("dress",))
    shoes(root / "shoes", 6)
    fashion200k(root / "fashion200k", 12)
    return root


@pytest.fixture
def root(releases, tmp_path, request):
    shutil.copytree(releases / request.param, tmp_path / "root")
    return tmp_path / "root"


def module(root, name, **arguments):
    return FashionRetrievalDataModule(root, name, categories=["dress"], **(OPTIONS | arguments))


# ---- layouts ---------------------------------------------------------------------------------------------------------------------------


def test_both_forms_of_fashioniq_are_one(tmp_path):
    fashioniq(tmp_path / "json", 6)
    fashioniq(tmp_path / "lines", 6, lines=True)
    found = [read_fashioniq(tmp_path / form, "val", ("dress", "toptee"), Broken()) for form in ("json", "lines")]
    for one, other in zip(found[0].categories, found[1].categories, strict=True):
        assert (one.words, one.wanted.tolist(), one.references.tolist()) == (other.words, other.wanted.tolist(), other.references.tolist())
        assert [p.name for p in one.gallery] == [p.name for p in other.gallery]
    assert [p.words for p in found[0].pairs] == [p.words for p in found[1].pairs]
    assert found[0].pairs[0].words == "is green and is more short"
    assert found[0].pairs[1].words == "is more short and is green"


def test_the_protocols_differ_in_the_gallery(tmp_path):
    fashioniq(tmp_path, 8, categories=("dress",))
    file = tmp_path / "captions" / "cap.dress.val.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:3]))
    sizes = [len(read_fashioniq(tmp_path, protocol, ("dress",), Broken()).categories[0].gallery) for protocol in ("val", "original")]
    assert sizes == [4, 8]
    for protocol in ("val", "original"):
        part = read_fashioniq(tmp_path, protocol, ("dress",), Broken()).categories[0]
        for query, wanted, reference in zip(part.queries, part.wanted, part.references, strict=True):
            assert part.gallery[reference] == query
            assert wanted != reference


def test_both_forms_of_shoes_are_one(tmp_path):
    shoes(tmp_path / "lines", 5)
    shoes(tmp_path / "table", 5, table=True)
    found = [read_shoes(tmp_path / form, Broken()) for form in ("lines", "table")]
    assert [(p.reference.name, p.target.name, p.words) for p in found[0].pairs] == [
        (p.reference.name, p.target.name, p.words) for p in found[1].pairs
    ]
    assert [p.name for p in found[0].categories[0].gallery] == [p.name for p in found[1].categories[0].gallery]
    assert all(path.exists() for release in found for path in release.categories[0].gallery)


def test_fashion200k_takes_every_image_of_a_caption_and_draws_its_pairs(releases):
    part = read_fashion200k(releases / "fashion200k", Broken()).categories[0]
    assert part.words[0] == "replace red with green"
    assert (part.labels == part.identities).all()
    data = module(releases / "fashion200k", "fashion200k", seed=1)
    data.setup("fit")
    pairs = [data.train_set.pair(0, k) for k in range(len(data.train_set))]
    captions = data.train_set.captions
    for pair in pairs:
        source, target = (captions[image].split() for image in (pair.reference, pair.target))
        assert sum(a != b for a, b in zip(source, target, strict=True)) == 1
    assert [data.train_set.pair(0, k) for k in range(len(pairs))] == pairs
    assert [data.train_set.pair(1, k) for k in range(len(pairs))] != pairs
    assert changed_words("a b", "b c") == "replace a with c"


@pytest.mark.skipif(not REAL, reason="LIT_METHODS_TEST_DATA names no folder")
def test_the_real_annotations_of_fashioniq():
    root = Path(REAL) / "fashioniq"
    found = read_fashioniq(root, "original", ("dress", "shirt", "toptee"), Broken())
    assert len(found.pairs) == 2 * 5985
    assert [len(part.queries) for part in found.categories] == [2 * 2017, 2 * 2038, 2 * 1961]
    assert [len(part.gallery) for part in found.categories] == [3817, 6346, 5373]
    assert [len(part.gallery) for part in read_fashioniq(root, "val", ("dress", "shirt", "toptee"), Broken()).categories] == [
        2628,
        3089,
        2902,
    ]
    assert "is grey with a design on the back" in found.categories[1].words  # its other caption is empty
    with pytest.raises(MissingFileError, match=r"\d+ of \d+ images aren't there"):
        FashionRetrievalDataModule(root).setup("fit")


# ---- images that are dead or broken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["fashioniq"], indirect=True)
def test_dead_links_are_named_and_counted_or_left_out(root):
    for part in ("DT00002", "DV00001"):
        (root / "image_data" / "dress" / f"{part}.jpg").unlink()
    with pytest.raises(MissingFileError, match=r"DT00002.jpg: image: 2 of 12 images aren't there"):
        module(root, "fashioniq").setup("fit")
    data = module(root, "fashioniq", on_broken="skip")
    with pytest.warns(UserWarning, match="2 records are left out"):
        data.setup("fit")
    assert len(data.train_set) == 2 * 3  # two of five pairs name the image
    assert (len(data.val_set.categories[0].gallery), len(data.val_set.categories[0].queries)) == (5, 2 * 3)
    part = data.val_set.categories[0]
    assert set(part.wanted.tolist()) <= set(part.labels.tolist())
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))


@pytest.mark.parametrize("root", ["fashioniq"], indirect=True)
def test_broken_images_end_the_run_or_are_left_out(root):
    folder = root / "image_data" / "dress"
    for name in ("DT00001", "DV00003"):
        (folder / f"{name}.jpg").write_bytes(b"<html>gone</html>")
    data = module(root, "fashioniq")
    data.setup("fit")
    with pytest.raises(BrokenRecordError, match="DT00001"):
        [data.train_set[k] for k in range(len(data.train_set))]
    data = module(root, "fashioniq", on_broken="skip")
    with pytest.warns(UserWarning, match="DV00003"):
        data.setup("fit")
    assert len(data.val_set.categories[0].gallery) == 5
    with pytest.warns(UserWarning, match="pair 0 skipped"):
        taken, good = data.train_set[0], data.train_set[4]
    assert taken["target"].shape == good["target"].shape
    for path in folder.glob("DT*.jpg"):
        path.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(BrokenRecordError, match="all 10 pairs"):
        data.train_set[0]


def test_nothing_that_is_left_is_an_error(releases, tmp_path):
    shutil.copytree(releases / "shoes", tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "attributedata")
    with pytest.raises(BrokenRecordError, match="no query with images is left"), pytest.warns(UserWarning, match="left out"):
        module(tmp_path / "root", "shoes", on_broken="skip").setup("fit")


# ---- bad input -------------------------------------------------------------------------------------------------------------------------


def edited(change):
    """A change of FashionIQ's records of the validation."""

    def act(root):
        file = root / "captions" / "cap.dress.val.json"
        records = json.loads(file.read_text())
        change(records)
        file.write_text(json.dumps(records))

    return act


def written(name, content):
    return lambda root: (root / name).write_bytes(content)


def line(name, text):
    def act(root):
        with (root / name).open("a") as file:
            file.write(text + "\n")

    return act


IQ, VAL = "fashioniq", "captions/cap.dress.val.json"
SPLIT = "image_splits/split.dress.val.json"
BAD = {  # what is done to a release -> part of the message, and whether it can be skipped
    "iq no JSON": (IQ, written(VAL, b"[{"), "isn't JSON", False),
    "iq empty": (IQ, written(VAL, b""), "is empty", False),
    "iq not UTF-8": (IQ, written(VAL, b"\xff\xfe[\x00]\x00"), "UTF-16", False),
    "iq an object": (IQ, written(VAL, b"{}"), "expected a list of records", False),
    "iq no target": (IQ, edited(lambda r: r[0].pop("target")), "record 0: has", True),
    "iq a number as id": (IQ, edited(lambda r: r[1].update(candidate=3)), "record 1, candidate", True),
    "iq a way out": (IQ, edited(lambda r: r[0].update(target="../../secret")), "record 0, target", True),
    "iq one caption": (IQ, edited(lambda r: r[2].update(captions=["a"])), "expected two captions", True),
    "iq empty captions": (IQ, edited(lambda r: r[2].update(captions=["", " "])), "both captions are empty", True),
    "iq own target": (IQ, edited(lambda r: r[0].update(target=r[0]["candidate"])), "is the candidate, too", True),
    "iq not in the split": (IQ, edited(lambda r: r[0].update(target="DX00000")), "isn't in split.dress.val.json", True),
    "iq twice in the split": (IQ, written(SPLIT, b'["DV00000", "DV00000"]'), "stands twice", False),
    "iq no split": (IQ, lambda root: (root / SPLIT).unlink(), "copy image_splits", False),
    "iq split of numbers": (IQ, written(SPLIT, b"[1, 2]"), "expected a list of image ids", False),
    "shoes two fields": ("shoes", line("shoes-cap-test.txt", "a.jpg;b.jpg"), "expected reference;target;caption", True),
    "shoes no caption": ("shoes", line("shoes-cap-train.txt", "a.jpg;b.jpg; "), "expected reference;target;caption", True),
    "shoes a way out": ("shoes", line("shoes-cap-test.txt", "../a.jpg;b.jpg;more"), "is no path", True),
    "shoes no such image": ("shoes", line("shoes-cap-test.txt", "a.jpg;attributedata/b.jpg;more"), "images aren't there", True),
    "shoes not UTF-8": ("shoes", written("shoes-cap-test.txt", b"\xe9;b;c"), "isn't UTF-8", False),
    "shoes a NUL": ("shoes", written("shoes-cap-test.txt", b"a;b\0;c"), "is NUL", False),
    "shoes empty": ("shoes", written("shoes-cap-test.txt", b""), "there is none, the file is empty", False),
    "shoes no test": ("shoes", lambda root: (root / "shoes-cap-test.txt").unlink(), "expected shoes-cap-train.txt", False),
    "shoes a folder": (
        "shoes", lambda root: ((root / "shoes-cap-test.txt").unlink(), (root / "shoes-cap-test.txt").mkdir()), "is a folder", False,
    ),
    "shoes a dead list": ("shoes", line("shoes-test-all.txt", "attributedata/gone.jpg"), "1 of ", True),
    "200k two columns": ("fashion200k", line("labels/dress_test_detect_all.txt", "a.jpeg\t0.9"), "with tabs", True),
    "200k no caption": ("fashion200k", line("labels/dress_test_detect_all.txt", "a.jpeg\t0.9\t "), "with tabs", True),
    "200k a way out": ("fashion200k", line("labels/dress_train_detect_all.txt", "../a.jpeg\t0.9\tred"), "with tabs", True),
    "200k an absolute path": ("fashion200k", line("labels/dress_train_detect_all.txt", "/a.jpeg\t0.9\tred"), "with tabs", True),
    "200k an image twice": (
        "fashion200k", line("labels/dress_test_detect_all.txt", "women/dresses/test/0/0_0.jpeg\t0.9\tred"), "stands twice", True,
    ),
    "200k no such image": (
        "fashion200k", line("labels/dress_train_detect_all.txt", "women/x.jpeg\t0.9\tred short"), "images aren't there", True,
    ),
    "200k an unknown query": ("fashion200k", line("test_queries.txt", "women/a.jpeg women/b.jpeg"), "expected two images", True),
    "200k one image a query": ("fashion200k", line("test_queries.txt", "women/dresses/test/0/0_0.jpeg"), "expected two images", True),
    "200k no labels": ("fashion200k", lambda root: shutil.rmtree(root / "labels"), "no such file", False),
    "200k not UTF-8": ("fashion200k", written("labels/dress_test_detect_all.txt", b"\xe9\t1\tc"), "isn't UTF-8", False),
    "200k captions alike": (
        "fashion200k",
        lambda root: (root / "labels/dress_train_detect_all.txt").write_text("women/dresses/train/0/0_0.jpeg\t1\tred dress\n"),
        "no two captions",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("root", "act", "said", "skippable"), BAD.values(), ids=list(BAD), indirect=["root"])
def test_bad_input_is_named_or_skipped(root, act, said, skippable, request):
    name = request.node.callspec.id.split()[0]
    name = {"iq": "fashioniq", "200k": "fashion200k"}.get(name, name)
    act(root)
    with pytest.raises((BrokenRecordError, WrongRootError), match=said) as error:
        module(root, name, protocol="original").setup("fit")
    assert str(root) in str(error.value)
    if skippable:
        data = module(root, name, protocol="original", on_broken="skip")
        with pytest.warns(UserWarning, match="1 records are left out|2 records are left out"):
            data.setup("fit")
        assert next(iter(data.val_dataloader()))


def test_arguments_and_roots(tmp_path):
    with pytest.raises(WrongRootError, match=r"no release of shoes: expected shoes-cap-train\.txt"):
        module(tmp_path, "shoes").check_root()
    for wrong, said in (
        ({"protocol": "mine"}, "val, original"),
        ({"categories": ["hat"]}, "dress, shirt"),
        ({"categories": []}, "categories is empty"),
        ({"image_size": 0}, "image_size"),
    ):
        with pytest.raises(ValueError, match=said):
            FashionRetrievalDataModule(tmp_path, **wrong)


# ---- shifted classes -------------------------------------------------------------------------------------------------------------------


def test_shifted_pairs_lead_to_the_class_that_they_say():
    data = ShiftedClassesDataModule(num_train=100, max_shift=4, pairs_per_epoch=64)
    data.setup("fit")
    labels = {image.numpy().tobytes(): label for image, label in zip(data.train_set.images, data.train_set.labels, strict=True)}
    batch = next(iter(data.train_dataloader()))
    for reference, target, ids in zip(batch["reference"], batch["target"], batch["text_ids"], strict=True):
        shift = int(data.tokens[ids[1]])
        assert labels[target.numpy().tobytes()] == (labels[reference.numpy().tobytes()] + shift) % 10
    part = data.val_set.categories[0]
    shifts = np.array([int(words.split()[1]) for words in part.words])
    assert (part.wanted == (part.labels + shifts) % 10).all()
    assert not {image.numpy().tobytes() for image in data._images} & set(labels)


def test_fashion_mnist_and_what_may_be_wrong_with_it(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte", np.zeros((20, 28, 28), np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.tile(np.arange(10, dtype=np.uint8), 2))
    data = ShiftedClassesDataModule("fashion_mnist", tmp_path, num_train=20)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["target"].shape == (32, 1, 28, 28)
    write_idx(folder / "t10k-labels-idx1-ubyte", np.arange(3, dtype=np.uint8))
    with pytest.raises(BrokenRecordError, match="3 labels for 20 images"):
        ShiftedClassesDataModule("fashion_mnist", tmp_path, num_train=20).setup("fit")
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(20, np.uint8))
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(20, np.uint8))
    with pytest.raises(BrokenRecordError, match="no class 1"):
        ShiftedClassesDataModule("fashion_mnist", tmp_path, num_train=20).setup("fit")
    with pytest.raises(WrongRootError, match="train-images"):
        ShiftedClassesDataModule("fashion_mnist", tmp_path / "none").check_root()
    with pytest.raises(ValueError, match="give fashion_mnist with the folder"):
        ShiftedClassesDataModule("fashion_mnist")
