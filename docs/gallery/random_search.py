"""The picture of random search: the loss of every candidate before training, in the order of the search, and the best so far."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1152, 648, 110, 1112, 110, 560  # pixels
BACKGROUND, GRID, TEXT = (13, 20, 33), (90, 104, 130), (214, 222, 235)
CANDIDATE, BEST = (125, 180, 240), (250, 176, 70)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/random_search.yaml``.

    Args:
        run: The run's folder, with ``checkpoints/last.ckpt``.
    """
    from lit_methods.callbacks.sparsity.random_search.core import best_so_far

    callbacks = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    scores = next(state["scores"] for key, state in callbacks.items() if key.startswith("RandomSearch"))
    lowest, places = best_so_far(scores)
    least, most = float(scores.min()), float(scores.max())

    def at(candidate: float, score: float) -> tuple[float, float]:
        across = LEFT + (RIGHT - LEFT) * (candidate + 0.5) / len(scores)
        return across, BOTTOM - (BOTTOM - TOP) * (score - least) / (most - least)

    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    pen.text((LEFT, 20), f"loss of {len(scores)} random sub-networks before training", font=font, fill=CANDIDATE)
    pen.text((LEFT, 48), f"and the best so far: candidate {int(places[-1])} is the one that is trained", font=font, fill=BEST)
    for share in (0.0, 0.5, 1.0):
        value = least + share * (most - least)
        _, height = at(0, value)
        pen.line([(LEFT, height), (RIGHT, height)], fill=GRID)
        pen.text((LEFT - 76, height - 12), f"{value:.3f}", font=font, fill=TEXT)
    for candidate, score in enumerate(scores.tolist()):
        x, y = at(candidate, score)
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=CANDIDATE)
    steps = [at(candidate + shift, score) for candidate, score in enumerate(lowest.tolist()) for shift in (-0.5, 0.5)]
    pen.line(steps, fill=BEST, width=4)
    for candidate in (0, len(scores) // 2, len(scores) - 1):
        pen.text((at(candidate, least)[0] - 10, BOTTOM + 14), str(candidate), font=font, fill=TEXT)
    pen.text(((LEFT + RIGHT) // 2 - 60, BOTTOM + 44), "candidate", font=font, fill=TEXT)
    return canvas
