"""Layout and motion of the embedded driving world: a bent road, what lines it, and who moves on it.

Places are given in road coordinates: ``s`` metres along the centre line, ``d`` metres to its left. The centre line is an arc through the
scene's origin, so that both directions of the conversion are closed forms. Traffic keeps right; the ego car drives towards growing ``s``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lit_methods.datamodules.driving.render import (
    BARK,
    BRICK,
    CLOTH,
    COACH,
    CONE,
    FACADE,
    GLASS,
    LEAVES,
    MATTE,
    METAL,
    PAINT,
    SIGN,
    STRIPES,
    TYRE,
    Bools,
    Floats,
    Ints,
    Light,
    Solid,
    Solids,
    box,
    ellipsoid,
    noise,
    prism,
    rgb,
    scatter,
    tapered,
)  # fmt: skip

# The 32 raw classes of nuScenes-lidarseg in the order of their ids.
LIDARSEG_NAMES = (
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable", "movable_object.trafficcone",
    "static_object.bicycle_rack", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck",
    "flat.driveable_surface", "flat.other", "flat.sidewalk", "flat.terrain", "static.manmade", "static.other",
    "static.vegetation", "vehicle.ego",
)  # fmt: skip
DRIVEABLE, OTHER_FLAT, SIDEWALK, TERRAIN, MANMADE, STATIC_OTHER, VEGETATION = 24, 25, 26, 27, 28, 29, 30

KERB = 0.14  # height of everything beside the carriageway
LANE = 3.5
PLOT = 18.0  # length of a piece of land beside the road
REACH = (-90.0, 130.0)  # the part of the road that is built up
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Road:
    """The ground: carriageway with markings, kerbs, pavements, land beside it, perhaps a side street and an island in the middle."""

    bend: float  # 1 / radius, left positive
    lanes: int  # in each direction
    parking: float  # width of the parking strip on either side
    pavement: float  # width of the pavement
    island: float  # half width of the raised island between the directions, 0: none
    crossing: float  # s of the side street's centre
    crossing_half: float  # half its width, 0: none
    land: Ints  # (2, n) 0 grass, 1 paved, for each side and plot
    seed: int

    @property
    def half(self) -> float:
        """Half the width of the carriageway."""
        return self.island + self.lanes * LANE + self.parking

    def place(self, s: Floats, d: Floats) -> Floats:
        """World position (..., 2) of road coordinates."""
        angle = self.bend * np.asarray(s, np.float64)
        away = 1 / self.bend - np.asarray(d, np.float64)
        return np.stack([away * np.sin(angle), 1 / self.bend - away * np.cos(angle)], axis=-1)

    def locate(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Road coordinates of world positions."""
        sign, radius = (1.0 if self.bend > 0 else -1.0), 1 / self.bend
        s = np.arctan2(sign * x, sign * (radius - y)) / self.bend
        d = sign * (abs(radius) - np.hypot(x, y - radius))
        return s, d

    def raised(self, x: Floats, y: Floats) -> Bools:
        """Whether the ground there is at kerb height rather than at 0."""
        s, d = self.locate(x, y)
        across = np.abs(s - self.crossing)
        raised = (np.abs(d) > self.half) & (across > self.crossing_half)
        return raised | ((np.abs(d) < self.island) & (across > self.crossing_half + 4))

    def depth(self, origin: Floats, rays: Floats) -> Floats:
        """Distance along rays (3, H, W) from ``origin`` to the ground, inf above the horizon."""
        shape = rays.shape[1:]
        depth = np.full(rays[0].size, np.inf, np.float32)
        down = np.nonzero(rays[2].ravel() < -1e-4)[0]
        dx, dy, dz = rays.reshape(3, -1)[:, down]
        x0, y0, z0 = map(float, origin)
        top, floor = (KERB - z0) / dz, -z0 / dz
        near = np.nonzero(floor < 400)[0]
        down, dx, dy, top, floor = down[near], dx[near], dy[near], top[near], floor[near]
        on_top = self.raised(x0 + top * dx, y0 + top * dy)
        under = self.raised(x0 + floor * dx, y0 + floor * dy)
        found = np.where(on_top, top, floor)
        edge = np.nonzero(under & ~on_top)[0]  # these rays end at the face of a kerb: halve the interval
        low, high, dx, dy = top[edge], floor[edge], dx[edge], dy[edge]
        for _ in range(6):
            middle = (low + high) / 2
            inside = self.raised(x0 + middle * dx, y0 + middle * dy)
            low, high = np.where(inside, low, middle), np.where(inside, middle, high)
        found[edge] = high
        depth[down] = found
        return depth.reshape(shape)

    def paint(self, point: Floats, depth: Floats) -> tuple[Ints, Floats, Bools]:
        """Raw class id (n,), albedo (3, n) and whether it is a kerb's face (n,), of ground points (3, n) seen ``depth`` metres away."""
        x, y, z = point
        s, d, drive, walk, paved = self._zones(x, y)
        side, across = np.abs(d), np.abs(s - self.crossing)
        street = across < self.crossing_half
        label = np.select([drive, walk, paved], [DRIVEABLE, SIDEWALK, OTHER_FLAT], TERRAIN).astype(np.uint8)
        kerb = ~drive & (z < KERB - 0.005)

        fade = np.clip(1.5 - depth / 30, 0.1, 1)
        fine, broad = noise(x * 22, y * 22) - 0.5, noise(x * 1.3 + self.seed, y * 1.3) - 0.5
        lane = (side - self.island) / LANE
        wear = 0.012 * np.cos(lane * 4 * np.pi) * (lane < self.lanes)
        grey = 0.095 + 0.035 * fade * fine + 0.035 * broad + np.where(street, 0, wear)
        patch = scatter(np.floor(s / 7), np.floor(d / 2.5), np.full_like(s, self.seed)) > 0.93
        color = (grey - 0.025 * patch) * rgb(1, 1, 1.04)
        mark, yellow = self._markings(s, d, across, street)
        worn = (noise(x * 9, y * 9) > 0.12) & drive
        color = np.where((mark & worn), np.float32(0.62), color)
        color = np.where((yellow & worn), rgb(0.62, 0.45, 0.06), color)

        slab_s, slab_d = s / 1.2, d / 0.9
        slab = scatter(np.floor(slab_s), np.floor(slab_d), np.full_like(s, 1)) - 0.5
        joint = ((slab_s % 1 < 0.05) | (slab_d % 1 < 0.06)) * np.clip(1.3 - depth / 14, 0, 1)
        walk_grey = 0.33 + 0.08 * slab * fade + 0.06 * fade * fine + 0.05 * broad - 0.14 * joint
        curbstone = walk & (np.minimum(side - self.half, across - self.crossing_half) < 0.28)
        stone = np.where(curbstone | kerb, 0.46 + 0.05 * fine, walk_grey)
        color = np.where((walk | kerb), stone * rgb(1.02, 1, 0.94), color)

        tile = (np.floor(s / 0.5) + np.floor(d / 0.5)) % 2 - 0.5
        sett = 0.27 + 0.05 * fade * tile * np.clip(1.3 - depth / 16, 0, 1) + 0.06 * fade * fine + 0.05 * broad
        color = np.where((paved & ~kerb), sett * rgb(1.18, 0.95, 0.84), color)

        grass = ~drive & ~walk & ~paved
        blades = 0.9 + 0.7 * fade * (noise(x * 30, y * 14) - 0.5) + 0.5 * broad
        dry = np.clip(noise(x * 3, y * 3 + self.seed) * 1.5 - 0.75, 0, 1)
        green = rgb(0.085, 0.17, 0.035) * (1 - dry) + rgb(0.2, 0.19, 0.07) * dry
        return label, np.where((grass & ~kerb), green * blades, color).astype(np.float32), kerb

    def _zones(self, x: Floats, y: Floats) -> tuple[Floats, Floats, Bools, Bools, Bools]:
        """Road coordinates of ground points, and whether they are carriageway, pavement, or paved land; the rest is grass."""
        s, d = self.locate(x, y)
        side, across = np.abs(d), np.abs(s - self.crossing)
        island = (side < self.island) & (across > self.crossing_half + 4)
        drive = ((side < self.half) | (across < self.crossing_half)) & ~island
        walk = ~drive & ~island & ((side < self.half + self.pavement) | (across < self.crossing_half + 0.6 * self.pavement))
        plot = np.clip(((s - REACH[0]) / PLOT).astype(np.int32), 0, self.land.shape[1] - 1)
        paved = ~drive & ~walk & (island | (self.land[(d > 0).astype(np.int32), plot] == 1))
        return s, d, drive, walk, paved

    def drivable(self, x: Floats, y: Floats) -> Bools:
        """Whether ground points are part of the carriageway."""
        return self._zones(x, y)[2]

    def _markings(self, s: Floats, d: Floats, across: Floats, street: Bools) -> tuple[Bools, Bools]:
        """White and yellow paint."""
        side = np.abs(d)
        clear = across > self.crossing_half + 3.6 if self.crossing_half else np.ones_like(street)
        lane = (side - self.island) / LANE
        between = np.abs(lane - np.round(lane)) * LANE < 0.075
        inner = between & (np.round(lane) >= 1) & (np.round(lane) < self.lanes)
        edge = np.abs(side - self.island - self.lanes * LANE) < 0.075
        dashes = (s / 6) % 1 < 0.5
        white = clear & ((inner & dashes) | edge)
        bays = (side > self.island + self.lanes * LANE) & ((s / 6.5) % 1 < 0.02) & clear & (side < self.half) & (self.parking > 1)
        yellow = clear & (np.abs(side - 0.16) < 0.065) & (self.island == 0)
        if self.crossing_half:
            gap = across - self.crossing_half
            zebra = (gap > 0.4) & (gap < 3.0) & ((d / 1.0) % 1 < 0.5) & (side < self.half)
            stop = (gap > 3.6) & (gap < 4.0) & ((d < 0) == (s < self.crossing)) & (side < self.half) & (side > self.island)
            middle = street & (np.abs(s - self.crossing) < 0.07) & (side > self.half) & ((d / 6) % 1 < 0.5)
            white = white | zebra | stop | middle
        return white | bays, yellow & ~white


@dataclass(frozen=True)
class Actor:
    """Something with solids of its own: scenery stands still, others move along the road at constant speed."""

    name: str  # one of LIDARSEG_NAMES
    solids: list[Solid]
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)  # width, length, height of the annotated box; zeros: scenery without a box
    s: float = 0.0
    d: float = 0.0
    z: float = 0.0
    yaw: float = 0.0  # relative to the road
    speed: float = 0.0  # metres of s per second
    drift: float = 0.0  # metres of d per second
    attribute: str = ""

    @property
    def boxed(self) -> bool:
        """Whether the annotation tables hold a box for it."""
        return self.size[2] > 0


@dataclass(frozen=True)
class Scene:
    """A piece of street for the duration of one recording."""

    index: int
    road: Road
    actors: list[Actor]
    light: Light
    ego_start: float
    ego_speed: float
    ego_gain: float  # acceleration
    ego_lane: float
    weave: float  # sideways amplitude of the ego car
    place: tuple[float, float, float]  # where the scene's origin lies in the global frame: x, y, yaw
    solids: Solids = field(init=False)
    moving: Bools = field(init=False)

    def __post_init__(self) -> None:
        parts = [(index, LIDARSEG_NAMES.index(actor.name), solid) for index, actor in enumerate(self.actors) for solid in actor.solids]
        object.__setattr__(self, "solids", Solids.stack(parts))
        object.__setattr__(self, "moving", np.array([actor.speed != 0 or actor.drift != 0 for actor in self.actors]))
        motion = np.array([[a.s, a.d, a.z, a.yaw, a.speed, a.drift] for a in self.actors])
        object.__setattr__(self, "_motion", motion)

    def stand(self, time: float) -> tuple[Floats, Floats]:
        """Positions (A, 3) and headings (A,) of the actors at a time in seconds, scene frame."""
        s, d, z, yaw, speed, drift = self._motion.T  # type: ignore[attr-defined]
        s, d = s + speed * time, d + drift * time
        return np.concatenate([self.road.place(s, d), z[:, None]], axis=1), yaw + self.road.bend * s

    def ego(self, time: float) -> tuple[Floats, Floats]:
        """Rotation (3, 3) and translation (3,) of the ego car at a time in seconds, ego to scene frame."""
        s = self.ego_start + self.ego_speed * time + 0.5 * self.ego_gain * time * time
        d = self.ego_lane + self.weave * np.sin(0.9 * time)
        rate = self.ego_speed + self.ego_gain * time
        heading = self.road.bend * s + np.arctan2(self.weave * 0.9 * np.cos(0.9 * time), rate * (1 - self.road.bend * d))
        pitch, roll = 0.004 * np.sin(2.1 * time + self.index), 0.006 * np.sin(1.3 * time + 2 * self.index)
        (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (heading, pitch, roll))
        yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
        tilt = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]]) @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
        return yaw @ tilt, np.append(self.road.place(np.asarray(s), np.asarray(d)), 0.0)

    def to_global(self, rotation: Floats, translation: Floats) -> tuple[Floats, Floats]:
        """A pose of the scene frame in the global frame of the tables."""
        x, y, yaw = self.place
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        return turn @ rotation, turn @ translation + np.array([x, y, 0.0])

    def drivable(self, x: Floats, y: Floats) -> Bools:
        """Whether cars may drive at positions of the global frame."""
        left, up, yaw = self.place
        x, y = x - left, y - up
        return self.road.drivable(np.cos(yaw) * x + np.sin(yaw) * y, np.cos(yaw) * y - np.sin(yaw) * x)


PAINTS: tuple[Color, ...] = (
    (0.75, 0.75, 0.74), (0.03, 0.03, 0.035), (0.3, 0.31, 0.33), (0.5, 0.5, 0.51), (0.38, 0.03, 0.03), (0.03, 0.07, 0.24),
    (0.06, 0.16, 0.12), (0.33, 0.25, 0.12), (0.45, 0.09, 0.02), (0.1, 0.22, 0.38),
)  # fmt: skip
WALLS: tuple[Color, ...] = (
    (0.5, 0.42, 0.32), (0.38, 0.17, 0.11), (0.55, 0.52, 0.46), (0.32, 0.31, 0.3), (0.56, 0.46, 0.26), (0.45, 0.28, 0.2),
    (0.28, 0.33, 0.37), (0.6, 0.55, 0.5),
)  # fmt: skip
CLOTHES: tuple[Color, ...] = (
    (0.5, 0.06, 0.06), (0.06, 0.1, 0.35), (0.55, 0.52, 0.46), (0.05, 0.05, 0.06), (0.1, 0.28, 0.12), (0.5, 0.35, 0.06),
    (0.3, 0.1, 0.28), (0.2, 0.3, 0.42),
)  # fmt: skip
SKIN: Color = (0.5, 0.32, 0.23)
DARK: Color = (0.035, 0.035, 0.04)


def _pick(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    r, g, b = np.array(colors[rng.integers(len(colors))]) * rng.uniform(0.85, 1.15)
    return (float(r), float(g), float(b))


def _wheels(length: float, width: float, radius: float, at: tuple[float, ...]) -> list[Solid]:
    return [ellipsoid((x * length, y * (width / 2 - 0.12), radius), (radius, 0.14, radius), TYRE, DARK) for x in at for y in (-1, 1)]


def car(rng: np.random.Generator) -> Actor:
    """A saloon, estate or small van."""
    kind = rng.integers(3)
    length, width, height = rng.uniform(4.1, 4.9), rng.uniform(1.75, 1.95), (1.47, 1.55, 1.85)[kind] * rng.uniform(0.97, 1.03)
    paint, waist = _pick(rng, PAINTS), 0.55 * height + 0.05
    x, y = length / 2, width / 2
    cabin = ((0.27, 0.17, -0.04), (0.36, 0.27, -0.09), (0.4, 0.33, -0.07))[kind]
    solids = [
        tapered((x, y), (x * 0.96, y * 0.95), (0.22, waist), PAINT, paint),
        tapered(
            (length * cabin[0], y * 0.94),
            (length * cabin[1], y * 0.76),
            (waist, height),
            GLASS,
            paint,
            at=(length * cabin[2], 0),
            shift=-0.08,
        ),
        *_wheels(length, width, 0.33, (-0.31, 0.32)),
    ]
    return Actor("vehicle.car", solids, (width, length, height))


def truck(rng: np.random.Generator) -> Actor:
    """A box truck: cab in front, box behind."""
    length, width, height = rng.uniform(6.5, 8.5), 2.4, rng.uniform(2.9, 3.4)
    paint, cargo = (
        _pick(rng, PAINTS),
        _pick(rng, ((0.68, 0.67, 0.63), (0.6, 0.6, 0.58), (0.12, 0.22, 0.4), (0.45, 0.1, 0.06), (0.14, 0.32, 0.2))),
    )
    cab = 1.9
    front = length / 2 - cab / 2
    solids = [
        tapered((cab / 2, 1.15), (cab / 2 - 0.05, 1.12), (0.45, 1.35), PAINT, paint, at=(front, 0)),
        tapered((cab / 2 - 0.03, 1.12), (cab / 2 - 0.25, 1.02), (1.35, 2.35), GLASS, paint, at=(front, 0), shift=-0.15),
        box((-cab / 2 - 0.05, 0, (height + 0.95) / 2), (length - cab - 0.1, width, height - 0.95), MATTE, cargo),
        box((0, 0, 0.75), (length - 0.5, 1.0, 0.4), MATTE, DARK),
        *_wheels(length, width, 0.48, (-0.32, 0.36)),
    ]
    return Actor("vehicle.truck", solids, (width, length, height))


def bus(rng: np.random.Generator) -> Actor:
    """A city bus."""
    length, width, height = rng.uniform(10.5, 12.0), 2.55, rng.uniform(3.0, 3.3)
    paint: Color = ((0.55, 0.05, 0.05), (0.62, 0.6, 0.55), (0.08, 0.25, 0.4), (0.6, 0.4, 0.05))[rng.integers(4)]
    solids = [
        tapered((length / 2, width / 2), (length / 2 - 0.1, width / 2 - 0.06), (0.32, height), COACH, paint),
        *_wheels(length, width, 0.48, (-0.27, 0.33)),
    ]
    return Actor("vehicle.bus.rigid", solids, (width, length, height))


def trailer(rng: np.random.Generator) -> Actor:
    """A parked trailer with a drawbar."""
    length, width, height = rng.uniform(5.5, 8.5), 2.4, rng.uniform(2.4, 3.6)
    cover = _pick(rng, ((0.1, 0.16, 0.38), (0.6, 0.6, 0.57), (0.12, 0.3, 0.15), (0.5, 0.1, 0.07)))
    solids = [
        box((-0.6, 0, (height + 0.75) / 2), (length - 1.2, width, height - 0.75), BRICK if rng.random() < 0.3 else MATTE, cover),
        box((length / 2 - 0.7, 0, 0.65), (1.4, 0.25, 0.2), METAL, DARK),
        *_wheels(length, width, 0.42, (-0.28, -0.12)),
    ]
    return Actor("vehicle.trailer", solids, (width, length, height))


def digger(rng: np.random.Generator) -> Actor:
    """An excavator: tracks, house, cab and a bent arm."""
    yellow: Color = (0.66, 0.4, 0.03)
    solids = [
        box((-0.3, -1.0, 0.4), (3.4, 0.55, 0.8), TYRE, DARK),
        box((-0.3, 1.0, 0.4), (3.4, 0.55, 0.8), TYRE, DARK),
        box((-0.6, 0, 1.4), (2.6, 2.2, 1.1), MATTE, yellow),
        tapered((0.75, 0.5), (0.6, 0.45), (1.5, 2.9), GLASS, yellow, at=(0.45, 0.55)),
        tapered((0.3, 0.2), (0.25, 0.18), (1.6, 3.6), MATTE, yellow, at=(1.1, -0.4), shift=1.0),
        tapered((0.22, 0.17), (0.2, 0.15), (1.0, 3.5), MATTE, yellow, at=(3.2, -0.4), shift=-1.0),
        tapered((0.5, 0.55), (0.3, 0.5), (0.35, 1.15), METAL, (0.2, 0.18, 0.16), at=(2.95, -0.4)),
    ]
    return Actor("vehicle.construction", solids, (2.6, 5.6, 3.6))


def person(rng: np.random.Generator, worker: bool = False, child: bool = False) -> Actor:
    """Somebody on foot."""
    height = rng.uniform(1.15, 1.35) if child else rng.uniform(1.6, 1.9)
    k = height / 1.75
    shirt: Color = (0.75, 0.45, 0.02) if worker else _pick(rng, CLOTHES)
    trousers, hair = (
        _pick(rng, ((0.05, 0.06, 0.12), (0.04, 0.04, 0.04), (0.25, 0.2, 0.14))),
        _pick(rng, ((0.05, 0.03, 0.02), (0.2, 0.12, 0.05))),
    )
    step = rng.uniform(0.1, 0.24)
    solids = [
        tapered((0.1 * k, 0.08 * k), (0.11 * k, 0.09 * k), (0, 0.85 * k), CLOTH, trousers, at=(step, 0.09 * k), shift=-step),
        tapered((0.1 * k, 0.08 * k), (0.11 * k, 0.09 * k), (0, 0.85 * k), CLOTH, trousers, at=(-step, -0.09 * k), shift=step),
        tapered((0.12 * k, 0.17 * k), (0.13 * k, 0.23 * k), (0.8 * k, 1.46 * k), CLOTH, shirt),
        tapered((0.07 * k, 0.06 * k), (0.07 * k, 0.06 * k), (0.85 * k, 1.42 * k), CLOTH, shirt, at=(0.12, 0.27 * k), shift=-0.1),
        tapered((0.07 * k, 0.06 * k), (0.07 * k, 0.06 * k), (0.85 * k, 1.42 * k), CLOTH, shirt, at=(-0.12, -0.27 * k), shift=0.1),
        ellipsoid((0.02, 0, 1.6 * k), (0.11 * k, 0.095 * k, 0.13 * k), MATTE, SKIN),
        ellipsoid((-0.015, 0, 1.65 * k), (0.12 * k, 0.105 * k, 0.115 * k), MATTE, (0.8, 0.6, 0.05) if worker else hair),
    ]
    name = "human.pedestrian." + ("construction_worker" if worker else "child" if child else "adult")
    return Actor(name, solids, (0.65 * k, 0.75 * k, height), attribute="pedestrian.standing")


def two_wheeler(rng: np.random.Generator, motor: bool, rider: bool) -> Actor:
    """A bicycle or motorcycle; its rider, if any, counts as part of it, as in nuScenes."""
    paint = _pick(rng, PAINTS)
    length, radius, thick = (2.1, 0.32, 0.09) if motor else (1.75, 0.34, 0.03)
    x = length / 2 - radius
    solids = [ellipsoid((sign * x, 0, radius), (radius, thick, radius), TYRE, DARK) for sign in (-1, 1)]
    if motor:
        solids += [
            tapered((0.5, 0.2), (0.42, 0.14), (0.35, 0.78), PAINT, paint),
            box((-0.45, 0, 0.84), (0.75, 0.28, 0.13), MATTE, DARK),
            tapered((0.09, 0.22), (0.06, 0.3), (0.55, 1.1), METAL, (0.3, 0.3, 0.3), at=(0.72, 0), shift=-0.14),
        ]
    else:
        solids += [
            box((0, 0, 0.68), (0.95, 0.06, 0.09), METAL, paint),
            tapered((0.06, 0.03), (0.05, 0.03), (0.3, 0.95), METAL, paint, at=(-0.2, 0), shift=-0.1),
            tapered((0.05, 0.04), (0.04, 0.26), (0.35, 1.05), METAL, paint, at=(x, 0), shift=-0.15),
        ]
    if rider:
        shirt, trousers = _pick(rng, CLOTHES), _pick(rng, CLOTHES[3:])
        solids += [
            tapered((0.15, 0.19), (0.15, 0.23), (0.9, 1.5), CLOTH, shirt, at=(-0.25, 0), shift=0.22),
            tapered((0.1, 0.19), (0.2, 0.19), (0.35, 0.95), CLOTH, trousers, at=(0.05, 0), shift=-0.15),
            tapered((0.08, 0.28), (0.1, 0.26), (1.02, 1.38), CLOTH, shirt, at=(0.3, 0), shift=-0.2),
            ellipsoid((0.02, 0, 1.66), (0.14, 0.12, 0.15), MATTE, paint if motor else SKIN),
        ]
    name = "vehicle.motorcycle" if motor else "vehicle.bicycle"
    return Actor(name, solids, (0.7, length, 1.75 if rider else 1.15), attribute="cycle.with_rider" if rider else "cycle.without_rider")


def cone() -> Actor:
    """A traffic cone on its foot."""
    orange: Color = (0.75, 0.16, 0.02)
    return Actor(
        "movable_object.trafficcone",
        [prism(0.19, (0.04, 0.8), CONE, orange, top=0.04), box((0, 0, 0.03), (0.48, 0.48, 0.06), MATTE, orange)],
        (0.48, 0.48, 0.8),
    )


def barrier(concrete: bool) -> Actor:
    """A red and white barrier board, or a concrete block; 2 m of it."""
    if concrete:
        solids = [tapered((1.0, 0.3), (1.0, 0.1), (0, 0.85), MATTE, (0.45, 0.44, 0.41))]
    else:
        solids = [box((0, 0, 0.68), (1.95, 0.1, 0.6), STRIPES, (0.65, 0.03, 0.03))]
        solids += [box((x, 0, 0.18), (0.14, 0.5, 0.36), MATTE, (0.2, 0.2, 0.2)) for x in (-0.8, 0.8)]
    return Actor("movable_object.barrier", solids, (0.55, 2.0, 0.98))


def tree(rng: np.random.Generator, scale: float = 1.0, lumps: int = 4) -> Actor:
    """Trunk and a crown of several leafy lumps; all of it is vegetation."""
    height, spread = rng.uniform(6, 9.5) * scale, rng.uniform(1.5, 2.3) * scale
    green = np.array(((0.09, 0.2, 0.04), (0.13, 0.22, 0.05), (0.06, 0.15, 0.05), (0.2, 0.2, 0.05))[rng.integers(4)])
    solids = [prism(rng.uniform(0.14, 0.24) * scale, (0, height * 0.62), BARK, (0.16, 0.11, 0.07), top=0.09)]
    for turn in np.arange(lumps) * (6.8 / lumps) + rng.uniform(0, 6):
        x, y = np.array([np.cos(turn), np.sin(turn)]) * spread * rng.uniform(0.3, 0.6)
        r, g, b = green * rng.uniform(0.85, 1.2)
        lump = spread * rng.uniform(0.62, 0.82)
        solids.append(ellipsoid((x, y, height * rng.uniform(0.52, 0.74)), (lump, lump, lump * rng.uniform(0.8, 1.0)), LEAVES, (r, g, b)))
    r, g, b = green * 1.05
    solids.append(ellipsoid((0, 0, height * 0.83), (spread * 0.7, spread * 0.7, height * 0.17), LEAVES, (r, g, b)))
    return Actor("static.vegetation", solids, z=KERB)


def bush(rng: np.random.Generator, long: bool = False) -> Actor:
    """A bush, or a few of them in a row as a hedge."""
    r, g, b = np.array([0.09, 0.19, 0.05]) * rng.uniform(0.8, 1.3)
    height = rng.uniform(0.5, 0.9)
    row = (-1.6, -0.5, 0.6, 1.7) if long else (0.0, rng.uniform(0.5, 0.9))
    solids = [
        ellipsoid((x, rng.uniform(-0.15, 0.15), height * 0.8), (rng.uniform(0.7, 0.95), rng.uniform(0.55, 0.75), height), LEAVES, (r, g, b))
        for x in row
    ]
    return Actor("static.vegetation", solids, z=KERB)


def building(rng: np.random.Generator, length: float, depth: float, height: float, gable: bool) -> Actor:
    """A house with a flat roof and parapet, or with a gable."""
    wall = _pick(rng, WALLS)
    solids = [box((0, 0, height / 2), (length, depth, height), FACADE, wall)]
    if gable:
        roof = _pick(rng, ((0.3, 0.1, 0.06), (0.12, 0.12, 0.13), (0.25, 0.14, 0.09)))
        solids.append(tapered((length / 2 + 0.3, depth / 2 + 0.4), (length / 2 + 0.3, 0.05), (height, height + depth * 0.33), BRICK, roof))
    else:
        r, g, b = wall
        solids.append(box((0, 0, height + 0.25), (length + 0.4, depth + 0.4, 0.5), MATTE, (r * 0.7, g * 0.7, b * 0.7)))
    return Actor("static.manmade", solids, z=KERB)


def street_lamp() -> Actor:
    """A mast whose arm reaches over the road (towards -y)."""
    grey: Color = (0.22, 0.23, 0.23)
    mast, arm = prism(0.09, (0, 7), METAL, grey, top=0.06), box((0, -0.8, 7), (0.12, 1.7, 0.1), METAL, grey)
    return Actor("static.manmade", [mast, arm, box((0, -1.6, 6.93), (0.25, 0.6, 0.12), MATTE, (0.7, 0.7, 0.6))], z=KERB)


def sign(rng: np.random.Generator) -> Actor:
    """A traffic sign that faces oncoming cars (towards -x)."""
    face = _pick(rng, ((0.05, 0.12, 0.5), (0.55, 0.03, 0.03), (0.65, 0.5, 0.04), (0.04, 0.3, 0.12)))
    return Actor(
        "static.manmade", [prism(0.045, (0, 2.9), METAL, (0.4, 0.4, 0.4)), box((-0.06, 0, 2.5), (0.04, 0.75, 0.75), SIGN, face)], z=KERB
    )


def traffic_light() -> Actor:
    """A mast with a signal head that faces -x."""
    lamps = [
        box((-0.2, 0, z), (0.05, 0.2, 0.2), SIGN, color)
        for z, color in ((3.2, (0.6, 0.03, 0.02)), (2.92, (0.25, 0.18, 0.02)), (2.64, (0.02, 0.2, 0.06)))
    ]
    return Actor(
        "static.manmade",
        [prism(0.08, (0, 3.5), METAL, (0.1, 0.1, 0.1)), box((-0.08, 0, 2.92), (0.22, 0.34, 1.0), MATTE, DARK), *lamps],
        z=KERB,
    )


def clutter(rng: np.random.Generator) -> Actor:
    """Things of the classes that the benchmark ignores: a bin bag, a dog, a bicycle rack, a pallet truck, a heap of gravel."""
    kind = rng.integers(5)
    if kind == 0:
        return Actor("movable_object.debris", [ellipsoid((0, 0, 0.25), (0.35, 0.3, 0.3), MATTE, (0.05, 0.05, 0.06))], (0.6, 0.7, 0.5))
    if kind == 1:
        fur: Color = (0.25, 0.16, 0.08)
        legs = [box((x, y, 0.15), (0.08, 0.07, 0.3), MATTE, fur) for x in (-0.22, 0.22) for y in (-0.08, 0.08)]
        dog = [ellipsoid((0, 0, 0.4), (0.36, 0.14, 0.16), MATTE, fur), ellipsoid((0.4, 0, 0.56), (0.17, 0.1, 0.11), MATTE, fur), *legs]
        return Actor("animal", dog, (0.35, 1.0, 0.65))
    if kind == 2:
        rack = [box((x, 0, 0.4), (0.06, 0.7, 0.8), METAL, (0.45, 0.45, 0.46)) for x in np.arange(-1, 1.1, 0.5)]
        return Actor("static_object.bicycle_rack", rack, (0.8, 2.2, 0.8))
    if kind == 3:
        bin_ = [
            tapered((0.28, 0.24), (0.36, 0.3), (0.05, 1.05), MATTE, (0.05, 0.2, 0.09)),
            box((0, 0, 1.08), (0.75, 0.65, 0.07), MATTE, (0.04, 0.15, 0.07)),
        ]
        return Actor("movable_object.pushable_pullable", bin_, (0.65, 0.75, 1.1))
    return Actor("static.other", [tapered((1.3, 1.1), (0.2, 0.2), (0, 0.9), MATTE, (0.36, 0.31, 0.25))], z=KERB)


def _light(rng: np.random.Generator, index: int) -> Light:
    """Sunny, hazy or overcast."""
    mood = (0, 1, 0, 2)[index % 4]
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 1.0) if mood != 2 else 1.5  # overcast: light from above, soft shadows
    sun = np.array([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)])
    strength, ambient, clouds = ((2.3, 0.48, 0.35), (1.9, 0.6, 0.55), (0.75, 0.9, 0.95))[mood]
    zenith = ((0.14, 0.32, 0.72), (0.24, 0.4, 0.68), (0.46, 0.5, 0.56))[mood]
    horizon = ((0.62, 0.74, 0.88), (0.74, 0.76, 0.78), (0.66, 0.68, 0.7))[mood]
    return Light(sun, strength, ambient, np.array(zenith), np.array(horizon), (320.0, 200.0, 240.0)[mood], clouds)


def make_scene(seed: int, index: int, duration: float) -> Scene:
    """Lay out one scene.

    Args:
        seed: Seed of the world.
        index: Number of the scene; it decides the kind of street and, with the seed, everything random.
        duration: Seconds that will be recorded; rare things are placed where the ego car passes in that time.
    """
    rng = np.random.default_rng([seed, index])
    kind = index % 4  # town, suburb, park road, arterial
    side_street = bool(rng.random() < (0.9, 0.5, 0.3, 0.7)[kind])
    lanes = (1, 1, 1, 2)[kind]
    bend = float(rng.choice([-1, 1]) / np.exp(rng.uniform(np.log(70), np.log(400))))
    speed = float(rng.uniform(5.0, 8.0) + (2.0 if lanes == 2 else 0.0))
    start = -0.5 * speed * duration
    road = Road(
        bend=bend,
        lanes=lanes,
        parking=(2.3, 2.2, 2.1, 2.4)[kind],
        pavement=float(rng.uniform(2.2, 3.8)),
        island=1.0 if lanes == 2 else 0.0,
        crossing=float(rng.uniform(8, 26)) * (1 if rng.random() < 0.75 else -1),
        crossing_half=4.0 if side_street else 0.0,
        land=(rng.random((2, int((REACH[1] - REACH[0]) // PLOT) + 1)) < (0.55, 0.2, 0.15, 0.45)[kind]).astype(int),
        seed=int(rng.integers(1000)),
    )
    ego_lane = -(road.island + (lanes - 0.5) * LANE)
    actors = (
        _scenery(rng, road, kind) + _work_site(rng, road, index) + _parked(rng, road, kind) + _traffic(rng, road, start, speed, duration)
    )
    actors += _people(rng, road, start, speed * duration)
    return Scene(
        index=index,
        road=road,
        actors=actors,
        light=_light(rng, index),
        ego_start=start,
        ego_speed=speed,
        ego_gain=float(rng.uniform(-0.5, 0.5)),
        ego_lane=ego_lane,
        weave=float(rng.uniform(0.05, 0.3)),
        place=(float(rng.uniform(150, 170)), float(rng.uniform(150, 170)), float(rng.uniform(-np.pi, np.pi))),
    )


def _beside(road: Road, s: float, margin: float) -> bool:
    """Whether ``s`` keeps ``margin`` from the side street."""
    return road.crossing_half == 0 or abs(s - road.crossing) > road.crossing_half + margin


def _scenery(rng: np.random.Generator, road: Road, kind: int) -> list[Actor]:
    actors: list[Actor] = []
    edge = road.half + road.pavement
    for side in (-1, 1):
        wooded = kind == 2 and bool(rng.random() < 0.6)
        corner = road.crossing_half + 0.6 * road.pavement + 0.5
        rows = [(REACH[0], road.crossing - corner), (road.crossing + corner, REACH[1])] if road.crossing_half else [REACH]
        for first, last in rows if not wooded else []:
            s = first
            while s < last - 8:
                length = min(rng.uniform(9, 20), last - s)
                depth, gap = rng.uniform(8, 13), (rng.uniform(0.3, 2.5), rng.uniform(5, 9), rng.uniform(6, 12), rng.uniform(2, 7))[kind]
                height = (rng.uniform(8, 20), rng.uniform(5.5, 7), rng.uniform(5, 9), rng.uniform(9, 26))[kind]
                if rng.random() < 0.9:
                    house = building(rng, length, depth, height, gable=bool(kind in (1, 2) and rng.random() < 0.8))
                    actors.append(replace(house, s=s + length / 2, d=side * (edge + gap + depth / 2), yaw=0.0 if side > 0 else np.pi))
                s += length + (rng.uniform(0.5, 3), rng.uniform(4, 10), rng.uniform(8, 20), rng.uniform(2, 9))[kind]
        for s in np.arange(REACH[0], REACH[1], 26.0):  # a second row closes the horizon
            if rng.random() < 0.75 and _beside(road, s, 14):
                house = building(rng, rng.uniform(14, 22), 10, rng.uniform(9, 22) + 8 * (kind in (0, 3)), False)
                actors.append(replace(house, s=float(s + rng.uniform(-4, 4)), d=side * (edge + rng.uniform(34, 46))))
        for s in np.arange(REACH[0] - 30, REACH[1] + 30, 15.0):  # and woods behind it
            if road.crossing_half == 0 or abs(s - road.crossing) > 16:
                r, g, b = np.array([0.06, 0.13, 0.045]) * rng.uniform(0.8, 1.3)
                size = (rng.uniform(8, 11), rng.uniform(3, 5), rng.uniform(5, 11))
                wood = Actor("static.vegetation", [ellipsoid((0, 0, 0.5), size, LEAVES, (r, g, b))], z=KERB)
                actors.append(replace(wood, s=float(s), d=side * min(edge + rng.uniform(56, 64), 0.85 / abs(road.bend))))
        if (kind in (1, 2) and not wooded) or rng.random() < 0.4:  # a garden wall or a fence, with gaps
            for s in np.arange(REACH[0], REACH[1], 7.0):
                if _beside(road, float(s), 5) and rng.random() < 0.6:
                    wall = Actor(
                        "static.manmade",
                        [box((0, 0, 0.55), (6.4, 0.22, 1.1), BRICK, (0.4, 0.22, 0.16) if kind != 2 else (0.42, 0.4, 0.36))],
                        z=KERB,
                    )
                    actors.append(replace(wall, s=float(s), d=side * (edge + 0.35)))
        spacing = (13.0, 10.0, 6.5, 11.0)[kind]
        for s in np.arange(REACH[0], REACH[1], spacing):  # street trees
            at = float(s + rng.uniform(-2, 2))
            if rng.random() < 0.7 and _beside(road, at, 4):
                offset = road.half + 0.9 if kind in (0, 3) else edge + rng.uniform(2.2, 4.0)
                actors.append(replace(tree(rng, 0.75 if kind in (0, 3) else 1.0), s=at, d=side * offset))
            if rng.random() < 0.5 and _beside(road, at + 4, 4) and kind != 0:
                actors.append(replace(bush(rng, bool(rng.random() < 0.5)), s=at + 4, d=side * (edge + rng.uniform(1.3, 2.2))))
        for _ in range(34 if wooded else 8):  # trees further back
            at, off = float(rng.uniform(*REACH)), rng.uniform(6, 30) if wooded else rng.uniform(20, 32)
            if _beside(road, at, 6):
                actors.append(replace(tree(rng, rng.uniform(0.9, 1.4), 4 if off < 12 else 2), s=at, d=side * (edge + off)))
        for s in np.arange(REACH[0] + 5 * side, REACH[1], 27.0):
            if _beside(road, float(s), 2):
                actors.append(replace(street_lamp(), s=float(s), d=side * (road.half + 0.45), yaw=0.0 if side > 0 else np.pi))
        for _ in range(4):
            at = float(rng.uniform(-40, 60))
            if _beside(road, at, 2):
                actors.append(replace(sign(rng), s=at, d=side * (road.half + 0.5), yaw=0.0 if side < 0 else np.pi))
        if road.crossing_half:
            at = road.crossing + side * (road.crossing_half + 3.2)
            actors.append(replace(traffic_light(), s=at, d=side * (road.half + 0.6), yaw=0.0 if side < 0 else np.pi))
    return actors


def _site_place(road: Road, index: int) -> tuple[float, int]:
    """Where the road works are: s and side of the road. Away from the side street, on alternating sides."""
    at = -9.0 if road.crossing > 0 else 9.0
    return at, (-1, 1)[(index // 2) % 2]


def _work_site(rng: np.random.Generator, road: Road, index: int) -> list[Actor]:
    """Road works at the edge of the carriageway: barriers, cones, a worker, and on the pavement a digger or a trailer (in turn)."""
    at, side = _site_place(road, index)
    line = road.half - 1.95  # just outside the lanes
    machine = digger(rng) if index % 2 == 0 else trailer(rng)
    along = 0.0 if side < 0 else np.pi
    actors = [replace(machine, s=at, d=side * (road.half + 0.9), z=KERB, yaw=along + float(rng.uniform(-0.12, 0.12)))]
    actors += [replace(barrier(bool(index % 3 == 1)), s=at - 5.5 + 2.15 * i, d=side * line) for i in range(6)]
    actors += [replace(cone(), s=at - 8.5 - 2.2 * i, d=side * (line + 0.1 + 0.6 * i)) for i in range(3)]
    actors += [replace(cone(), s=at + 8.5 + 2.2 * i, d=side * (line + 0.1 + 0.6 * i)) for i in range(3)]
    actors.append(replace(person(rng, worker=True), s=at + 4.6, d=side * (road.half - 0.9), yaw=float(rng.uniform(0, 6))))
    if index % 2 == 0 and rng.random() < 0.5:
        actors.append(replace(trailer(rng), s=at + (20 if at > 0 else -20), d=-side * (road.half - 1.25), yaw=along + np.pi))
    return actors


def _parked(rng: np.random.Generator, road: Road, kind: int) -> list[Actor]:
    actors: list[Actor] = []
    site = _site_place(road, 0)[0]
    if kind == 2:  # no parking beside the park
        return actors
    for side in (-1, 1):
        for s in np.arange(REACH[0] + 3.25, REACH[1], 6.5):
            at = float(s)
            # Keep the road works (either side: cheap and harmless), the trailer opposite and the side street free.
            if abs(at - site) < 17 or abs(at - site - np.sign(site) * 20) < 8 or not _beside(road, at, 8):
                continue
            draw = rng.random()
            if draw < 0.5:
                vehicle = car(rng)
            elif draw < 0.58 and at + 4 < REACH[1]:
                vehicle = replace(truck(rng), attribute="")
            elif draw < 0.66:
                vehicle = two_wheeler(rng, motor=bool(rng.random() < 0.6), rider=False)
            else:
                continue
            yaw = (0.0 if side < 0 else np.pi) + rng.uniform(-0.03, 0.03)
            wide = vehicle.name.startswith("vehicle.truck")
            actors.append(
                replace(
                    vehicle, s=at, d=side * (road.half - (1.3 if wide else 1.05)), yaw=yaw, attribute=vehicle.attribute or "vehicle.parked"
                )
            )
    return actors


def _traffic(rng: np.random.Generator, road: Road, start: float, speed: float, duration: float) -> list[Actor]:
    """Moving vehicles: one speed per lane, so that nobody runs into anybody."""
    actors: list[Actor] = []
    makers = [car, car, bus, car, truck]
    shuffled = [makers[i] for i in rng.permutation(len(makers))]
    turn = 0
    for direction in (-1, 1):  # -1: our side, towards growing s
        for lane in range(road.lanes):
            ours = direction == -1 and lane == road.lanes - 1
            pace = speed if ours else speed * float(rng.uniform(0.7, 1.1)) + (1.5 if direction == 1 else 0)
            meeting = start + speed * duration * 0.5  # where the ego car is half-way through
            at = start + 14 + rng.uniform(0, 6) if ours else meeting + direction * pace * duration * 0.5 - 20 + rng.uniform(0, 8)
            for _ in range(4):
                vehicle = shuffled[turn % len(shuffled)](rng)
                turn += 1
                d = direction * (road.island + (lane + 0.5) * LANE)
                yaw, velocity = (0.0, pace) if direction == -1 else (np.pi, -pace)
                actors.append(replace(vehicle, s=float(at), d=d, yaw=yaw, speed=velocity, attribute="vehicle.moving"))
                at += vehicle.size[1] + rng.uniform(9, 20)
            if ours:  # somebody behind us
                actors.append(
                    replace(
                        car(rng),
                        s=start - float(rng.uniform(13, 20)),
                        d=-(road.island + (lane + 0.5) * LANE),
                        speed=speed,
                        attribute="vehicle.moving",
                    )
                )
    for direction in (-1, 1):  # cyclists and motorcyclists keep to the edge of the carriageway
        for motor in (False, True):
            pace = float(rng.uniform(3.5, 5.5)) + (2.5 if motor else 0)
            at = (
                start
                + 0.5 * duration * (speed - (pace if direction == -1 else -pace))
                + float(rng.choice([rng.uniform(-16, -8), rng.uniform(9, 20)]))
            )
            off = road.island + (road.lanes * LANE - 0.1 if not motor else (road.lanes - 1) * LANE + 0.4)
            rider = two_wheeler(rng, motor, rider=True)
            actors.append(replace(rider, s=float(at), d=direction * off, yaw=0.0 if direction == -1 else np.pi, speed=-direction * pace))
    return actors


def _people(rng: np.random.Generator, road: Road, start: float, length: float) -> list[Actor]:
    actors: list[Actor] = []
    for _ in range(14):
        side, direction = rng.choice([-1, 1]), rng.choice([-1, 1])
        walker = person(rng, child=bool(rng.random() < 0.15))
        s, d = float(rng.uniform(start - 10, start + length + 22)), float(side * (road.half + rng.uniform(1.3, road.pavement - 0.3)))
        if rng.random() < 0.7:
            pace = float(direction * rng.uniform(0.8, 1.6))
            walker = replace(walker, speed=pace, attribute="pedestrian.moving")
        actors.append(replace(walker, s=s, d=d, z=KERB, yaw=0.0 if direction > 0 else np.pi))
    if road.crossing_half:  # somebody on the zebra crossing
        s = road.crossing + road.crossing_half + 1.7
        actors.append(replace(person(rng), s=s, d=road.half - 1.0, yaw=-np.pi / 2, drift=-1.1, attribute="pedestrian.moving"))
    for _ in range(5):
        side = rng.choice([-1, 1])
        thing = clutter(rng)
        s, d = float(rng.uniform(start - 5, start + length + 20)), float(side * (road.half + rng.uniform(1.0, road.pavement - 0.2)))
        actors.append(replace(thing, s=s, d=d, z=KERB, yaw=float(rng.uniform(0, 6))))
    return actors
