"""The JSON tables of a nuScenes v1.0 release, read once into compact arrays.

Of the 2.6 million rows of ``sample_data.json`` (v1.0-trainval) the key frames of LIDAR_TOP and of the six cameras are kept, the few
LiDAR sweeps before each key frame, and the poses of all. The result pickles quickly, so that worker processes start quickly.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from lit_methods.datamodules.driving.common import rigid
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import listed
from lit_methods.datamodules.reading import file_size, once, plain_file_name

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
LIDAR = "LIDAR_TOP"
_ROUNDED = 0.01  # what rounding may take off the square of a quaternion's length
_CHUNK = 1 << 22  # characters read at a time
_NUMBERS = frozenset({"rotation", "translation", "camera_intrinsic"})
_TYPES = {"timestamp": (int, "a whole number of microseconds"), "is_key_frame": (bool, "true or false")}
Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a table one by one, so that a table of gigabytes never stands in memory as a whole.

    Raises:
        WrongRootError: There is no such table.
        BrokenRecordError: The file is not a JSON list of objects, or ends too early.
    """
    try:
        file_size(path, "table", "unpack the metadata again")
    except MissingFileError:
        raise WrongRootError(f"{path} is missing: unpack the metadata archive of this nuScenes version into {path.parent.parent}") from None
    with path.open(encoding="utf-8") as file:
        yield from _rows_in(file, path)


def _chunk(file: TextIO, path: Path) -> str:
    try:
        return file.read(_CHUNK)
    except UnicodeDecodeError as problem:
        raise BrokenRecordError(path, "table", f"byte {problem.start} isn't UTF-8 text: broken, unpack the metadata again") from problem


def _rows_in(file: TextIO, path: Path) -> Iterator[Row]:
    decoder, more_of = json.JSONDecoder(), partial(_chunk, file, path)
    text, position, number = more_of().lstrip("\ufeff \t\r\n"), 1, 0
    if not text.startswith("["):
        raise BrokenRecordError(path, "table", "expected a JSON list of rows, it begins with " + repr(text[:20]))
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position < len(text) and text[position] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except RecursionError:
            raise BrokenRecordError(path, f"row {number}", "lists in lists without end: broken, unpack the metadata again") from None
        except json.JSONDecodeError as problem:
            more = more_of() if len(text) - position < 8 * _CHUNK else ""  # no row is that long
            if not more:
                raise BrokenRecordError(
                    path, f"row {number}", f"not valid JSON ({problem.msg}): truncated or broken, unpack the metadata again"
                ) from None
            text, position = text[position:] + more, 0
            continue
        except ValueError as problem:  # a number of thousands of digits
            raise BrokenRecordError(path, f"row {number}", f"not valid JSON ({problem}): broken, unpack the metadata again") from None
        if not isinstance(row, dict):
            raise BrokenRecordError(path, f"row {number}", f"expected an object, got {type(row).__name__}")
        yield row
        number += 1


def read_table(path: Path, *keys: str) -> Iterator[tuple[Any, ...]]:
    """The values of ``keys`` in every row.

    Raises:
        BrokenRecordError: A row lacks a key, or holds something else where a token, a name or a time belongs.
    """
    types = [(object, "") if key in _NUMBERS else _TYPES.get(key, (str, "a text")) for key in keys]
    for number, row in enumerate(read_rows(path)):
        try:
            values = tuple(row[key] for key in keys)
            for key, value, (kind, name) in zip(keys, values, types, strict=True):
                if (kind is not object and type(value) is not kind) or (kind is int and not -(2**63) <= value < 2**63):
                    raise BrokenRecordError(path, f"row {number}", f"{key} is {str(value)[:40]}, expected {name}")
            yield values
        except KeyError as missing:
            have = ", ".join(row) or "nothing"
            raise BrokenRecordError(path, f"row {number}", f"lacks the key {missing}; it has {have}") from None


def rotation_matrices(quaternions: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 4) quaternions (w, x, y, z), as the tables hold them, -> (n, 3, 3) float64 rotations."""
    return Rotation.from_quat(quaternions[:, [1, 2, 3, 0]]).as_matrix()


@dataclass(frozen=True)
class NuScenesTables:
    """Key frames and what belongs to them. F frames, R records (one file each), P = R poses, C calibrated sensors.

    Attributes:
        root: Folder of the data set.
        version: Folder of the tables.
        scene_names: Names of the scenes, in the table's order.
        scene: (F,) int32, scene of each key frame; frames are sorted by scene, then time.
        lidar: (F,) int32, record of the key scan.
        cameras: (F, 6) int32, records of the key images in the order of ``CAMERAS``; -1 where there is none.
        sweeps: (F, S) int32, records of the nearest earlier sweeps that are not key scans, nearest first; -1 at the start of a scene.
        token: (R,) bytes, sample_data token.
        file: (R,) bytes, path relative to the root.
        timestamp: (R,) int64, microseconds.
        sensor: (R,) int32, row of the calibrations.
        ego_rotation: (R, 3, 3) float64, vehicle -> world at the record's own time.
        ego_translation: (R, 3) float64, metres, of the same transform.
        sensor_rotation: (C, 3, 3) float64, sensor -> vehicle.
        sensor_translation: (C, 3) float64, metres, of the same transform.
        intrinsic: (C, 3, 3) float64, zeros for a LiDAR.
        lidarseg: (F,) bytes, label file relative to the root; empty where there is none.
    """

    root: Path
    version: str
    scene_names: tuple[str, ...]
    scene: NDArray[np.int32]
    lidar: NDArray[np.int32]
    cameras: NDArray[np.int32]
    sweeps: NDArray[np.int32]
    token: NDArray[np.bytes_]
    file: NDArray[np.bytes_]
    timestamp: NDArray[np.int64]
    sensor: NDArray[np.int32]
    ego_rotation: NDArray[np.float64]
    ego_translation: NDArray[np.float64]
    sensor_rotation: NDArray[np.float64]
    sensor_translation: NDArray[np.float64]
    intrinsic: NDArray[np.float64]
    lidarseg: NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.scene)

    def path(self, record: int) -> Path:
        """File of a record."""
        return self.root / self.file[record].decode()

    def neighbour(self, frame: int, offset: int) -> int | None:
        """Key frame ``offset`` steps later (negative: earlier) in the same scene, or None past its border."""
        other = frame + offset
        return other if 0 <= other < len(self) and self.scene[other] == self.scene[frame] else None

    def sensor_to_global(self, record: int) -> NDArray[np.float64]:
        """(4, 4) float64 pose of the sensor at the record's time."""
        sensor = self.sensor[record]
        ego = rigid(self.ego_rotation[record], self.ego_translation[record])
        return ego @ rigid(self.sensor_rotation[sensor], self.sensor_translation[sensor])

    def frames_of(self, scenes: list[str]) -> list[int]:
        """Key frames of the named scenes, by scene and time."""
        wanted = np.isin(self.scene, [self.scene_names.index(name) for name in scenes])
        return np.flatnonzero(wanted).tolist()


def tables_folder(root: Path, version: str) -> Path:
    """The folder of a release's tables.

    Raises:
        WrongRootError: It isn't there.
    """
    folder = root / version
    if not folder.is_dir():
        there = ", ".join([path.name for path in listed(root) if path.is_dir()][:8]) or "nothing" if root.is_dir() else "no such folder"
        raise WrongRootError(
            f"root={str(root)!r} holds no {version}/ (found: {there}). Expected the official nuScenes layout: {version}/*.json, "
            "samples/, sweeps/, lidarseg/. "
            "Get it from https://www.nuscenes.org/nuscenes#download (free account), or set root=null for the built-in world"
        )
    return folder


def read_tables(root: Path, version: str, num_sweeps: int) -> NuScenesTables:
    """Read the tables of a release.

    Args:
        root: Folder that holds ``samples/``, ``sweeps/``, ``lidarseg/`` and the folder of tables.
        version: Folder of the tables: ``v1.0-trainval``, ``v1.0-mini`` or ``v1.0-test``.
        num_sweeps: Sweeps kept per key frame.

    Returns:
        The tables, without reading any sensor file.

    Raises:
        WrongRootError: The root or a table is missing; the message says what was expected and where to get it.
        BrokenRecordError: A table is truncated, a row lacks a key, or names a row that doesn't exist.
    """
    folder = tables_folder(root, version)
    scenes = list(read_table(folder / "scene.json", "token", "name"))
    for place, field in enumerate(("token", "name")):
        once([row[place] for row in scenes], folder / "scene.json", field, field)
    rows = list(read_table(folder / "sample.json", "token", "scene_token", "timestamp"))
    once([token for token, *_ in rows], folder / "sample.json", "token", "token")
    samples = {token: (scene, stamp) for token, scene, stamp in rows}
    sensors = list(read_table(folder / "sensor.json", "token", "channel"))
    once([token for token, _ in sensors], folder / "sensor.json", "token", "token")
    channels = dict(sensors)
    calibrations = _read_calibrations(folder / "calibrated_sensor.json", channels)

    kept_lidar: dict[str, tuple[str, str, bool]] = {}  # LiDAR record -> its predecessor, its sample, whether a key scan
    details: dict[str, tuple[str, str, int, str]] = {}  # record -> file, pose, time, calibration
    key_records: dict[str, dict[str, str]] = {token: {} for token in samples}  # sample -> channel -> record
    keys = ("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "is_key_frame", "filename", "prev")
    table = folder / "sample_data.json"
    for number, (token, sample, pose, calibration, stamp, is_key, file, previous) in enumerate(read_table(table, *keys)):
        try:
            channel = calibrations.channel[calibration]
        except KeyError:
            raise BrokenRecordError(
                table, f"row {number}", f"calibrated_sensor_token {calibration!r} is in no row of calibrated_sensor.json"
            ) from None
        if channel == LIDAR:
            kept_lidar[token] = (previous, sample, is_key)
        elif not (is_key and channel in CAMERAS):
            continue
        if token in details:
            raise BrokenRecordError(table, f"row {number}", f"the token {token!r} stands in an earlier row, too: unpack the metadata again")
        details[token] = (file, pose, stamp, calibration)
        if is_key:
            if sample not in key_records:
                raise BrokenRecordError(table, f"row {number}", f"sample_token {sample!r} is in no row of sample.json")
            key_records[sample][channel] = token

    scene_row = {token: row for row, (token, _) in enumerate(scenes)}
    for token, (scene, _) in samples.items():
        if scene not in scene_row:
            raise BrokenRecordError(folder / "sample.json", f"sample {token}", f"scene_token {scene!r} is in no row of scene.json")
        if LIDAR not in key_records[token]:
            raise BrokenRecordError(
                table, f"sample {token}", f"has no key frame of {LIDAR}: the table is incomplete, unpack the metadata again"
            )
    ordered = sorted(samples, key=lambda token: (scene_row[samples[token][0]], samples[token][1]))
    sweeps = [_previous_sweeps(key_records[token][LIDAR], kept_lidar, num_sweeps, table) for token in ordered]

    records: dict[str, int] = {}  # record -> row of the compact arrays
    for token, earlier in zip(ordered, sweeps, strict=True):
        for record in (*key_records[token].values(), *earlier):
            records.setdefault(record, len(records))
    for record in records:
        plain_file_name(record, table, "token")
    rotation, translation = _read_poses(folder / "ego_pose.json", [details[record][1] for record in records])
    lidarseg = _read_lidarseg(folder / "lidarseg.json")
    padded = [[records[record] for record in earlier] + [-1] * (num_sweeps - len(earlier)) for earlier in sweeps]
    return NuScenesTables(
        root=root,
        version=version,
        scene_names=tuple(name for _, name in scenes),
        scene=np.array([scene_row[samples[token][0]] for token in ordered], dtype=np.int32),
        lidar=np.array([records[key_records[token][LIDAR]] for token in ordered], dtype=np.int32),
        cameras=np.array(
            [[records.get(key_records[token].get(name, ""), -1) for name in CAMERAS] for token in ordered], dtype=np.int32
        ).reshape(-1, 6),
        sweeps=np.array(padded, dtype=np.int32).reshape(len(ordered), num_sweeps),
        token=np.array([record.encode() for record in records]),
        file=np.array([details[record][0].encode() for record in records]),
        timestamp=np.array([details[record][2] for record in records], dtype=np.int64),
        sensor=np.array([calibrations.row[details[record][3]] for record in records], dtype=np.int32),
        ego_rotation=rotation,
        ego_translation=translation,
        sensor_rotation=calibrations.rotation,
        sensor_translation=calibrations.translation,
        intrinsic=calibrations.intrinsic,
        lidarseg=np.array([lidarseg.get(key_records[token][LIDAR], "").encode() for token in ordered]),
    )


def _previous_sweeps(key_scan: str, chain: dict[str, tuple[str, str, bool]], count: int, table: Path) -> list[str]:
    found: list[str] = []
    record, passed = chain[key_scan][0], {key_scan}
    while record in chain and len(found) < count:
        if record in passed:
            raise BrokenRecordError(table, "prev", f"leads from {key_scan!r} back to {record!r} in a circle: unpack the metadata again")
        passed.add(record)
        if not chain[record][2]:
            found.append(record)
        record = chain[record][0]
    return found


@dataclass(frozen=True)
class _Calibrations:
    row: dict[str, int]
    channel: dict[str, str]
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]
    intrinsic: NDArray[np.float64]


def _read_calibrations(path: Path, channels: dict[str, str]) -> _Calibrations:
    rows = list(read_table(path, "token", "sensor_token", "rotation", "translation", "camera_intrinsic"))
    for number, (_, sensor, *_rest) in enumerate(rows):
        if sensor not in channels:
            raise BrokenRecordError(path, f"row {number}", f"sensor_token {sensor!r} is in no row of sensor.json")
        if channels[sensor] in CAMERAS and not _rest[2]:
            raise BrokenRecordError(path, f"row {number}", "camera_intrinsic is empty, expected 3 x 3 numbers: unpack the metadata again")
    once([row[0] for row in rows], path, "token", "token")
    try:
        quaternion = np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4)
        if not (turns := _turns(quaternion)).all():
            raise BrokenRecordError(
                path, f"row {int(np.argmin(turns))}", "rotation is no quaternion of length 1: unpack the metadata again"
            )
        rotation = rotation_matrices(quaternion)
        translation = np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 3)
        intrinsic = np.array([row[4] or np.zeros((3, 3)) for row in rows], dtype=np.float64).reshape(-1, 3, 3)
    except BrokenRecordError:
        raise
    except (ValueError, TypeError, OverflowError) as problem:
        raise BrokenRecordError(path, "rotation, translation, camera_intrinsic", f"expected 4, 3 and 3x3 numbers ({problem})") from problem
    for name, values in (("rotation", rotation), ("translation", translation), ("camera_intrinsic", intrinsic)):
        plausible = _plausible(values).reshape(len(rows), -1).all(axis=1)
        if not plausible.all():
            raise BrokenRecordError(
                path, f"row {int(np.argmin(plausible))}", f"{name} holds NaN, infinite or impossible numbers: unpack the metadata again"
            )
    return _Calibrations(
        {row[0]: number for number, row in enumerate(rows)}, {row[0]: channels[row[1]] for row in rows}, rotation, translation, intrinsic
    )


def _read_poses(path: Path, wanted: list[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows: dict[str, list[int]] = {}
    for row, token in enumerate(wanted):
        rows.setdefault(token, []).append(row)
    quaternion, translation, met = np.full((len(wanted), 4), np.nan), np.full((len(wanted), 3), np.nan), set()
    for number, (token, rotation, shift) in enumerate(read_table(path, "token", "rotation", "translation")):
        if token in rows:
            if token in met:
                raise BrokenRecordError(
                    path, f"row {number}", f"the token {token!r} stands in an earlier row, too: unpack the metadata again"
                )
            met.add(token)
            try:
                quaternion[rows[token]], translation[rows[token]] = rotation, shift
            except (ValueError, TypeError, OverflowError) as problem:
                raise BrokenRecordError(path, f"row {number}", f"rotation and translation must be 4 and 3 numbers ({problem})") from problem
    unset = np.isnan(quaternion).any(axis=1) | np.isnan(translation).any(axis=1)
    if unset.any():
        raise BrokenRecordError(path, "token", f"no pose {wanted[int(np.argmax(unset))]!r}, which sample_data.json names (or it holds NaN)")
    bad = ~_plausible(translation).all(axis=1) | ~_turns(quaternion)
    if bad.any():
        raise BrokenRecordError(
            path, "rotation", f"the pose {wanted[int(np.argmax(bad))]!r} is no rotation and place: unpack the metadata again"
        )
    return rotation_matrices(quaternion), translation


def _read_lidarseg(path: Path) -> dict[str, str]:
    if not os.path.lexists(path):
        return {}
    rows = list(read_table(path, "sample_data_token", "filename"))
    once([token for token, _ in rows], path, "sample_data_token", "token")
    return dict(rows)


def _turns(quaternions: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of (n, 4) quaternions are rotations: of length 1, up to rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.abs((quaternions**2).sum(axis=1) - 1) < _ROUNDED


def _plausible(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where metres or pixels are numbers that may be: not NaN, and within 100,000 km."""
    return np.abs(values) <= 1e8
