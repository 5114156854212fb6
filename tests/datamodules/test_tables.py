"""Columns of every table go by their names; ratings have tests of their own."""

import pytest

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.metric_learning.images import read_sop
from lit_methods.datamodules.regression.ages import read_ages
from lit_methods.datamodules.regression.nyud2 import read_list
from lit_methods.datamodules.regression.sentences import read_pairs
from lit_methods.datamodules.tables import named_rows, plain, text_of


def ages(folder, *columns):
    rows = [{"age": str(20 + k), "path": f"{split}.jpg", "split": split, "place": "7"} for k, split in enumerate(("train", "val", "test"))]
    file = folder / "agedb.csv"
    file.write_text("\n".join([",".join(columns), *(",".join(row[c.strip().lower()] for c in columns) for row in rows)]), "utf-8-sig")
    return {split: (paths, labels.tolist()) for split, (paths, labels) in read_ages(file).items()}


def sentences(folder, *columns):
    row = {"sentence1": "A dog.", "sentence2": 'A "cat.', "score": "2.5", "year": "2016"}
    file = folder / "train_new.tsv"
    file.write_text("\t".join(columns) + "\n" + "\t".join(row[c] for c in columns) + "\n")
    pairs, scores = read_pairs(file)
    return pairs, scores.tolist()


def depths(folder, *columns):
    row = {"image": "data/room/1.jpg", "depth": "data/room/1.png", "scene": "data/room"}
    file = folder / "nyu2_train.csv"
    file.write_text(",".join(columns) + "\n" + ",".join(row[c] for c in columns) + "\n")
    return [tuple(path.name for path in pair) for pair in read_list(file)]


def products(folder, *columns):
    row = {"image_id": "1", "class_id": "2", "super_class_id": "3", "path": "a.JPG"}
    for part in ("train", "test"):
        (folder / f"Ebay_{part}.txt").write_text(" ".join(columns) + "\n" + " ".join(row[c] for c in columns) + "\n")
    return [(part.paths[0].name, part.labels.tolist()) for part in read_sop(folder)]


@pytest.mark.parametrize(
    ("read", "official", "other", "without"),
    [
        (ages, ("age", "path", "split"), ("split", "place", "Age ", "path"), ("age", "path", "place")),
        (sentences, ("sentence1", "sentence2", "score"), ("score", "sentence2", "year", "sentence1"), ("sentence1", "year", "score")),
        (depths, ("image", "depth"), ("depth", "scene", "image"), ("image", "scene")),
        (
            products,
            ("image_id", "class_id", "super_class_id", "path"),
            ("path", "super_class_id", "image_id", "class_id"),
            ("image_id", "image_id", "super_class_id", "path"),
        ),
    ],
)
def test_places_do_not_count(read, official, other, without, tmp_path):
    assert read(tmp_path, *official) == read(tmp_path, *other)
    (missing,) = set(official) - set(without)
    with pytest.raises(BrokenRecordError, match=rf"header: the column {missing} is missing.*found '{without[0]}', .*expected .*{missing}"):
        read(tmp_path, *without)


def test_a_table_of_products_without_its_first_line_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"Ebay_{part}.txt").write_text("1 2 3 a.JPG\n2 2 3 b.JPG\n")
    with pytest.raises(BrokenRecordError, match=r"Ebay_train\.txt: header: the column class_id is missing"):
        read_sop(tmp_path)


def test_names_and_texts(tmp_path):
    assert [plain(name) for name in ("user_id:token", "User-ID", ' "Rating" ')] == ["userid", "userid", "rating"]
    file = tmp_path / "a.csv"
    with pytest.raises(MissingFileError, match=r"a\.csv: file: no such file: copy it"):
        text_of(file, "copy it")
    for content, words in (
        (b"age,path\n1,\xff\xfe", r"a\.csv: file: byte 11 isn't UTF-8"),
        (b"", "header: the file is empty, expected the columns age, path"),
        (b"age,path\n1," + b"x" * 140_000, "line 2: can't be split into cells"),
    ):
        file.write_bytes(content)
        with pytest.raises(BrokenRecordError, match=words):
            list(named_rows(file, ("age", "path"), ""))
