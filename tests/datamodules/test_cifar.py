"""CIFAR: the official files whole, partial and broken, augmentation, the built-in images."""

import pickle

import numpy as np
import pytest
import torch

from helpers import tiny_trainer
from lit_methods import CifarResNet, ImageClassifier
from lit_methods.datamodules import CIFARDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.pictures import crop_and_flip
from lit_methods.datamodules.vision.cifar import read_pickle
from lit_methods.datamodules.vision.fake import cifar
from lit_methods.datamodules.vision.shapes import draw_shapes
from lit_methods.runs.checkpoints import read_state_dict


def prepared(root=None, **kwargs):
    data = CIFARDataModule(root, **({"batch_size": 4} | kwargs))
    data.setup("fit")
    return data


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("name", "files", "last"), [("cifar10", 5, 4), ("cifar100", 1, 0)])
def test_the_official_layout_is_read(name, files, last, protocol, tmp_path):
    cifar(tmp_path, name, 6, protocol)
    data = prepared(tmp_path, name=name, augment=False, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    assert (len(data.train_set), len(data.test_set)) == (6 * files, 6)
    assert (data.num_classes, data.class_names[3]) == (10 if name == "cifar10" else 100, "class 3")
    sample = data.train_set[(0, 6 * files - 1)]
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].mean((1, 2)).tolist() == pytest.approx([5, 0, last])
    assert sample["label"] == 5 + last


def test_validation_images_are_taken_from_the_training_images(tmp_path):
    cifar(tmp_path, number=6)
    data = prepared(tmp_path, val_size=10, seed=3)

    def identity(dataset):
        return {(int(image[0, 0, 0]), int(image[2, 0, 0])) for image in map(dataset.read, range(len(dataset)))}

    train, held_out = identity(data.train_set), identity(data.val_set)
    assert (len(train), len(held_out)) == (20, 10)
    assert not train & held_out
    assert identity(prepared(tmp_path, val_size=10, seed=4).val_set) == held_out
    with pytest.raises(ValueError, match="val_size=30"):
        prepared(tmp_path, val_size=30)


def rewrite(path, **changes):
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(content | {key.encode(): value for key, value in changes.items()}, 2))


def test_broken_files_are_named_with_their_field(tmp_path):
    folder = cifar(tmp_path, number=6)
    file = folder / "data_batch_3"
    whole = file.read_bytes()
    for spoil, error, words in (
        (lambda: file.write_bytes(whole[:5000]), BrokenRecordError, "data_batch_3: pickle: 5000 bytes.*truncated"),
        (lambda: file.write_bytes(b""), BrokenRecordError, "data_batch_3: pickle"),
        (
            lambda: rewrite(file, labels=[1, 2, 3, 10, 0, 0]),
            BrokenRecordError,
            r"data_batch_3: labels: label 10 of image 3 is not in 0\.\.9",
        ),
        (lambda: rewrite(file, labels=[1, 2]), BrokenRecordError, "data_batch_3: labels: expected 6 integers"),
        (lambda: rewrite(file, data=np.zeros((6, 3071), np.uint8)), BrokenRecordError, r"data_batch_3: data: expected \(n, 3072\)"),
        (lambda: file.write_bytes(pickle.dumps({"data": 1})), BrokenRecordError, "data_batch_3: labels: the field is missing"),
        (file.unlink, MissingFileError, "data_batch_3"),
    ):
        spoil()
        with pytest.raises(error, match=words):
            prepared(tmp_path)
        file.write_bytes(whole)
    with pytest.raises(WrongRootError, match="cifar-100-python"):
        prepared(tmp_path, name="cifar100")


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_files_that_were_saved_again_are_read(name, protocol, tmp_path):
    """By Python 3: names as bytes or NumPy's strings, labels as NumPy's integers or arrays, images in Fortran's order."""
    folder = cifar(tmp_path, name, 6, protocol)
    field, last = ("labels", "test_batch") if name == "cifar10" else ("fine_labels", "test")
    meta, names = ("batches.meta", "label_names") if name == "cifar10" else ("meta", "fine_label_names")
    written = pickle.loads((folder / meta).read_bytes())
    (folder / meta).write_bytes(pickle.dumps({names: [word.encode() for word in written[names]]}, protocol))
    for labels, order in ((lambda k: list(k), "C"), (lambda k: k, "C"), (lambda k: k.astype(np.uint8), "F"), (lambda k: k.tolist(), "F")):
        data = np.repeat(np.arange(3, dtype=np.uint8)[:, None], 3072, axis=1)
        content = {"data": np.asarray(data, order=order), field: labels(np.array([2, 0, 1]))}
        (folder / last).write_bytes(pickle.dumps(content, protocol))
        found = prepared(tmp_path, name=name)
        assert [(int(found.test_set.read(k).float().mean()), found.test_set[k]["label"]) for k in range(3)] == [(0, 2), (1, 0), (2, 1)]
        assert found.class_names[:2] == ("class 0", "class 1")
    (folder / meta).write_bytes(pickle.dumps({names: np.array(written[names])}, protocol))
    assert prepared(tmp_path, name=name).class_names[3] == "class 3"


def test_no_code_runs_from_a_pickle(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    for protocol in range(6):
        for content in (Trap(), {"data": np.array([Trap()], dtype=object)}, {"labels": [np.int64(3), Trap()]}):
            (tmp_path / "trap").write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(BrokenRecordError, match="which no CIFAR file needs"):
                read_pickle(tmp_path / "trap")
    assert not (tmp_path / "sprung").exists()


def test_augmentation_is_a_crop_and_a_flip_that_follow_from_the_draw():
    image = torch.arange(1, 3 * 32 * 32 + 1).reshape(3, 32, 32)
    padded = torch.zeros(3, 40, 40, dtype=image.dtype)
    padded[:, 4:36, 4:36] = image
    possible = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 32, left : left + 32]
            possible[crop.numpy().tobytes()] = (top, left, 0)
            possible[crop.flip(2).numpy().tobytes()] = (top, left, 1)
    seen = [possible[crop_and_flip(image, (0, epoch, 7)).numpy().tobytes()] for epoch in range(300)]
    tops, lefts, flips = (set(column) for column in zip(*seen, strict=True))
    assert (tops, lefts, flips) == (set(range(9)), set(range(9)), {0, 1})
    assert torch.equal(crop_and_flip(image, (0, 5, 7)), crop_and_flip(image, (0, 5, 7)))


def test_batches_are_the_same_with_workers_and_held_out_images_are_not_augmented():
    alone, helped = (next(iter(prepared(num_workers=workers, batch_size=32).train_dataloader())) for workers in (0, 2))
    assert torch.equal(alone["image"], helped["image"])
    assert torch.equal(alone["label"], helped["label"])
    data = prepared()
    assert torch.equal(data.val_set[(0, 3)]["image"], data.val_set[(9, 3)]["image"])
    assert not torch.equal(data.train_set[(0, 3)]["image"], data.train_set[(1, 3)]["image"])


@pytest.mark.parametrize("classes", [10, 100])
def test_built_in_images_are_balanced_and_repeatable(classes):
    images, labels = draw_shapes(400, classes, 32, seed=0)
    assert set(np.bincount(labels, minlength=classes)) == {400 // classes}
    assert np.array_equal(images, draw_shapes(400, classes, 32, seed=0)[0])
    assert not np.array_equal(images, draw_shapes(400, classes, 32, seed=1)[0])
    assert images.shape == (400, 32, 32, 3)


def test_a_small_network_learns_the_built_in_images():
    torch.manual_seed(0)
    data, model = CIFARDataModule(batch_size=50, augment=False), ImageClassifier(CifarResNet(8, width=4), learning_rate=0.1)
    tiny_trainer(max_epochs=2, limit_val_batches=0).fit(model, datamodule=data)
    (result,) = tiny_trainer().test(model, datamodule=data, verbose=False)
    assert result["classifier/test_accuracy"] > 0.3, "chance is 0.1"


def test_real_images_are_told_apart_by_published_weights(test_data):
    data = prepared(test_data / "cifar10", augment=False, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), batch_size=200)
    assert (len(data.train_set), len(data.test_set), data.class_names[9]) == (4000, 1000, "truck")
    model = ImageClassifier(CifarResNet(20))
    weights = read_state_dict(test_data / "models" / "cifar_resnet" / "resnet20-12fca82f.th", "module.")
    model.network.load_state_dict(model.network.state_dict() | weights)
    (result,) = tiny_trainer(limit_test_batches=2).test(model, datamodule=data, verbose=False)
    assert result["classifier/test_accuracy"] > 0.7
