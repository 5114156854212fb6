"""The picture of TCM: how near each unseen class lies to itself and to others, beside the range of thresholds; and each class's utility."""

from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TOP, BOTTOM = 1152, 648, 70, 580  # pixels; TOP, BOTTOM: of both parts
BACKGROUND, GRID, TEXT, BAND = (13, 20, 33), (40, 52, 72), (214, 222, 235), (52, 62, 48)
OWN, OTHERS, MEAN = (90, 160, 245), (250, 150, 80), (240, 240, 240)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/tcm.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    from lit_methods.tasks.metric_learning.opis import calibration_range, opis

    embeddings, labels = load(run)
    d_min, d_max, _ = calibration_range(embeddings, labels)
    found = opis(embeddings, labels, d_min, d_max)
    order = found.class_mean_utility.argsort(descending=True)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    left, right = 40, 560

    def across(distance: float) -> float:
        return left + (right - left) * distance / 2

    pen.rectangle([across(d_min), TOP, across(d_max), BOTTOM], fill=BAND)
    pen.text((left, 18), "distance of each class to itself and to others", font=font, fill=TEXT)
    pen.text((across(d_min), BOTTOM + 10), "thresholds", font=font, fill=TEXT)
    height = (BOTTOM - TOP) / len(order)
    distance = torch.cdist(embeddings, embeddings).numpy()
    for place, one in enumerate(found.classes[order].tolist()):
        inside = (labels == one).numpy()
        y = TOP + place * height
        same = distance[np.ix_(inside, inside)][np.triu_indices(int(inside.sum()), 1)]
        for values, colour, low, high in ((same, OWN, 0.12, 0.46), (distance[np.ix_(inside, ~inside)], OTHERS, 0.54, 0.88)):
            start, middle, end = np.quantile(values, [0.1, 0.5, 0.9])
            pen.rectangle([across(start), y + low * height, across(end), y + high * height], fill=colour)
            pen.line([(across(middle), y + low * height), (across(middle), y + high * height)], fill=BACKGROUND, width=3)
    curves(pen, found.utility[order].numpy(), found.mean_utility.numpy(), (640, TOP, 1112, BOTTOM))
    pen.text((640, 18), f"utility over the thresholds; OPIS {float(found.opis):.3f}", font=font, fill=TEXT)
    pen.text((640, BOTTOM + 10), f"{d_min:.2f}", font=font, fill=TEXT)
    pen.text((1070, BOTTOM + 10), f"{d_max:.2f}", font=font, fill=TEXT)
    return canvas


def load(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of the unseen classes, and their labels."""
    from lit_methods import MLP
    from lit_methods.datamodules import OpenWorldDataModule

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    network = MLP(config["model"]["init_args"]["network"]["init_args"]["widths"])
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")})
    data = OpenWorldDataModule(**config["data"]["init_args"])
    data.setup("validate")
    samples = data.val_set
    assert samples is not None
    with torch.no_grad():
        embeddings = network(samples.images)
    return torch.nn.functional.normalize(embeddings.double(), dim=1), samples.labels


def curves(pen: ImageDraw.ImageDraw, utility: NDArray[np.float64], mean: NDArray[np.float64], box: tuple[int, int, int, int]) -> None:
    """A thin line for each class, best first, and a thick one for their mean; 0 to 1 from bottom to top."""
    left, top, right, bottom = box
    for level in (0, 0.25, 0.5, 0.75, 1):
        pen.line([(left, bottom - level * (bottom - top)), (right, bottom - level * (bottom - top))], fill=GRID, width=2)
    x = np.linspace(left, right, utility.shape[1])
    for place, values in enumerate([*utility, mean]):
        share = place / (len(utility) - 1)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(OWN, OTHERS, strict=True)) if place < len(utility) else MEAN
        line = list(zip(x.tolist(), (bottom - values * (bottom - top)).tolist(), strict=True))
        pen.line(line, fill=colour, width=2 if place < len(utility) else 6)
