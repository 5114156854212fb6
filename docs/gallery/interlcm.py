"""The picture of InterLCM: degraded digits, what comes of them from three start steps, and the clean ones."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP = 1152, 648, 270, 24  # pixels
BACKGROUND, TEXT, NOTE = (13, 20, 33), (214, 222, 235), (250, 176, 70)
ROWS = (("degraded", ""), ("from t = 759", "3 calls"), ("from t = 499", "2 calls"), ("from t = 259", "1 call"), ("clean", ""))


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/interlcm.yaml``.

    Args:
        run: The run's folder, with ``media/``.
    """
    media = max((run / "media").glob("interlcm-images-*.png"), key=lambda file: file.stat().st_mtime)
    whole = Image.open(media).convert("RGB")
    shown = whole.crop((0, 0, whole.width * 7 // 8, whole.height))  # seven of the eight images have room
    height = HEIGHT - 2 * TOP
    width = shown.width * height // shown.height
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    canvas.paste(shown.resize((width, height), Image.Resampling.NEAREST), (LEFT, TOP))
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(26), ImageFont.load_default(20)
    for row, (name, note) in enumerate(ROWS):
        middle = TOP + height * (2 * row + 1) // (2 * len(ROWS))
        pen.text((40, middle - 26), name, font=font, fill=TEXT)
        pen.text((40, middle + 8), note, font=small, fill=NOTE)
    return canvas


__all__ = ["draw"]
