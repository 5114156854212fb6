"""nuScenes' own devkit as judge: it reads our world, and finds the poses, pixels, submission and scores that we find.

    pip install --no-deps nuscenes-devkit pyquaternion cachetools shapely descartes pycocotools opencv-python-headless

Its declared requirements hold NumPy back, and it needs none of them for this.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tiny_trainer
from lit_methods.callbacks import SubmissionWriter
from lit_methods.datamodules import NuScenesDataModule
from lit_methods.datamodules.driving.nuscenes import project_into_cameras, sweep_to_key
from lit_methods.datamodules.driving.nuscenes_tables import CAMERAS, read_tables
from lit_methods.datamodules.driving.world import make_world
from lit_methods.lidar.minkunet import MinkUNet
from lit_methods.lidar.segmentor import PointSegmentor

nuscenes = pytest.importorskip("nuscenes", reason="nuscenes-devkit is not installed; the head of this file has the command")
pytestmark = pytest.mark.slow

SIZE = (240, 135)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, scenes=3, val_scenes=1, key_frames=3, image_size=SIZE, lidar_columns=96, workers=1)
    return folder


@pytest.fixture(scope="module")
def devkit(root: Path) -> Any:
    return nuscenes.NuScenes(version="v1.0-mini", dataroot=str(root), verbose=False)


@pytest.fixture
def our_splits(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devkit knows the official scenes alone."""
    names = [f"scene-{9001 + index:04d}" for index in range(3)]
    monkeypatch.setattr("nuscenes.eval.lidarseg.utils.create_splits_scenes", lambda verbose=False: {"mini_val": names[-1:]})
    return names


def test_the_devkit_walks_through_every_record_of_the_world(devkit: Any, root: Path) -> None:
    assert len(devkit.scene) == 3
    assert len(devkit.sample) == 9
    for sample in devkit.sample:
        assert set(sample["data"]) == {"LIDAR_TOP", *CAMERAS}
        for token in sample["data"].values():
            path, boxes, _ = devkit.get_sample_data(token)
            assert Path(path).is_file()
            assert {box.token for box in boxes} <= set(sample["anns"])
        labels = np.fromfile(root / devkit.get("lidarseg", sample["data"]["LIDAR_TOP"])["filename"], np.uint8)
        scan = np.fromfile(root / devkit.get("sample_data", sample["data"]["LIDAR_TOP"])["filename"], np.float32)
        assert len(scan) == 5 * len(labels)


def test_boxes_hold_the_points_that_are_labelled_as_their_class(devkit: Any, root: Path) -> None:
    from nuscenes.utils.geometry_utils import points_in_box

    inside, right = 0, 0
    for sample in devkit.sample:
        token = sample["data"]["LIDAR_TOP"]
        path, boxes, _ = devkit.get_sample_data(token)
        points = np.fromfile(path, np.float32).reshape(-1, 5)[:, :3].T
        labels = np.fromfile(root / devkit.get("lidarseg", token)["filename"], np.uint8)
        for box in boxes:
            within = points_in_box(box, points, wlh_factor=1.05)
            names = [devkit.lidarseg_idx2name_mapping[label] for label in labels[within]]
            inside, right = inside + len(names), right + sum(name == box.name for name in names)
    assert inside > 100
    assert right / inside > 0.8, "the rest is road below the wheels and what stands beside"


def test_sweeps_lie_where_the_devkit_puts_them(devkit: Any, root: Path) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud

    tables = read_tables(root, "v1.0-mini", 2)
    for frame in range(len(tables)):
        key = int(tables.lidar[frame])
        data = devkit.get("sample_data", tables.token[key].decode())
        sample = devkit.get("sample", data["sample_token"])
        sweeps = [int(record) for record in tables.sweeps[frame] if record >= 0]
        expected, _ = LidarPointCloud.from_file_multisweep(
            devkit, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=1 + len(sweeps), min_distance=0
        )
        clouds = [np.fromfile(tables.path(key), np.float32).reshape(-1, 5)[:, :3]]
        for record in sweeps:
            points = np.fromfile(tables.path(record), np.float32).reshape(-1, 5)[:, :3]
            motion = sweep_to_key(tables, record, key)
            clouds.append(points @ motion[:3, :3] - motion[:3, 3])
        np.testing.assert_allclose(np.concatenate(clouds), expected.points[:3].T, atol=2e-4)


def test_points_fall_on_the_devkits_pixels(devkit: Any, root: Path) -> None:
    tables = read_tables(root, "v1.0-mini", 0)
    compared = 0
    for frame in range(len(tables)):
        key = int(tables.lidar[frame])
        points = torch.from_numpy(np.fromfile(tables.path(key), np.float32).reshape(-1, 5)[:, :4])
        for camera in tables.cameras[frame]:
            theirs, depths, image = devkit.explorer.map_pointcloud_to_image(tables.token[key].decode(), tables.token[camera].decode())
            assert image.size == SIZE
            rows, pixels = project_into_cameras(tables, points, key, [int(camera)], (SIZE[1], SIZE[0]))
            # The devkit drops what is nearer than a pixel to the upper and left edge; the authors of SLidR keep it.
            u_v = pixels[:, [2, 1]].numpy()
            expected = np.rint(theirs[:2].T).astype(int)
            ours = {tuple(pixel) for pixel in u_v.tolist()}
            near = {(u + du, v + dv) for u, v in ours for du in (-1, 0, 1) for dv in (-1, 0, 1)}  # a half may round to either side
            found = [tuple(pixel) for pixel in expected.tolist()]
            assert all(pixel in near for pixel in found)
            assert np.mean([pixel in ours for pixel in found]) > 0.99
            assert len(rows) >= len(depths)
            compared += len(found)
    assert compared > 1000


def test_a_submission_is_valid_and_scores_as_the_devkit_says(devkit: Any, root: Path, our_splits: list[str], tmp_path: Path) -> None:
    from nuscenes.eval.lidarseg.evaluate import LidarSegEval
    from nuscenes.eval.lidarseg.validate_submission import validate_submission

    torch.manual_seed(0)
    module = PointSegmentor(
        MinkUNet(depth=18, stem_channels=8, planes=[8] * 8), num_outputs=17, ignore_index=16, protocol="finetune", learning_rate=0.02
    )
    data = NuScenesDataModule(root, version="v1.0-mini", mode="segment", batch_size=2)
    trainer = tiny_trainer(callbacks=[SubmissionWriter(tmp_path)], max_steps=60)
    trainer.fit(module, datamodule=data)
    score = trainer.validate(module, datamodule=data, verbose=False)[0]["segmentor/val_miou"]
    trainer.predict(module, datamodule=data, return_predictions=False)
    validate_submission(devkit, str(tmp_path), "mini_val")
    judged = LidarSegEval(devkit, str(tmp_path), "mini_val").evaluate()
    there = [value for value in judged["iou_per_class"].values() if not np.isnan(value)]
    assert 0.02 < score < 0.98
    assert score == pytest.approx(judged["miou"], abs=1e-4)
    assert len(there) > 5
