"""The picture of CIRIM: the pictures of a run's validations, one below the other."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, BACKGROUND, TEXT = 640, (13, 20, 33), (214, 222, 235)
ROWS, TITLE = 4, 34  # pictures, pixels of the headings


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/cirim.yaml``.

    Args:
        run: The run's folder, with its media.
    """
    files = sorted((run / "media").rglob("*pictures*"), key=lambda file: (len(file.name), file.name))
    chosen = [files[k] for k in np.unique(np.linspace(0, len(files) - 1, ROWS).round().astype(int))]
    rows = []
    for file in chosen:
        picture = Image.open(file).convert("RGB")
        rows.append(picture.resize((WIDTH, WIDTH * picture.height // picture.width), Image.Resampling.NEAREST))
    canvas = Image.new("RGB", (WIDTH, TITLE + sum(row.height + 4 for row in rows)), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for number, word in enumerate(("target", "reconstruction", "error x 4", "zero-filled")):
        pen.text((number * WIDTH // 4 + 8, 6), word, font=font, fill=TEXT)
    top = TITLE
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height + 4
    return canvas
