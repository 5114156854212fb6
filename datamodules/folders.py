"""Folders of data: where a path points, and which files in a folder count."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from lit_methods.datamodules.errors import BrokenRecordError

COMMON = "LIT_METHODS_DATA"  # environment variable: the folder that stands for data/
_OF_SYSTEMS = frozenset({"Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"})


def counts(name: str) -> bool:
    """Whether a name in a folder is one of data: not hidden (``.DS_Store``, macOS's ``._*``) and none that a system leaves there."""
    return not name.startswith(".") and name not in _OF_SYSTEMS


def listed(folder: Path, pattern: str = "*", endings: Sequence[str] = ()) -> list[Path]:
    """Files and folders of data in a folder, sorted; hidden ones and what systems leave there don't count.

    Args:
        folder: An existing folder; its own name may be hidden.
        pattern: As for ``Path.glob``; with ``**/`` the folders on the way count, too.
        endings: Endings in small letters that a file may have, such as ``.png``; none: any.

    Raises:
        BrokenRecordError: This user may not read the folder.
    """
    if folder.is_dir() and not os.access(
        folder, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):  # glob would find nothing in it, and say nothing
        raise BrokenRecordError(folder, "folder", f"may not be read by this user: chmod u+rx {folder}, or ask its owner")
    return sorted(
        path
        for path in folder.glob(pattern)
        if all(map(counts, path.relative_to(folder).parts)) and (not endings or path.suffix.lower() in endings)
    )


@overload
def user_path(path: None) -> None: ...
@overload
def user_path(path: Path | str) -> Path: ...
def user_path(path: Path | str | None) -> Path | None:
    """A path that a user gave, with ``~`` replaced."""
    return None if path is None else Path(path).expanduser()


@overload
def data_path(path: None) -> None: ...
@overload
def data_path(path: Path | str) -> Path: ...
def data_path(path: Path | str | None) -> Path | None:
    """Where the data lie that a user's path names.

    ``~`` is replaced. A relative path that isn't there in the current folder is looked for in the folder that the environment variable
    LIT_METHODS_DATA names, which stands for a leading ``data/``: ``data/imagenet`` is ``$LIT_METHODS_DATA/imagenet``.

    Args:
        path: A file or a folder; None stays None.
    """
    given = user_path(path)
    common = os.environ.get(COMMON)
    if given is None or not common or given.is_absolute() or given.exists():
        return given
    below = Path(common).expanduser()
    tried = [below / (given.relative_to("data") if given.parts[:1] == ("data",) else given), below / given]
    return next((place for place in tried if place.exists()), tried[0])


__all__ = ["COMMON", "counts", "data_path", "listed", "user_path"]
