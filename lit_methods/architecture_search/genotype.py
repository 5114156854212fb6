"""Genotypes: the cells that a search found, as text, as a file and as a picture."""

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.architecture_search.space import OPERATIONS
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.reading import read_json, read_tensors
from lit_methods.files import write_json

Edge = tuple[str, int]
_SHORT = {"conv_3x3": "3", "conv_5x5": "5", "skip_connect": "skip", "_pool_3x3": "_pool"}
_COLORS = {"max": (176, 122, 0), "avg": (176, 122, 0), "skip": (110, 110, 110), "sep": (0, 92, 175), "dil": (0, 130, 80)}


@dataclass(frozen=True)
class Genotype:
    """Two cells, as a search found them.

    Attributes:
        normal: (operation, predecessor), two for each node. Predecessors 0 and 1 are the cell's inputs, 2 is the first node.
        reduce: The same for cells that halve the size.
        normal_concat: Predecessors whose outputs, side by side, are the cell's output.
        reduce_concat: The same.
    """

    normal: tuple[Edge, ...]
    reduce: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce_concat: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Lists and names alone, for a file."""
        edges = {kind: [list(edge) for edge in getattr(self, kind)] for kind in ("normal", "reduce")}
        return edges | {kind: list(getattr(self, kind)) for kind in ("normal_concat", "reduce_concat")}

    def save(self, path: Path) -> None:
        """Write a JSON file, which :func:`read_genotype` reads."""
        write_json(path, self.to_dict())

    def counts(self) -> dict[str, int]:
        """Operation -> how often it stands in the two cells."""
        every = [name for name, _ in (*self.normal, *self.reduce)]
        return {name: every.count(name) for name in OPERATIONS if name != "none"}


def _edges(text: str) -> tuple[Edge, ...]:
    names = {"sep3": "sep_conv_3x3", "sep5": "sep_conv_5x5", "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5", "skip": "skip_connect"}
    names |= {"max": "max_pool_3x3", "avg": "avg_pool_3x3"}
    return tuple((names[word.split("<")[0]], int(word.split("<")[1])) for word in text.split())


_ALL = (2, 3, 4, 5)
KNOWN = {
    "dass_10": Genotype(
        _edges("dil3<1 dil5<0 sep5<0 dil5<1 sep5<0 sep3<3 sep3<2 dil5<0"),
        _edges("skip<1 skip<0 dil5<1 dil5<2 dil5<2 dil5<3 dil5<3 skip<0"),
        _ALL,
        _ALL,
    ),
    "dass_5": Genotype(
        _edges("sep5<0 skip<1 dil5<1 sep3<2 dil3<2 sep3<0 sep3<2 sep3<0"),
        _edges("sep3<0 avg<1 sep3<0 sep5<2 sep5<1 sep5<2 dil3<1 dil3<2"),
        _ALL,
        _ALL,
    ),
}
"""Cells that the authors' repository names, found on CIFAR-10 with 10 % and with 5 % of the weights."""


def _cell(found: Any, kind: str, path: Path) -> tuple[tuple[Edge, ...], tuple[int, ...]]:
    edges, concat = found.get(kind), found.get(f"{kind}_concat")
    if not isinstance(edges, list) or not edges or len(edges) % 2:
        raise BrokenRecordError(path, kind, f"is {edges!r}: give a list of [operation, predecessor], two for each node")
    for place, edge in enumerate(edges):
        field, node = f"{kind}[{place}]", place // 2
        if not isinstance(edge, list) or len(edge) != 2 or not isinstance(edge[0], str) or type(edge[1]) is not int:
            raise BrokenRecordError(path, field, f'is {edge!r}: give [operation, predecessor], such as ["sep_conv_3x3", 0]')
        if edge[0] not in OPERATIONS or edge[0] == "none":
            near = difflib.get_close_matches(edge[0], OPERATIONS[1:], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BrokenRecordError(path, field, f"unknown operation {edge[0]!r}: {hint}There are {', '.join(OPERATIONS[1:])}")
        if not 0 <= edge[1] < 2 + node:
            raise BrokenRecordError(path, field, f"predecessor {edge[1]} doesn't come before node {node}: give 0 to {1 + node}")
    nodes = len(edges) // 2
    if not isinstance(concat, list) or not concat or any(type(index) is not int or not 2 <= index < 2 + nodes for index in concat):
        raise BrokenRecordError(path, f"{kind}_concat", f"is {concat!r}: give a list of nodes from 2 to {1 + nodes}")
    return tuple((edge[0], edge[1]) for edge in edges), tuple(concat)


def read_genotype(source: str | Path) -> Genotype:
    """A genotype by its name or out of a file.

    Args:
        source: ``dass_10`` or ``dass_5``, the authors' cells; a JSON file such as a search writes, ``genotype.json``; or the checkpoint of
            a search, a file whose name ends in ``.ckpt``.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: Its content is no genotype: an unknown operation, a predecessor that isn't there, ...
    """
    if str(source) in KNOWN:
        return KNOWN[str(source)]
    path = Path(source)
    known = f"give a file that a search wrote, such as runs/dass/.../genotype.json, or one of {', '.join(KNOWN)}"
    if path.suffix == ".ckpt":
        content = read_tensors(path, path, "genotype", known, known)
        found = content.get("dass", {}).get("genotype") if isinstance(content, dict) else None
        if found is None:
            raise BrokenRecordError(path, "genotype", f"is the checkpoint of something else than a search: {known}")
    else:
        found = read_json(path, "genotype", known)
    if not isinstance(found, dict):
        raise BrokenRecordError(path, "genotype", f"is a {type(found).__name__}, no object with normal and reduce: {known}")
    (normal, normal_concat), (reduce, reduce_concat) = _cell(found, "normal", path), _cell(found, "reduce", path)
    return Genotype(normal, reduce, normal_concat, reduce_concat)


def describe(genotype: Genotype) -> str:
    """Both cells in words."""
    kinds = {kind: ", ".join(f"{name} of {source}" for name, source in getattr(genotype, kind)) for kind in ("normal", "reduce")}
    return "; ".join(f"{kind} cell: {words}" for kind, words in kinds.items())


def _short(name: str) -> str:
    for long, short in _SHORT.items():
        name = name.replace(long, short)
    return name.replace("_", " ")


def draw_genotype(genotype: Genotype) -> NDArray[np.uint8]:
    """Both cells as a picture: inputs and nodes in a row, a node's stronger input as an arc above, the other one below.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    from PIL import Image, ImageDraw

    gap, border, rise = 110, 60, 42
    nodes = max(len(genotype.normal), len(genotype.reduce)) // 2
    width, half = 2 * border + gap * (nodes + 2), 30 + rise * (nodes + 1) // 2 + 40
    image = Image.new("RGB", (width, 4 * half + 40), "white")
    pen = ImageDraw.Draw(image)
    for row, kind in enumerate(("normal", "reduce")):
        base = half + 25 + row * (2 * half + 15)
        pen.text((8, base - half - 8), f"{kind} cell", fill="black")
        edges, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        for place, (name, source) in enumerate(edges):
            target, up = place // 2 + 2, place % 2 == 0
            left, right, height = border + gap * source, border + gap * target, 14 + rise * (target - source) // 2
            color = _COLORS.get(name.split("_")[0], (0, 0, 0))
            pen.arc((left, base - height, right, base + height), *((180, 360) if up else (0, 180)), fill=color, width=2)
            y = base - height if up else base + height
            words = _short(name)
            size = pen.textlength(words)
            middle = (left + right) / 2
            pen.rectangle((middle - size / 2 - 2, y - 7, middle + size / 2 + 2, y + 7), fill="white")
            pen.text((middle - size / 2, y - 6), words, fill=color)
        for place in range(len(edges) // 2 + 2):
            x = border + gap * place
            word = f"in {place}" if place < 2 else f"{place}"
            shade = (225, 225, 225) if place < 2 else (255, 236, 179) if place in concat else (255, 255, 255)
            pen.ellipse((x - 17, base - 13, x + 17, base + 13), fill=shade, outline="black")
            pen.text((x - pen.textlength(word) / 2, base - 6), word, fill="black")
        x = border + gap * (len(edges) // 2 + 2) - 50
        pen.text((x, base - 6), "-> yellow ones", fill="black")
    return np.asarray(image, dtype=np.uint8).copy()


def draw_shares(shares: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Shares of the operations as a picture: a row for each edge, a column for each operation, dark for 1; a block for each cell."""
    tallest = max(len(block) for block in shares.values())
    blocks = []
    for block in shares.values():
        padded = np.full((tallest, block.shape[1] + 1, 3), 255.0)
        padded[: len(block), :-1] = (255 * (1 - block))[..., None]
        blocks.append(padded)
    cells = np.concatenate(blocks, axis=1)[:, :-1]
    size = max(1, math.ceil(256 / max(cells.shape[:2])))
    return cells.round().astype(np.uint8).repeat(size, 0).repeat(size, 1)


__all__ = ["KNOWN", "Genotype", "describe", "draw_genotype", "draw_shares", "read_genotype"]
