"""What a scene of the embedded driving world holds: the kind of street, what lines it, and who moves on it, drawn from a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lit_methods.datamodules.driving.actors import (
    barrier,
    building,
    bus,
    bush,
    car,
    clutter,
    cone,
    digger,
    person,
    sign,
    street_lamp,
    traffic_light,
    trailer,
    tree,
    truck,
    two_wheeler,
)
from lit_methods.datamodules.driving.render import (
    BRICK,
    LEAVES,
    Light,
    box,
    ellipsoid,
)
from lit_methods.datamodules.driving.street import (
    KERB,
    LANE,
    PLOT,
    REACH,
    Actor,
    Road,
    Scene,
)


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
