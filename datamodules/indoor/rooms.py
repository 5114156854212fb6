"""Generated rooms: floor, walls, boxes and cylinders as coloured points, with views of posed depth cameras and noisy masks."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.checks import at_least, one_of, share
from lit_methods.datamodules.indoor.base import Augmentation, IndoorDataModule, Scene, Supervision
from lit_methods.lidar.lifting import link_points, masks_at_points, superpoints

CLASSES = ("floor", "wall", "chest", "cabinet", "barrel")
FLOOR, WALL, CHEST, CABINET, BARREL = range(5)
MaskSource = Literal["views", "geometric"]
_COLOURS = np.array([[0.6, 0.5, 0.4], [0.7, 0.7, 0.7], [0.55, 0.35, 0.3], [0.35, 0.5, 0.35], [0.35, 0.4, 0.6]])
_TINT, _GRAIN = 0.04, 0.15  # standard deviations of colours, of an instance and of a point
_HEIGHT, _WIDTH = 60, 80  # pixels of a view
_FOCAL = 36.0  # pixels


class Room(NamedTuple):
    """Shapes of a room; its floor is z = 0, its corner the origin.

    Attributes:
        size: (3,) metres.
        kinds: (K,) classes of the objects.
        centre: (K, 2) metres.
        half: (K, 2) half sides of boxes; of cylinders twice the radius, in both.
        height: (K,) metres.
        yaw: (K,) radians.
    """

    size: NDArray[np.float64]
    kinds: NDArray[np.int64]
    centre: NDArray[np.float64]
    half: NDArray[np.float64]
    height: NDArray[np.float64]
    yaw: NDArray[np.float64]


class Views(NamedTuple):
    """What posed cameras see.

    Attributes:
        intrinsic: (3, 3).
        rotation: (V, 3, 3) world to camera.
        translation: (V, 3) world to camera, metres.
        depth: (V, H, W) metres; 0: nothing.
        instances: (V, H, W) int64: 0 floor, 1 to 4 walls, 5 and more objects; -1: the ceiling.
        places: (V, H, W, 3) what is seen there, world coordinates.
    """

    intrinsic: NDArray[np.float64]
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]
    depth: NDArray[np.float64]
    instances: NDArray[np.int64]
    places: NDArray[np.float64]


def draw_room(rng: np.random.Generator) -> Room:
    """A room of 3 to 4 metres with low walls and 6 to 10 objects that don't touch each other; where there is no place left, fewer."""
    size = np.array([*rng.uniform(3.0, 4.0, 2), 1.5])
    kinds: list[int] = []
    centre: list[NDArray[np.float64]] = []
    half: list[NDArray[np.float64]] = []
    height: list[float] = []
    yaw: list[float] = []
    for kind in rng.integers(CHEST, BARREL + 1, int(rng.integers(6, 11))):
        sides = np.full(2, rng.uniform(0.25, 0.4)) if kind == BARREL else rng.uniform(0.2, 0.45, 2)
        reach = float(np.hypot(*sides)) if kind != BARREL else float(sides[0])
        for _ in range(20):
            place = rng.uniform(reach, size[:2] - reach)
            if all(np.hypot(*(place - other)) > reach + float(np.hypot(*theirs)) for other, theirs in zip(centre, half, strict=True)):
                kinds.append(int(kind))
                centre.append(place)
                half.append(sides)
                height.append(rng.uniform(*{CHEST: (0.3, 0.7), CABINET: (0.8, 1.4), BARREL: (0.4, 1.2)}[int(kind)]))
                yaw.append(rng.uniform(0, np.pi / 2))
                break
    return Room(size, np.array(kinds), np.array(centre), np.array(half), np.array(height), np.array(yaw))


def sample_points(room: Room, number: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Points on all surfaces, evenly: places (number, 3), normals, and instances as in :class:`Views`."""
    x, y, z = room.size
    # corner, two edges and normal of each rectangle, and its instance
    flat: list[tuple[Any, ...]] = [([0, 0, 0], [x, 0, 0], [0, y, 0], [0, 0, 1], 0)]
    flat += [([0, 0, 0], [x, 0, 0], [0, 0, z], [0, 1, 0], 1), ([0, y, 0], [x, 0, 0], [0, 0, z], [0, -1, 0], 2)]
    flat += [([0, 0, 0], [0, y, 0], [0, 0, z], [1, 0, 0], 3), ([x, 0, 0], [0, y, 0], [0, 0, z], [-1, 0, 0], 4)]
    for k, kind in enumerate(room.kinds):
        if kind == BARREL:
            continue
        (a, b), h = room.half[k], room.height[k]
        turn = _turn(room.yaw[k])
        base = np.array([*room.centre[k], 0.0])
        faces: list[tuple[Any, ...]] = [([-a, -b, h], [2 * a, 0, 0], [0, 2 * b, 0], [0, 0, 1])]
        faces += [([-a, s * b, 0], [2 * a, 0, 0], [0, 0, h], [0, s, 0]) for s in (-1, 1)]
        faces += [([s * a, -b, 0], [0, 2 * b, 0], [0, 0, h], [s, 0, 0]) for s in (-1, 1)]
        flat += [(base + turn @ c, turn @ u, turn @ v, turn @ n, 5 + k) for c, u, v, n in faces]
    corner, first, second, normal = (np.array([rectangle[i] for rectangle in flat], dtype=float) for i in range(4))
    instance = np.array([rectangle[4] for rectangle in flat])
    round_ones = np.flatnonzero(room.kinds == BARREL)
    radius, tall = room.half[round_ones, 0] if len(round_ones) else np.zeros(0), room.height[round_ones]
    areas = np.concatenate([np.linalg.norm(np.cross(first, second), axis=1), 2 * np.pi * radius * tall, np.pi * radius**2])
    surface = rng.choice(len(areas), 3 * number, p=areas / areas.sum())
    u, v = rng.random((2, 3 * number, 1))
    flats, sides = len(flat), len(round_ones)
    place, direction = np.empty((3 * number, 3)), np.empty((3 * number, 3))
    owner = np.concatenate([instance, 5 + round_ones, 5 + round_ones])[surface]
    on = surface < flats
    place[on] = corner[surface[on]] + u[on] * first[surface[on]] + v[on] * second[surface[on]]
    direction[on] = normal[surface[on]]
    angle = 2 * np.pi * u[:, 0]
    around = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1)
    side, top = (surface >= flats) & (surface < flats + sides), surface >= flats + sides
    for part, which in ((side, surface - flats), (top, surface - flats - sides)):
        if not part.any():
            continue
        round_one = which[part]
        share_of_radius = 1.0 if part is side else np.sqrt(v[part])
        place[part] = (
            np.column_stack([room.centre[round_ones[round_one]], np.zeros(len(round_one))])
            + radius[round_one, None] * share_of_radius * around[part]
        )
        place[part, 2] = v[part, 0] * tall[round_one] if part is side else tall[round_one]
        direction[part] = around[part] if part is side else [0, 0, 1]
    covered = (owner == 0) & _under_objects(room, place)
    chosen = np.flatnonzero(~covered)[:number]
    return place[chosen] + rng.normal(0, 0.003, (len(chosen), 3)), direction[chosen], owner[chosen]


def _turn(yaw: float) -> NDArray[np.float64]:
    """(3, 3) rotation about z."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _under_objects(room: Room, place: NDArray[np.float64]) -> NDArray[np.bool_]:
    away = place[:, None, :2] - room.centre
    c, s = np.cos(room.yaw), np.sin(room.yaw)
    local = np.stack([c * away[..., 0] + s * away[..., 1], -s * away[..., 0] + c * away[..., 1]], axis=-1)
    box = (np.abs(local) <= room.half).all(-1)
    disc = np.hypot(*np.moveaxis(away, -1, 0)) <= room.half[:, 0]
    return np.asarray(np.where(room.kinds == BARREL, disc, box).any(1))


def render_views(room: Room, number: int, rng: np.random.Generator) -> Views:
    """Views from near the walls at the height of eyes, by casting a ray through each pixel; the nearest hit is what is seen."""
    intrinsic = np.array([[_FOCAL, 0, (_WIDTH - 1) / 2], [0, _FOCAL, (_HEIGHT - 1) / 2], [0, 0, 1]])
    rotation, translation, depth, instances, places = [], [], [], [], []
    for angle in rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(number) / number:
        origin = np.array([*(room.size[:2] * (0.5 + 0.45 * np.array([np.cos(angle), np.sin(angle)]))), rng.uniform(1.2, 1.45)])
        forward = np.array([*(room.size[:2] * rng.uniform(0.4, 0.6, 2)), 0.4]) - origin
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1.0])
        right /= np.linalg.norm(right)
        world_to_camera = np.stack([right, np.cross(forward, right), forward])
        rows, columns = np.mgrid[:_HEIGHT, :_WIDTH]
        pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1).reshape(-1, 3)
        rays = pixels @ np.linalg.inv(intrinsic).T @ world_to_camera  # their part along the camera's z is 1
        distance, instance = _nearest_hit(room, origin, rays)
        rotation.append(world_to_camera)
        translation.append(-world_to_camera @ origin)
        depth.append(distance.reshape(_HEIGHT, _WIDTH))
        instances.append(instance.reshape(_HEIGHT, _WIDTH))
        places.append((origin + distance[:, None] * rays).reshape(_HEIGHT, _WIDTH, 3))
    return Views(intrinsic, *(np.array(part) for part in (rotation, translation, depth, instances, places)))


def _nearest_hit(room: Room, origin: NDArray[np.float64], rays: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Depth of the first surface on each ray (R, 3) from inside the room, and its instance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.maximum((0 - origin) / rays, (room.size - origin) / rays)  # where a ray leaves the room, along each axis
        axis, distance = ends.argmin(1), ends.min(1)
        towards = np.take_along_axis(rays, axis[:, None], 1)[:, 0] > 0
        instance = np.select([axis == 1, axis == 0], [np.where(towards, 2, 1), np.where(towards, 4, 3)], np.where(towards, -1, 0))
        c, s = np.cos(room.yaw), np.sin(room.yaw)
        away = origin[:2] - room.centre
        start = np.stack([c * away[:, 0] + s * away[:, 1], -s * away[:, 0] + c * away[:, 1]], axis=-1)
        along = np.stack([c * rays[:, :1] + s * rays[:, 1:2], -s * rays[:, :1] + c * rays[:, 1:2]], axis=-1)  # (R, K, 2)
        level = np.sort(np.stack([(0 - origin[2]) / rays[:, 2:] + 0 * room.height, (room.height - origin[2]) / rays[:, 2:]]), axis=0)
        slab = np.sort(np.stack([(-room.half - start) / along, (room.half - start) / along]), axis=0)
        square, middle = (along**2).sum(-1), (along * start).sum(-1)
        root = np.sqrt(middle**2 - square * ((start**2).sum(-1) - room.half[:, 0] ** 2))  # NaN: the ray passes the cylinder
        is_round = room.kinds == BARREL
        enter = np.where(is_round, (-middle - root) / square, slab[0].max(-1))
        leave = np.where(is_round, (-middle + root) / square, slab[1].min(-1))
        enter, leave = np.maximum(enter, level[0]), np.minimum(leave, level[1])
        hit = np.where((enter <= leave) & (enter > 0), enter, np.inf)
    if len(room.kinds):
        first = hit.argmin(1)
        nearest = hit[np.arange(len(hit)), first]
        instance = np.where(nearest < distance, 5 + first, instance)
        distance = np.minimum(distance, nearest)
    return distance, instance


def noisy_masks(views: Views, noise: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """(V, H, W) masks as an image model might give them: instances, half of them cut in two, anew in each view, and wrong pixels.

    Args:
        views: What is seen.
        noise: Share of pixels that take the mask of another pixel of the view.
        rng: Draws cuts and noise.
    """
    found = []
    for instances, places in zip(views.instances, views.places, strict=True):
        flat, spot = instances.ravel(), places.reshape(-1, 3)
        seen = flat >= 0
        size = np.bincount(flat[seen], minlength=1)
        centre = np.stack([np.bincount(flat[seen], spot[seen, i], len(size)) for i in range(3)], axis=1) / np.maximum(size, 1)[:, None]
        cut = rng.normal(0, 1, centre.shape)
        half = (((spot - centre[flat]) * cut[flat]).sum(1) > 0) & (rng.random(len(size)) < 0.5)[flat]
        mask = np.where(seen, 2 * flat + half, -1)
        wrong = rng.random(len(mask)) < noise
        mask[wrong] = rng.choice(mask, int(wrong.sum()))
        found.append(mask.reshape(instances.shape))
    return np.array(found)


class Furnished(NamedTuple):
    """Points of a room.

    Attributes:
        points: (N, 9) as in :class:`~lit_methods.datamodules.indoor.base.Scene`.
        labels: (N,) classes.
        owner: (N,) instances.
    """

    points: NDArray[np.float64]
    labels: NDArray[np.uint8]
    owner: NDArray[np.int64]


def make_room(rng: np.random.Generator, number: int, views: int) -> tuple[Furnished, Views]:
    """A room's coloured points, and what cameras see of it."""
    room = draw_room(rng)
    place, normal, owner = sample_points(room, number, rng)
    labels = np.concatenate([[FLOOR], [WALL] * 4, room.kinds]).astype(np.uint8)[owner]
    tint = rng.normal(0, _TINT, (5 + len(room.kinds), 3))
    colour = np.clip(_COLOURS[labels] + tint[owner] + rng.normal(0, _GRAIN, place.shape), 0, 1)
    return Furnished(np.concatenate([place, normal, colour], axis=1), labels, owner), render_views(room, views, rng)


def scene_of(name: str, room: Furnished, seen: Views, pixels: NDArray[np.int64] | None, delta: float = 0.05) -> Scene:
    """A scene whose masks are those of the views' pixels (V, H, W), or superpoints where there are none."""
    place = np.ascontiguousarray(room.points[:, :3])
    if pixels is None:
        masks = superpoints(place, room.points[:, 3:6])[None]
    else:
        intrinsic, rotation, translation, depth = map(torch.from_numpy, (seen.intrinsic, seen.rotation, seen.translation, seen.depth))
        link = link_points(torch.from_numpy(place), intrinsic, rotation, translation, depth, delta)
        masks = masks_at_points(link, torch.from_numpy(pixels)).numpy()
    return Scene(name, room.points.astype(np.float32), room.labels, masks.astype(np.int32))


def make_scene(
    name: str,
    rng: np.random.Generator,
    number: int = 4000,
    views: int = 3,
    mask_noise: float = 0.02,
    mask_source: MaskSource = "views",
) -> tuple[Scene, NDArray[np.int64]]:
    """A generated room with its points, labels and masks at the points, and the instance (N,) of each point.

    Args:
        name: Name of the scene.
        rng: Draws everything.
        number: Points, at most.
        views: Cameras.
        mask_noise: Share of pixels of a wrong mask.
        mask_source: ``views``: masks of the cameras' images; ``geometric``: superpoints of the points.
    """
    room, seen = make_room(rng, number, views)
    return scene_of(name, room, seen, noisy_masks(seen, mask_noise, rng) if mask_source == "views" else None), room.owner


class RoomsDataModule(IndoorDataModule):
    """Generated rooms with a few labelled points, and masks of rendered views: weak labels of indoor scenes without a download.

    Batch: {"points": (P, 9) float32, "points_per_sample": (B,) int64, "labels": (P,) int64, "weights": (P,) float32, "truth": (P,) int64, "index": (B,) int64}

    Rooms of 3 to 4 metres with low walls and 6 to 10 chests, cabinets and barrels. A point's colour is noisy, and tells something of its
    class together with its neighbours' alone. Each view's masks are instances and halves of instances, with wrong pixels. What batches
    and attributes hold: :class:`~lit_methods.datamodules.indoor.base.IndoorDataModule`.

    Args:
        num_train: Rooms to train on.
        num_val: Rooms of the validation, and as many of the test.
        num_points: Points of a room.
        labelled_points: Labelled points of a training room: one of each of as many things, such as a wall or a chest, then a second one.
        num_views: Views of a room.
        mask_noise: Share of the views' pixels that have a wrong mask.
        mask_source: ``views``, or ``geometric``: superpoints of the points, without a view.
        supervision: ``sparse``: the labelled points alone; ``full``: all labels, the upper bound.
        augment: Turn, scale, jitter and thin out training rooms.
        labels_folder: Folder of the label store; None: ``labels`` in the run's folder. It is written anew at every fit.
        batch_size: Rooms per process and step.
        num_workers: Processes that read data.
        seed: Seed of the training rooms, their labelled points, order and augmentation. Validation and test are the same for every seed.

    Raises:
        ValueError: A value lies outside its range.
    """  # noqa: E501

    def __init__(
        self,
        num_train: int = 8,
        num_val: int = 4,
        num_points: int = 4000,
        labelled_points: int = 10,
        num_views: int = 3,
        mask_noise: float = 0.02,
        mask_source: MaskSource = "views",
        supervision: Supervision = "sparse",
        augment: bool = True,
        labels_folder: Path | None = None,
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            supervision=supervision,
            augmentation=Augmentation() if augment else None,
            max_points=None,
            labels_folder=labels_folder,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        at_least(1, num_train=num_train, num_val=num_val, labelled_points=labelled_points, num_views=num_views)
        at_least(100, "points", num_points=num_points)
        share(mask_noise=mask_noise)
        one_of(MaskSource, mask_source=mask_source)
        if labelled_points > num_points:
            raise ValueError(f"labelled_points is {labelled_points} of num_points {num_points}: give fewer")
        self.class_names = CLASSES
        self.sizes = {"train": num_train, "val": num_val, "test": num_val}
        self.options: dict[str, Any] = {"number": num_points, "views": num_views, "mask_noise": mask_noise, "mask_source": mask_source}
        self.labelled_points = labelled_points
        self.save_hyperparameters(ignore=["labels_folder"])  # a path would block a strict resume

    def scenes(self, part: Literal["train", "val", "test"]) -> tuple[Any, int]:
        """Generated rooms, kept in memory."""
        place = {"train": [1, self.seed], "val": [2], "test": [3]}[part]
        number = self.sizes[part]
        rooms, owners = zip(
            *(make_scene(f"{part}_{i}", np.random.default_rng([31, *place, i]), **self.options) for i in range(number)), strict=True
        )
        if part == "train":
            self._owners = owners
        return rooms.__getitem__, number

    def labelled(self, index: int) -> NDArray[np.int64]:
        """A point of each thing, things in random order; where there are fewer things than points, second ones follow, and so on."""
        rng, owner = np.random.default_rng([37, self.seed, index]), self._owners[index]
        order = rng.permutation(len(owner))
        _, thing = np.unique(owner[order], return_inverse=True)
        by_thing = np.argsort(thing, kind="stable")
        before = np.empty(len(owner), dtype=np.int64)  # points of the same thing that come earlier
        before[by_thing] = np.arange(len(owner)) - np.searchsorted(thing[by_thing], thing[by_thing])
        rank = rng.permutation(thing.max() + 1)[thing]
        return order[np.lexsort((rank, before))[: self.labelled_points]]


__all__ = [
    "CLASSES",
    "Furnished",
    "Room",
    "RoomsDataModule",
    "Views",
    "draw_room",
    "make_room",
    "make_scene",
    "noisy_masks",
    "render_views",
    "sample_points",
    "scene_of",
]
