"""The picture of SparseD: blocks of keys that each head keeps for each block of queries, with words on both axes."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP = 1152, 648, 120, 90  # pixels
BACKGROUND, TEXT, QUIET = (13, 20, 33), (214, 222, 235), (125, 138, 160)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sparsed.yaml``.

    Args:
        run: The run's folder, with the callback's picture in ``media/``: a row of squares per layer, a square per head.
    """
    squares = Image.open(max((run / "media").glob("sparsed-pattern-*.png"), key=lambda path: path.stat().st_mtime)).convert("RGB")
    room = (WIDTH - LEFT - 40, HEIGHT - TOP - 70)
    scale = min(room[0] / squares.width, room[1] / squares.height)
    size = round(scale * squares.width), round(scale * squares.height)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    canvas.paste(squares.resize(size, Image.Resampling.NEAREST), (LEFT, TOP))
    pen, large, small = ImageDraw.Draw(canvas), ImageFont.load_default(22), ImageFont.load_default(18)
    pen.text((LEFT, 18), "blocks that each head keeps, chosen once and used in all later steps", font=large, fill=TEXT)
    pen.text((LEFT, 52), "dark: computed. In each square: blocks of keys across, blocks of queries downwards", font=small, fill=QUIET)
    for layer in range(2):
        pen.text((24, TOP + size[1] * (layer + 0.5) / 2 - 12), f"layer {layer + 1}", font=small, fill=TEXT)
    for head in range(4):
        pen.text((LEFT + size[0] * (head + 0.5) / 4 - 28, TOP + size[1] + 12), f"head {head + 1}", font=small, fill=TEXT)
    return canvas
