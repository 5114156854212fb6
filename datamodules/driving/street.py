"""A street of the embedded driving world: a bent road, and how what stands and moves on it is described.

Places are given in road coordinates: ``s`` metres along the centre line, ``d`` metres to its left. The centre line is an arc through the
scene's origin, so that both directions of the conversion are closed forms. Traffic keeps right; the ego car drives towards growing ``s``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lit_methods.datamodules.driving.render import (
    Bools,
    Floats,
    Ints,
    Light,
    Solid,
    Solids,
    noise,
    rgb,
    scatter,
)

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
