"""Whole matrices: made, real, and read from MNIST's files and the table of job postings."""

import csv
import gzip

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lit_methods.datamodules import JobPostingsDataModule, PlantedDirectionsDataModule, SemiSyntheticDigitsDataModule, TwoClassDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.matrices.fake import mnist, postings
from lit_methods.datamodules.matrices.idx import read_idx, write_idx
from lit_methods.datamodules.matrices.postings import COLUMNS, FILES, FRAUD, read_postings


def ready(data):
    data.setup("fit")
    return data


def held_out(data):
    (batch,) = data.val_dataloader()
    return batch


def test_every_training_batch_is_the_whole_matrix_in_one_order():
    data = ready(PlantedDirectionsDataModule(steps_per_epoch=3, num_covariates=2))
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert data.matrix_shape == (200, 50, 2)
    for batch in batches:
        assert {name: tuple(value.shape) for name, value in batch.items()} == {
            "features": (200, 50),
            "label": (200,),
            "covariates": (200, 2),
        }
        assert torch.equal(batch["features"], batches[0]["features"])
    assert len(held_out(data)["label"]) == 100


def test_the_planted_direction_is_the_fourth_and_decides_the_label():
    data = ready(PlantedDirectionsDataModule(num_rows=4000))
    batch = data.train_set[0]
    u, s, v = torch.linalg.svd(batch["features"], full_matrices=False)
    variances = (s.square() / len(u))[:5]
    assert ((variances[:3] - 10).abs() < 1.5).all()
    assert abs(variances[3] - 0.5) < 0.1 > variances[4]
    hits = [float(((batch["features"] @ v[k] > 0).long() == batch["label"]).double().mean()) for k in range(4)]
    assert max(hits[3], 1 - hits[3]) > 0.85
    assert all(abs(hit - 0.5) < 0.1 for hit in hits[:3])


def test_seeds_draw_other_rows_and_the_same_seed_the_same():
    for kind in (PlantedDirectionsDataModule, SemiSyntheticDigitsDataModule):
        first, again, other = (ready(kind(num_rows=30, seed=seed)).train_set[0]["features"] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_mixtures_of_digits_are_of_rank_4_and_their_labels_balanced():
    data = ready(SemiSyntheticDigitsDataModule(noise=0.0, scale=10.0))
    batch = data.train_set[0]
    assert data.image_shape == (8, 8)
    assert int(torch.linalg.matrix_rank(batch["features"])) == 4
    assert 0.35 < batch["label"].double().mean() < 0.65
    assert batch["features"].max() <= 0.4
    classifier = LogisticRegression(C=1e4).fit(batch["features"], batch["label"])
    assert classifier.score(held_out(data)["features"], held_out(data)["label"]) > 0.65


def test_mnist_is_read_packed_or_not(tmp_path):
    mnist(tmp_path / "plain")
    images = tmp_path / "plain" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    pixels = read_idx(images, 3)
    assert pixels.shape == (40, 28, 28)
    packed = tmp_path / "packed"
    packed.mkdir()
    for file in images.parent.iterdir():
        (packed / f"{file.name.replace('train', 't10k')}.gz").write_bytes(gzip.compress(file.read_bytes()))
    both = [ready(SemiSyntheticDigitsDataModule(tmp_path / name, num_rows=20)) for name in ("plain", "packed")]
    assert both[0].image_shape == (28, 28)
    assert torch.equal(both[0].train_set[0]["features"], both[1].train_set[0]["features"])


def test_broken_mnist_is_named(tmp_path):
    with pytest.raises(WrongRootError, match="has no train-images-idx3-ubyte"):
        ready(SemiSyntheticDigitsDataModule(tmp_path))
    mnist(tmp_path)
    folder = tmp_path / "MNIST" / "raw"
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for content, message in ((whole[:-5], r"bytes for an array of \(40, 28, 28\)"), (b"PK\x03\x04", "begins with 504b0304")):
        images.write_bytes(content)
        with pytest.raises(BrokenRecordError, match=message):
            ready(SemiSyntheticDigitsDataModule(tmp_path))
    images.write_bytes(whole)
    write_idx(labels, np.zeros(40, np.uint8))
    with pytest.raises(BrokenRecordError, match="0 images of a 1, 2 are needed"):
        ready(SemiSyntheticDigitsDataModule(tmp_path))
    write_idx(labels, np.zeros(3, np.uint8))
    with pytest.raises(BrokenRecordError, match="3 labels for 40 images"):
        ready(SemiSyntheticDigitsDataModule(tmp_path))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(BrokenRecordError, match="can't be unpacked"):
        read_idx(folder / "train-images-idx3-ubyte.gz", 3)


@pytest.mark.parametrize(
    ("name", "classes", "rows", "features"), [("breast_cancer", (0, 1), 569, 30), ("digits", (4, 9), 361, 64), ("wine", (0, 2), 107, 13)]
)
def test_real_tables_lie_in_0_to_1(name, classes, rows, features):
    data = ready(TwoClassDataModule(name, classes))
    train, held = data.train_set[0], held_out(data)
    assert len(train["label"]) + len(held["label"]) == rows
    assert train["features"].shape[1] == len(data.feature_names) == features
    for part in (train, held):
        assert 0 <= part["features"].min() <= part["features"].max() <= 1
        assert set(part["label"].tolist()) == {0, 1}


def test_classes_that_arent_there_are_refused():
    for name, classes in (("breast_cancer", (0, 2)), ("digits", (3, 3))):
        with pytest.raises(ValueError, match=r"classes are \(\d, \d\): give two different ones"):
            TwoClassDataModule(name, classes)
    with pytest.raises(ValueError, match="name is 'iris'"):
        TwoClassDataModule("iris")


# ---- job postings ----------------------------------------------------------------------------------------------------------------------


def test_postings_are_words_and_covariates(tmp_path):
    postings(tmp_path)
    data = ready(JobPostingsDataModule(tmp_path, num_words=30))
    batch = data.train_set[0]
    assert torch.equal(batch["features"], ready(JobPostingsDataModule(num_words=30)).train_set[0]["features"])  # the built-in sample
    assert data.matrix_shape == (96, 30, 3 + 2 + 2 + 2)
    assert len(data.feature_names) == 30
    torch.testing.assert_close(batch["features"].norm(dim=1), torch.ones(96).double())  # TF-IDF rows have norm 1
    assert set(batch["covariates"].unique().tolist()) == {0.0, 1.0}
    assert (batch["covariates"][:, 3:5].sum(1) <= 1).all()  # one kind of employment, or none
    fraud = batch["features"][batch["label"] == 1].mean(0) - batch["features"][batch["label"] == 0].mean(0)
    assert data.feature_names[int(fraud.argmax())] in FRAUD.split()


def test_words_are_chosen_on_training_rows_alone(tmp_path):
    postings(tmp_path, rows=20)
    with (tmp_path / FILES[0]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    held = JobPostingsDataModule(tmp_path).split(20)[1]
    for row in held:
        rows[row]["description"] = "zebra zebra zebra"
    rewrite(tmp_path / FILES[0], rows)
    assert "zebra" not in ready(JobPostingsDataModule(tmp_path)).feature_names


def rewrite(path, rows, columns=COLUMNS):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def test_both_tables_are_read_alike(tmp_path):
    postings(tmp_path, rows=20)
    with (tmp_path / FILES[0]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    flags = ("telecommuting", "has_company_logo", "has_questions", "fraudulent")
    rewrite(tmp_path / FILES[1], [row | {name: "ft"[int(row[name])] for name in flags} for row in rows], COLUMNS[1:])
    first, second = (read_postings(tmp_path / name) for name in FILES)
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert (first[1] == second[1]).all()
    assert (first[3] == second[3]).all()


def test_broken_postings_are_named(tmp_path):
    with pytest.raises(WrongRootError, match=r"has no fake_job_postings\.csv and no emscad_v1\.csv"):
        JobPostingsDataModule(tmp_path).check_root()
    postings(tmp_path, rows=20)
    with (tmp_path / FILES[0]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for changed, message in (
        ([rows[0], rows[1] | {"has_questions": "yes"}], "line 3: has_questions is 'yes', not 0 or 1"),
        ([rows[1], rows[2]], r"2 rows with labels \[0\], both 0 and 1 are needed"),
    ):
        rewrite(tmp_path / FILES[0], changed)
        with pytest.raises(BrokenRecordError, match=message):
            ready(JobPostingsDataModule(tmp_path))
    rewrite(tmp_path / FILES[0], rows, [name for name in COLUMNS if name != "fraudulent"])
    with pytest.raises(BrokenRecordError, match="the column fraudulent is missing"):
        ready(JobPostingsDataModule(tmp_path))


@pytest.mark.parametrize("arguments", [{"test_share": 1.0}, {"scale": 0.0}, {"steps_per_epoch": 0}, {"seed": -1}], ids=str)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        SemiSyntheticDigitsDataModule(**arguments)


def test_as_many_directions_as_features_are_refused():
    with pytest.raises(ValueError, match="directions is 4 and num_features 4"):
        PlantedDirectionsDataModule(num_features=4, directions=4)
