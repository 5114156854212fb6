"""The picture of video action detection: two clips of the run, frame by frame, with outlines, probability and attention."""

from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1152, 648
BACKGROUND = (13, 20, 33)
FRAMES, ROWS, GAP = 8, 3, 2  # of a clip: frames, rows, pixels of white between frames
SIDE = 100  # pixels of a frame in the picture


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/video_action_detection.yaml``.

    Args:
        run: The run's folder, with the strip of clips among its media.
    """
    newest = max((run / "media").glob("video_detector-clips-*.png"), key=lambda file: file.stat().st_mtime)
    strip = Image.open(newest).convert("RGB")
    step = strip.width // FRAMES
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    left = (WIDTH - FRAMES * (SIDE + 4)) // 2
    y = 12
    for row in range(2 * ROWS):
        for frame in range(FRAMES):
            box = (frame * step + GAP // 2, row * step + GAP // 2, (frame + 1) * step - GAP // 2, (row + 1) * step - GAP // 2)
            canvas.paste(strip.crop(box).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left + frame * (SIDE + 4), y))
        y += SIDE + (12 if row == ROWS - 1 else 4)
    return canvas
