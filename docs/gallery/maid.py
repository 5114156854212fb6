"""The picture of MAID: upper loss and accuracy over lower iterations."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1152, 648, 90, 1090, 110, 560  # pixels
BACKGROUND, GRID, TEXT = (13, 20, 33), (90, 104, 130), (214, 222, 235)
LOSS, EPSILON = (250, 176, 70), (125, 180, 240)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/maid.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl``.
    """
    from lit_methods.reports.page import series_by_name
    from lit_methods.reports.record import load_run

    series = series_by_name(load_run(run).history)
    at = dict(zip(*series["bilevel/lower_iterations"], strict=True))
    curves = {}
    for name in ("bilevel/loss", "bilevel/epsilon"):
        points = [(at[step], value) for step, value in zip(*series[name], strict=True) if step in at and value > 0]
        curves[name] = np.array(points)
    longest = max(float(points[:, 0].max()) for points in curves.values())
    values = np.log10(np.concatenate([points[:, 1] for points in curves.values()]))
    low, high = np.floor(values.min()), np.ceil(values.max())
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    pen.text((LEFT, 20), "upper loss of accepted steps", font=font, fill=LOSS)
    pen.text((LEFT, 48), "accuracy epsilon of the lower solution: falls where no step was found, rises after one", font=font, fill=EPSILON)

    def place(x: float, value: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * x / longest, BOTTOM - (BOTTOM - TOP) * (np.log10(value) - low) / (high - low)

    for power in range(int(low), int(high) + 1):
        _, y = place(0, 10.0**power)
        pen.line([(LEFT, y), (RIGHT, y)], fill=GRID)
        pen.text((LEFT - 74, y - 12), f"1e{power}", font=font, fill=TEXT)
    for name, colour in (("bilevel/loss", LOSS), ("bilevel/epsilon", EPSILON)):
        pen.line([place(*point) for point in curves[name]], fill=colour, width=3)
    for share in (0.0, 0.5, 1.0):
        pen.text((place(share * longest, 10.0**low)[0] - 24, BOTTOM + 14), f"{share * longest:,.0f}", font=font, fill=TEXT)
    pen.text(((LEFT + RIGHT) // 2 - 70, BOTTOM + 44), "lower iterations", font=font, fill=TEXT)
    return canvas
