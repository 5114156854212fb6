"""Tables and files of the official nuScenes v1.0 layout, as far as a generated world needs them.

A :class:`Tables` collects the rows of one scene and links them (``prev``/``next``, first and last); :func:`write_tables` writes the JSON
files of several scenes. Tokens are hashes of the seed and of what a row stands for, so that a world has the same bytes whoever wrote which
scene.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_methods.datamodules.driving.render import Floats, Ints
from lit_methods.datamodules.driving.street import LIDARSEG_NAMES

VERSION_FOLDER = "v1.0-mini"
TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene", "sample", "sample_data",
    "sample_annotation", "map", "lidarseg",
)  # fmt: skip
ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider", "pedestrian.sitting_lying_down",
    "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
VISIBILITY = (("1", "v0-40"), ("2", "v40-60"), ("3", "v60-80"), ("4", "v80-100"))
Row = dict[str, Any]


def token(*parts: object) -> str:
    """32 hexadecimal digits that stand for ``parts``."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def quaternion(rotation: Floats) -> list[float]:
    """Rotation matrix (3, 3) to a unit quaternion in nuScenes' order w, x, y, z (much faster for one matrix than scipy's Rotation)."""
    (a, b, c), (d, e, f), (g, h, i) = np.asarray(rotation, np.float64).tolist()
    # Four times the products of each component with all others; the row with the largest square is the one to normalise.
    rows = (
        (1 + a + e + i, h - f, c - g, d - b),
        (h - f, 1 + a - e - i, b + d, c + g),
        (c - g, b + d, 1 - a + e - i, f + h),
        (d - b, c + g, f + h, 1 - a - e + i),
    )
    row = max(enumerate(rows), key=lambda item: item[1][item[0]])[1]
    norm = math.sqrt(sum(value * value for value in row))
    return [value / norm for value in row]


class Tables:
    """The rows of one scene, and the files they name.

    Args:
        root: Folder of the data set.
        seed: Seed of the world, part of every token.
        name: Name of the scene.
    """

    def __init__(self, root: Path, seed: int, name: str) -> None:
        self.root, self.seed, self.name = root, seed, name
        self.rows: dict[str, list[Row]] = {table: [] for table in TABLES}
        self.logfile = f"embedded-{name}"
        self.log_token, self.scene_token = self.token("log"), self.token("scene")
        self.rows["log"].append(
            {"token": self.log_token, "logfile": self.logfile, "vehicle": "embedded", "date_captured": "2018-07-24", "location": "embedded"}
        )
        self._last: dict[str, Row] = {}  # newest row of each chain

    def token(self, *parts: object) -> str:
        """Token of a row of this scene."""
        return token(self.seed, self.name, *parts)

    def map(self, drivable: NDArray[np.bool_], cells: int) -> None:
        """Write the mask of the drivable ground: row 0 is the largest y, 10 pixels per metre, ``cells`` pixels per element."""
        name = self.token("map")
        filename = f"maps/{name}.png"
        path = self.root / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.repeat(np.repeat(drivable.astype(np.uint8) * 255, cells, axis=0), cells, axis=1)
        Image.fromarray(mask).save(path, compress_level=1)
        self.rows["map"].append({"token": name, "log_tokens": [self.log_token], "category": "semantic_prior", "filename": filename})

    def _chain(self, table: str, key: str, row: Row) -> Row:
        """Append a row and link it to the one before it in its chain."""
        before = self._last.get(key)
        row |= {"prev": before["token"] if before else "", "next": ""}
        if before:
            before["next"] = row["token"]
        self._last[key] = row
        self.rows[table].append(row)
        return row

    def calibration(self, channel: str, rotation: Floats, translation: Floats, intrinsic: Floats | None) -> None:
        """How a sensor is mounted: sensor to ego frame, and pixels per unit of x/z for a camera."""
        self.rows["calibrated_sensor"].append(
            {
                "token": self.token("calibrated_sensor", channel),
                "sensor_token": token("sensor", channel),
                "translation": np.asarray(translation, float).tolist(),
                "rotation": quaternion(rotation),
                "camera_intrinsic": [] if intrinsic is None else np.asarray(intrinsic).tolist(),
            }
        )

    def sample(self, key_frame: int, timestamp: int) -> str:
        """Start a key frame; returns its token."""
        row = {"token": self.token("sample", key_frame), "timestamp": timestamp, "scene_token": self.scene_token}
        return str(self._chain("sample", "sample", row)["token"])

    def sample_token(self, key_frame: int) -> str:
        """Token of a key frame, also before it is there: sweeps belong to the key frame after them."""
        return self.token("sample", key_frame)

    def sample_data(
        self, channel: str, timestamp: int, key_frame: int, is_key_frame: bool, pose: tuple[Floats, Floats], size: tuple[int, int] = (0, 0)
    ) -> tuple[str, Path]:  # fmt: skip
        """Register one file of a sensor.

        Args:
            channel: Sensor.
            timestamp: Microseconds.
            key_frame: Number of the key frame that the file belongs to.
            is_key_frame: False for a sweep.
            pose: Rotation and translation of the ego car at that time, ego to global frame.
            size: Width and height of an image.

        Returns:
            Token of the row, and where to write the file.
        """
        suffix = "pcd.bin" if channel == "LIDAR_TOP" else "jpg"
        filename = f"{'samples' if is_key_frame else 'sweeps'}/{channel}/{self.logfile}__{channel}__{timestamp}.{suffix}"
        name = self.token("sample_data", channel, timestamp)
        self.rows["ego_pose"].append(
            {"token": name, "timestamp": timestamp, "rotation": quaternion(pose[0]), "translation": np.asarray(pose[1], float).tolist()}
        )
        row = {
            "token": name,
            "sample_token": self.sample_token(key_frame),
            "ego_pose_token": name,
            "calibrated_sensor_token": self.token("calibrated_sensor", channel),
            "timestamp": timestamp,
            "fileformat": suffix.split(".")[0],
            "is_key_frame": is_key_frame,
            "height": size[1],
            "width": size[0],
            "filename": filename,
        }
        self._chain("sample_data", channel, row)
        path = self.root / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        return name, path

    def lidarseg(self, sample_data_token: str, labels: Ints) -> None:
        """Write the raw class ids (n,) of a key scan."""
        filename = f"lidarseg/{VERSION_FOLDER}/{sample_data_token}_lidarseg.bin"
        path = self.root / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        labels.astype(np.uint8).tofile(path)
        self.rows["lidarseg"].append({"token": sample_data_token, "sample_data_token": sample_data_token, "filename": filename})

    def superpixels(self, sample_data_token: str, ids: Ints) -> None:
        """Write the class ids (H, W) of an image."""
        path = self.root / "superpixels" / f"{sample_data_token}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(np.uint8)).save(path)

    def annotation(
        self, actor: int, key_frame: int, category: str, attribute: str, pose: tuple[Floats, Floats], size: tuple[float, float, float],
        lidar_points: int, visible: float,
    ) -> None:  # fmt: skip
        """Add the box of an object in a key frame.

        Args:
            actor: Number of the object in its scene; one number is one instance.
            key_frame: Number of the key frame.
            category: One of the 32 names.
            attribute: One of ATTRIBUTES, or empty.
            pose: Rotation and centre of the box in the global frame.
            size: Width, length, height.
            lidar_points: Returns from the object in the key scan.
            visible: Share of the object that is not hidden, 0..1.
        """
        row = {
            "token": self.token("annotation", actor, key_frame),
            "sample_token": self.sample_token(key_frame),
            "instance_token": self.token("instance", actor),
            "visibility_token": VISIBILITY[int(np.searchsorted([0.4, 0.6, 0.8], visible, side="right"))][0],
            "attribute_tokens": [token("attribute", attribute)] if attribute else [],
            "translation": np.asarray(pose[1], float).tolist(),
            "size": [float(side) for side in size],
            "rotation": quaternion(pose[0]),
            "num_lidar_pts": lidar_points,
            "num_radar_pts": 0,
        }
        first = f"annotation {actor}" not in self._last
        self._chain("sample_annotation", f"annotation {actor}", row)
        if first:
            instance = {
                "token": row["instance_token"],
                "category_token": token("category", category),
                "nbr_annotations": 0,
                "first_annotation_token": row["token"],
                "last_annotation_token": "",
            }
            self.rows["instance"].append(instance)
            self._last[f"instance {actor}"] = instance
        instance = self._last[f"instance {actor}"]
        instance["nbr_annotations"] += 1
        instance["last_annotation_token"] = row["token"]

    def close(self, description: str) -> dict[str, list[Row]]:
        """Add the scene's own row; returns all rows by table."""
        samples = self.rows["sample"]
        self.rows["scene"].append(
            {
                "token": self.scene_token,
                "log_token": self.log_token,
                "nbr_samples": len(samples),
                "first_sample_token": samples[0]["token"],
                "last_sample_token": samples[-1]["token"],
                "name": self.name,
                "description": description,
            }
        )
        return self.rows


def write_tables(root: Path, scenes: list[dict[str, list[Row]]], channels: tuple[str, ...]) -> None:
    """Write the JSON tables of all scenes.

    Args:
        root: Folder of the data set.
        scenes: Rows by table of each scene, in order.
        channels: Sensors.
    """
    rows: dict[str, list[Row]] = {table: [row for scene in scenes for row in scene[table]] for table in TABLES}
    rows["category"] = [
        {"token": token("category", name), "name": name, "description": "", "index": i} for i, name in enumerate(LIDARSEG_NAMES)
    ]
    rows["attribute"] = [{"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES]
    rows["visibility"] = [{"token": key, "level": level, "description": f"visibility of {level[1:]} %"} for key, level in VISIBILITY]
    rows["sensor"] = [
        {"token": token("sensor", channel), "channel": channel, "modality": "lidar" if channel == "LIDAR_TOP" else "camera"}
        for channel in channels
    ]
    folder = root / VERSION_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for table, content in rows.items():
        (folder / f"{table}.json").write_text(json.dumps(content, indent=0) + "\n")
