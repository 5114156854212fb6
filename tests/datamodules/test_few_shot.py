"""The few-shot sets: layouts, shots by seed, base and new classes, views, and errors that name file and place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import FewShotDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.fewshot import coloured_shapes as shapes
from lit_methods.datamodules.fewshot.fake import CLASSES, listed_split
from lit_methods.datamodules.fewshot.images import CLIP_MEAN, CLIP_STD
from lit_methods.datamodules.fewshot.releases import LAYOUTS, choose_shots, read_release


def save(path: Path, colour: int = 90, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 50, 20)).save(path)


def ready(**arguments: Any) -> FewShotDataModule:
    data = FewShotDataModule(**arguments)
    data.setup("fit")
    return data


def test_base_classes_are_the_first_half_and_new_ones_count_from_zero(tmp_path: Path) -> None:
    sentences = tmp_path / "eurosat.json"
    sentences.write_text(json.dumps({name: ["one", "two"] for name in CLASSES}))
    data = ready(root=listed_split(tmp_path), shots=2, image_size=16, descriptions=sentences)
    assert (data.base_classes, data.new_classes) == (CLASSES[:3], CLASSES[3:])
    assert data.template == "a centered satellite photo of {}."
    assert data.descriptions["Forest"] == ["one", "two"]
    assert data.train_set is not None
    assert np.bincount(data.train_set.labels).tolist() == [2, 2, 2]
    base, new = data.test_set
    assert sorted(set(base.labels.tolist())) == [0, 1, 2]
    assert sorted(set(new.labels.tolist())) == [0, 1]
    picture = new[0, 0]["image"]  # "Pasture" is painted with 60
    assert picture.shape == (3, 16, 16)
    red = float(picture[0, 8, 8]) * CLIP_STD[0] + CLIP_MEAN[0]
    assert red == pytest.approx(60 / 255, abs=0.03)
    everything = ready(root=tmp_path, shots=None, classes="all", image_size=16)
    assert everything.base_classes == CLASSES
    assert everything.new_classes == ()
    assert len(everything.test_set) == 1
    assert everything.train_set is not None
    assert len(everything.train_set) == 20
    assert len(everything.val_dataloader()) == 1


def test_shots_follow_from_their_seed_alone() -> None:
    labels = np.array([0, 1, 2] * 10)
    first = choose_shots(labels, 4, 1)
    assert np.bincount(labels[first]).tolist() == [4, 4, 4]
    assert len(set(first.tolist())) == 12
    assert choose_shots(labels, 4, 1).tolist() == first.tolist()
    assert choose_shots(labels, 4, 2).tolist() != first.tolist()
    assert np.bincount(labels[choose_shots(labels, 99, 1)]).tolist() == [10, 10, 10]  # a class that has fewer gives all
    one, other = ready(shots=2, seed=0), ready(shots=2, seed=5)
    assert one.train_set is not None
    assert other.train_set is not None
    assert torch.equal(one.train_set.read(3), other.train_set.read(3))
    again = ready(shots=2, shot_seed=2)
    assert again.train_set is not None
    assert not torch.equal(one.train_set.read(3), again.train_set.read(3))


def test_two_views_are_two_draws_that_follow_from_epoch_and_index() -> None:
    data = ready(shots=2, batch_size=5)
    assert data.train_set is not None
    sample, again, later = (data.train_set[draw] for draw in ((0, 4), (0, 4), (1, 4)))
    assert torch.equal(sample["image"], again["image"])
    assert torch.equal(sample["image_second"], again["image_second"])
    assert not torch.equal(sample["image"], sample["image_second"])
    assert not torch.equal(sample["image"], later["image"])
    batch = next(iter(data.train_dataloader()))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "image": (5, 3, 24, 24),
        "image_second": (5, 3, 24, 24),
        "label": (5,),
    }
    assert batch["image"].dtype == torch.float32
    test = data.test_set[0]
    assert torch.equal(test[0, 0]["image"], test[9, 0]["image"])  # never augmented


def test_photos_have_two_draws_too(tmp_path: Path) -> None:
    data = ready(root=listed_split(tmp_path), shots=2, image_size=16)
    assert data.train_set is not None
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    pairs = [data.train_set[epoch, 0] for epoch in range(6)]
    assert torch.rand(1) == expected, "the global generator was used"
    assert any(not torch.equal(pair["image"], pair["image_second"]) for pair in pairs)
    assert torch.equal(data.train_set[3, 0]["image_second"], pairs[3]["image_second"])


def test_the_built_in_classes_have_words() -> None:
    data = ready()
    assert (len(data.base_classes), len(data.new_classes)) == (10, 10)
    assert not set(data.base_classes) & set(data.new_classes)
    assert {len(own) for own in data.descriptions.values()} == {10}
    for (kind, colour), name in zip(shapes.task_classes(), data.base_classes + data.new_classes, strict=True):
        texts = data.descriptions[name]
        assert len(set(texts)) == 10
        assert not any(kind in shapes.split_words(text) and colour in shapes.split_words(text) for text in texts)
    every = [text for own in shapes.all_classes() for text in shapes.sentences(*own)]
    assert len(set(every)) == len(every), "two classes have a sentence in common"


def test_the_images_of_a_class_are_what_it_is_called() -> None:
    pictures, labels = shapes.draw_images(6, 3, [("disc", "green"), ("disc", "rose")])
    middle = pictures[:, 9:15, 9:15].reshape(len(labels), -1, 3).mean(1)
    assert labels.tolist() == [0] * 6 + [1] * 6
    assert (middle[:6, 1] > middle[:6, 0]).all()  # more green than red
    assert (middle[6:, 0] > middle[6:, 1]).all()


def test_aircraft_and_imagenet_have_layouts_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    save(folder / "images" / "001.jpg")
    (folder / "variants.txt").write_text("707-320\nDC-10 30\n")
    for part in ("train", "test"):
        (folder / f"images_variant_{part}.txt").write_text("001 DC-10 30\n001 707-320\n")
    found = read_release(folder, "fgvc_aircraft")
    assert found.classes == ("707-320", "DC-10 30")
    assert found.train.labels.tolist() == [1, 0]
    (folder / "images_variant_test.txt").write_text("001 A380\n")
    with pytest.raises(BrokenRecordError, match=r"images_variant_test\.txt: line 1: 'A380'"):
        read_release(folder, "fgvc_aircraft")
    net = tmp_path / "imagenet"
    for part in ("train", "val"):
        save(net / "images" / part / "n01" / "a.JPEG")
    (net / "classnames.txt").write_text("n01 great white shark\nn02 hen\n")
    with pytest.raises(MissingFileError, match=r"n02: images: no \*\.JPEG"):
        read_release(net, "imagenet")
    (net / "classnames.txt").write_text("n01 great white shark\n")
    assert read_release(net, "imagenet").classes == ("great white shark",)


def test_eleven_sets_have_a_layout() -> None:
    assert len(LAYOUTS) == 11
    assert all("{}" in layout.template for layout in LAYOUTS.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": [', "isn't JSON"),
        ('{"train": []}', "train: expected a list"),
        ('{"train": [["a.jpg", 0, "A"]], "test": [["a.jpg", "0", "A"]]}', r"test\[0\]: expected \[path, label, class name\]"),
        ('{"train": [["a.jpg", 0, "A"]], "test": [["a.jpg", 0, "B"]]}', "label 0 is called 'B' here and 'A' before"),
        ('{"train": [["a.jpg", 1, "A"]], "test": [["a.jpg", 1, "A"]]}', "label 0 has no image"),
    ],
)
def test_a_broken_list_is_named(content: str, message: str, tmp_path: Path) -> None:
    listed_split(tmp_path)
    (tmp_path / "split_zhou_EuroSAT.json").write_text(content)
    with pytest.raises(BrokenRecordError, match=message):
        ready(root=tmp_path)


def test_missing_folders_images_and_sentences_are_named(tmp_path: Path) -> None:
    with pytest.raises(WrongRootError, match=r"no split_zhou_EuroSAT\.json: lay out eurosat there"):
        ready(root=tmp_path)
    listed_split(tmp_path)
    (tmp_path / "2750" / "River" / "River_1.jpg").write_bytes(b"no image")
    (tmp_path / "2750" / "River" / "River_2.jpg").unlink()
    data = ready(root=tmp_path, shots=None, image_size=16)
    assert data.train_set is not None
    with pytest.raises(BrokenRecordError, match=r"River_1\.jpg: image: can't be decoded"):
        data.train_set[0, 0]
    with pytest.raises(MissingFileError, match=r"River_2\.jpg: image: no such file"):
        data.train_set[0, 1]
    file = tmp_path / "words.json"
    with pytest.raises(MissingFileError, match=r"words\.json"):
        ready(root=tmp_path, descriptions=file)
    file.write_text('{"River": []}')
    with pytest.raises(BrokenRecordError, match="'River': expected a list"):
        ready(root=tmp_path, descriptions=file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "imagenet, caltech101"),
        ({"classes": "some"}, "base_to_new, all"),
        ({"shots": 0}, r"shots is 0: .* \[1, inf\)"),
        ({"template": "a photo"}, "has no {}"),
    ],
)
def test_arguments_outside_their_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotDataModule(**arguments)


def test_loaders_need_setup() -> None:
    for method in ("train_dataloader", "val_dataloader"):
        with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
            getattr(FewShotDataModule(), method)()


def test_built_in_digits_have_names_sentences_and_test_images_in_other_hands():
    data = FewShotDataModule(pictures="digits", shots=3, batch_size=6)
    data.setup("fit")
    assert len(data.base_classes) == len(data.new_classes) == 10
    assert {name.split()[1] for name in data.base_classes + data.new_classes} <= set(shapes.DIGITS)
    for name, sentences in data.descriptions.items():
        assert not any(set(name.split()) <= set(shapes.split_words(text)) for text in sentences), "none gives the whole name away"
        others = set(shapes.DIGITS) - set(name.split())
        assert not any(others & set(shapes.split_words(text)) for text in sentences)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (6, 3, 24, 24)


def test_a_coloured_digit_is_its_colour_and_its_handwriting():
    pictures, labels = shapes.draw_images(40, 2, [("zero", "green"), ("one", "rose")])
    assert labels.tolist() == [0] * 40 + [1] * 40
    bright = pictures.reshape(80, -1, 3).astype(float)
    top = np.take_along_axis(bright, bright.sum(-1).argsort(1)[:, -30:, None], axis=1).mean(1)
    assert (top[:40].argmax(1) == 1).all(), "green"
    assert (top[40:].argmax(1) == 0).all(), "rose"
    stroke = (bright.sum(-1) > 0.75 * bright.sum(-1).max(1, keepdims=True)).mean(1)
    assert stroke[:40].mean() > stroke[40:].mean(), "a loop covers more than a stroke"
    again, _ = shapes.draw_images(40, 2, [("zero", "green"), ("one", "rose")])
    assert np.array_equal(pictures, again)
    assert not np.array_equal(pictures, shapes.draw_images(40, 4, [("zero", "green"), ("one", "rose")])[0])


def test_unknown_built_in_pictures_are_refused():
    with pytest.raises(ValueError, match="pictures"):
        FewShotDataModule(pictures="letters")
