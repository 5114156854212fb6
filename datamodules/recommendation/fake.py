"""Tiny sets of ratings in the layouts of MovieLens, RecBole, Last.fm and LightGCN."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_methods.datamodules.fake import Arguments, Writer, text

PAIRS = tuple((user, item) for user in range(6) for item in range(user, user + 4))
FILES: dict[str, tuple[str, str]] = {  # file: separator, header
    "ratings.dat": ("::", ""),
    "ratings.csv": (",", "userId,movieId,rating,timestamp"),
    "u.data": ("\t", ""),
    "fake.inter": ("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
    "user_artists.dat": ("\t", "userID\tartistID\tweight"),
}


def ratings(root: Path, file: str = "ratings.dat", pairs: Sequence[tuple[int, int]] = PAIRS, value: str = "3.5") -> None:
    """One file of ratings.

    Args:
        root: Folder to write to.
        file: A key of :data:`FILES`.
        pairs: (user, item), as ids in the file.
        value: The rating of all.
    """
    separator, header = FILES[file]
    text(root / file, *([header] if header else []), *(separator.join((str(u), str(i), value, "978300760")) for u, i in pairs))


def lightgcn(
    root: Path, train: Sequence[tuple[int, int]] = ((0, 3), (0, 4), (1, 3), (2, 5)), test: Sequence[tuple[int, int]] = ((0, 6), (1, 4))
) -> None:
    """``fake.train`` and ``fake.test``, a pair of user and item in each line; the ids of items go on behind those of users."""
    for part, pairs in (("train", train), ("test", test)):
        text(root / f"fake.{part}", *(f"{user} {item}" for user, item in pairs))


def _ratings(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    users, items = sizes.get("num_users", 40), sizes.get("num_items", 30)
    each = max(5, arguments["min_user_items"], arguments["min_item_users"])  # items of each user
    count = max(users, -(-items // each)) if "num_users" not in sizes else users
    needed = max(each, -(-items // count))  # enough that every item is somebody's
    pairs = [(user, (user * needed + k) % items) for user in range(count) for k in range(needed)]
    if arguments["format"] == "lightgcn":
        lightgcn(arguments["root"], [(u, count + i) for u, i in pairs], [(u, count + (u * needed + needed) % items) for u in range(count)])
    else:
        file = "user_artists.dat" if arguments["format"] == "lastfm" else "ratings.dat"
        ratings(arguments["root"], file, [(u + 1, i + 1) for u, i in pairs])
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"RatingsDataModule": _ratings}
__all__ = ["FAKES", "FILES", "PAIRS", "lightgcn", "ratings"]
