"""The picture of SuperFlow++: camera images with their LiDAR points, under them the scan from above, in the colours of the embedding."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

WIDTH, HEIGHT, BAND = 1152, 648, 216  # pixels; BAND: height of the camera images
BACKGROUND = (13, 20, 33)
PALETTE = ((109, 74, 224), (60, 125, 245), (33, 181, 190), (96, 200, 110), (240, 196, 70), (240, 122, 70), (226, 70, 96))  # violet to red
SAMPLE = 4  # of the held-out scenes: a crossing with cars and people


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/superflow.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    model, batch = load(run)
    cloud, dense = batch["cur"], batch["dense"]
    with torch.no_grad():
        single, several = (F.normalize(model.embed_points(part).at_points().float(), dim=1) for part in (cloud, dense))
    colours = principal_colours(torch.cat([single, several]))
    cameras = camera_images(cloud, colours[: len(single)])
    canvas = np.full((HEIGHT, WIDTH, 3), BACKGROUND, dtype=np.uint8)
    canvas[: cameras.shape[0]] = cameras
    canvas[BAND:] = from_above(dense["points"][:, :3].numpy(), colours[len(single) :], WIDTH, HEIGHT - BAND)
    return Image.fromarray(canvas)


def load(run: Path) -> tuple[Any, dict[str, Any]]:
    """The trained module of a run, and a batch of one held-out sample with all six cameras in full size."""
    import yaml

    from lit_methods import MinkUNet, PatchStatistics, SuperFlow
    from lit_methods.datamodules import NuScenesDataModule

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    networks = {name: config.pop(name)["init_args"] for name in ("backbone_3d", "backbone_2d")}
    model = SuperFlow(MinkUNet(**networks["backbone_3d"]), PatchStatistics(**networks["backbone_2d"]), **config)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    data = NuScenesDataModule(mode="pretrain", image_size=(198, 352), cameras=6, num_sweeps=2, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    batch = next(batch for index, batch in enumerate(data.val_dataloader()) if index == SAMPLE)
    return model.eval(), batch


def principal_colours(features: Tensor) -> NDArray[np.uint8]:
    """(N, C) features -> (N, 3) RGB: the first principal component chooses the colour, the second how pale it is."""
    centred = features - features.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -2:].flip(1)
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    ranks = (centred @ axes).argsort(0).argsort(0).numpy() / len(features)  # equal shares: no colour is wasted on outliers
    anchors = np.array(PALETTE, dtype=np.float64)
    place = ranks[:, 0] * (len(anchors) - 1)
    low = np.minimum(place.astype(int), len(anchors) - 2)
    part = (place - low)[:, None]
    colour = anchors[low] * (1 - part) + anchors[low + 1] * part
    pale = 0.35 * (1 - ranks[:, 1:])
    return (colour * (1 - pale) + 255 * pale).astype(np.uint8)


def camera_images(view: dict[str, Any], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The three cameras that face forwards, side by side, with the points of the scan: (BAND, WIDTH, 3)."""
    images = (view["images"][0].permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    camera, row, column = view["pairing_images"].numpy().T
    point = view["pairing_points"].numpy()
    x, y = view["points"].numpy()[point, :2].T
    heading = [np.arctan2(x[camera == index].mean(), y[camera == index].mean()) for index in range(len(images))]  # 0: straight on
    order = sorted(np.argsort(np.abs(heading))[:3], key=lambda index: heading[index])
    tile, scale = WIDTH // 3, WIDTH // 3 / images.shape[2]
    band = np.empty((BAND, WIDTH, 3), dtype=np.uint8)
    for place, index in enumerate(order):
        large = np.asarray(Image.fromarray(images[index]).resize((tile, BAND), Image.Resampling.LANCZOS))
        large = (0.8 * large).astype(np.uint8)
        mine = camera == index
        far_first = np.argsort(-np.hypot(x, y)[mine])
        centre = np.stack([(row[mine] + 0.5) * BAND / images.shape[1], (column[mine] + 0.5) * scale], axis=1)[far_first]
        band[:, place * tile : (place + 1) * tile] = discs(large, centre, colours[point[mine][far_first]], np.full(len(centre), 2.1))
    band[:, tile - 1 : tile + 1] = band[:, 2 * tile - 1 : 2 * tile + 1] = BACKGROUND
    return band


def from_above(points: NDArray[np.float32], colours: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The cloud as seen from behind and above the vehicle (x right, y forward, z up, metres): (height, width, 3)."""
    eye, pitch, focal = np.array([0.0, -31.0, 26.0]), np.deg2rad(-35.0), 0.92 * width
    x, y, z = (points - eye).T
    depth = y * np.cos(pitch) + z * np.sin(pitch)
    rise = -y * np.sin(pitch) + z * np.cos(pitch)
    seen = depth > 4
    far_first = np.argsort(-depth[seen])
    x, depth, rise = (value[seen][far_first] for value in (x, depth, rise))
    centre = np.stack([height / 2 - focal * rise / depth, width / 2 + focal * x / depth], axis=1)
    haze = np.clip((depth - 40) / 80, 0, 0.6)[:, None]
    shaded = ((1 - haze) * colours[seen][far_first] + haze * np.array(BACKGROUND)).astype(np.uint8)
    return discs(np.full((height, width, 3), BACKGROUND, dtype=np.uint8), centre, shaded, np.clip(110 / depth, 1.1, 4.0))


def discs(
    picture: NDArray[np.uint8], centre: NDArray[np.floating[Any]], colours: NDArray[np.uint8], radius: NDArray[np.floating[Any]]
) -> NDArray[np.uint8]:
    """Draw smooth discs, later ones over earlier ones, at twice the size and scaled down: (row, column) centres and radii in pixels."""
    height, width = picture.shape[:2]
    large = np.repeat(np.repeat(picture, 2, axis=0), 2, axis=1)
    reach = int(np.ceil(2 * radius.max()))
    order = np.arange(len(centre))
    last = np.full((2 * height, 2 * width), -1)
    for dr in range(-reach, reach + 1):
        for dc in range(-reach, reach + 1):
            inside = dr * dr + dc * dc <= (2 * radius) ** 2
            r, c = (2 * centre[inside]).astype(int).T + np.array([[dr], [dc]])
            kept = (r >= 0) & (r < 2 * height) & (c >= 0) & (c < 2 * width)
            np.maximum.at(last, (r[kept], c[kept]), order[inside][kept])
    hit = last >= 0
    large[hit] = colours[last[hit]]
    return np.asarray(Image.fromarray(large).resize((width, height), Image.Resampling.BOX))
