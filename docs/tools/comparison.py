"""Keeps the figures of a comparison in ``docs/comparisons/``, and draws the picture that a page shows of it.

A comparison whose file says ``over`` is drawn as its frontier, any other one as a row for each arm.

    python docs/tools/comparison.py runs/claims/compare-sparse_autoencoders/compare.json    # keep what `lit compare` has written; draw it
    python docs/tools/comparison.py                                                         # draw all that are kept

The file has the keys of ``compare.json`` that the picture needs; its name is the comparison's.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_methods.claims.comparison import comparison_plot, frontier_plot
from lit_methods.files import write_atomically

KEPT = Path(__file__).resolve().parents[1] / "comparisons"
KEYS = ("slug", "sentence", "metric", "higher", "over", "seeds", "values", "reports")


def keep(file: Path) -> Path:
    """Copy what the picture needs of a ``compare.json``; gives the kept file."""
    summary = json.loads(file.read_text(encoding="utf-8"))
    if missing := [key for key in KEYS if key not in summary]:
        sys.exit(f"{file} has no {', '.join(missing)}: give the compare.json that lit compare has written")
    kept = {key: summary[key] for key in KEYS}
    place = KEPT / f"{kept['slug']}.json"
    write_atomically(place, json.dumps(kept, indent=2) + "\n")
    return place


def draw(kept: Path) -> Path:
    """Draw the picture beside a kept file; gives its path."""
    summary = json.loads(kept.read_text(encoding="utf-8"))
    picture = kept.with_name(f"{kept.stem}_frontier.svg" if summary["over"] else f"{kept.stem}.svg")
    write_atomically(picture, frontier_plot(summary) if summary["over"] else comparison_plot(summary))
    return picture


def main(words: Sequence[str]) -> None:
    """Keep the given files, then draw them; without any, draw all that are kept."""
    for file in [keep(Path(word)) for word in words] or sorted(KEPT.glob("*.json")):
        print(file, draw(file))


if __name__ == "__main__":
    main(sys.argv[1:])
