"""Ray casting of convex solids and a flat street, shared by the LiDAR and the cameras of the embedded driving world.

Both sensors are a grid of rays with one origin, and both go through :func:`cast` and :func:`surface`: what a point and a pixel see along
the same line is the same surface, of the same class, behind the same occluders. Frames are x forward, y left, z up unless stated; units are
metres, radians and seconds; colours are linear RGB in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

if TYPE_CHECKING:
    from lit_methods.datamodules.driving.street import Road

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

SKY, GROUND = -2, -1  # values of Hits.solid that are no index of a solid
MAX_PLANES = 10

# Materials choose the texture. The second column is how strongly the material returns LiDAR light, relative to its brightness.
MATTE, FACADE, LEAVES, BARK, PAINT, GLASS, TYRE, BRICK, STRIPES, CONE, CLOTH, COACH, SIGN, METAL = range(14)
LIDAR_GAIN = np.array([0.25, 0.2, 0.3, 0.25, 0.3, 0.08, 0.25, 0.2, 0.6, 0.7, 0.22, 0.3, 1.2, 0.4], np.float32)


class Solid(NamedTuple):
    """One convex solid in the frame of its actor: the space where ``normals @ x <= offsets``, or an ellipsoid where there are no planes."""

    normals: Floats  # (P, 3) outward unit normals, P = 0 for an ellipsoid
    offsets: Floats  # (P,)
    center: Floats  # (3,) centre of the axis-aligned bounding box
    half: Floats  # (3,) half its sides; the radii of an ellipsoid
    material: int
    color: tuple[float, float, float]
    label: int | None = None  # raw nuScenes-lidarseg id; None: that of the actor


def tapered(
    bottom: tuple[float, float], top: tuple[float, float], z: tuple[float, float], material: int, color: tuple[float, float, float], *,
    at: tuple[float, float] = (0.0, 0.0), shift: float = 0.0, label: int | None = None,
) -> Solid:  # fmt: skip
    """A box with a top of another size: ``bottom`` and ``top`` are half lengths and half widths, ``shift`` moves the top along x."""
    (bx, by), (tx, ty), (z0, z1), (ax, ay) = bottom, top, z, at
    height = z1 - z0
    rise = np.array(
        [
            [height, 0, bx - (tx + shift)],
            [-height, 0, bx - (tx - shift)],
            [0, height, by - ty],
            [0, -height, by - ty],
            [0, 0, -1],
            [0, 0, 1],
        ]
    )
    foot = np.array([[ax + bx, ay, z0], [ax - bx, ay, z0], [ax, ay + by, z0], [ax, ay - by, z0], [ax, ay, z0], [ax, ay, z1]])
    normals = rise / np.linalg.norm(rise, axis=1, keepdims=True)
    low = np.array([min(ax - bx, ax + shift - tx), ay - max(by, ty), z0])
    high = np.array([max(ax + bx, ax + shift + tx), ay + max(by, ty), z1])
    return Solid(normals, (normals * foot).sum(1), (low + high) / 2, (high - low) / 2, material, color, label)


def box(center: tuple[float, float, float], size: tuple[float, float, float], material: int, color: tuple[float, float, float]) -> Solid:
    """A box of ``size`` (length, width, height) about ``center``, parallel to the axes of its actor."""
    (x, y, z), (length, width, height) = center, size
    half = (length / 2, width / 2)
    return tapered(half, half, (z - height / 2, z + height / 2), material, color, at=(x, y))


def prism(
    radius: float,
    z: tuple[float, float],
    material: int,
    color: tuple[float, float, float],
    *,
    top: float | None = None,
    at: tuple[float, float] = (0.0, 0.0),
) -> Solid:
    """An upright eight-sided column (or cone, with ``top`` the upper radius): poles, trunks, limbs, traffic cones."""
    top = radius if top is None else top
    angle = np.arange(8) * (np.pi / 4)
    sides = np.stack([np.cos(angle), np.sin(angle), np.full(8, (radius - top) / (z[1] - z[0]))], axis=1)
    normals = np.concatenate([sides / np.linalg.norm(sides, axis=1, keepdims=True), [[0, 0, -1], [0, 0, 1]]])
    base = np.array([at[0], at[1], z[0]])
    foot = base + np.concatenate([radius * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1), [[0, 0, 0], [0, 0, z[1] - z[0]]]])
    reach = max(radius, top) / np.cos(np.pi / 8)
    half = np.array([reach, reach, (z[1] - z[0]) / 2])
    return Solid(normals, (normals * foot).sum(1), base + np.array([0, 0, half[2]]), half, material, color)


def ellipsoid(
    center: tuple[float, float, float], radii: tuple[float, float, float], material: int, color: tuple[float, float, float]
) -> Solid:
    """An ellipsoid with its axes parallel to those of its actor."""
    return Solid(np.zeros((0, 3)), np.zeros(0), np.array(center), np.array(radii), material, color)


@dataclass(frozen=True)
class Solids:
    """All solids of a scene as arrays; each in the frame of the actor that it moves with."""

    actor: Ints  # (n,) index of the actor
    planes: Ints  # (n,) number of planes; 0: ellipsoid
    normals: Floats  # (n, MAX_PLANES, 3)
    offsets: Floats  # (n, MAX_PLANES)
    center: Floats  # (n, 3)
    half: Floats  # (n, 3)
    material: Ints  # (n,)
    color: Floats  # (n, 3)
    label: Ints  # (n,) raw nuScenes-lidarseg ids 0..31

    @classmethod
    def stack(cls, parts: list[tuple[int, int, Solid]]) -> Solids:
        """Stack ``(actor index, raw id of the actor, solid)`` triples."""
        normals = np.zeros((len(parts), MAX_PLANES, 3), np.float32)
        offsets = np.zeros((len(parts), MAX_PLANES), np.float32)
        for row, (_, _, solid) in enumerate(parts):
            normals[row, : len(solid.normals)], offsets[row, : len(solid.normals)] = solid.normals, solid.offsets
        return cls(
            actor=np.array([actor for actor, _, _ in parts]),
            planes=np.array([len(solid.normals) for _, _, solid in parts]),
            normals=normals,
            offsets=offsets,
            center=np.array([solid.center for _, _, solid in parts], np.float32),
            half=np.array([solid.half for _, _, solid in parts], np.float32),
            material=np.array([solid.material for _, _, solid in parts]),
            color=np.array([solid.color for _, _, solid in parts], np.float32),
            label=np.array([label if solid.label is None else solid.label for _, label, solid in parts], np.uint8),
        )


@dataclass(frozen=True)
class Posed:
    """The solids as one sensor shot sees them: where each actor stands at that time, relative to the sensor's origin."""

    solids: Solids
    turn: Floats  # (n, 2) cosine and sine of the actor's yaw
    origin: Floats  # (n, 3) sensor origin in the actor frame
    nearness: Floats  # (n, MAX_PLANES, 3) world-frame normal / distance to the plane; times a unit ray: 1 / depth of the plane
    faces: Ints  # (n, MAX_PLANES) which plane each row of ``nearness`` is: those that face the sensor come first
    facing: Ints  # (n,) how many planes face the sensor
    corners: Floats  # (n, 8, 3) corners of the bounding box, world frame, relative to the sensor origin
    nearest: Floats  # (n,) distance from the sensor to the bounding box


def pose(solids: Solids, position: Floats, yaw: Floats, origin: Floats) -> Posed:
    """Place the solids.

    Args:
        solids: The scene's solids.
        position: (A, 3) where the actors stand, world frame.
        yaw: (A,) their headings.
        origin: (3,) the sensor, world frame.
    """
    cosine, sine = np.cos(yaw)[solids.actor], np.sin(yaw)[solids.actor]
    away = origin - position[solids.actor]
    local = np.stack([cosine * away[:, 0] + sine * away[:, 1], cosine * away[:, 1] - sine * away[:, 0], away[:, 2]], axis=1)
    clearance = solids.offsets - (solids.normals * local[:, None]).sum(2)  # negative: the sensor is on the outer side of the plane
    clearance = np.where(np.abs(clearance) < 1e-5, 1e-5, clearance)
    unused = np.arange(MAX_PLANES) >= solids.planes[:, None]
    faces = np.argsort(np.where(unused, 2, clearance > 0), axis=1, kind="stable")
    nearness = np.take_along_axis(_turn(solids.normals, cosine[:, None], sine[:, None]) / clearance[..., None], faces[..., None], axis=1)
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = (solids.center - local)[:, None] + solids.half[:, None] * signs
    outside = np.maximum(np.abs(local - solids.center) - solids.half, 0)
    return Posed(
        solids=solids,
        turn=np.stack([cosine, sine], axis=1).astype(np.float32),
        origin=local.astype(np.float32),
        nearness=nearness.astype(np.float32),
        faces=faces.astype(np.uint8),
        facing=((clearance < 0) & ~unused).sum(1),
        corners=_turn(corners, cosine[:, None], sine[:, None]),
        nearest=np.linalg.norm(outside, axis=1),
    )


def _turn(vectors: Floats, cosine: Floats, sine: Floats) -> Floats:
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return np.stack([cosine * x - sine * y, sine * x + cosine * y, z], axis=-1)


Window = tuple[int, int, int, int, int]  # solid, first row, last row + 1, first column, last column + 1


def clip_windows(index: Ints, row0: Floats, row1: Floats, col0: Floats, col1: Floats, shape: tuple[int, int]) -> list[Window]:
    top, bottom = np.clip(np.floor(row0), 0, shape[0]), np.clip(np.ceil(row1) + 1, 0, shape[0])
    left, right = np.clip(np.floor(col0), 0, shape[1]), np.clip(np.ceil(col1) + 1, 0, shape[1])
    keep = (top < bottom) & (left < right)
    table = np.stack([index, top, bottom, left, right], axis=1)[keep].astype(np.int64)
    return [(p, a, b, c, d) for p, a, b, c, d in table.tolist()]


EDGES = np.array([[a, b] for a in range(8) for b in range(a + 1, 8) if bin(a ^ b).count("1") == 1])


def camera_windows(posed: Posed, rotation: Floats, intrinsic: Floats, shape: tuple[int, int], far: float) -> list[Window]:
    """For each solid that a camera may see, the rows and columns that its bounding box covers, nearest solid first.

    Args:
        posed: The solids around the camera.
        rotation: (3, 3) camera (x right, y down, z forward) to world.
        intrinsic: (3, 3).
        shape: Rows and columns of the image.
        far: Solids beyond this many metres are left out.
    """
    near = 0.05
    index = np.nonzero(posed.nearest < far)[0]
    corners = posed.corners[index] @ rotation
    start, end = corners[:, EDGES[:, 0]], corners[:, EDGES[:, 1]]
    crossing = (start[..., 2] < near) != (end[..., 2] < near)  # box edges through the near plane end there
    share = np.where(crossing, (near - start[..., 2]) / np.where(crossing, end[..., 2] - start[..., 2], 1), 0)[..., None]
    points = np.concatenate([corners, start + share * (end - start)], axis=1)
    seen = np.concatenate([corners[..., 2] >= near, crossing], axis=1)
    depth = np.where(seen, points[..., 2], 1)
    col = intrinsic[0, 0] * points[..., 0] / depth + intrinsic[0, 2]
    row = intrinsic[1, 1] * points[..., 1] / depth + intrinsic[1, 2]
    low, high = (lambda a: np.where(seen, a, np.inf).min(1)), (lambda a: np.where(seen, a, -np.inf).max(1))
    order = np.argsort(posed.nearest[index], kind="stable")
    return clip_windows(index[order], low(row)[order], high(row)[order], low(col)[order], high(col)[order], shape)


def lidar_windows(posed: Posed, rotation: Floats, elevation: Floats, columns: int, far: float) -> list[Window]:
    """For each solid within range, the beams and columns that its bounding box covers, nearest solid first.

    Args:
        posed: The solids around the LiDAR.
        rotation: (3, 3) LiDAR (x right, y forward, z up) to world.
        elevation: (beams,) rising, evenly spaced.
        columns: Columns of a sweep; column c looks along :func:`lidar_azimuth`.
        far: Maximum range.
    """
    index = np.nonzero(posed.nearest < far)[0]
    index = index[np.argsort(posed.nearest[index], kind="stable")]
    corners = posed.corners[index] @ rotation
    # Seen from the origin a box is highest at its nearest point, which need not be a corner; the margin covers the tilt of the sensor.
    flat = (np.abs(posed.origin[index] - posed.solids.center[index]) - posed.solids.half[index])[:, :2]
    nearest = np.maximum(np.linalg.norm(np.maximum(flat, 0), axis=1), 1e-3)
    farthest = np.linalg.norm(corners[..., :2], axis=2).max(1)
    low, high = corners[..., 2].min(1), corners[..., 2].max(1)
    margin = 0.02
    step = elevation[1] - elevation[0]
    row0 = (np.arctan2(low, np.where(low < 0, nearest, farthest)) - margin - elevation[0]) / step
    row1 = (np.arctan2(high, np.where(high > 0, nearest, farthest)) + margin - elevation[0]) / step
    middle = corners.mean(1)
    heading = np.arctan2(middle[:, 0], middle[:, 1])
    spread = np.arctan2(corners[..., 0], corners[..., 1]) - heading[:, None]
    spread = (spread + np.pi) % (2 * np.pi) - np.pi
    around = (flat <= 0).all(1)  # the sensor stands under or above the box
    lowest, highest = np.where(around, -np.pi, spread.min(1)), np.where(around, np.pi, spread.max(1))
    per_column = 2 * np.pi / columns
    begin = (heading + lowest - lidar_azimuth(0, columns)) / per_column
    end = begin + (highest - lowest) / per_column
    turns = np.floor(begin / columns) * columns
    begin, end = begin - turns, np.minimum(end - turns, begin - turns + columns)
    windows = clip_windows(index, row0, row1, begin, end, (len(elevation), columns))
    wrapped = end > columns - 1  # goes on at column 0
    return windows + clip_windows(
        index[wrapped], row0[wrapped], row1[wrapped], 0 * end[wrapped], (end - columns)[wrapped], (len(elevation), columns)
    )


def lidar_azimuth(column: int | Ints, columns: int) -> float | Floats:
    """Clockwise angle from the LiDAR's y axis (forward) of a column: a sweep starts at the left, -pi/2, and turns over the front."""
    return column * (2 * np.pi / columns) - np.pi / 2


class Hits(NamedTuple):
    """First surface along each ray: arrays of the rays' grid shape (H, W)."""

    depth: Floats  # metres along the unit ray, inf for the sky
    solid: Ints  # index of the solid, or GROUND, or SKY
    face: Ints  # which plane of the solid; meaningless for ellipsoids and ground


def cast(rays: Floats, posed: Posed, windows: list[Window], depth: Floats) -> Hits:
    """Find the nearest solid along each ray.

    Args:
        rays: (3, H, W) float32 unit directions in the world frame, all from the origin that ``posed`` was made for.
        posed: The solids.
        windows: The part of the grid to test for each solid; nearest first is fastest, any order is right.
        depth: (H, W) float32, how far each ray goes if nothing stops it (inf, or the ground behind which nothing is seen).
            Returned in :class:`Hits` with ``solid`` GROUND where it is finite and SKY elsewhere, when nothing stands in the way.
    """
    # The buffer holds 1 / depth. A plane is at 1 / depth = nearness . ray, so that entering and leaving a solid are a minimum over the
    # planes that face the sensor and a maximum over the others, without a division or a case for rays that run along or away from a plane.
    inverse = 1 / depth
    solid = np.where(inverse > 0, GROUND, SKY).astype(np.int32)
    face = np.zeros(depth.shape, np.uint8)
    with np.errstate(invalid="ignore"):
        for index, top, bottom, left, right in windows:
            part = (slice(top, bottom), slice(left, right))
            behind = inverse[part]
            if np.minimum.reduce(behind, axis=None) * posed.nearest[index] >= 1:
                continue  # hidden behind what is already there
            ray = rays[:, top:bottom, left:right]
            count = posed.solids.planes[index]
            if count == 0:
                enter = _enter_ellipsoid(ray, posed, index, behind)
                nearer = enter > behind
            else:
                facing = posed.facing[index]
                if facing == 0:
                    continue  # the sensor is inside
                plane = posed.nearness[index, :count, :, None, None]
                near = plane[:, 0] * ray[0]
                near += plane[:, 1] * ray[1]
                near += plane[:, 2] * ray[2]
                enter = near[:facing].min(0)
                nearer = enter > np.maximum(near[facing:].max(0), behind)
            if nearer.any():
                np.copyto(behind, enter, where=nearer)
                np.copyto(solid[part], index, where=nearer)
                if count:
                    face[part][nearer] = posed.faces[index][near[:facing][:, nearer].argmin(0)]
    with np.errstate(divide="ignore"):
        return Hits(1 / inverse, solid, face)


def _enter_ellipsoid(ray: Floats, posed: Posed, index: int, behind: Floats) -> Floats:
    """1 / depth of an ellipsoid, NaN or negative for a miss; leafy ones have holes towards their outline, at fixed places of the plant.

    Holes are cut only where the ellipsoid is nearer than what is there already, ``behind``.
    """
    half, (cosine, sine) = posed.solids.half[index], posed.turn[index]
    start = (posed.origin[index] - posed.solids.center[index]) / half
    apart = float((start * start).sum()) - 1
    if apart <= 0:
        return np.zeros(ray.shape[1:], np.float32)  # the sensor is inside
    x = (cosine / half[0]) * ray[0] + (sine / half[0]) * ray[1]
    y = (cosine / half[1]) * ray[1] - (sine / half[1]) * ray[0]
    z = ray[2] / half[2]
    a = x * x + y * y + z * z
    b = start[0] * x + start[1] * y + start[2] * z
    root = np.sqrt(b * b - a * np.float32(apart))
    inverse = (root - b) / np.float32(apart)
    if posed.solids.material[index] == LEAVES:
        row, col = np.nonzero(inverse > behind)
        if not len(row):
            return inverse
        distance = 1 / inverse[row, col]
        px, py, pz = (start[i] + distance * axis[row, col] for i, axis in enumerate((x, y, z)))
        facing = root[row, col] / np.sqrt(a[row, col])  # cosine between ray and normal, on the unit sphere
        u, v = (px - py) * (half[0] * 3) + np.float32(index * 17 % 512), (pz + 0.5 * py) * (half[2] * 3)
        hole = noise(u, v) > 0.22 + 1.1 * facing
        inverse[row[hole], col[hole]] = 0
    return inverse


@lru_cache(maxsize=1)
def _noise_table() -> NDArray[np.float32]:
    """512 x 512 tileable noise of several scales, uniform in [0, 1]."""
    rng = np.random.default_rng(20240)
    total = sum(
        weight * _unit(gaussian_filter(rng.standard_normal((512, 512)), scale, mode="wrap"))
        for scale, weight in ((0.7, 0.5), (2, 0.6), (6, 0.6))
    )
    ranks = np.empty(512 * 512, np.float32)
    ranks[np.argsort(total, axis=None, kind="stable")] = np.arange(512 * 512) / (512 * 512)  # type: ignore[arg-type]
    return ranks.reshape(512, 512)


def _unit(field: Floats) -> Floats:
    return field / field.std()


def noise(u: Floats, v: Floats) -> Floats:
    """Noise in [0, 1] at texture coordinates, repeating every 512."""
    return _noise_table()[np.floor(u).astype(np.int32) & 511, np.floor(v).astype(np.int32) & 511]


def scatter(*keys: Floats | Ints) -> Floats:
    """A number in [0, 1) for each integer key tuple: which window is lit, which slab is darker."""
    mixed = np.zeros(np.broadcast(*keys).shape, np.uint32)
    for key in keys:
        mixed = (mixed ^ key.astype(np.int32).astype(np.uint32)) * np.uint32(2654435761)
        mixed ^= mixed >> np.uint32(15)
    return (mixed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


class Surface(NamedTuple):
    """What n rays see. Vectors and colours are channel-first, which numpy handles several times faster."""

    point: Floats  # (3, n) world frame
    normal: Floats  # (3, n) world frame
    albedo: Floats  # (3, n) colour under white light
    label: Ints  # (n,) raw nuScenes-lidarseg id
    gain: Floats  # (n,) LiDAR reflectivity relative to brightness
    gloss: Floats  # (n,) share of the sky that the surface mirrors


def _gather(table: Floats, which: Ints) -> Floats:
    """Rows of a table (m, 3) for each pixel, channel-first (3, n)."""
    return np.take(np.ascontiguousarray(table.T), which, axis=1)


def rgb(red: float, green: float, blue: float) -> Floats:
    return np.array([[red], [green], [blue]], np.float32)


def surface(posed: Posed, road: Road, origin: Floats, directions: Floats, depth: Floats, solid: Ints, face: Ints) -> Surface:
    """Class, colour and normal of the first surface along n rays that hit something.

    Args:
        posed: The solids.
        road: The ground.
        origin: (3,) sensor, world frame.
        directions: (3, n) unit rays, world frame.
        depth: (n,) finite.
        solid: (n,) index of the solid or GROUND.
        face: (n,) plane of the solid.
    """
    solids = posed.solids
    count = len(depth)
    along = directions * depth
    point = along + origin.astype(np.float32)[:, None]
    normal = np.zeros((3, count), np.float32)
    albedo = np.empty((3, count), np.float32)
    label = np.zeros(count, np.uint8)
    gain = np.full(count, 0.22, np.float32)
    gloss = np.zeros(count, np.float32)

    ground = np.flatnonzero(solid == GROUND)
    label[ground], albedo[:, ground], kerb = road.paint(point.take(ground, axis=1), depth[ground])
    normal[2, ground] = np.where(kerb, np.float32(0.5), np.float32(1))

    on = np.flatnonzero(solid >= 0)
    material = solids.material[solid[on]]
    for kind in np.flatnonzero(np.bincount(material)):
        pixels = on[np.flatnonzero(material == kind)]
        which = solid[pixels]
        cosine, sine = posed.turn[:, 0][which], posed.turn[:, 1][which]
        x, y, z = along.take(pixels, axis=1)
        local = np.stack([cosine * x + sine * y, cosine * y - sine * x, z]) + _gather(posed.origin, which)
        own = _gather(solids.normals.reshape(-1, 3), which * MAX_PLANES + face[pixels])
        round_ = np.flatnonzero(solids.planes[which] == 0)
        if len(round_):
            outward = (local[:, round_] - _gather(solids.center, which[round_])) / _gather(solids.half, which[round_]) ** 2
            own[:, round_] = outward / np.maximum(np.sqrt(_dot(outward, outward)), np.float32(1e-6))
        normal[:, pixels] = cosine * own[0] - sine * own[1], sine * own[0] + cosine * own[1], own[2]
        label[pixels] = solids.label[which]
        gain[pixels] = LIDAR_GAIN[kind]
        albedo[:, pixels], gloss[pixels] = _texture(int(kind), _gather(solids.color, which), local, own, which, depth[pixels], solids)
    return Surface(point, normal, albedo, label, gain, gloss)


def _texture(
    kind: int, color: Floats, local: Floats, normal: Floats, which: Ints, depth: Floats, solids: Solids
) -> tuple[Floats, Floats | float]:  # fmt: skip
    """Colour (3, n) and gloss of one material at points ``local`` (3, n) of the actor frame."""
    x, y, z = local
    fade = np.clip(1.6 - depth / 40, 0.15, 1)  # finer than a pixel far away: fade instead of flicker
    along = np.where(np.abs(normal[0]) > np.abs(normal[1]), y, x)
    if kind == FACADE:
        return _facade(color, along, z, normal, which, depth, solids)
    if kind == LEAVES:
        u, v = (x - y) * 7 + which * 31, (z + 0.5 * y) * 7
        clumps, leaves = noise(u * 0.3, v * 0.3), noise(u, v)
        bright = 0.55 + 0.35 * clumps + fade * 0.7 * (leaves - 0.5)
        top = np.clip((z - solids.center[:, 2][which]) / solids.half[:, 2][which], -1, 1)
        return color * (bright * (1 + 0.25 * top)), 0.0
    if kind == BARK:
        return color * (1 + 0.8 * fade * (noise(np.arctan2(y, x) * 12, z * 4) - 0.5)), 0.0
    if kind == PAINT:
        # Lamps at both ends, a dark underside, a plate; the rest is lacquer.
        size = _gather(solids.half, which)
        middle = _gather(solids.center, which)
        low = z < middle[2] - 0.55 * size[2]
        end = np.abs(normal[0]) > 0.7
        lamp = end & (np.abs(y) > 0.62 * size[1]) & (np.abs(z - middle[2] - 0.2 * size[2]) < 0.35 * size[2])
        plate = end & (np.abs(y) < 0.26) & (np.abs(z - middle[2] + 0.1 * size[2]) < 0.07)
        out = np.where(low, color * 0.25 + 0.02, color)
        seam = (np.abs(normal[1]) > 0.7) & ((np.abs(x) < 0.02) | (np.abs(np.abs(x) - 1.0) < 0.02)) & (depth < 18)
        out = np.where(seam, out * 0.5, out)
        front = rgb(0.95, 0.95, 0.85)
        rear = rgb(0.75, 0.04, 0.03)
        out = np.where(lamp, np.where((normal[0] > 0), front, rear), out)
        return np.where(plate, np.float32(0.85), out), np.where(low | lamp, 0.02, 0.16)
    if kind == GLASS:
        # Car cabins: glass all round between pillars and a painted roof.
        size, middle = _gather(solids.half, which), _gather(solids.center, which)
        share = (z - (middle[2] - size[2])) / (2 * size[2])
        side = np.abs(normal[1]) > 0.6
        along = np.where(side, np.abs(x - middle[0]) / size[0], np.abs(y) / size[1])
        pillar = np.where(side, (along < 0.05) | (along > 0.84 - 0.28 * share), along > 0.82)
        painted = (normal[2] > 0.85) | (share < 0.06) | (share > 0.9) | pillar
        glass = rgb(0.035, 0.045, 0.055)
        return np.where(painted, color, glass), np.where(painted, 0.14, 0.4)
    if kind == COACH:
        # Buses, box trucks, caravans: a band of windows when the colour is bright, planks otherwise.
        size, middle = _gather(solids.half, which), _gather(solids.center, which)
        share = (z - (middle[2] - size[2])) / (2 * size[2])
        upright = np.abs(normal[2]) < 0.5
        post = np.abs((along / 1.35) % 1 - 0.5) > 0.45
        pane = upright & (share > 0.48) & (share < 0.86) & ~post
        stripe = upright & (share > 0.3) & (share < 0.37)
        out = np.where(stripe, 0.25 + 0.5 * color[::-1], color)
        out = np.where((upright & (share < 0.05)), np.float32(0.05), out)
        return np.where(pane, rgb(0.04, 0.05, 0.06), out), np.where(pane, 0.35, 0.08)
    if kind == TYRE:
        middle, size = _gather(solids.center, which), _gather(solids.half, which)
        ring = np.hypot((x - middle[0]) / size[0], (z - middle[2]) / size[2])
        return np.where((ring < 0.55), np.float32(0.42), np.float32(0.03)), 0.0
    if kind == BRICK:
        row = np.floor(z / 0.22)
        brick = scatter(row, np.floor(along / 0.6 + 0.5 * (row % 2)), which)
        joint = (((z / 0.22) % 1 < 0.12) | ((along / 0.6 + 0.5 * (row % 2)) % 1 < 0.05)) & (depth < 15)
        return color * (0.9 + 0.25 * fade * (brick - 0.5) + 0.2 * (noise(along * 3, z * 3) - 0.5) - 0.25 * joint), 0.0
    if kind == STRIPES:
        second = ((along + z) / 0.5) % 1 < 0.5
        return np.where(second, rgb(0.85, 0.85, 0.82), color), 0.02
    if kind == CONE:
        size, middle = _gather(solids.half, which), _gather(solids.center, which)
        share = (z - middle[2]) / size[2]
        return np.where((np.abs(share - 0.15) < 0.3), np.float32(0.9), color), 0.02
    if kind == CLOTH:
        return color * (0.9 + 0.35 * fade * (noise(along * 25, z * 18) - 0.5)), 0.0
    if kind == SIGN:
        size, middle = _gather(solids.half, which), _gather(solids.center, which)
        rim = (np.abs(y - middle[1]) > 0.8 * size[1]) | (np.abs(z - middle[2]) > 0.86 * size[2])
        return np.where((rim & (depth < 30)), np.float32(0.9), color), 0.02
    shine = 0.1 if kind == METAL else 0.0
    return color * (0.92 + 0.3 * fade * (noise(along * 6, z * 6) - 0.5)), shine


def _facade(
    color: Floats, along: Floats, z: Floats, normal: Floats, which: Ints, depth: Floats, solids: Solids
) -> tuple[Floats, Floats]:  # fmt: skip
    """House fronts: storeys of 3.2 m, a window in each bay, shops below, roofs above."""
    style = scatter(which, which * 0 + 3)
    bay = 2.2 + 1.6 * style
    storey = z / 3.2
    level, column = np.floor(storey), np.floor(along / bay)
    fu, fv = along / bay - column, storey - level
    shop = level < 1
    wide = 0.2 + 0.14 * scatter(which, which * 0 + 5)
    inside = (np.abs(fu - 0.5) < np.where(shop, 0.42, 0.5 - wide)) & (fv > np.where(shop, 0.12, 0.28)) & (fv < np.where(shop, 0.72, 0.84))
    frame = inside & ((np.abs(fu - 0.5) < 0.02) | (np.abs(fv - 0.56) < 0.015)) & (depth < 30)
    sill = ~inside & (np.abs(fu - 0.5) < 0.54 - wide) & (fv > 0.22) & (fv < 0.28) & ~shop
    awning = shop & (fv >= 0.78)
    cell = scatter(level, column, which)
    roof = np.abs(normal[2]) > 0.5
    wall = color * (0.88 + 0.3 * (noise(along * 2.5, z * 2.5) - 0.5) + 0.1 * (noise(along * 0.3, z * 0.3 + which) - 0.5))
    row = np.floor(z / 0.3)
    wall = wall * (1 - 0.12 * np.clip(1.4 - depth / 25, 0, 1) * (scatter(row, np.floor(along / 0.7 + 0.5 * (row % 2)), which) > 0.6))
    pane = rgb(0.05, 0.06, 0.075) + (0.45 * (cell > 0.82) * (fv > 0.45)) * rgb(1, 0.93, 0.78)
    out = np.where(inside, pane, wall)
    out = np.where((frame | sill), np.float32(0.75), out)
    tint = np.stack([scatter(which, which * 0 + 7 + i) for i in range(3)])
    out = np.where((awning & ~roof), 0.12 + 0.5 * tint, out)
    out = np.where(roof, (0.12 + 0.2 * color[0]) * rgb(1.25, 0.9, 0.8), out)
    return out.astype(np.float32), np.where(inside & ~frame & ~roof, 0.3, 0.0).astype(np.float32)


class Light(NamedTuple):
    """Weather of a scene."""

    sun: Floats  # (3,) unit vector towards the sun
    strength: float  # of the direct light
    ambient: float
    zenith: Floats  # (3,) sky colour overhead
    horizon: Floats  # (3,) sky colour at the horizon, also that of the haze
    haze: float  # metres after which 63 % of the light is haze
    clouds: float  # 0..1


def _dot(vectors: Floats, direction: Floats) -> Floats:
    """Scalar products along the first axis; not ``@``, whose last bit may depend on the number of BLAS threads."""
    return vectors[0] * direction[0] + vectors[1] * direction[1] + vectors[2] * direction[2]


def _power(base: Floats, doublings: int) -> Floats:
    """``base ** (2 ** doublings)``."""
    for _ in range(doublings):
        base = base * base
    return base


def sky(directions: Floats, light: Light) -> Floats:
    """Colour of the sky (3, n) along n unit directions (3, n)."""
    up = np.clip(directions[2], 0, 1)
    blend = 1 - up
    blend = blend * blend * blend
    zenith, horizon = rgb(*light.zenith), rgb(*light.horizon)
    color = zenith + (horizon - zenith) * blend
    above = np.maximum(up, 0.03)
    field = noise(60 * directions[0] / above, 60 * directions[1] / above)
    soft = noise(17 * directions[0] / above, 17 * directions[1] / above)
    cover = np.clip((0.3 * field + 0.7 * soft - (1 - light.clouds)) * 2.2, 0, 1) * np.clip(up * 6, 0, 1)
    color = color + (rgb(0.95, 0.95, 0.96) - color) * (0.75 * cover)
    glare = _power(np.clip(_dot(directions, light.sun.astype(np.float32)), 0, 1), 6)
    return (color + 0.35 * light.strength * glare).astype(np.float32)


def shade(seen: Surface, directions: Floats, depth: Floats, lit: Floats, light: Light) -> Floats:
    """Colour of n surfaces (3, n): sun by the normal and the shadow map, sky light from above, mirrored sky, haze by distance.

    Args:
        seen: The surfaces.
        directions: (3, n) rays towards them.
        depth: (n,) metres.
        lit: (n,) share of the sun that reaches the surface, 0..1.
        light: Weather.
    """
    sun = light.sun.astype(np.float32)
    direct = np.clip(_dot(seen.normal, sun), 0, 1) * lit
    fill = light.ambient * (0.75 + 0.25 * seen.normal[2])
    warm = rgb(1.06, 1.0, 0.9)
    cool = rgb(0.92, 0.98, 1.1)
    color = seen.albedo * (light.strength * direct * warm + fill * cool)
    shiny = np.nonzero(seen.gloss > 0.01)[0]
    if len(shiny):
        ray, normal = directions[:, shiny], seen.normal[:, shiny]
        facing = -_dot(ray, normal)
        mirrored = ray + 2 * facing * normal
        fresnel = seen.gloss[shiny] * (0.5 + 1.2 * (1 - np.clip(facing, 0, 1)) ** 3)
        below = mirrored[2] < 0
        reflection = np.where(below, np.float32(0.22), sky(mirrored, light))
        spark = _power(np.clip(_dot(mirrored, sun), 0, 1), 5) * lit[shiny] * light.strength
        color[:, shiny] += fresnel * reflection + (0.5 * seen.gloss[shiny] * spark)
    haze = 1 - np.exp(-depth / np.float32(light.haze))
    return color + (rgb(*light.horizon) - color) * haze


def smooth_edges(image: Floats, solid: Ints) -> Floats:
    """Soften the stairs along outlines: where two solids meet, half of the pixel is the mean of its four neighbours.

    ``image`` is (3, H, W), ``solid`` (H, W).
    """
    border = np.zeros(solid.shape, bool)
    rows, cols = solid[1:] != solid[:-1], solid[:, 1:] != solid[:, :-1]
    border[1:] |= rows
    border[:-1] |= rows
    border[:, 1:] |= cols
    border[:, :-1] |= cols
    rows, cols = np.nonzero(border)
    above, below = np.maximum(rows - 1, 0), np.minimum(rows + 1, solid.shape[0] - 1)
    left, right = np.maximum(cols - 1, 0), np.minimum(cols + 1, solid.shape[1] - 1)
    mean = (image[:, above, cols] + image[:, below, cols] + image[:, rows, left] + image[:, rows, right]) / 4
    smooth = image.copy()
    smooth[:, rows, cols] = 0.5 * image[:, rows, cols] + 0.5 * mean
    return smooth


def develop(image: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Linear light (3, H, W) to (H, W, 3) 8-bit sRGB-like values, with a soft shoulder and sensor noise."""
    light = np.clip(image * (1 + 0.12 * image) / (1 + 0.45 * image) * 1.3, 0, 1)
    exposed = _gamma_table()[(light * 4095).astype(np.int32)]
    exposed += rng.standard_normal(image.shape[1:], dtype=np.float32) * np.float32(2.0)
    return np.ascontiguousarray(np.clip(exposed, 0, 255).astype(np.uint8).transpose(1, 2, 0))


@lru_cache(maxsize=1)
def _gamma_table() -> NDArray[np.float32]:
    return (255 * (np.arange(4096) / 4095) ** (1 / 2.2) + 0.5).astype(np.float32)
