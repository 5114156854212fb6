"""The picture of CIRIM: the last pictures of a run's validation, with headings."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, TITLE, BACKGROUND, TEXT = 1152, 44, (13, 20, 33), (214, 222, 235)
WORDS = ("target", "reconstruction", "error x 4", "zero-filled")


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/cirim.yaml``.

    Args:
        run: The run's folder, with ``media/mri-pictures-*.png``.
    """
    newest = max((run / "media").glob("mri-pictures-*.png"), key=lambda file: file.stat().st_mtime)
    picture = Image.open(newest).convert("RGB")
    picture = picture.resize((WIDTH, WIDTH * picture.height // picture.width), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (WIDTH, TITLE + picture.height), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    for number, word in enumerate(WORDS):
        pen.text((number * WIDTH // len(WORDS) + 10, 8), word, font=font, fill=TEXT)
    canvas.paste(picture, (0, TITLE))
    return canvas
