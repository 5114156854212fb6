"""Scene lists of nuScenes: the official train / val split and SLidR's split for pretraining.

Sources: the official split of the nuScenes v1.0 release, and the split released with SLidR (arXiv:2203.16258), which holds 100 of the 700
training scenes back for choosing hyperparameters of the pretraining.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.reading import read_json

Split = Literal["train", "val", "test", "slidr600"]

OFFICIAL_VAL = """
3 12-18 35 36 38 39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629 630 632-638 770 771 775 777 778 780-784 794-800 802
904-917 919-931 962 963 966-969 971 972 1059-1073
"""
MINI_VAL = "103 916"
SLIDR_HELD_OUT = """
8 9 19 29 32 42 45 49 52 54 56 66 67 73 131 152 166 168 183 190 194 208 210 211 241 243 248 259 260 261 287 292 297 305 306 350 352 358
361
365 368 377 388 391 395 413 427 428 438 444 452 453 459 463 464 475 513 533 544 575 587 589 642 652 658 669 678 687 701 703 706 710 715
726
735 740 758 786 790 804 806 847 856 868 882 897 899 976 996 1012 1015 1016 1018 1020 1024 1044 1058 1094 1098 1107
"""


def scene_names(ranges: str) -> set[str]:
    """``"3 12-14"`` -> ``{"scene-0003", "scene-0012", "scene-0013", "scene-0014"}``."""
    names: set[str] = set()
    for part in ranges.split():
        first, _, last = part.partition("-")
        names.update(f"scene-{number:04d}" for number in range(int(first), int(last or first) + 1))
    return names


def choose_scenes(names: Sequence[str], split: Split, version: str, root: Path) -> list[str]:
    """Scenes of a split, in the order of the scene table.

    A file ``splits.json`` in the root ({"train": [scene names], "val": [...]}, and "test" and "slidr600" where they differ) wins over the
    official lists; a split that it doesn't list is empty, except that "slidr600" is then the same as "train". "slidr600" differs from
    "train" for v1.0-trainval alone.

    Args:
        names: Names of all scenes in the tables.
        split: Name of the split.
        version: Folder of the tables, such as ``v1.0-trainval``. The scenes of ``v1.0-test`` are all "test".
        root: Folder of the data set.

    Returns:
        Names, possibly none.

    Raises:
        BrokenRecordError: ``splits.json`` can't be read or names a scene that isn't in the tables.
    """
    own = root / "splits.json"
    if os.path.lexists(own):
        listed = read_json(own, split)
        try:
            wanted = set(listed.get(split, listed.get("train", []) if split == "slidr600" else []))
        except (AttributeError, TypeError) as problem:
            raise BrokenRecordError(own, split, f"expected an object of lists of scene names ({problem})") from problem
        if unknown := sorted(wanted - set(names)):
            raise BrokenRecordError(own, split, f"scene {unknown[0]!r} is not in {version}/scene.json")
        return [name for name in names if name in wanted]
    if version.endswith("test"):
        return list(names) if split == "test" else []
    if split == "test":
        return []
    val = scene_names(MINI_VAL if version.endswith("mini") else OFFICIAL_VAL)
    held_out = scene_names(SLIDR_HELD_OUT) if split == "slidr600" and not version.endswith("mini") else set()
    return [name for name in names if (name in val) == (split == "val") and name not in held_out]
