"""A tiny nuScenes v1.0 release: a few scenes of random points with true poses, written by the tests that read it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

CHANNELS = ("LIDAR_TOP", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
YAW = {"CAM_FRONT": 0, "CAM_FRONT_RIGHT": -60, "CAM_BACK_RIGHT": -120, "CAM_BACK": 180, "CAM_BACK_LEFT": 120, "CAM_FRONT_LEFT": 60}
WIDTH, HEIGHT = 64, 36
TABLES = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "lidarseg", "category", "log", "map")


def wxyz(rotation: Rotation) -> list[float]:
    x, y, z, w = rotation.as_quat()
    return [w, x, y, z]


def write_release(
    root: Path, scenes=("scene-0061", "scene-0103"), frames: int = 4, sweeps: int = 2, points: int = 120, version: str = "v1.0-mini"
) -> Path:
    """Write the release.

    Landmarks are fixed in the world: every scan holds the same ones, seen from another pose, and row i is landmark
    i, so that scans can be compared point by point.

    Label i % 32, intensity i; images are grey ramps, superpixels are column stripes of 17 ids. Channel times differ by milliseconds.
    """
    rng = np.random.default_rng(0)
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
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
                        (root / "superpixels").mkdir(exist_ok=True)
                        stripes = np.tile(np.arange(WIDTH) * 17 // WIDTH, (HEIGHT, 1)).astype(np.uint8)
                        Image.fromarray(stripes).save(root / "superpixels" / f"{token}.png")
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
