"""The picture of FLAIR: digits with a hole, filled, and whole; below them one digit over the times of the optimisation."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP = 1152, 648, 250, 40  # pixels
BACKGROUND, TEXT, NOTE = (13, 20, 33), (214, 222, 235), (250, 176, 70)
ROWS = ("measured", "restored", "true")
SIDE = 108  # of a digit


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/flair.yaml``.

    Args:
        run: The run's folder, with ``media/``.
    """
    images, strip = (
        max((run / "media").glob(f"flair-{name}-*.png"), key=lambda file: file.stat().st_mtime) for name in ("images", "strip")
    )
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(24)
    shown = Image.open(images).convert("RGB").resize((8 * SIDE, 3 * SIDE), Image.Resampling.NEAREST)
    canvas.paste(shown, (LEFT, TOP))
    for row, name in enumerate(ROWS):
        pen.text((40, TOP + row * SIDE + SIDE // 2 - 14), name, font=font, fill=TEXT)
    below = TOP + 3 * SIDE + 70
    canvas.paste(Image.open(strip).convert("RGB").resize((8 * SIDE, SIDE), Image.Resampling.NEAREST), (LEFT, below))
    pen.text((40, below + SIDE // 2 - 14), "the first one", font=font, fill=NOTE)
    pen.text((LEFT, below + SIDE + 14), "t near 1: the prior is asked with much noise", font=font, fill=NOTE)
    pen.text((LEFT + 8 * SIDE - 140, below + SIDE + 14), "t near 0.18", font=font, fill=NOTE)
    return canvas
