"""The embedded driving world: its tables link up, its two sensors agree, and its bytes depend on its arguments alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.spatial.transform import Rotation

from forks import HANGS
from lit_methods.datamodules.driving import render, world
from lit_methods.datamodules.driving.nuscenes_writer import TABLES
from lit_methods.datamodules.driving.street import LIDARSEG_NAMES
from lit_methods.datamodules.driving.world import CAMERAS, RAW_TO_CLASS, corrupt, embedded_world, make_world

SMALL: dict[str, Any] = {"scenes": 2, "val_scenes": 1, "key_frames": 3, "image_size": (240, 135), "lidar_columns": 96}
TINY: dict[str, Any] = {"scenes": 2, "val_scenes": 1, "key_frames": 1, "image_size": (64, 36), "lidar_columns": 24}
Table = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root, **SMALL, label_noise=0.0, workers=1)
    return root


def tables(root: Path) -> dict[str, Table]:
    rows = {name: json.loads((root / "v1.0-mini" / f"{name}.json").read_text()) for name in TABLES}
    for name, content in rows.items():
        assert len({row["token"] for row in content}) == len(content), f"{name} has a token twice"
    return {name: {row["token"]: row for row in content} for name, content in rows.items()}


def fingerprint(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def channel(t: dict[str, Table], row: dict[str, Any]) -> str:
    return str(t["sensor"][t["calibrated_sensor"][row["calibrated_sensor_token"]]["sensor_token"]]["channel"])


def chain(rows: Table, first: dict[str, Any]) -> list[dict[str, Any]]:
    """Follow ``next``, checking ``prev`` on the way."""
    found = [first]
    assert first["prev"] == ""
    while found[-1]["next"]:
        following = rows[found[-1]["next"]]
        assert following["prev"] == found[-1]["token"]
        found.append(following)
    return found


def test_every_reference_leads_somewhere(small_world: Path) -> None:
    t = tables(small_world)
    references = {
        "sample_data": {"sample_token": "sample", "ego_pose_token": "ego_pose", "calibrated_sensor_token": "calibrated_sensor"},
        "sample": {"scene_token": "scene"},
        "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
        "sample_annotation": {"sample_token": "sample", "instance_token": "instance", "visibility_token": "visibility"},
        "instance": {
            "category_token": "category",
            "first_annotation_token": "sample_annotation",
            "last_annotation_token": "sample_annotation",
        },
        "calibrated_sensor": {"sensor_token": "sensor"},
        "lidarseg": {"sample_data_token": "sample_data"},
    }
    for table, fields in references.items():
        assert t[table]
        for row in t[table].values():
            for field, target in fields.items():
                assert row[field] in t[target], f"{table}.{field}"
    for row in t["sample_annotation"].values():
        assert row["num_lidar_pts"] > 0
        assert min(row["size"]) > 0
        for attribute in row["attribute_tokens"]:
            assert attribute in t["attribute"]
    assert [row["name"] for row in t["category"].values()] == list(LIDARSEG_NAMES)
    assert [row["index"] for row in t["category"].values()] == list(range(32))


def test_superpixel_ids_are_the_training_ids_of_the_reader() -> None:
    from lit_methods.datamodules.driving.nuscenes import LABEL_TABLE

    assert RAW_TO_CLASS.tolist() == np.asarray(LABEL_TABLE).tolist()


def test_chains_run_in_time_order_with_two_sweeps_before_each_key_frame(small_world: Path) -> None:
    t = tables(small_world)
    for scene in t["scene"].values():
        samples = chain(t["sample"], t["sample"][scene["first_sample_token"]])
        assert len(samples) == scene["nbr_samples"] == SMALL["key_frames"]
        assert samples[-1]["token"] == scene["last_sample_token"]
        assert np.diff([s["timestamp"] for s in samples]).tolist() == [500_000] * (len(samples) - 1)
        mine = [row for row in t["sample_data"].values() if t["sample"][row["sample_token"]]["scene_token"] == scene["token"]]
        for name in ("LIDAR_TOP", *CAMERAS):
            (first,) = (row for row in mine if channel(t, row) == name and row["prev"] == "")
            rows = chain(t["sample_data"], first)
            assert len(rows) == sum(channel(t, row) == name for row in mine)
            assert (np.diff([row["timestamp"] for row in rows]) > 0).all()
            keys = [row["is_key_frame"] for row in rows]
            assert keys == ([False, False, True] if name == "LIDAR_TOP" else [True]) * len(samples)
            for row in rows:
                assert t["ego_pose"][row["ego_pose_token"]]["timestamp"] == row["timestamp"]
                assert row["filename"].startswith(f"{'samples' if row['is_key_frame'] else 'sweeps'}/{name}/")
    for instance in t["instance"].values():
        rows = chain(t["sample_annotation"], t["sample_annotation"][instance["first_annotation_token"]])
        assert len(rows) == instance["nbr_annotations"]
        assert rows[-1]["token"] == instance["last_annotation_token"]


def test_files_have_the_shapes_and_ranges_of_the_format(small_world: Path) -> None:
    t = tables(small_world)
    width, height = SMALL["image_size"]
    for row in t["sample_data"].values():
        path = small_world / row["filename"]
        if channel(t, row) == "LIDAR_TOP":
            points = np.fromfile(path, np.float32).reshape(-1, 5)
            distance = np.linalg.norm(points[:, :3], axis=1)
            assert len(points) > 500
            assert np.isfinite(points).all()
            assert 0.5 < distance.min() < distance.max() < 60.5
            assert (points[:, 3] >= 0).all() and (points[:, 3] <= 255).all() and points[:, 3].std() > 1  # noqa: PT018
            assert set(np.unique(points[:, 4])) <= set(range(32))
            elevation = np.rad2deg(np.arcsin(points[:, 2] / distance))
            np.testing.assert_allclose(elevation, -30.67 + points[:, 4] * 41.34 / 31, atol=0.01)
            if row["is_key_frame"]:
                labels = np.fromfile(small_world / t["lidarseg"][row["token"]]["filename"], np.uint8)
                assert len(labels) == len(points)
                assert labels.max() < 32
                assert len(np.unique(RAW_TO_CLASS[labels])) >= 6
        else:
            assert (row["width"], row["height"]) == (width, height)
            assert Image.open(path).size == (width, height)
            ids = np.asarray(Image.open(small_world / "superpixels" / f"{row['token']}.png"))
            assert ids.shape == (height, width)
            assert ids.dtype == np.uint8
            assert ids.max() <= 16
    splits = json.loads((small_world / "splits.json").read_text())
    assert sorted(splits["train"] + splits["val"]) == sorted(s["name"] for s in t["scene"].values())
    assert (len(splits["train"]), len(splits["val"])) == (1, 1)


def test_the_ego_car_stays_on_the_drivable_part_of_its_map_and_turns(small_world: Path) -> None:
    t = tables(small_world)
    maps = {log: row for row in t["map"].values() for log in row["log_tokens"]}
    assert set(maps) == set(t["log"])
    for scene in t["scene"].values():
        mask = np.asarray(Image.open(small_world / maps[scene["log_token"]]["filename"]))
        mine = [row for row in t["sample_data"].values() if t["sample"][row["sample_token"]]["scene_token"] == scene["token"]]
        poses = [t["ego_pose"][row["ego_pose_token"]] for row in sorted(mine, key=lambda row: row["timestamp"])]
        x, y = np.array([pose["translation"][:2] for pose in poses]).T
        assert (mask[mask.shape[0] - 1 - (y * 10).astype(int), (x * 10).astype(int)] > 0).all()
        assert 0.2 < mask.mean() / 255 * (mask.shape[0] / 10) ** 2 / (220 * 20) < 3  # about 220 m of street
        headings = np.unwrap([np.arctan2(matrix(pose)[1, 0], matrix(pose)[0, 0]) for pose in poses])
        assert np.ptp(headings) > 0.005
        moved = np.hypot(np.diff(x), np.diff(y)) / np.maximum(np.diff([pose["timestamp"] for pose in poses]) / 1e6, 1e-9)
        assert (moved < 15).all()
        travelled = np.hypot(x[-1] - x[0], y[-1] - y[0]) / ((poses[-1]["timestamp"] - poses[0]["timestamp"]) / 1e6)
        assert travelled > 3


def matrix(row: dict[str, Any]) -> np.ndarray:
    w, x, y, z = row["rotation"]
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = Rotation.from_quat([x, y, z, w]).as_matrix(), row["translation"]
    return out


def agreement(root: Path, camera_time: bool) -> tuple[float, float]:
    """Shares of LiDAR points with the class of the pixel they fall on, from the tables alone, without our projection.

    The first counts all points away from outlines, the second those of barriers, cones, people and two-wheelers wherever they fall:
    these are thin, so that a shift shows.
    """
    t = tables(root)
    same, inner, thin = [], [], []
    for scan in t["sample_data"].values():
        if channel(t, scan) != "LIDAR_TOP" or not scan["is_key_frame"]:
            continue
        points = np.fromfile(root / scan["filename"], np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
        labels = RAW_TO_CLASS[np.fromfile(root / t["lidarseg"][scan["token"]]["filename"], np.uint8)]
        to_global = matrix(t["ego_pose"][scan["ego_pose_token"]]) @ matrix(t["calibrated_sensor"][scan["calibrated_sensor_token"]])
        for image in t["sample_data"].values():
            if image["sample_token"] != scan["sample_token"] or channel(t, image) == "LIDAR_TOP":
                continue
            sensor = t["calibrated_sensor"][image["calibrated_sensor_token"]]
            pose = t["ego_pose"][(image if camera_time else scan)["ego_pose_token"]]
            to_camera = np.linalg.inv(matrix(pose) @ matrix(sensor)) @ to_global
            seen = points @ to_camera[:3, :3].T + to_camera[:3, 3]
            front = seen[:, 2] > 1
            pixel = seen[front] @ np.array(sensor["camera_intrinsic"]).T
            col, row = np.round(pixel[:, :2] / pixel[:, 2:]).astype(int).T
            inside = (col >= 0) & (col < image["width"]) & (row >= 0) & (row < image["height"])
            ids = np.asarray(Image.open(root / "superpixels" / f"{image['token']}.png"))
            label = labels[front][inside]
            same.append(ids[row[inside], col[inside]] == label)
            inner.append((maximum_filter(ids, 3) == minimum_filter(ids, 3))[row[inside], col[inside]])
            thin.append(np.isin(label, [0, 1, 5, 6, 7]))
    right, away, narrow = (np.concatenate(parts) for parts in (same, inner, thin))
    assert away.sum() > 3000
    assert narrow.sum() > 200
    return float(right[away].mean()), float(right[narrow].mean())


def test_points_fall_on_pixels_of_their_class_only_with_the_poses_of_both_times(small_world: Path) -> None:
    exact, exact_thin = agreement(small_world, camera_time=True)
    careless, careless_thin = agreement(small_world, camera_time=False)
    assert exact > 0.95  # the rest is what one sensor sees past or over something and the other doesn't
    assert exact > careless
    assert exact_thin > careless_thin + 0.1


def test_boxes_hold_the_points_of_their_class(small_world: Path) -> None:
    t = tables(small_world)
    scans = {row["sample_token"]: row for row in t["sample_data"].values() if channel(t, row) == "LIDAR_TOP" and row["is_key_frame"]}
    counted = held = 0
    for box in t["sample_annotation"].values():
        scan = scans[box["sample_token"]]
        points = np.fromfile(small_world / scan["filename"], np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
        labels = np.fromfile(small_world / t["lidarseg"][scan["token"]]["filename"], np.uint8)
        mine = points[labels == t["category"][t["instance"][box["instance_token"]]["category_token"]]["index"]]
        placed = matrix(t["ego_pose"][scan["ego_pose_token"]]) @ matrix(t["calibrated_sensor"][scan["calibrated_sensor_token"]])
        to_box = np.linalg.inv(matrix(box)) @ placed
        local = mine @ to_box[:3, :3].T + to_box[:3, 3]
        width, length, height = box["size"]
        inside = (np.abs(local) < np.array([length, width, height]) / 2 + 0.1).all(1).sum()
        counted, held = counted + box["num_lidar_pts"], held + min(int(inside), box["num_lidar_pts"])
    assert held > 0.95 * counted


def test_same_arguments_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    make_world(tmp_path / "one", **TINY, seed=3, workers=1)
    make_world(tmp_path / "two", **TINY, seed=3, workers=2)
    make_world(tmp_path / "other", **TINY, seed=4, workers=1)
    one = fingerprint(tmp_path / "one")
    assert one == fingerprint(tmp_path / "two")
    assert len(one) == 14 + 1 + 2 * (1 + 3 + 1 + 6 + 6)  # tables, splits; map, scans, labels, images, superpixels of each scene
    seen = [
        {digest for name, digest in prints.items() if name.endswith((".bin", ".jpg"))} for prints in (one, fingerprint(tmp_path / "other"))
    ]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_label_noise_has_its_share_and_comes_in_patches(share: float) -> None:
    ids = np.zeros((99, 176), np.uint8)
    ids[40:], ids[:, 120:], ids[60:80, 30:60] = 10, 14, 3
    noisy = corrupt(ids, share, np.random.default_rng(0))
    wrong = noisy != ids
    assert abs(wrong.mean() - share) < 0.01
    assert set(np.unique(noisy)) <= {0, 3, 10, 14}
    lonely = wrong & (maximum_filter(np.roll(wrong, 1, 0) | np.roll(wrong, -1, 0) | np.roll(wrong, 1, 1) | np.roll(wrong, -1, 1), 1) == 0)
    assert lonely.sum() < 0.01 * wrong.sum()
    assert np.array_equal(corrupt(ids, 0.0, np.random.default_rng(0)), ids)


def test_the_nearest_of_two_boxes_is_hit_at_the_right_distance() -> None:
    parts = [render.box((x, 0.0, 1.0), (2.0, 4.0, 2.0), render.MATTE, (0.5, 0.5, 0.5)) for x in (10.0, 5.0)]
    solids = render.Solids.stack(
        [(0, 17, parts[0]), (0, 28, parts[1]), (0, 30, render.ellipsoid((0.0, 8.0, 1.0), (1.0, 2.0, 3.0), render.MATTE, (1, 1, 1)))]
    )
    posed = render.pose(solids, np.zeros((1, 3)), np.zeros(1), np.array([0.0, 0.0, 1.0]))
    rays = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0.6, 0.8, 0]], np.float32).T[:, None]
    windows = [(index, 0, 1, 0, 4) for index in range(3)]
    hits = render.cast(rays, posed, windows, np.full((1, 4), np.inf, np.float32))
    assert hits.solid[0].tolist() == [1, 2, render.SKY, render.SKY]
    np.testing.assert_allclose(hits.depth[0], [4, 6, np.inf, np.inf], rtol=1e-6)


def test_windows_leave_nothing_out() -> None:
    scene = world.make_scene(5, 0, 1.0)
    rotation, origin = world.sensor_pose(scene, CAMERAS["CAM_BACK"], 0.3)
    intrinsic = CAMERAS["CAM_BACK"].intrinsic(96)
    col, row = np.meshgrid((np.arange(96) - intrinsic[0, 2]) / intrinsic[0, 0], (np.arange(54) - intrinsic[1, 2]) / intrinsic[1, 1])
    local = np.stack([col, row, np.ones_like(col)])
    rays = np.einsum("ij,jhw->ihw", rotation, local / np.linalg.norm(local, axis=0)).astype(np.float32)
    posed = render.pose(scene.solids, *scene.stand(0.3), origin)
    far = np.full((54, 96), 100, np.float32)
    windows = render.camera_windows(posed, rotation, intrinsic, (54, 96), 100)
    everywhere = [(index, 0, 54, 0, 96) for index in np.nonzero(posed.nearest < 100)[0].tolist()]
    assert sum((w[2] - w[1]) * (w[4] - w[3]) for w in windows) < 0.2 * len(everywhere) * 54 * 96
    np.testing.assert_array_equal(render.cast(rays, posed, windows, far).depth, render.cast(rays, posed, everywhere, far).depth)

    rotation, origin = world.sensor_pose(scene, world.LIDAR, 0.3)
    azimuth, flat = render.lidar_azimuth(np.arange(64), 64), np.cos(world.BEAMS)[:, None]
    local = np.stack([flat * np.sin(azimuth), flat * np.cos(azimuth), np.sin(world.BEAMS)[:, None] + 0 * azimuth])
    rays = np.einsum("ij,jhw->ihw", rotation, local).astype(np.float32)
    posed = render.pose(scene.solids, *scene.stand(0.3), origin)
    far = np.full((32, 64), 60, np.float32)
    windows = render.lidar_windows(posed, rotation, world.BEAMS, 64, 60)
    everywhere = [(index, 0, 32, 0, 64) for index in np.nonzero(posed.nearest < 60)[0].tolist()]
    assert sum((w[2] - w[1]) * (w[4] - w[3]) for w in windows) < 0.2 * len(everywhere) * 32 * 64
    np.testing.assert_array_equal(render.cast(rays, posed, windows, far).depth, render.cast(rays, posed, everywhere, far).depth)


def test_the_cache_is_made_once_and_a_broken_attempt_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, **_: Any) -> None:
        (root / "v1.0-mini").mkdir()
        (root / "v1.0-mini" / "scene.json").write_text("[")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world, "make_world", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded_world(tmp_path, **TINY, workers=1)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []

    name = embedded_world(tmp_path, **TINY, seed=9, workers=1).name
    killed = tmp_path / f".{name}.tmp-killed"  # what a killed process leaves behind, after the finished world is lost
    (tmp_path / name).rename(killed)
    root = embedded_world(tmp_path, **TINY, seed=9, workers=1)
    assert (root.name, killed.exists()) == (name, False)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert embedded_world(tmp_path, **TINY, seed=9, workers=1) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert embedded_world(tmp_path, **{**TINY, "lidar_columns": 25}, seed=9, workers=1) != root


def test_two_processes_share_one_world(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from lit_methods.datamodules.driving.world import embedded_world\n"
        f"print(embedded_world(Path({str(tmp_path)!r}), **{TINY!r}, workers=1))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    roots = {child.communicate(timeout=HANGS)[0].strip() for child in both}
    assert [child.returncode for child in both] == [0, 0]
    (root,) = roots
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [Path(root).name]
    make_world(tmp_path / "alone", **TINY, workers=1)
    assert fingerprint(Path(root)) == fingerprint(tmp_path / "alone")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"val_scenes": 2}, "val_scenes=2"),
        ({"key_frames": 0}, "key_frames=0"),
        ({"label_noise": 1.5}, "label_noise=1.5"),
        ({"image_size": (4, 4)}, "image_size"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_world(tmp_path, **{**TINY, **wrong})


def test_the_error_of_a_worker_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "__name__", "no_such_module")
    with pytest.raises(RuntimeError, match=r"workers=1 makes it in this process[^$]*no_such_module"):
        make_world(tmp_path, **TINY, workers=2)


@pytest.mark.slow
def test_the_default_world_has_every_class_in_train_and_val(tmp_path: Path) -> None:
    make_world(tmp_path, image_size=(64, 36))
    t = tables(tmp_path)
    counts = {name: np.zeros(17, int) for name in ("train", "val")}
    split_of = {scene: split for split, scenes in json.loads((tmp_path / "splits.json").read_text()).items() for scene in scenes}
    for row in t["lidarseg"].values():
        sample = t["sample"][t["sample_data"][row["sample_data_token"]]["sample_token"]]
        counts[split_of[t["scene"][sample["scene_token"]]["name"]]] += np.bincount(
            RAW_TO_CLASS[np.fromfile(tmp_path / row["filename"], np.uint8)], minlength=17
        )
    assert (counts["train"][:16] > 500).all()
    assert (counts["val"][:16] > 100).sum() >= 15
    assert counts["train"][16] > 0
