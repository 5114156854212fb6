"""Tiny releases of nuScenes and of the KITTI-style sets in their official layouts: random points with true poses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from lit_methods.datamodules.driving.kitti import LabelMap, read_label_map
from lit_methods.datamodules.driving.nuscenes_tables import CAMERAS, LIDAR
from lit_methods.datamodules.fake import Arguments, Writer, text

CHANNELS = (LIDAR, *CAMERAS)
YAW = {"CAM_FRONT": 0, "CAM_FRONT_RIGHT": -60, "CAM_BACK_RIGHT": -120, "CAM_BACK": 180, "CAM_BACK_LEFT": 120, "CAM_FRONT_LEFT": 60}
WIDTH, HEIGHT = 64, 36
TABLES = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "lidarseg", "category", "log", "map")


def wxyz(rotation: Rotation) -> list[float]:
    x, y, z, w = rotation.as_quat()
    return [w, x, y, z]


def nuscenes(
    root: Path,
    scenes: Sequence[str] = ("scene-0061", "scene-0103"),
    frames: int = 4,
    sweeps: int = 2,
    points: int = 120,
    version: str = "v1.0-mini",
    superpixels: Path | None = None,
) -> Path:
    """A nuScenes v1.0 release with lidarseg and superpixels.

    Landmarks are fixed in the world: every scan holds the same ones, seen from another pose, and row i is landmark
    i, so that scans can be compared point by point.

    Label i % 32, intensity i; images are ramps, superpixels are column stripes of 17 ids. Channel times differ by milliseconds.

    Args:
        root: Folder to write to.
        scenes: Names; the first is of the official training split, the second of the validation split.
        frames: Key frames of each scene.
        sweeps: LiDAR sweeps before each key frame but the first.
        points: Of each scan.
        version: Folder of the tables.
        superpixels: Folder of the superpixels; None: ``superpixels`` below ``root``.

    Returns:
        ``root``.
    """
    superpixels = root / "superpixels" if superpixels is None else superpixels
    rng = np.random.default_rng(0)
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    sensor_to_ego = {"LIDAR_TOP": (Rotation.from_euler("xyz", [1, -2, 90], degrees=True), np.array([0.9, 0.1, 1.8]))}
    optical = Rotation.from_matrix(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]))  # camera axes -> vehicle axes
    for name, yaw in YAW.items():
        sensor_to_ego[name] = (Rotation.from_euler("z", yaw, degrees=True) * optical, np.array([0.5 * np.cos(np.radians(yaw)), 0.0, 1.5]))
    intrinsic = [[45.0, 0.0, 31.3], [0.0, 45.0, 17.7], [0.0, 0.0, 1.0]]
    for name, (rotation, translation) in sensor_to_ego.items():
        tables["sensor"].append({"token": f"sensor-{name}", "channel": name, "modality": "lidar" if name == "LIDAR_TOP" else "camera"})
        tables["calibrated_sensor"].append(
            {
                "token": f"calib-{name}",
                "sensor_token": f"sensor-{name}",
                "translation": translation.tolist(),
                "rotation": wxyz(rotation),
                "camera_intrinsic": [] if name == "LIDAR_TOP" else intrinsic,
            }
        )
    for s, scene in enumerate(scenes):
        landmarks = np.concatenate([rng.uniform(-25, 25, (points, 2)) + 100 * s, rng.uniform(0, 4, (points, 1))], axis=1)
        previous = {name: "" for name in CHANNELS}
        tables["scene"].append({"token": f"token-{scene}", "name": scene, "first_sample_token": f"{scene}-0"})
        for f in range(frames):
            sample = f"{scene}-{f}"
            tables["sample"].append(
                {
                    "token": sample,
                    "timestamp": 10**9 * s + 500_000 * f,
                    "scene_token": f"token-{scene}",
                    "prev": f"{scene}-{f - 1}" if f else "",
                    "next": f"{scene}-{f + 1}" if f + 1 < frames else "",
                }
            )
            for step in range(-sweeps if f else 0, 1):  # sweeps lie before their key frame; step 0 is the key frame
                for c, name in enumerate(CHANNELS):
                    if name != "LIDAR_TOP" and step:
                        continue
                    stamp = 10**9 * s + 500_000 * f + 100_000 * step + 3_000 * c
                    time = (stamp - 10**9 * s) / 1e6
                    token = f"{scene}-{f}-{step}-{name}"
                    ego = (
                        Rotation.from_euler("zyx", [20 + 30 * time, 1, -2], degrees=True),
                        np.array([100.0 * s + 4 * time, 100.0 * s + time, 0.1]),
                    )
                    tables["ego_pose"].append(
                        {"token": f"pose-{token}", "timestamp": stamp, "rotation": wxyz(ego[0]), "translation": ego[1].tolist()}
                    )
                    folder = f"{'sweeps' if step else 'samples'}/{name}"
                    file = f"{folder}/{token}.{'pcd.bin' if c == 0 else 'png'}"
                    (root / folder).mkdir(parents=True, exist_ok=True)
                    if c == 0:
                        rotation, translation = sensor_to_ego[name]
                        local = rotation.inv().apply(ego[0].inv().apply(landmarks - ego[1]) - translation)
                        scan = np.zeros((points, 5), dtype=np.float32)
                        scan[:, :3], scan[:, 3], scan[:, 4] = local, np.arange(points), 7
                        scan.tofile(root / file)
                    else:
                        ramp = np.tile(np.linspace(0, 255, WIDTH), (HEIGHT, 1)).astype(np.uint8)
                        Image.fromarray(np.stack([ramp, np.full_like(ramp, 40 * c), np.full_like(ramp, 9)], axis=-1)).save(root / file)
                        superpixels.mkdir(parents=True, exist_ok=True)
                        stripes = np.tile(np.arange(WIDTH) * 17 // WIDTH, (HEIGHT, 1)).astype(np.uint8)
                        Image.fromarray(stripes).save(superpixels / f"{token}.png")
                    if previous[name]:
                        next(row for row in tables["sample_data"] if row["token"] == previous[name])["next"] = token
                    tables["sample_data"].append(
                        {
                            "token": token,
                            "sample_token": sample,
                            "ego_pose_token": f"pose-{token}",
                            "calibrated_sensor_token": f"calib-{name}",
                            "timestamp": stamp,
                            "fileformat": "pcd" if c == 0 else "jpg",
                            "is_key_frame": step == 0,
                            "height": 0 if c == 0 else HEIGHT,
                            "width": 0 if c == 0 else WIDTH,
                            "filename": file,
                            "prev": previous[name],
                            "next": "",
                        }
                    )
                    previous[name] = token
                    if c == 0 and step == 0:
                        label_file = f"lidarseg/{version}/{token}_lidarseg.bin"
                        (root / label_file).parent.mkdir(parents=True, exist_ok=True)
                        (np.arange(points) % 32).astype(np.uint8).tofile(root / label_file)
                        tables["lidarseg"].append({"token": token, "sample_data_token": token, "filename": label_file})
    (root / version).mkdir()
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows, indent=0))
    return root


# ---- KITTI-style sets ------------------------------------------------------------------------------------------------------------------

TR = np.array([[0.0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])  # LiDAR axes -> camera axes
RAW_LABELS = (10, 252, 40, 50, 0)  # SemanticKITTI: car, moving car, road, building, unlabelled


def lidar_pose(frame: int) -> NDArray[np.float64]:
    """(4, 4) pose of the LiDAR at a frame: it turns and moves on."""
    angle = 0.2 * frame
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    pose[:3, 3] = [1.5 * frame, 0.3 * frame, 0]
    return pose


def sequences(
    root: Path,
    names: Sequence[str] = ("00", "08"),
    frames: int = 4,
    *,
    scans: str = "velodyne",
    labels: Sequence[str] = ("labels",),
    columns: int = 4,
    points: int = 50,
    raw: Sequence[int] = RAW_LABELS,
    dtype: str = "uint32",
    poses: str = "camera",
) -> Path:
    """Sequences of scans, labels and poses: landmarks that stand still, seen from a moving LiDAR.

    Args:
        root: Folder of the sequences.
        names: Names of the sequences.
        frames: Scans of each.
        scans: Folder of a sequence that holds the scans.
        labels: Folders that hold the labels; all of them get the same.
        columns: Values per point.
        points: Of each scan.
        raw: Raw ids that the points take in turn.
        dtype: Integer type of a label; with 32 bits the upper ones hold the number of an object, 7.
        poses: ``camera``, ``lidar`` or ``none``, as in :class:`LabelMap`.

    Returns:
        ``root``.
    """
    landmarks = np.random.default_rng(0).uniform(-20, 20, (points, 3))
    ids = np.array(raw, dtype)[np.arange(points) % len(raw)]
    if np.dtype(dtype).itemsize == 4:
        ids = ids | np.array(7 << 16, dtype)
    for name in names:
        folder = root / name
        for own in (scans, *labels):
            (folder / own).mkdir(parents=True, exist_ok=True)
        lines = []
        for frame in range(frames):
            pose = lidar_pose(frame)
            scan = np.zeros((points, columns), np.float32)
            scan[:, :3] = (landmarks - pose[:3, 3]) @ pose[:3, :3]
            scan[:, 3] = np.arange(points) / points
            scan.tofile(folder / scans / f"{frame:06d}.bin")
            for own in labels:
                ids.tofile(folder / own / f"{frame:06d}.label")
            written = pose @ np.linalg.inv(TR) if poses == "camera" else pose
            lines.append(" ".join(f"{value:.12e}" for value in written[:3].ravel()))
        if poses != "none":
            text(folder / "poses.txt", *lines)
        if poses == "camera":
            text(folder / "calib.txt", "P0: 1 2 3", "Tr: " + " ".join(map(str, TR[:3].ravel())))
    return root


def labelled_sequences(root: Path, label_map: LabelMap, splits: Mapping[str, Sequence[str]], frames: int = 4, points: int = 200) -> None:
    """A KITTI-style set as its label map describes it; a list of scans for each split that has a file of its own."""
    base = root if label_map.folders[0] == "." else root / label_map.folders[0]
    names = {part: [*own] for part, own in splits.items()} | {part: ["00000"] for part in label_map.split_files}
    raw = [ids[0] for ids in label_map.classes.values()] + list(label_map.ignored[:1])
    label_folders = dict.fromkeys((label_map.labels[0], label_map.train_labels[0]))
    every = list(dict.fromkeys(name for own in names.values() for name in own))
    sequences(
        base,
        every,
        frames,
        scans=label_map.scans[0],
        labels=list(label_folders),
        columns=label_map.columns,
        points=points,
        raw=raw,
        dtype=label_map.label_dtype,
        poses=label_map.poses,
    )
    for part, file in label_map.split_files.items():
        own = range(frames)[frames // 2 :] if part == "val" else range(frames)[: frames // 2]
        lines = [f"00000/{label_map.scans[0]}/{k:06d}.bin 00000/{label_map.labels[0]}/{k:06d}.label" for k in own]
        text(base / file, *lines)


# ---- what each datamodule gets ---------------------------------------------------------------------------------------------------------


def _nuscenes(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    root, own = arguments["root"], arguments.get("superpixel_root")
    nuscenes(root, ("scene-0061", "scene-0103", "scene-0001"), points=400, version=arguments["version"], superpixels=own)
    return {"root": root} | ({} if own is None else {"superpixel_root": own})


def _kitti(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    label_map = read_label_map(arguments["dataset"])
    given = {part: arguments.get(f"{part}_sequences") for part in ("train", "val", "test")}
    splits = {part: names if names is not None else label_map.splits.get(part, ()) for part, names in given.items()}
    labelled_sequences(arguments["root"], label_map, splits)
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"NuScenesDataModule": _nuscenes, "KittiStyleDataModule": _kitti}
__all__ = ["CHANNELS", "FAKES", "HEIGHT", "TR", "WIDTH", "labelled_sequences", "lidar_pose", "nuscenes", "sequences"]
