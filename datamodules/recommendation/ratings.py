"""Who took what: ratings, plays and purchases as implicit feedback, in the layouts of the public data sets."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, literals, within
from lit_methods.datamodules.base import Batches, LoaderDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.reading import read_bytes
from lit_methods.datamodules.tables import find_columns, is_header, plain

Format = Literal["auto", "movielens", "lastfm", "lightgcn"]
Mode = Literal["bpr", "neumf", "autoencoder"]
Ints = NDArray[np.int64]
Batch = dict[str, Tensor]


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How a file is written. Without a header user and item are the first two of ``columns``, and the value is the third."""

    separator: str | None
    columns: int


_MOVIELENS = {  # file pattern -> layout
    "ratings.dat": _Layout("::", 3),  # MovieLens 1M and 10M, without a header
    "ratings.csv": _Layout(",", 3),  # MovieLens latest and 20M and later
    "u.data": _Layout("\t", 3),  # MovieLens 100k, without a header
    "*.inter": _Layout("\t", 3),  # an interaction file of RecBole
}
_LASTFM = {"user_artists.dat": _Layout("\t", 3)}  # HetRec 2011
_PAIRS = _Layout(None, 2)
_USER = ("user", "userid", "uid", "userindex", "useridx")
_THINGS = ("item", "movie", "artist", "book", "track", "song", "product", "business", "game", "anime", "recipe", "place", "venue")
_ITEM = (*(thing + ending for thing in _THINGS for ending in ("id", "", "index", "idx")), "iid", "isbn", "asin")
_VALUE = (
    "rating", "ratings", "bookrating", "userrating", "score", "stars", "value", "weight", "count", "plays", "playcount", "listencount"
)  # fmt: skip
_TIMES = 1e8  # seconds of 1973: a column of larger values holds times


def _columns(file: Path, header: Sequence[str]) -> list[int]:
    """Places of user, item and, where there is one, rating, by the names of a header."""
    names = [plain(name) for name in header]
    items: Sequence[str] = _ITEM
    if not set(names) & set(_ITEM):  # the only other id
        others = {name for name in names if name.endswith("id") and name not in _USER}
        items = tuple(others) if len(others) == 1 else _ITEM
    found = find_columns(file, header, {"user": _USER, "item": items, "rating": _VALUE}, optional=("rating",))
    return [found[name] for name in ("user", "item", "rating") if name in found]


def read_rows(file: Path, layout: _Layout, rated: bool = False) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """User ids, item ids and values of a file, each (N,); values are 1 where there is no column of them.

    A first line without a number is a header, whose names decide; other files are read by place.

    Args:
        file: The file.
        layout: How it is written.
        rated: A column of ratings (or plays) must be there; one of times is none.

    Raises:
        BrokenRecordError: A column is missing; a line that isn't numbers, has too few columns, or a negative id; the message names file and
            line.
    """
    text = read_bytes(file, "lines").decode("utf-8-sig", errors="replace")  # names of things may be in any encoding
    if "\0" in text:
        raise BrokenRecordError(file, "lines", "it has NUL bytes: UTF-16, which is to be converted to UTF-8, or damaged; download it again")
    first, line = next(((number, line) for number, line in enumerate(io.StringIO(text)) if line.strip()), (0, ""))
    cells = line.split(layout.separator)
    named = is_header(cells)
    columns = _columns(file, cells) if named else list(range(layout.columns))
    if rated and len(columns) < 3:
        shown = ", ".join(repr(cell.strip()) for cell in cells)
        raise BrokenRecordError(
            file, "rating", f"there is no such column, found {shown if named else 'two columns'}: leave min_value at null, or add one of "
            f"{', '.join(_VALUE[:3])}, ..."
        )  # fmt: skip
    skipped = first + 1 if named else 0
    plain_text = text.replace("::", "\t") if layout.separator == "::" else text
    separator = "\t" if layout.separator == "::" else layout.separator
    try:
        rows = np.loadtxt(
            io.StringIO(plain_text), delimiter=separator, skiprows=skipped, usecols=columns, ndmin=2, comments=None, quotechar='"'
        )
    except ValueError:
        rows = None
    if rows is None or not np.isfinite(rows).all() or (rows[:, :2] < 0).any() or (rows[:, :2] % 1).any() or (rows[:, :2] >= 2**53).any():
        raise _first_broken_line(file, text, layout, skipped, columns)
    if not len(rows):
        raise BrokenRecordError(file, "lines", "there is none behind the header: download the file again")
    values = rows[:, 2] if len(columns) > 2 else np.ones(len(rows))
    if rated and not named and (values > _TIMES).all():
        raise BrokenRecordError(
            file, "rating", f"the third column has {values[0]:.0f} and the like, which are times: leave min_value at null"
        )
    return rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), values


def _first_broken_line(file: Path, text: str, layout: _Layout, skipped: int, columns: Sequence[int]) -> BrokenRecordError:
    """Only after something went wrong: the line that did."""
    for number, line in enumerate(text.splitlines(), start=1):
        cells = line.split(layout.separator)
        if number <= skipped or not line.strip():
            continue
        try:
            numbers = [float(cells[place].strip().strip('"')) for place in columns]
        except (ValueError, IndexError):
            numbers = []
        ids = numbers[:2]
        if not numbers or not all(map(math.isfinite, numbers)) or any(x < 0 or x % 1 or x >= 2**53 for x in ids):
            shown = "user, item" + (", value" if len(columns) > 2 else "")
            between = {None: "blanks", "\t": "tabs"}.get(layout.separator, repr(layout.separator))
            return BrokenRecordError(
                file, f"line {number}", f"{line[:60]!r}, expected {shown} as numbers (ids whole and from 0 on) with {between} between them"
            )
    return BrokenRecordError(file, "lines", "some can't be read as numbers: download the file again")


def find_format(root: Path, format: Format) -> tuple[Format, list[tuple[Path, _Layout]]]:
    """The layout that ``root`` has, and its files.

    Returns:
        Format and (file, layout); for ``lightgcn`` the training file and then the test file.

    Raises:
        WrongRootError: Nothing known is there.
    """
    if not root.is_dir():
        raise WrongRootError(f"root={str(root)!r} is no folder: give the folder of the unpacked data set, or null for the built-in set")
    if format in ("auto", "lightgcn"):
        pairs = [(train, train.with_suffix(".test")) for train in listed(root, "*.train")]
        pairs = [pair for pair in pairs if pair[1].is_file()]
        if len(pairs) > 1:
            raise WrongRootError(f"root={str(root)!r} has several data sets ({', '.join(p[0].stem for p in pairs)}): keep one in a folder")
        if pairs:
            return "lightgcn", [(file, _PAIRS) for file in pairs[0]]
    for name, layouts in (("movielens", _MOVIELENS), ("lastfm", _LASTFM)):
        if format in ("auto", name):
            for pattern, layout in layouts.items():
                if found := listed(root, pattern):
                    return name, [(found[0], layout)]  # type: ignore[return-value]
    wanted = {
        "movielens": "ratings.dat, ratings.csv, u.data or *.inter (https://grouplens.org/datasets/movielens)",
        "lastfm": "user_artists.dat (https://grouplens.org/datasets/hetrec-2011)",
        "lightgcn": "<name>.train and <name>.test, with 'user item' on a line",
    }
    expected = wanted.get(format) or "; or ".join(wanted.values())
    raise WrongRootError(f"root={str(root)!r} holds no {format if format != 'auto' else 'known'} data set: expected {expected}")


# ---- interactions ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interactions:
    """Pairs (user, item), each once, sorted by user and then item; both counted from 0.

    Attributes:
        user: (E,) int64.
        item: (E,) int64.
        num_users: U.
        num_items: I.
    """

    user: Ints
    item: Ints
    num_users: int
    num_items: int

    @staticmethod
    def unique(user: Ints, item: Ints, num_users: int, num_items: int) -> "Interactions":
        """Sort, and drop repeated pairs."""
        key = np.unique(user * num_items + item)
        return Interactions(key // num_items, key % num_items, num_users, num_items)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def starts(self) -> Ints:
        """(U + 1,) where each user's pairs begin."""
        return np.searchsorted(self.user, np.arange(self.num_users + 1)).astype(np.int64)

    def select(self, chosen: NDArray[np.bool_]) -> "Interactions":
        """The pairs at which ``chosen`` is True."""
        return Interactions(self.user[chosen], self.item[chosen], self.num_users, self.num_items)

    def rows(self, users: Ints) -> NDArray[np.bool_]:
        """(B, I): which items each of ``users`` has."""
        starts = self.starts
        counts = starts[users + 1] - starts[users]
        places = np.repeat(starts[users] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        table = np.zeros((len(users), self.num_items), dtype=bool)
        table[np.repeat(np.arange(len(users)), counts), self.item[places]] = True
        return table

    def draw_others(self, users: Ints, uniform: NDArray[np.float64]) -> Ints:
        """For each user an item that it doesn't have, uniformly.

        Args:
            users: (N,) of users that lack at least one item.
            uniform: (N,) in [0, 1).

        Returns:
            (N,) int64.
        """
        starts = self.starts
        own = np.diff(starts)
        rank = (uniform * (self.num_items - own[users])).astype(np.int64)
        # the j-th item of a user has (item - j) missing ones before it: the missing item of a rank lies behind all with at most that many
        before = self.item - (np.arange(len(self.item)) - starts[self.user])
        width = self.num_items + 1
        passed = np.searchsorted(self.user * width + before, users * width + rank, side="right") - starts[users]
        return rank + passed


def _union(one: Interactions, other: Interactions) -> Interactions:
    both = np.concatenate([one.user, other.user]), np.concatenate([one.item, other.item])
    return Interactions.unique(*both, one.num_users, one.num_items)


def keep_frequent(user: Ints, item: Ints, min_user: int, min_item: int) -> tuple[Ints, Ints]:
    """Pairs of users with ``min_user`` items and items with ``min_item`` users, thinned until both hold."""
    while len(user):
        keep = (np.bincount(user)[user] >= min_user) & (np.bincount(item)[item] >= min_item)
        if keep.all():
            break
        user, item = user[keep], item[keep]
    return user, item


def hold_out(pairs: Interactions, share: float, rng: np.random.Generator, leave_one: bool = False) -> NDArray[np.bool_]:
    """(E,) which pairs are held out: ``round(share * n)`` of each user's n at random, or one; each user keeps one at least."""
    order = np.lexsort((rng.random(len(pairs)), pairs.user))
    place = np.empty(len(pairs), dtype=np.int64)
    place[order] = np.arange(len(pairs)) - pairs.starts[pairs.user[order]]
    counts = np.diff(pairs.starts)
    wanted = np.ones_like(counts) if leave_one else np.rint(share * counts).astype(np.int64)
    return place < np.minimum(wanted, counts - 1)[pairs.user]


def synthetic_interactions(num_users: int = 200, num_items: int = 150, rank: int = 8, seed: int = 0) -> Interactions:
    """Users who choose 20 to 40 items each, by taste and popularity.

    The logit of a pair is the product of two Gaussian vectors of length ``rank`` plus the item's Gaussian popularity; each user draws items
    without repetition, with probabilities in proportion to exp(logit).

    Args:
        num_users: U.
        num_items: I >= 40.
        rank: Length of the vectors of taste.
        seed: Decides everything.
    """
    rng = np.random.default_rng([seed, 20240202])
    logits = rng.normal(size=(num_users, rank)) @ rng.normal(size=(rank, num_items)) + rng.normal(size=num_items)
    best = np.argsort(-(logits + rng.gumbel(size=logits.shape)), axis=1)
    counts = rng.integers(20, 41, size=num_users)
    user = np.repeat(np.arange(num_users), counts)
    item = best[np.arange(num_items) < counts[:, None]]
    return Interactions.unique(user, item, num_users, num_items)


# ---- samples ---------------------------------------------------------------------------------------------------------------------------


class _Triples(Batches):
    """User, an item of theirs, an item that they lack; a whole epoch is drawn at once, from (seed, epoch) alone."""

    def __init__(self, train: Interactions, seed: int) -> None:
        self.train, self.seed = train, seed
        self._epoch = -1
        self._drawn: Batch = {}

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Triples of the first of ``epochs``: a loader never mixes them."""
        epoch, size = int(epochs[0]), len(self)
        if self._epoch != epoch:
            rng, starts = np.random.default_rng([self.seed, 2, epoch]), self.train.starts
            active = np.flatnonzero(np.diff(starts))
            user = active[rng.integers(len(active), size=size)]
            place = starts[user] + (rng.random(size) * (starts[user + 1] - starts[user])).astype(np.int64)
            negative = self.train.draw_others(user, rng.random(size))
            self._epoch, self._drawn = epoch, _tensors(user=user, positive=self.train.item[place], negative=negative)
        where = torch.from_numpy(index)
        return {name: values[where] for name, values in self._drawn.items()}


class _FixedNegatives(Batches):
    """A training pair and the fixed negatives of its user, (U, N)."""

    def __init__(self, train: Interactions, negatives: Ints) -> None:
        self.train, self.negatives = train, negatives

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Pairs with their user's negatives."""
        user = self.train.user[index]
        return _tensors(user=user, positive=self.train.item[index], negative=self.negatives[user])


class _Candidates(Batches):
    """Candidates of (S,) users, (S, C), the held-out item first."""

    def __init__(self, user: Ints, item: Ints) -> None:
        self.user, self.item = user, item

    def __len__(self) -> int:
        return len(self.user)

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Users with their candidates."""
        item = self.item[index]
        target = np.zeros_like(item, dtype=bool)
        target[:, 0] = True
        return _tensors(user=self.user[index], item=item, known=np.zeros_like(target), target=target)


class _Ranked(Batches):
    """Users with a held-out item, for full ranking."""

    def __init__(self, known: Interactions, held: Interactions, users: Ints | None = None, history: bool = False) -> None:
        has = np.diff(held.starts) > 0
        self.user = np.flatnonzero(has) if users is None else users[has[users]]
        if not len(self.user):
            raise ValueError("no user has a held-out item to rank: raise test_share (or val_share), or thin out users with few items")
        self.known, self.held, self.history = known, held, history

    def __len__(self) -> int:
        return len(self.user)

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Users with what they have, and what they are to get."""
        user = self.user[index]
        batch = _tensors(user=user, known=self.known.rows(user), target=self.held.rows(user))
        return batch | {"history": batch["known"].float()} if self.history else batch


class _Histories(Batches):
    """Everything that (S,) users have taken."""

    def __init__(self, pairs: Interactions, users: Ints) -> None:
        self.pairs, self.users = pairs, users

    def __len__(self) -> int:
        return len(self.users)

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Rows of 0 and 1, one a user."""
        return {"history": torch.from_numpy(self.pairs.rows(self.users[index])).float()}


def _tensors(**arrays: NDArray[Any]) -> Batch:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class RatingsDataModule(LoaderDataModule):
    """Implicit feedback from ratings, plays or pairs; every pair counts as taken, whatever its value, unless ``min_value`` is given.

    Batch: {"user": (B,) int64, "positive": (B,) int64, "negative": (B,) int64}

    Layouts of ``root``: MovieLens (``ratings.dat`` with ``::``, ``ratings.csv``, ``u.data``, or RecBole's ``*.inter``), Last.fm of HetRec
    2011 (``user_artists.dat``), and LightGCN's pairs (``<name>.train`` and ``<name>.test``, a line ``user item`` each, item ids behind the
    user ids, the split as given). Ids of the first two become 0, 1, ... in rising order after thinning.

    A first line without a number is a header: its names decide which column is the user, the item and the rating (``rating``, ``weight``,
    ``count``, ...), wherever they stand; a timestamp is no rating. Files without a header have user, item and value in this order.

    Modes and batches (int64, float32 and bool; B users or pairs, I items):

    - ``bpr``: training ``user``, ``positive``, ``negative`` (B,): a user uniformly, one of its items, one that it lacks, drawn anew in
      every epoch, as many as there are training pairs. Evaluation ``user`` (B,), ``known`` and ``target`` (B, I) bool.
    - ``neumf``: training ``user``, ``positive`` (B,) and ``negative`` (B, num_negatives), the same in every epoch for a user.
      Evaluation: one held-out item per user, chosen at random, first among ``num_negatives`` others: ``user`` (B,), ``item`` (B, C),
      ``known`` (all False) and ``target`` (B, C) bool.
    - ``autoencoder``: training ``history`` (B, I) float32 of 0 and 1. Evaluation on users that were not trained on: ``user`` (B,), the
      known part of their items as ``history`` and ``known``, the rest as ``target``.

    Validation and test are the same users and items in ``bpr`` with ``val_share: 0`` and in ``neumf``: choose nothing by the one to report
    it by the other.

    Args:
        root: Folder of the data; None: a synthetic set of 200 users and 150 items, with no download.
        format: ``movielens``, ``lastfm``, ``lightgcn``; ``auto`` looks what is there.
        mode: ``bpr``, ``neumf`` or ``autoencoder``.
        min_value: Count a pair only if its rating (or play count) is at least this; None: all.
        min_user_items: Thin out users with fewer items.
        min_item_users: Thin out items with fewer users.
        test_share: Share of each user's items that is held out; in ``autoencoder`` of the held-out users' alone. Not used for ``neumf`` and
            given splits.
        val_share: Share of each user's training items that is held out for validation, in ``bpr``; 0: validate on the test items.
        heldout_users: Share of the users for validation, and as many for test, in ``autoencoder``.
        num_negatives: Items that a user lacks, for each pair, in ``neumf``.
        batch_size: Pairs (users in ``autoencoder``) per process and training step.
        eval_batch_size: Users per process and evaluation batch.
        num_workers: Processes that make batches.
        split_seed: Seed of the synthetic set, of the split and of the fixed negatives.
        seed: Seed of the order and of the draws.

    Attributes:
        num_users: U, after ``setup``.
        num_items: I, after ``setup``.
        train_interactions: Users and items of the training pairs, (E,) int64 tensors, after ``setup``.

    Raises:
        ValueError: A number outside its range.
    """

    def __init__(
        self,
        root: Path | None = None,
        format: Format = "auto",
        mode: Mode = "bpr",
        min_value: float | None = None,
        min_user_items: int = 1,
        min_item_users: int = 1,
        test_share: float = 0.3,
        val_share: float = 0.0,
        heldout_users: float = 0.1,
        num_negatives: int = 100,
        batch_size: int = 512,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        literals(RatingsDataModule, locals())
        within("(0, 1)", "a share", test_share=test_share)
        within("[0, 1)", "a share", val_share=val_share)
        within("(0, 0.5)", "a share", heldout_users=heldout_users)
        at_least(1, min_user_items=min_user_items, min_item_users=min_item_users, num_negatives=num_negatives)
        self.save_hyperparameters()
        self.root = data_path(root)
        self.format, self.mode, self.min_value = format, mode, min_value
        self.min_user_items, self.min_item_users = min_user_items, min_item_users
        self.test_share, self.val_share, self.heldout_users, self.num_negatives = test_share, val_share, heldout_users, num_negatives
        self.split_seed = split_seed
        self.num_users = self.num_items = 0
        self.train_interactions: tuple[Tensor, Tensor] | None = None

    # ---- reading and splitting -------------------------------------------------------------------------------------------------------

    def check_root(self, stage: str = "fit") -> None:
        """Look which layout is there."""
        if self.root is not None:
            find_format(self.root, self.format)

    def setup(self, stage: str) -> None:
        """Read, thin out, split.

        Raises:
            WrongRootError: ``root`` has none of the layouts.
            BrokenRecordError: A line that can't be used.
            ValueError: Nothing is left, or a user has every item.
        """
        if self.train_set is not None:
            return
        rng = np.random.default_rng([self.split_seed, 1])
        train, held = self._read()
        if held is None:
            held, train = self._split(train, rng)
        self.num_users, self.num_items = train.num_users, train.num_items
        own = np.diff(train.starts)
        if self.mode != "autoencoder" and (own >= train.num_items).any():
            user = int(np.argmax(own >= train.num_items))
            raise ValueError(
                f"user {user} has every item of root={str(self.root)!r}, no negative is left: thin out by min_item_users or leave it out"
            )
        if self.mode == "bpr":
            known, validated = train, held
            if self.val_share:
                chosen = hold_out(train, self.val_share, rng)
                validated, train = train.select(chosen), train.select(~chosen)
            self.val_set, self.test_set = _Ranked(train, validated), _Ranked(known, held)
            self.train_set = _Triples(train, self.seed)
        elif self.mode == "neumf":
            fixed, candidates = self._with_candidates(train, held, rng)
            self.train_set, self.val_set, self.test_set = _FixedNegatives(train, fixed), candidates, candidates
        else:
            users = np.flatnonzero(own)
            users = users[rng.permutation(len(users))]
            size = max(round(self.heldout_users * len(users)), 1)
            parts = {"val": users[:size], "test": users[size : 2 * size], "train": users[2 * size :]}
            if not len(parts["train"]):
                raise ValueError(
                    f"{len(users)} users are too few in root={str(self.root)!r} to hold out {size} for validation and {size} for test"
                )
            whole, learners = _union(train, held), np.sort(parts["train"])
            self.val_set, self.test_set = (_Ranked(train, held, np.sort(parts[name]), history=True) for name in ("val", "test"))
            self.train_set = _Histories(whole, learners)
            train = whole.select(np.isin(whole.user, learners))
        self.train_interactions = torch.from_numpy(train.user), torch.from_numpy(train.item)

    def _read(self) -> tuple[Interactions, Interactions | None]:
        """Training pairs and, where the split is given, the held-out ones."""
        if self.root is None:
            pairs = synthetic_interactions(seed=self.split_seed)
            if max(self.min_user_items, self.min_item_users) == 1:
                return pairs, None  # an item that nobody took stays, so that the set has one size for all seeds
            user, item = pairs.user, pairs.item
        else:
            name, files = find_format(self.root, self.format)
            if name == "lightgcn":
                return self._given_split(files)
            user, item, value = read_rows(*files[0], rated=self.min_value is not None)
            if self.min_value is not None:
                user, item = user[value >= self.min_value], item[value >= self.min_value]
        users, user = np.unique(user, return_inverse=True)
        items, item = np.unique(item, return_inverse=True)
        both = Interactions.unique(user, item, len(users), len(items))  # a play may stand there twice: it counts once
        user, item = keep_frequent(both.user, both.item, self.min_user_items, self.min_item_users)
        if not len(user):
            raise ValueError(
                f"nothing is left of {self.root}: no pair has min_value={self.min_value}, min_user_items={self.min_user_items} and "
                f"min_item_users={self.min_item_users}; lower them"
            )
        users, user = np.unique(user, return_inverse=True)
        items, item = np.unique(item, return_inverse=True)
        return Interactions.unique(user, item, len(users), len(items)), None

    def _given_split(self, files: list[tuple[Path, _Layout]]) -> tuple[Interactions, Interactions]:
        if self.min_value is not None or max(self.min_user_items, self.min_item_users) > 1:
            raise ValueError(f"{files[0][0]} has its split already: leave min_value, min_user_items and min_item_users at their defaults")
        parts = [read_rows(file, layout)[:2] for file, layout in files]
        num_users = int(min(item.min() for _, item in parts))
        for (file, _), (user, _) in zip(files, parts, strict=True):
            if (user >= num_users).any():
                line = int(np.argmax(user >= num_users)) + 1
                raise BrokenRecordError(
                    file,
                    f"line {line}",
                    f"user {user[line - 1]} is no smaller than item {num_users}, the first one: item ids must follow the user ids",
                )
        num_items = int(max(item.max() for _, item in parts)) + 1 - num_users
        train, held = (Interactions.unique(user, item - num_users, num_users, num_items) for user, item in parts)
        return train, held.select(~np.isin(held.user * num_items + held.item, train.user * num_items + train.item))

    def _split(self, pairs: Interactions, rng: np.random.Generator) -> tuple[Interactions, Interactions]:
        chosen = hold_out(pairs, self.test_share, rng, leave_one=self.mode == "neumf")
        if not chosen.any():
            raise ValueError(f"test_share={self.test_share} holds nothing out of {len(pairs)} pairs of root={str(self.root)!r}: raise it")
        return pairs.select(chosen), pairs.select(~chosen)

    # ---- batches ---------------------------------------------------------------------------------------------------------------------

    def _with_candidates(self, train: Interactions, held: Interactions, rng: np.random.Generator) -> tuple[Ints, _Candidates]:
        """Fixed negatives of each user for training, (U, N), and one held-out item before N others of users that have one."""
        both = _union(train, held)
        if (np.diff(both.starts) >= train.num_items).any():
            raise ValueError(
                f"a user has every item of root={str(self.root)!r}, no candidate is left: thin out by min_item_users or leave it out"
            )
        count = self.num_negatives
        everybody = np.repeat(np.arange(train.num_users), count)
        fixed = train.draw_others(everybody, rng.random(len(everybody))).reshape(-1, count)
        first = held.starts[:-1][np.diff(held.starts) > 0]  # of a given split the first held-out item
        user = held.user[first]
        others = both.draw_others(np.repeat(user, count), rng.random(len(user) * count)).reshape(-1, count)
        return fixed, _Candidates(user, np.concatenate([held.item[first, None], others], axis=1))


__all__ = ["Interactions", "RatingsDataModule", "read_rows", "synthetic_interactions"]
