"""The embedded sample of the driving family: a procedural world in the official nuScenes v1.0 layout.

:func:`embedded_world` makes it once in a cache folder; the nuScenes reader then reads it like the real release. The world is a handful of
street scenes (:mod:`~lit_methods.datamodules.driving.layout`), seen by a spinning LiDAR and six cameras that fire at different times while
the ego car and the others move; every ray of either sensor goes through one ray caster (:mod:`~lit_methods.datamodules.driving.render`).

What it leaves out of a real release: camera sweeps, radar, hits on the ego car, the smear of a LiDAR turn (a sweep has one time and one
pose), and lens distortion. What it adds: ``splits.json`` with the train and val scenes, and ``superpixels/<camera token>.png``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from lit_methods.datamodules.cache import cache_folder, making_folder
from lit_methods.datamodules.driving import render
from lit_methods.datamodules.driving.layout import make_scene
from lit_methods.datamodules.driving.nuscenes_writer import Row, Tables, write_tables
from lit_methods.datamodules.driving.render import GROUND, SKY, Bools, Floats, Hits, Ints, Posed
from lit_methods.datamodules.driving.street import LIDARSEG_NAMES, Scene
from lit_methods.import_path import CHILD_PREFIX

log = logging.getLogger(__name__)

WORLD_VERSION = 1  # part of the cache folder's name: raise it with every change of what is written

# Raw 32 -> 16 classes and 16 for the rest, in the order of the lidarseg benchmark; superpixel ids are the same, with the sky in the rest.
RAW_TO_CLASS = np.full(32, 16, np.uint8)
RAW_TO_CLASS[[9, 14, 15, 16, 17, 18, 21, 2, 3, 4, 6, 12, 22, 23, 24, 25, 26, 27, 28, 30]] = [
    0, 1, 2, 2, 3, 4, 5, 6, 6, 6, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
]  # fmt: skip
REST = 16

KEY_PERIOD, SWEEP_PERIOD, SWEEPS = 500_000, 50_000, 2  # microseconds; sweeps before each key frame
LEAD = 150_000  # microseconds from the start of a recording to its first key frame
FAR = 150.0  # metres up to which a camera sees solids
NATIVE_WIDTH = 1600.0  # the intrinsics below are those of 1600 x 900 images
BEAMS = np.deg2rad(np.linspace(-30.67, 10.67, 32))
MIN_RANGE, MAX_RANGE = 1.0, 60.0


@dataclass(frozen=True)
class Mount:
    """A sensor on the car: place in the ego frame, direction, and for cameras focal length, centre (pixels at 1600 x 900) and lead."""

    translation: tuple[float, float, float]
    yaw: float  # degrees to the left of forward
    tilt: tuple[float, float]  # degrees about the sensor's own x and z axes: nothing is mounted perfectly
    focal: float = 0.0
    center: tuple[float, float] = (0.0, 0.0)
    lead: int = 0  # microseconds that the camera fires before the LiDAR's time stamp

    def rotation(self) -> Floats:
        """Sensor to ego frame (3, 3): cameras look along z with x right and y down, the LiDAR looks along y with x right and z up."""
        forward_left_up = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]) if self.focal else np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]])
        turned: Floats = Rotation.from_euler("z", self.yaw, degrees=True).as_matrix() @ forward_left_up
        return turned @ Rotation.from_euler("xz", self.tilt, degrees=True).as_matrix()

    def intrinsic(self, width: int) -> Floats:
        """(3, 3) for images ``width`` pixels wide; pixel centres lie at whole numbers."""
        scale = width / NATIVE_WIDTH
        return np.array([[self.focal * scale, 0, self.center[0] * scale], [0, self.focal * scale, self.center[1] * scale], [0, 0, 1.0]])


LIDAR = Mount((0.94, 0.0, 1.84), 0.0, (0.3, -0.2))
CAMERAS = {
    "CAM_FRONT": Mount((1.70, 0.01, 1.51), 0.0, (0.3, 0.2), 1262.0, (816.0, 491.0), 35_500),
    "CAM_FRONT_RIGHT": Mount((1.55, -0.49, 1.50), -56.0, (-0.4, 0.3), 1258.0, (808.0, 495.0), 27_600),
    "CAM_FRONT_LEFT": Mount((1.52, 0.49, 1.51), 55.0, (0.2, -0.4), 1268.0, (826.0, 480.0), 43_100),
    "CAM_BACK": Mount((0.03, 0.0, 1.58), 180.0, (-0.5, 0.1), 809.0, (829.0, 482.0), 10_400),
    "CAM_BACK_LEFT": Mount((1.04, 0.48, 1.59), 109.0, (0.4, -0.2), 1257.0, (792.0, 493.0), 1_500),
    "CAM_BACK_RIGHT": Mount((1.01, -0.48, 1.56), -110.0, (-0.3, -0.3), 1260.0, (807.0, 501.0), 20_000),
}


@dataclass(frozen=True)
class WorldOptions:
    """Everything that decides the bytes of a world; see :func:`make_world`."""

    seed: int
    scenes: int
    val_scenes: int
    key_frames: int
    image_size: tuple[int, int]
    lidar_columns: int
    label_noise: float

    def __post_init__(self) -> None:
        if not 0 < self.val_scenes < self.scenes:
            raise ValueError(
                f"val_scenes={self.val_scenes} of scenes={self.scenes}: there must be at least one scene for train and one for val"
            )
        if self.key_frames < 1:
            raise ValueError(f"key_frames={self.key_frames}: a scene needs at least 1")
        if min(self.image_size) < 16 or self.lidar_columns < 16:
            raise ValueError(f"image_size={self.image_size}, lidar_columns={self.lidar_columns}: each must be at least 16")
        if not 0 <= self.label_noise <= 0.9:
            raise ValueError(f"label_noise={self.label_noise}: a share between 0 and 0.9 is expected")

    def names(self) -> list[str]:
        """Scene names; the last ``val_scenes`` are the val split."""
        return [f"scene-{9001 + index:04d}" for index in range(self.scenes)]

    def splits(self) -> dict[str, list[str]]:
        """The content of ``splits.json``."""
        names = self.names()
        return {"train": names[: -self.val_scenes], "val": names[-self.val_scenes :]}


@dataclass(frozen=True)
class ShadowMap:
    """Which part of the sun reaches the ground, on a grid parallel to the scene frame."""

    corner: Floats  # (2,)
    cell: float
    lit: Floats  # (rows = y, cols = x) 0..1

    def __call__(self, x: Floats, y: Floats) -> Floats:
        """Bilinear look-up at ground points; lit outside the grid."""
        u, v = (x - self.corner[0]) / self.cell, (y - self.corner[1]) / self.cell
        inside = (u >= 0) & (v >= 0) & (u < self.lit.shape[1] - 1) & (v < self.lit.shape[0] - 1)
        u, v = np.where(inside, u, 0).astype(np.float32), np.where(inside, v, 0).astype(np.float32)
        col, row = u.astype(np.int32), v.astype(np.int32)
        u, v = u - col, v - row
        top = self.lit[row, col] * (1 - u) + self.lit[row, col + 1] * u
        bottom = self.lit[row + 1, col] * (1 - u) + self.lit[row + 1, col + 1] * u
        return np.where(inside, top * (1 - v) + bottom * v, np.float32(1)).astype(np.float32)


class Sun:
    """The sun as a far-away ray source over the ground: shadows of what stands still once per scene, those of the others at any time."""

    def __init__(self, scene: Scene, duration: float, cell: float = 0.25) -> None:
        self.scene, self.cell = scene, cell
        path = np.stack([scene.ego(time)[1][:2] for time in (0, duration / 2, duration)])
        self.corner = np.floor(path.min(0) - 50)
        cols, rows = (np.ceil(path.max(0) + 50 - self.corner) / cell).astype(int)
        self.place = np.append(path.mean(0), 0) + scene.light.sun * 500
        x, y = self.corner[0] + cell * np.arange(cols), self.corner[1] + cell * np.arange(rows)
        rays = (
            np.stack([np.broadcast_to(x, (rows, cols)), np.broadcast_to(y[:, None], (rows, cols)), np.full((rows, cols), 0.1)])
            - self.place[:, None, None]
        )
        distance = np.sqrt((rays * rays).sum(0))
        self.rays, self.distance = (rays / distance).astype(np.float32), (distance - 0.1).astype(np.float32)
        self.still = self._lit(0.0, ~scene.moving)

    def _lit(self, time: float, actors: Bools) -> Floats:
        posed = render.pose(self.scene.solids, *self.scene.stand(time), self.place)
        index = np.nonzero(actors[self.scene.solids.actor])[0]
        corners = posed.corners[index]
        ground = (self.place[:2] - self.corner + corners[..., :2] * (-self.place[2] / corners[..., 2])[..., None]) / self.cell
        low, high = ground.min(1), ground.max(1)
        windows = render.clip_windows(index, low[:, 1], high[:, 1], low[:, 0], high[:, 0], self.distance.shape)
        return (render.cast(self.rays, posed, windows, self.distance).solid == GROUND).astype(np.float32)

    def shadows(self, time: float) -> ShadowMap:
        """The shadows at a time in seconds."""
        lit = np.multiply(self.still, self._lit(time, self.scene.moving))
        return ShadowMap(self.corner, self.cell, gaussian_filter(lit, 0.8 if self.scene.light.strength > 1 else 4.0))


def sensor_pose(scene: Scene, mount: Mount, time: float) -> tuple[Floats, Floats]:
    """Rotation (3, 3) and origin (3,) of a sensor in the scene frame at a time in seconds."""
    rotation, translation = scene.ego(time)
    return rotation @ mount.rotation(), rotation @ np.array(mount.translation) + translation


@lru_cache(maxsize=4)
def _lidar_rays(columns: int) -> Floats:
    """Unit rays (3, beams, columns) float32 of a turn, LiDAR frame."""
    azimuth, flat = render.lidar_azimuth(np.arange(columns), columns), np.cos(BEAMS)[:, None]
    up = np.broadcast_to(np.sin(BEAMS)[:, None], (len(BEAMS), columns))
    return np.stack([flat * np.sin(azimuth), flat * np.cos(azimuth), up]).astype(np.float32)


@lru_cache(maxsize=12)
def _camera_rays(mount: Mount, size: tuple[int, int]) -> Floats:
    """Unit rays (3, H, W) float32 through the pixel centres, camera frame."""
    width, height = size
    k = mount.intrinsic(width)
    col, row = np.meshgrid((np.arange(width) - k[0, 2]) / k[0, 0], (np.arange(height) - k[1, 2]) / k[1, 1])
    rays = np.stack([col, row, np.ones_like(col)])
    return (rays / np.sqrt((rays * rays).sum(0))).astype(np.float32)


def scan(scene: Scene, time: float, columns: int, rng: np.random.Generator) -> tuple[Floats, Ints, Ints, Hits, Posed]:
    """One turn of the LiDAR.

    Args:
        scene: The street.
        time: Seconds; the whole turn is taken at this time.
        columns: Shots per turn.
        rng: Range noise, intensity noise, drop-outs.

    Returns:
        points (N, 5) float32 (x right, y forward, z up in metres, intensity 0..255, ring 0 = lowest), raw class ids (N,), actors (N,) with
        -1 for the ground, and the hits and posed solids behind them.
    """
    rotation, origin = sensor_pose(scene, LIDAR, time)
    local = _lidar_rays(columns)
    rays = np.einsum("ij,jhw->ihw", rotation.astype(np.float32), local)
    posed = render.pose(scene.solids, *scene.stand(time), origin)
    windows = render.lidar_windows(posed, rotation, BEAMS, columns, MAX_RANGE)
    hits = render.cast(rays, posed, windows, scene.road.depth(origin, rays))

    turned = [array.T.ravel() for array in hits]  # as the sensor spins: all beams of a column, then the next column
    local, directions = local.transpose(2, 1, 0).reshape(-1, 3), rays.transpose(0, 2, 1).reshape(3, -1)
    ring = np.tile(np.arange(len(BEAMS)), columns)
    near = np.nonzero((turned[1] != SKY) & (turned[0] > MIN_RANGE) & (turned[0] < MAX_RANGE))[0]
    depth, solid, face = (array[near] for array in turned)
    directions = directions[:, near]
    seen = render.surface(posed, scene.road, origin, directions, depth, solid, face)
    facing = np.abs((seen.normal * directions).sum(0))
    back = seen.gain * seen.albedo.mean(0) * (0.4 + 0.6 * facing) / (1 + (depth / 55) ** 2)
    intensity = np.clip(np.round(255 * back * rng.lognormal(0, 0.18, len(back))), 0, 255)
    soft = np.isin(seen.label, [LIDARSEG_NAMES.index("static.vegetation"), LIDARSEG_NAMES.index("flat.terrain")])
    measured = depth + rng.standard_normal(len(depth)) * np.where(soft, 0.04, 0.015)
    lost = 0.015 + 0.45 * (seen.gloss > 0.25) + 0.3 * np.clip((depth - 30) / 30, 0, 1) * (back < 0.03) + 0.3 * (facing < 0.03)
    kept = rng.random(len(depth)) >= lost
    points = np.concatenate([local[near] * measured[:, None], intensity[:, None], ring[near, None]], axis=1)[kept].astype(np.float32)
    actor = np.where(solid >= 0, scene.solids.actor[solid], -1)[kept]
    return points, seen.label[kept], actor, hits, posed


def photograph(
    scene: Scene, mount: Mount, time: float, size: tuple[int, int], shadows: ShadowMap, rng: np.random.Generator
) -> tuple[Ints, Ints]:  # fmt: skip
    """One camera image.

    Args:
        scene: The street.
        mount: The camera.
        time: Seconds.
        size: Width and height.
        shadows: Sunlight near the ground.
        rng: Sensor noise.

    Returns:
        image (H, W, 3) uint8, and the exact class id of each pixel (H, W) uint8: 0..15, or 16 for the rest.
    """
    width, rows = size
    rotation, origin = sensor_pose(scene, mount, time)
    intrinsic = mount.intrinsic(width)
    rays = np.einsum("ij,jhw->ihw", rotation.astype(np.float32), _camera_rays(mount, size))
    posed = render.pose(scene.solids, *scene.stand(time), origin)
    windows = render.camera_windows(posed, rotation, intrinsic, (rows, width), FAR)
    hits = render.cast(rays, posed, windows, scene.road.depth(origin, rays))

    directions, solid = rays.reshape(3, -1), hits.solid.ravel()
    image, ids = np.empty((3, rows * width), np.float32), np.full(rows * width, REST, np.uint8)
    air = solid == SKY
    sky = np.flatnonzero(air)
    image[:, sky] = render.sky(directions.take(sky, axis=1), scene.light)
    near = np.flatnonzero(~air)
    directions = directions.take(near, axis=1)
    depth = hits.depth.ravel()[near]
    seen = render.surface(posed, scene.road, origin, directions, depth, solid[near], hits.face.ravel()[near])
    # Solids take the light of the ground in front of them; it no longer tells much a storey higher up.
    height = seen.point[2]
    out = np.where(solid[near] == GROUND, np.float32(0), np.float32(0.7))
    lit = shadows(seen.point[0] + out * seen.normal[0], seen.point[1] + out * seen.normal[1])
    lit += (1 - lit) * np.clip((height - 2) / 3, 0, 1)
    image[:, near] = render.shade(seen, directions, depth, lit, scene.light)
    ids[near] = RAW_TO_CLASS[seen.label]
    picture = render.smooth_edges(image.reshape(3, rows, width), hits.solid)
    return render.develop(picture, rng), ids.reshape(rows, width)


def corrupt(ids: Ints, share: float, rng: np.random.Generator) -> Ints:
    """Class ids with mistakes in coherent patches, as a segmenter makes them.

    The image is cut into cells of about 1/22 of its height. Clumps of neighbouring cells are filled with another class of the same picture,
    until ``share`` of all pixels is wrong (as near as whole cells allow). A picture of one class alone stays as it is.

    Args:
        ids: (H, W) uint8.
        share: Wanted share of wrong pixels, 0..0.9.
        rng: Source of the cells and classes.

    Returns:
        (H, W) uint8.
    """
    height, width = ids.shape
    side = max(2, round(height / 22))
    rows, cols = -(-height // side), -(-width // side)
    present = np.unique(ids)
    if share == 0 or len(present) == 1:
        return ids.copy()
    order = np.argsort(gaussian_filter(rng.standard_normal((rows, cols)), 1.0), axis=None, kind="stable")
    coarse = rng.integers(len(present), size=(-(-rows // 4), -(-cols // 4)))  # neighbours are mistaken for the same thing
    replacement = present[np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1)[:rows, :cols]]
    row, col = np.arange(height) // side, np.arange(width) // side
    wrong = ids != replacement[row[:, None], col]
    per_cell = np.bincount((row[:, None] * cols + col).ravel(), wrong.ravel(), minlength=rows * cols)
    count = int(np.searchsorted(np.cumsum(per_cell[order]), share * ids.size))
    chosen = np.zeros(rows * cols, bool)
    chosen[order[: count + 1]] = True
    return np.where(chosen.reshape(rows, cols)[row[:, None], col], replacement[row[:, None], col], ids).astype(np.uint8)


def _visible(posed: Posed, scene: Scene, rotation: Floats, columns: int, rays_hit: Ints, actors: Ints) -> Floats:
    """Share of each actor's unhidden outline that the LiDAR's rays reach, from the ray counts ``rays_hit`` (A,)."""
    windows = render.lidar_windows(posed, rotation, BEAMS, columns, MAX_RANGE)
    by_actor: dict[int, list[render.Window]] = {}
    for window in windows:
        by_actor.setdefault(int(scene.solids.actor[window[0]]), []).append(window)
    rays = np.einsum("ij,jhw->ihw", rotation.astype(np.float32), _lidar_rays(columns))
    empty = np.full(rays.shape[1:], np.inf, np.float32)
    alone = np.array([np.isfinite(render.cast(rays, posed, by_actor[int(actor)], empty).depth).sum() for actor in actors])
    return rays_hit[actors] / np.maximum(alone, 1)


def record(root: Path, options: WorldOptions, index: int) -> dict[str, list[Row]]:
    """Make one scene and write its files; returns its table rows."""
    duration = (LEAD + (options.key_frames - 1) * KEY_PERIOD) / 1e6
    scene = make_scene(options.seed, index, duration)
    tables = Tables(root, options.seed, options.names()[index])
    base = 1_532_402_900_000_000 + index * 1_000_000_000
    tables.calibration("LIDAR_TOP", LIDAR.rotation(), np.array(LIDAR.translation), None)
    for channel, mount in CAMERAS.items():
        tables.calibration(channel, mount.rotation(), np.array(mount.translation), mount.intrinsic(options.image_size[0]))
    tables.map(scene.drivable(*np.meshgrid(np.arange(0.25, 320, 0.5), np.arange(319.75, 0, -0.5))), cells=5)
    sun = Sun(scene, duration)

    def ego(micro: int) -> tuple[Floats, Floats]:
        return scene.to_global(*scene.ego(micro / 1e6))

    for key in range(options.key_frames):
        now = LEAD + key * KEY_PERIOD
        for back in range(SWEEPS, 0, -1):
            then = now - back * SWEEP_PERIOD
            points = scan(scene, then / 1e6, options.lidar_columns, np.random.default_rng([options.seed, index, key, back]))[0]
            points.tofile(tables.sample_data("LIDAR_TOP", base + then, key, False, ego(then))[1])
        tables.sample(key, base + now)
        rng = np.random.default_rng([options.seed, index, key, 0])
        points, labels, actor, hits, posed = scan(scene, now / 1e6, options.lidar_columns, rng)
        name, path = tables.sample_data("LIDAR_TOP", base + now, key, True, ego(now))
        points.tofile(path)
        tables.lidarseg(name, labels)
        _annotate(tables, scene, key, now / 1e6, actor, hits, posed, options.lidar_columns)
        shadows = sun.shadows(now / 1e6)
        for channel, mount in CAMERAS.items():
            then = now - mount.lead
            image, ids = photograph(scene, mount, then / 1e6, options.image_size, shadows, rng)
            name, path = tables.sample_data(channel, base + then, key, True, ego(then), options.image_size)
            Image.fromarray(image).save(path, quality=88)
            tables.superpixels(name, corrupt(ids, options.label_noise, rng))
    return tables.close(f"embedded street {index}, seed {options.seed}")


def _annotate(tables: Tables, scene: Scene, key: int, time: float, actor: Ints, hits: Hits, posed: Posed, columns: int) -> None:
    """Boxes of the objects that the key scan reached."""
    points = np.bincount(actor[actor >= 0], minlength=len(scene.actors))
    solid = hits.solid[(hits.solid >= 0) & (hits.depth < MAX_RANGE)]
    rays_hit = np.bincount(scene.solids.actor[solid], minlength=len(scene.actors))
    seen = np.nonzero((points > 0) & np.array([a.boxed for a in scene.actors]))[0]
    visible = _visible(posed, scene, sensor_pose(scene, LIDAR, time)[0], columns, rays_hit, seen)
    position, yaw = scene.stand(time)
    for number, share in zip(seen.tolist(), visible.tolist(), strict=True):
        a = scene.actors[number]
        cosine, sine = np.cos(yaw[number]), np.sin(yaw[number])
        turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        box = scene.to_global(turn, position[number] + [0, 0, a.size[2] / 2])
        tables.annotation(number, key, a.name, a.attribute, box, a.size, int(points[number]), share)


def make_world(
    root: Path,
    *,
    seed: int = 0,
    scenes: int = 11,
    val_scenes: int = 3,
    key_frames: int = 8,
    image_size: tuple[int, int] = (352, 198),
    lidar_columns: int = 288,
    label_noise: float = 0.1,
    workers: int | None = None,
) -> None:
    """Write a procedural driving world in the nuScenes v1.0 layout.

    The bytes depend on every argument but ``root`` and ``workers``.

    Args:
        root: Folder to fill, empty or missing.
        seed: Seed of streets, actors, weather and noise.
        scenes: Number of scenes, each a street of its own.
        val_scenes: How many of them (the last) are the val split in ``splits.json``.
        key_frames: Key frames per scene, 0.5 s apart; each has two sweeps before it.
        image_size: Width and height of the images; 16:9 like the real ones, or the view is cut off.
        lidar_columns: Shots per turn of the 32-beam LiDAR.
        label_noise: Share of wrong pixels in the superpixels, in coherent patches.
        workers: Processes; None: one per scene, at most one per CPU. 1 stays in this process.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: A worker process failed; its error is part of the message.
    """
    options = WorldOptions(seed, scenes, val_scenes, key_frames, (image_size[0], image_size[1]), lidar_columns, label_noise)
    root.mkdir(parents=True, exist_ok=True)
    count = min(workers or os.cpu_count() or 1, scenes)
    recorded = [record(root, options, index) for index in range(scenes)] if count == 1 else _record_in_workers(root, options, count)
    write_tables(root, recorded, ("LIDAR_TOP", *CAMERAS))
    (root / "splits.json").write_text(json.dumps(options.splits(), indent=1) + "\n")


def _record_in_workers(root: Path, options: WorldOptions, count: int) -> list[dict[str, list[Row]]]:
    """Share the scenes among processes of their own.

    Plain child interpreters rather than multiprocessing: a spawned pool imports the caller's main script again, which breaks scripts
    without a ``__main__`` guard, and a forked one is unsafe once PyTorch has threads.
    """
    with tempfile.TemporaryDirectory(prefix=".rows-", dir=root) as folder:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        children = []
        for number in range(count):
            job = {"root": str(root), "rows": folder, "options": asdict(options), "scenes": list(range(number, options.scenes, count))}
            command = [sys.executable, "-c", f"{CHILD_PREFIX}from {__name__} import _work; _work()", json.dumps(job)]
            children.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            messages = [child.communicate()[1] for child in children]
        finally:
            for child in children:
                child.kill()
        failed = [message for child, message in zip(children, messages, strict=True) if child.returncode != 0]
        if failed:
            raise RuntimeError(f"a process that makes the driving world failed (workers=1 makes it in this process):\n{failed[0]}")
        return [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(options.scenes)]


def _work() -> None:
    """Entry point of a child process; its job is the last argument, as JSON."""
    job: dict[str, Any] = json.loads(sys.argv[-1])
    options = WorldOptions(**job["options"] | {"image_size": tuple(job["options"]["image_size"])})
    for index in job["scenes"]:
        (Path(job["rows"]) / f"{index}.json").write_text(json.dumps(record(Path(job["root"]), options, index)))


def embedded_world(
    cache: Path | None = None,
    seed: int = 0,
    *,
    scenes: int = 11,
    val_scenes: int = 3,
    key_frames: int = 8,
    image_size: tuple[int, int] = (352, 198),
    lidar_columns: int = 288,
    label_noise: float = 0.1,
    workers: int | None = None,
) -> Path:
    """The driving world for these arguments, made on the first call and kept.

    Safe when several processes ask at once: one makes it in a temporary folder beside its final place and renames it, the others wait.

    Args:
        cache: Folder that holds worlds; None: :func:`cache_folder`.
        seed: Seed of the world; this and the following as in :func:`make_world`.
        scenes: Number of scenes.
        val_scenes: Scenes of the val split.
        key_frames: Key frames per scene.
        image_size: Width and height.
        lidar_columns: Shots per turn.
        label_noise: Share of wrong superpixel ids.
        workers: Processes.

    Returns:
        Root of the data set, to be read like a nuScenes release.
    """
    options = WorldOptions(seed, scenes, val_scenes, key_frames, (image_size[0], image_size[1]), lidar_columns, label_noise)
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()[:12]
    cache = cache_folder() if cache is None else Path(cache).expanduser()
    name = f"driving-v{WORLD_VERSION}-{digest}"
    root = cache / name
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f".{name}.lock") as alone:
        if root.is_dir():
            return root
        if alone:  # whatever lies here was left by a process that died
            for left in cache.glob(f".{name}.tmp-*"):
                shutil.rmtree(left, ignore_errors=True)
        log.info("making the driving world in %s: about half a minute, once", root)
        with making_folder(root) as work:  # where the file system has no locks, the first process wins
            make_world(work, workers=workers, **asdict(options))
    return root


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock file; yields whether it is held (False where the system or the file system has no locks)."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends, however it ends
        except (ImportError, OSError):
            yield False
            return
        yield True
