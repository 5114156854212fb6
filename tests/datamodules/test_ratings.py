"""Ratings: layouts, splits, draws."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_methods.datamodules import RatingsDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.recommendation import fake
from lit_methods.datamodules.recommendation.ratings import Interactions, hold_out, keep_frequent, synthetic_interactions

REAL = os.environ.get("LIT_METHODS_TEST_DATA")


def write(folder: Path, name: str, lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", fake.FILES)
def test_layouts_are_read_alike(name, tmp_path):
    fake.ratings(tmp_path, name, [(7 + u, 3 * i) for u, i in fake.PAIRS])
    data = RatingsDataModule(tmp_path, test_share=0.25)
    data.setup("fit")
    assert (data.num_users, data.num_items) == (6, 9)
    batch = next(iter(data.test_dataloader()))
    pairs = batch["known"] | batch["target"]
    assert not (batch["known"] & batch["target"]).any()
    assert batch["target"].sum(1).tolist() == [1] * 6
    for user in range(6):
        assert pairs[user].nonzero().flatten().tolist() == list(range(user, user + 4))


def test_pairs_with_a_split_of_their_own(tmp_path):
    write(tmp_path, "tiny.train", ["0 3", "0 4", "1 3", "2 5"])
    write(tmp_path, "tiny.test", ["0 6", "1 4", "1 3"])  # 1 3 stands in both: known
    data = RatingsDataModule(tmp_path)
    data.setup("fit")
    assert (data.num_users, data.num_items) == (3, 4)
    assert [part.tolist() for part in data.train_interactions] == [[0, 0, 1, 2], [0, 1, 0, 2]]
    batch = next(iter(data.val_dataloader()))
    assert batch["user"].tolist() == [0, 1]
    assert batch["target"].int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    write(tmp_path, "tiny.train", ["0 3", "4 3"])
    with pytest.raises(BrokenRecordError, match=r"tiny.train: line 2: user 4 is no smaller than item 3"):
        RatingsDataModule(tmp_path).setup("fit")
    with pytest.raises(ValueError, match="has its split already"):
        RatingsDataModule(tmp_path, min_user_items=2).setup("fit")
    write(tmp_path, "second.train", ["0 1"])
    write(tmp_path, "second.test", ["0 1"])
    with pytest.raises(WrongRootError, match="second, tiny"):
        RatingsDataModule(tmp_path).setup("fit")


@pytest.mark.parametrize("broken", ["8::x::3::1", "8::3", "8::-3::3::1", "8::3::nan::1", "8.5::3::3::1"])
def test_a_broken_line_is_named(broken, tmp_path):
    lines = ["1::1::5::0", "", "2::1::4::0", broken, "3::1::4::0"]
    with pytest.raises(BrokenRecordError, match=r"ratings.dat: line 4: .*expected user, item, value"):
        RatingsDataModule(write(tmp_path, "ratings.dat", lines)).setup("fit")


def test_wrong_roots_and_numbers(tmp_path):
    with pytest.raises(WrongRootError, match="is no folder"):
        RatingsDataModule(tmp_path / "no").setup("fit")
    with pytest.raises(WrongRootError, match=r"ratings.dat.*user_artists.dat.*\.train"):
        RatingsDataModule(tmp_path).setup("fit")
    fake.ratings(tmp_path)
    with pytest.raises(WrongRootError, match="no lastfm data set"):
        RatingsDataModule(tmp_path, format="lastfm").setup("fit")
    with pytest.raises(ValueError, match="nothing is left"):
        RatingsDataModule(tmp_path, min_user_items=5).setup("fit")
    with pytest.raises(ValueError, match=r"test_share is 1\.5"):
        RatingsDataModule(test_share=1.5)
    with pytest.raises(ValueError, match="mode is 'rank': give one of bpr, neumf, autoencoder"):
        RatingsDataModule(mode="rank")
    write(tmp_path / "all", "a.train", ["0 2", "0 3", "1 2"])
    write(tmp_path / "all", "a.test", ["1 3"])
    with pytest.raises(ValueError, match="user 0 has every item"):
        RatingsDataModule(tmp_path / "all").setup("fit")
    with pytest.raises(RuntimeError, match="setup"):
        RatingsDataModule().train_dataloader()


def test_values_below_the_limit_and_rare_users_go(tmp_path):
    lines = ["1::1::5::0", "1::2::3::0", "1::3::4::0", "2::1::4::0", "2::2::5::0", "3::1::5::0", "1::1::5::9"]
    data = RatingsDataModule(write(tmp_path, "ratings.dat", lines), mode="autoencoder", min_value=4, min_user_items=2)
    with pytest.raises(ValueError, match="2 users are too few"):
        data.setup("fit")
    assert (data.num_users, data.num_items) == (2, 3)
    user, item = keep_frequent(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2]), 2, 2)
    assert (user.tolist(), item.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    user, _ = keep_frequent(np.array([0, 0, 1]), np.array([0, 1, 0]), 2, 2)
    assert len(user) == 0, "thinning items leaves a user with too few"


def test_draws_are_uniform_over_what_a_user_lacks():
    pairs = Interactions.unique(np.array([0, 0, 0, 2, 2]), np.array([0, 2, 5, 1, 1]), 3, 6)
    grid = (np.arange(600) + 0.5) / 600
    for user, missing in ((0, [1, 3, 4]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 3, 4, 5])):
        items, counts = np.unique(pairs.draw_others(np.full(600, user), grid), return_counts=True)
        assert items.tolist() == missing
        assert (counts == 600 // len(missing)).all()
    assert pairs.rows(np.array([2, 0, 1])).astype(int).tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1], [0] * 6]


def test_every_user_keeps_something():
    pairs = synthetic_interactions(seed=3)
    counts = np.diff(pairs.starts)
    assert (counts >= 20).all()
    assert (counts <= 40).all()
    held = pairs.select(hold_out(pairs, 0.3, np.random.default_rng(0)))
    assert np.array_equal(np.diff(held.starts), np.rint(0.3 * counts))
    alone = Interactions.unique(np.array([0, 1, 1]), np.array([0, 0, 1]), 2, 2)
    assert np.diff(alone.select(hold_out(alone, 0.9, np.random.default_rng(0))).starts).tolist() == [0, 1]


def test_triples_are_true_and_new_in_every_epoch():
    data = RatingsDataModule(batch_size=256)
    data.setup("fit")
    known = np.zeros((200, 150), dtype=bool)
    known[data.train_interactions[0], data.train_interactions[1]] = True
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        whole = [torch.cat([batch[name] for batch in batches]) for batches in [list(loader)] for name in ("user", "positive", "negative")]
        user, positive, negative = (part.numpy() for part in whole)
        assert known[user, positive].all()
        assert not known[user, negative].any()
        assert np.bincount(user, minlength=200).max() < 60, "users are drawn uniformly"
        epochs.append(whole)
    assert not torch.equal(epochs[0][0], epochs[1][0])


@pytest.mark.parametrize("mode", ["bpr", "neumf", "autoencoder"])
def test_batches_do_not_depend_on_workers(mode):
    kinds = []
    for workers in (0, 2):
        data = RatingsDataModule(mode=mode, batch_size=64, num_workers=workers, num_negatives=5, test_share=0.2)
        data.setup("fit")
        batches = iter(data.train_dataloader())
        kinds.append([next(batches) for _ in range(2)])
    for one, other in zip(*kinds, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_candidates_are_the_held_out_item_and_others():
    data = RatingsDataModule(mode="neumf", num_negatives=20)
    data.setup("fit")
    known = torch.zeros(200, 150, dtype=torch.bool)
    known[data.train_interactions] = True
    batch = next(iter(data.test_dataloader()))
    assert batch["target"].sum(1).tolist() == [1] * len(batch["user"])
    assert not known[batch["user"][:, None], batch["item"]].any()
    assert not (batch["item"][:, 1:] == batch["item"][:, :1]).any()
    train = next(iter(data.train_dataloader()))
    assert known[train["user"], train["positive"]].all()
    assert not known[train["user"][:, None], train["negative"]].any()


def test_held_out_users_are_not_trained_on():
    data = RatingsDataModule(mode="autoencoder", batch_size=500, test_share=0.2)
    data.setup("fit")
    parts = {split: {int(user) for batch in getattr(data, f"{split}_dataloader")() for user in batch["user"]} for split in ("val", "test")}
    learners = set(data.train_interactions[0].tolist())
    assert not parts["val"] & parts["test"]
    assert not learners & (parts["val"] | parts["test"])
    assert len(learners) + len(parts["val"]) + len(parts["test"]) == 200
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(batch["history"], batch["known"].float())
    assert not (batch["known"] & batch["target"]).any()
    assert next(iter(data.train_dataloader()))["history"].sum() == len(data.train_interactions[0])


def test_validation_items_of_their_own():
    data = RatingsDataModule(val_share=0.2)
    data.setup("fit")
    val, test = next(iter(data.val_dataloader())), next(iter(data.test_dataloader()))
    assert torch.equal(val["known"] | val["target"], test["known"])
    assert not (val["target"] & test["target"]).any()
    assert val["known"].sum() == len(data.train_interactions[0])


def test_seeds_change_what_they_should():
    def first(**kwargs: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = RatingsDataModule(**kwargs)
        data.setup("fit")
        return data.train_interactions[1], next(iter(data.train_dataloader()))["user"]

    edges, order = first()
    again, other_order = first(seed=1)
    assert torch.equal(edges, again)
    assert not torch.equal(order, other_order)
    other, _ = first(split_seed=1)
    assert edges.shape != other.shape or not torch.equal(edges, other)


@pytest.mark.skipif(REAL is None, reason="LIT_METHODS_TEST_DATA names no folder with the real data sets")
@pytest.mark.parametrize(("name", "users", "pairs"), [("ml-latest-small", 671, 100_004), ("lastfm-2k", 1892, 92_834)])
def test_real_data(name, users, pairs):
    data = RatingsDataModule(Path(str(REAL)) / name)
    data.setup("fit")
    held = sum(int(batch["target"].sum()) for batch in data.test_dataloader())
    assert data.num_users == users
    assert len(data.train_interactions[0]) + held == pairs
    assert held / pairs == pytest.approx(0.3, abs=0.01)


# ---- columns ---------------------------------------------------------------------------------------------------------------------------

PAIRS = [(u, b) for u in range(1, 13) for b in (101, 102, 103) if (u * b) % 4]


def sizes(folder: Path, name: str, header: str, line: str, **arguments) -> tuple[int, int]:
    lines = [header] if header else []
    data = RatingsDataModule(write(folder, name, lines + [line.format(u=u, i=i, r=1 + (u + i) % 5) for u, i in PAIRS]), **arguments)
    data.setup("fit")
    return data.num_users, data.num_items


@pytest.mark.parametrize(
    ("name", "header", "line"),
    [
        ("ratings.csv", "movieId,userId,rating,timestamp", "{i},{u},{r},978300760"),
        ("ratings.csv", "timestamp,rating,book_id,user_id", "978300760,{r},{i},{u}"),
        ("ratings.csv", '"User-ID","Book-Rating","ISBN"', '"{u}","{r}","{i}"'),
        ("ratings.csv", "rating,recipe_number_id,uid", "{r},{i},{u}"),  # the only other id
        ("ratings.csv", "", "{u},{i},{r},978300760"),  # no header: by place
        ("a.inter", "item_id:token\ttimestamp:float\tuser_id:token\trating:float", "{i}\t978300760\t{u}\t{r}"),
        ("user_artists.dat", "weight\tartistID\tuserID", "{r}\t{i}\t{u}"),
        ("ratings.dat", "MovieID::UserID::Rating", "{i}::{u}::{r}"),
        ("ratings.dat", "", "{u}::{i}::{r}::978300760"),
        ("u.data", "item\tuser\ttime\trating", "{i}\t{u}\t978300760\t{r}"),
    ],
)
def test_columns_go_by_their_names(name, header, line, tmp_path):
    rated = len({u for u, i in PAIRS if (u + i) % 5 >= 2}), 3
    assert sizes(tmp_path, name, header, line) == (9, 3)
    assert sizes(tmp_path, name, header, line, min_value=3.0) == rated


def test_split_pairs_may_have_a_header_too(tmp_path):
    for part, lines in (("train", ["3 0", "4 0", "3 1", "5 2"]), ("test", ["6 0", "4 1"])):
        write(tmp_path, f"a.{part}", ["item user", *lines])
    data = RatingsDataModule(tmp_path)
    data.setup("fit")
    assert (data.num_users, data.num_items) == (3, 4)
    assert [part.tolist() for part in data.train_interactions] == [[0, 0, 1, 2], [0, 1, 0, 2]]


def test_a_missing_column_is_named_with_what_was_found(tmp_path):
    with pytest.raises(BrokenRecordError, match=r"ratings\.csv: header: the column user is missing.*found 'person', 'movieId', 'rating'"):
        sizes(tmp_path, "ratings.csv", "person,movieId,rating", "{u},{i},{r}")
    with pytest.raises(BrokenRecordError, match=r"the column item is missing.*'list_id', 'shelf_id'"):
        sizes(tmp_path, "ratings.csv", "user_id,list_id,shelf_id", "{u},{i},{r}")
    with pytest.raises(BrokenRecordError, match="several columns may be item"):
        sizes(tmp_path, "ratings.csv", "user_id,book_id,item_id", "{u},{i},{r}")
    (tmp_path / "ratings.csv").unlink()
    header, line = "user_id:token\titem_id:token\ttimestamp:float", "{u}\t{i}\t978300760"
    assert sizes(tmp_path, "b.inter", header, line) == (9, 3), "a time isn't needed"
    with pytest.raises(BrokenRecordError, match=r"b\.inter: rating: there is no such column, found 'user_id:token'.*min_value"):
        sizes(tmp_path, "b.inter", header, line, min_value=4.0)
    with pytest.raises(BrokenRecordError, match=r"u\.data: rating: the third column has 978300760 and the like, which are times"):
        sizes(tmp_path / "third", "u.data", "", "{u}\t{i}\t978300760", min_value=4.0)
