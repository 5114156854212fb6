"""The picture of group bias adaptation: how often each neuron fires, and how near it lies to a true feature, group by group."""

import math
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT = 1152, 648, 90, 1122  # pixels; LEFT, RIGHT: of both parts
BACKGROUND, GRID, TEXT = (13, 20, 33), (40, 52, 72), (214, 222, 235)
NEURON, TARGET, TRUE = (90, 160, 245), (250, 150, 80), (130, 215, 150)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/gba.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    from lit_methods.callbacks.sparse_autoencoders.gba.core import neuron_groups, target_frequencies
    from lit_methods.sparse_autoencoders.recovery import max_cosine

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    frequency, directions, truth = load(run, config)
    options = next(one for one in config["trainer"]["callbacks"] if one["class_path"].endswith("GroupBiasAdaptation"))["init_args"]
    groups = options["groups"]
    group, targets = neuron_groups(len(frequency), groups), target_frequencies(groups, options["htf"], options["ltf"])
    nearest = max_cosine(directions, truth)
    own = sum(config["data"]["init_args"]["active"]) / len(config["data"]["init_args"]["active"]) / len(truth)

    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    column = (RIGHT - LEFT) / groups
    pen.text((LEFT, 10), "how often each neuron fires (blue), its group's target (orange), the features (green)", font=font, fill=TEXT)
    pen.text((LEFT, 348), "its largest cosine with a true feature, by group", font=font, fill=TEXT)

    def firing(share: float) -> float:
        return 50 + 260 * (math.log10(1) - math.log10(max(share, 1e-4))) / 4

    def cosine(value: float) -> float:
        return 610 - 220 * max(value, 0.0)

    for power in range(5):
        y = firing(10.0**-power)
        pen.line([(LEFT, y), (RIGHT, y)], fill=GRID, width=2)
        pen.text((20, y - 12), f"{10.0**-power:g}", font=font, fill=TEXT)
    for level in (0.0, 0.5, 1.0):
        pen.line([(LEFT, cosine(level)), (RIGHT, cosine(level))], fill=GRID, width=2)
        pen.text((20, cosine(level) - 12), f"{level:g}", font=font, fill=TEXT)
    pen.line([(LEFT, firing(own)), (RIGHT, firing(own))], fill=TRUE, width=3)
    pen.line([(LEFT, cosine(0.9)), (RIGHT, cosine(0.9))], fill=TRUE, width=3)
    for number, target in enumerate(targets.tolist()):
        start = LEFT + number * column
        members = (group == number).nonzero().flatten().tolist()
        pen.line([(start + 4, firing(target)), (start + column - 4, firing(target))], fill=TARGET, width=4)
        for place, neuron in enumerate(members):
            x = start + 8 + (column - 16) * place / max(1, len(members) - 1)
            for y in (firing(float(frequency[neuron])), cosine(float(nearest[neuron]))):
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=NEURON)
    return canvas


def load(run: Path, config: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Share of the held-out samples in which each neuron fires, its direction, and the true features."""
    from lit_methods import SparseAutoencoder
    from lit_methods.datamodules import SparseMixturesDataModule

    module = SparseAutoencoder(**config["model"]["init_args"])
    module.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    data = SparseMixturesDataModule(**config["data"]["init_args"])
    data.setup("validate")
    with torch.no_grad():
        frequency = torch.cat([module.pre_activations(batch["activation"]) > 0 for batch in data.val_dataloader()]).float().mean(0)
        return frequency, module.decoder_directions.detach(), data.directions
