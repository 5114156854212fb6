"""Who and what stands and moves on a street of the embedded driving world, each built of a few solids around its own origin."""

from __future__ import annotations

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
    Solid,
    box,
    ellipsoid,
    prism,
    tapered,
)
from lit_methods.datamodules.driving.street import (
    KERB,
    Actor,
    Color,
)

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
