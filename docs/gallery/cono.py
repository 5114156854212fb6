"""The picture of CoNo: two long videos of the run, a line for each piece, enlarged."""

from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1152, 648
BACKGROUND, LINE = (13, 20, 33), (230, 60, 50)
PIECES = ((0, 16), (16, 26), (26, 36))  # frames
FRAME, GAP, SCALE = 16, 1, 4  # pixels of a frame and between two in the strip; how much they are enlarged


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/cono.yaml``.

    Args:
        run: The run's folder, with the strip among its media.
    """
    newest = max((run / "media").glob("cono-strip-*.png"), key=lambda file: file.stat().st_mtime)
    strip = Image.open(newest).convert("RGB")
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    step, side = FRAME + GAP, FRAME * SCALE
    y = 66
    for video in range(2):
        for piece, (start, end) in enumerate(PIECES):
            for place, frame in enumerate(range(start, end)):
                x0, y0 = GAP + frame * step, GAP + video * step
                picture = strip.crop((x0, y0, x0 + FRAME, y0 + FRAME)).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(picture, (32 + place * (side + 4), y))
            if piece:
                canvas.paste(LINE, (24, y, 28, y + side))
            y += side + 8
        y += 88
    return canvas
