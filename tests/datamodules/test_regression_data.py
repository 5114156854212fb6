"""AgeDB-DIR, IMDB-WIKI-DIR, STS-B-DIR and NYUD2-DIR in their official layouts, on small releases made here, and on the real tables."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import tiny_trainer
from lit_methods import DenseFeatures, ImbalancedRegression, SentencePairEncoder
from lit_methods.callbacks import FDS, ConR
from lit_methods.datamodules import AgeDataModule, NYUD2DataModule, SentencePairsDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.regression.fake import faces, rooms, sentences
from lit_methods.datamodules.regression.nyud2 import bin_weights, depth_bins
from lit_methods.datamodules.regression.sentences import tokens_of

TABLES = {"agedb": "agedb.csv", "imdb_wiki": "imdb_wiki.csv"}
AGES = {"train": [20] * 12 + [21] * 3 + [70], "val": [20, 70, 90], "test": [21, 22]}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_ages_gives_faces_weights_and_counts(name, tmp_path):
    faces(tmp_path, name, AGES)
    data = AgeDataModule(tmp_path, name, image_size=28, views=2, reweight="inverse", batch_size=16)
    data.setup("fit")
    (train,) = list(data.train_dataloader())
    assert train["image"].shape == train["view_2"].shape == (16, 3, 28, 28)
    known = dict(zip(train["target"].tolist(), train["count"].tolist(), strict=True))
    assert known == {20.0: 12, 21.0: 3, 70.0: 1}
    weight = dict(zip(train["target"].tolist(), train["weight"].tolist(), strict=True))
    assert weight[70.0] / weight[20.0] == pytest.approx(12 / 5, rel=1e-6)  # counts below 5 count as 5
    assert train["weight"].mean() == pytest.approx(1, rel=1e-5)
    (val,) = list(data.val_dataloader())
    assert val["target"].tolist() == [20, 70, 90]
    assert val["count"].tolist() == [12, 1, 0]
    assert "weight" not in val
    torch.testing.assert_close((val["image"].mean((1, 2, 3)) + 1) * 127.5, val["target"], rtol=0, atol=2.0)
    (test,) = list(data.test_dataloader())
    assert test["target"].tolist() == [21, 22]


def test_a_broken_table_of_ages_is_named(tmp_path):
    with pytest.raises(WrongRootError, match=r"agedb\.csv"):
        AgeDataModule(tmp_path).setup("fit")
    faces(tmp_path, "agedb", AGES)
    file = tmp_path / "agedb.csv"
    whole = file.read_text()
    for text, words in (
        (whole.replace("age,", "years,", 1), r"agedb\.csv: header"),
        (whole.replace("20,", "old,", 1), r"agedb\.csv: line 2: age is 'old'"),
        (whole.replace("train\n", "training\n", 1), "line 2: expected an age of 0 to 200"),
        (whole[: whole.index("21,AgeDB/test_0")], "no row of the split test"),
        (whole[: whole.rindex(",")], f"line {whole.count(chr(10))}"),
    ):
        file.write_text(text)
        with pytest.raises(BrokenRecordError, match=words):
            AgeDataModule(tmp_path).setup("fit")
    file.write_text(whole)
    data = AgeDataModule(tmp_path, image_size=8)
    data.setup("fit")
    image = tmp_path / "AgeDB" / "val_1.jpg"
    image.write_bytes(image.read_bytes()[:120])
    with pytest.raises(BrokenRecordError, match=r"val_1\.jpg"):
        data.val_set[0, 1]
    image.unlink()
    with pytest.raises(MissingFileError, match=r"val_1\.jpg"):
        data.val_set[0, 1]


def test_the_real_table_of_agedb_has_the_sizes_of_the_benchmark(test_data):
    data = AgeDataModule(test_data / "agedb_labels", reweight="sqrt_inv", lds=True)
    data.setup("fit")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [12208, 2140, 2140]
    train = data.train_set.labels.tensors
    assert train["weight"].mean() == pytest.approx(1, rel=1e-4)
    rarest, commonest = train["count"].argmin(), train["count"].argmax()
    assert train["weight"][rarest] > 3 * train["weight"][commonest]
    with pytest.raises(MissingFileError, match=r"AgeDB.*\.jpg"):  # the faces aren't there
        data.train_set[0, 0]


# ---- sentences -------------------------------------------------------------------------------------------------------------------------

ROWS = {  # a quotation mark that is never closed, and scores on the edges of bins
    "train": [("A dog runs.", "A dog runs.", "5.000"), ('He said "no', "He spoke.", "0.7"), ("One", "Two", "0.7")],
    "dev": [("A man sings.", "A man is singing!", "4.75")],
    "test": [("One", "Two", "0")],
}


def test_a_table_of_sentences_gives_tokens_and_counts(tmp_path):
    sentences(tmp_path, ROWS)
    data = SentencePairsDataModule(tmp_path, num_tokens=1000, max_length=5, batch_size=3)
    data.setup("fit")
    train = {name: torch.stack([data.train_set[0, index][name] for index in range(3)]) for name in ("tokens", "target", "count")}
    assert train["target"].tolist() == pytest.approx([5.0, 0.7, 0.7])
    assert train["count"].tolist() == [1, 2, 2]
    tokens = train["tokens"]
    assert tokens.shape == (3, 2, 5)
    assert torch.equal(tokens[0, 0], tokens[0, 1])
    assert (tokens != 0).sum(-1).tolist() == [[4, 4], [4, 3], [1, 1]]
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < 1000
    assert data.bins(np.float32([0.1, 0.3, 0.7, 4.7, 4.99, 5.0])).tolist() == [1, 3, 7, 47, 49, 49]
    one, other = tokens_of(("A DOG", "a dog runs"), None, num_tokens=900, max_length=3)
    assert torch.equal(one[:2], other[:2])
    assert (one[2] == 0, other[2] > 0) == (True, True)


def test_a_broken_table_of_sentences_is_named(tmp_path):
    with pytest.raises(WrongRootError, match=r"train_new\.tsv"):
        SentencePairsDataModule(tmp_path).setup("fit")
    sentences(tmp_path, ROWS)
    file = tmp_path / "dev_new.tsv"
    whole = file.read_text()
    for text, words in (
        (whole.replace("score", "points"), r"dev_new\.tsv: header"),
        (whole.replace("4.75", "7"), r"dev_new\.tsv: line 2: .* got '7'"),
        (whole[: whole.index("A man is")], r"dev_new\.tsv: line 2"),
        ("sentence1\tsentence2\tscore", r"dev_new\.tsv: rows"),
    ):
        file.write_text(text)
        with pytest.raises(BrokenRecordError, match=words):
            SentencePairsDataModule(tmp_path).setup("fit")
    file.unlink()
    with pytest.raises(MissingFileError, match=r"dev_new\.tsv"):
        SentencePairsDataModule(tmp_path).setup("fit")


def test_the_real_sentences_fall_into_the_regions_of_the_benchmark(test_data):
    """With more than 100 and fewer than 30 pairs to a bin: 22 many-shot and 21 few-shot bins in the benchmark's own lists."""
    data = SentencePairsDataModule(test_data / "sts-b-dir")
    data.setup("fit")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [5249, 1000, 1000]
    counts = np.bincount(data.bins(data.train_set.labels.tensors["target"].numpy()), minlength=50)
    assert np.flatnonzero(counts > 100).tolist() == [0, *range(10, 27, 2), 28, *range(30, 35, 2), 36, *range(38, 49, 2), 49]
    assert int((counts < 30).sum()) == 21


def test_sentences_train_with_conr_and_fds():
    torch.manual_seed(0)
    module = ImbalancedRegression(SentencePairEncoder(500, 16, 16), nn.Linear(16, 1), loss="mse", inputs="tokens", learning_rate=1e-2)
    fds = FDS(inputs="tokens", last_bucket=50, bucket_width=0.1, kernel_size=3)
    conr = ConR(window=0.5, weight=0.1)
    trainer = tiny_trainer(max_epochs=3, limit_train_batches=6, callbacks=[fds, conr])
    data = SentencePairsDataModule(num_tokens=500, max_length=10)
    trainer.validate(module, data, verbose=False)
    before = float(trainer.callback_metrics["regression/val_mae_all"])
    trainer.fit(module, data)
    assert trainer.callback_metrics["conr/anchors"] > 0
    assert trainer.callback_metrics["regression/val_mae_all"] < before - 0.3
    seen = fds.statistics.variance.ne(1).any(1)  # six scores fill six buckets
    assert seen.nonzero().flatten().tolist() == [0, 10, 20, 30, 40, 50]


# ---- depth -----------------------------------------------------------------------------------------------------------------------------


def test_the_layout_of_nyud2_gives_depths_in_metres(tmp_path):
    rooms(tmp_path)
    data = NYUD2DataModule(tmp_path, reweight="inverse", batch_size=3)
    data.setup("fit")
    (train,) = list(data.train_dataloader())
    assert train["image"].shape == (3, 3, 228, 304)
    assert train["target"].shape == train["weight"].shape == train["count"].shape == (3, 1, 114, 152)
    near = {round(value, 1) for value in train["target"].unique().tolist()}
    assert near <= {2.0, 3.0, 4.0, 6.0, 7.0, 8.0}  # nothing between, and no 0 where the picture was turned
    assert len(near) == 6
    (val,) = list(data.val_dataloader())
    assert val["target"].shape == (3, 1, 228, 304)
    left, right = val["target"].split(152, dim=3)
    assert right.isnan().all()
    torch.testing.assert_close(left.mean((1, 2, 3)), torch.tensor([2.0, 3.0, 4.0]))
    assert data.train_set.counts.sum() == 3 * 228 * 304
    assert data.train_set.counts[depth_bins(np.float32([2.0]))] == 228 * 152
    one, other = data.train_set[0, 1], data.train_set[1, 1]
    assert not torch.equal(one["image"], other["image"])
    assert torch.equal(one["image"], data.train_set[0, 1]["image"])


def test_weights_of_depths_have_mean_one_and_smoothing_mirrors_the_ends():
    counts = np.array([0, 800, 200, 100, 0])
    weights = bin_weights(counts, "inverse", False, "gaussian", 3, 1.0)
    np.testing.assert_allclose(weights / weights[1], [8, 1, 4, 8, 8], rtol=1e-6)
    assert (counts * weights).sum() / counts.sum() == pytest.approx(1, rel=1e-6)
    window = np.array([0.5, 1, 0.5])
    smoothed = bin_weights(counts, "sqrt_inv", True, "triang", 3, 1.0)
    roots = np.sqrt([100, 100, 800, 200, 100, 100, 100])  # the outermost bins once more
    expected = 1 / np.convolve(roots, window, mode="valid")
    np.testing.assert_allclose(smoothed / smoothed[0], expected / expected[0], rtol=1e-6)


def test_a_broken_nyud2_is_named(tmp_path):
    with pytest.raises(WrongRootError, match=r"nyu2_train\.csv"):
        NYUD2DataModule(tmp_path).setup("fit")
    rooms(tmp_path, 2)
    test, mask = tmp_path / "nyu2_test.csv", tmp_path / "test_balanced_mask.npy"
    depth = tmp_path / "nyu2_train" / "room" / "1.png"
    kept = {file: file.read_bytes() for file in (test, mask, depth)}
    for harm, error, words in (
        (lambda: test.write_text("data/a.jpg\n"), BrokenRecordError, r"nyu2_test\.csv: line 1"),
        (lambda: test.write_text(""), BrokenRecordError, r"nyu2_test\.csv: lines"),
        (test.unlink, MissingFileError, r"nyu2_test\.csv"),
        (lambda: np.save(mask, np.ones((1, 4, 4))), BrokenRecordError, r"test_balanced_mask\.npy: mask: expected \(2, 228, 304\)"),
        (lambda: mask.write_bytes(kept[mask][:500]), BrokenRecordError, r"test_balanced_mask\.npy"),
        (mask.unlink, MissingFileError, r"test_balanced_mask\.npy"),
        (lambda: depth.write_bytes(kept[depth][:60]), BrokenRecordError, r"1\.png"),
        (lambda: Image.new("L", (10, 10)).save(depth), BrokenRecordError, r"1\.png: depth: expected one number a pixel"),
        (depth.unlink, MissingFileError, r"1\.png"),
    ):
        harm()
        with pytest.raises(error, match=words):
            NYUD2DataModule(tmp_path).setup("fit")
        for file, content in kept.items():
            file.write_bytes(content)


def test_depth_trains_with_the_dense_variant_and_is_evaluated_at_full_size(tmp_path):
    rooms(tmp_path)
    torch.manual_seed(0)
    module = ImbalancedRegression(
        DenseFeatures("resnet10t", channels=4, lateral_channels=4), nn.Conv2d(4, 1, 1), loss="mse", delta1=True, learning_rate=1e-2
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fds = FDS(last_bucket=99, first_bucket=7, bucket_width=0.1, collect_every=2, clip=(0.2, 5.0))
    data = NYUD2DataModule(tmp_path, batch_size=3)
    trainer = tiny_trainer(max_epochs=1, callbacks=[fds, ConR(variant="dense", window=0.2, eta=0.2, weight=0.2)])
    trainer.fit(module, data)
    found = trainer.callback_metrics
    assert found["conr/loss"].isfinite()
    assert 0 <= found["regression/val_delta1"] <= 1
    assert found["regression/val_mae_all"].isfinite()
    assert not torch.equal(before["backbone.fuse.0.weight"], module.state_dict()["backbone.fuse.0.weight"])
    seen = fds.statistics.variance.ne(1).any(1).nonzero().flatten() + 7  # images 0 and 2 of the three
    assert set(seen.tolist()) == {20, 40, 60, 80}
