"""The picture of mask spreading: a room by given labels, by the masks of a view, by the labels after training, and by true labels."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lit_methods.lidar.pictures import class_colors

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, TEXT, BARE = (13, 20, 33), (214, 222, 235), (62, 72, 92)
SCENE = 2  # of the training rooms: one with many things


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sam3d_weak.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and the label store ``labels``.
    """
    import yaml

    from lit_methods import LabelStore
    from lit_methods.datamodules import RoomsDataModule

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    data = RoomsDataModule(**config | {"labels_folder": None})
    data.setup("fit")
    store, room = LabelStore(run / "labels"), data.training_scene(SCENE)
    given, now = store.original(SCENE)[0], store.current(SCENE)[0]
    view = room.masks[(room.masks >= 0).sum(1).argmax()]
    palette = class_colors(len(data.class_names))
    masks = class_colors(int(view.max()) + 1)[np.random.default_rng(3).permutation(int(view.max()) + 1)]
    panels = [
        ("ten labelled points", coloured(given, palette), np.where(given != 255, 5, 1)),
        ("masks of one of three views", coloured(np.where(view >= 0, view, 255), masks), None),
        ("labels spread over the masks, after training", coloured(now, palette), np.where(given != 255, 5, 1)),
        ("true labels", coloured(room.labels, palette), None),
    ]
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    writer, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for place, (title, colours, sizes) in enumerate(panels):
        left, top = place % 2 * WIDTH // 2, place // 2 * HEIGHT // 2
        canvas.paste(Image.fromarray(seen(room.points[:, :3], colours, sizes)), (left, top))
        writer.text((left + 16, top + 10), title, TEXT, font)
    return canvas


def coloured(labels: NDArray[np.integer[Any]], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 3) colours of labels, those outside the palette bare."""
    inside = (labels >= 0) & (labels < len(palette)) & (labels != 255)
    return np.where(inside[:, None], palette[np.where(inside, labels, 0)], np.array(BARE, dtype=np.uint8)).astype(np.uint8)


def seen(points: NDArray[np.floating[Any]], colours: NDArray[np.uint8], sizes: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    """A cloud from obliquely above, without perspective; near points cover far ones, and large ones all."""
    width, height = WIDTH // 2, HEIGHT // 2
    away = points - (points.min(0) + points.max(0)) / 2
    turn, tilt = np.radians(35), np.radians(55)
    x = away[:, 0] * np.cos(turn) - away[:, 1] * np.sin(turn)
    y = away[:, 0] * np.sin(turn) + away[:, 1] * np.cos(turn)
    up, near = y * np.sin(tilt) + away[:, 2] * np.cos(tilt), -y * np.cos(tilt) + away[:, 2] * np.sin(tilt)
    scale = min((width - 40) / np.ptp(x), (height - 60) / np.ptp(up))
    column, row = (width / 2 + scale * x).astype(int), (height / 2 + 12 - scale * up).astype(int)
    picture = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
    radius = np.ones(len(points), dtype=np.int64) if sizes is None else sizes
    for size in np.unique(radius):
        chosen = np.flatnonzero(radius == size)
        chosen = chosen[np.argsort(near[chosen])]
        for dy in range(-size, size + 1):
            for dx in range(-size, size + 1):
                rows, columns = (row[chosen] + dy).clip(0, height - 1), (column[chosen] + dx).clip(0, width - 1)
                picture[rows, columns] = colours[chosen]
    return picture
