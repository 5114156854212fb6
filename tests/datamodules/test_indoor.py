"""ScanNet and S3DIS: prepared scenes, frames, lifted masks, lists of labelled points; and what is wrong with files."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import S3DISDataModule, ScanNetDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.indoor.fake import s3dis, scannet
from lit_methods.datamodules.indoor.frames import chosen_views, lift_scene, open_frames, read_masks
from lit_methods.datamodules.indoor.prepared import read_labelled_points, read_lifted, read_scene

FIRST, SECOND = "scene0000_00", "scene0001_00"


@pytest.fixture
def root(tmp_path):
    listed = scannet(tmp_path)
    (tmp_path / "points20.json").write_text(json.dumps(listed))
    torch.save({name: np.array(rows) for name, rows in listed.items()}, tmp_path / "points20")
    return tmp_path


def module(root, **arguments):
    return ScanNetDataModule(
        root, **({"labelled": root / "points20", "mask_source": "files", "batch_size": 2, "num_workers": 0} | arguments)
    )


def test_scenes_are_read_with_their_labelled_points_and_masks(root):
    data = module(root, augment=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["points"].shape[1] == 9
    assert batch["points_per_sample"].sum() == len(batch["points"])
    assert (batch["labels"] != 255).sum() == 40
    assert (batch["labels"] == batch["truth"])[batch["labels"] != 255].all()
    for index in range(2):
        scene = data.training_scene(index)
        assert data.point_masks(index).shape == (2, len(scene.points))
        given = np.flatnonzero(data.label_store.original(index)[0] != 255)
        raw = read_scene(root / "train" / scene.name, scene.name, "segment20", 20)
        wanted = np.unique(read_labelled_points(root / "points20.json")[scene.name])
        assert sorted(map(tuple, scene.points[given, :3])) == sorted(map(tuple, raw.points[wanted, :3])), "the very points of the list"
    shares = module(root, labelled=None, labelled_share=0.1, voxel_size=0.5)
    shares.setup("fit")
    assert (shares.label_store.original(0)[0] != 255).sum() == round(0.1 * len(shares.training_scene(0).points))
    data.setup("predict")
    whole = data.predict_set[0]
    assert len(whole["points"]) == len(np.load(root / "test" / "scene0707_00" / "coord.npy"))
    path = data.write_labels("scene0707_00", torch.tensor([0, 19]), root / "out")
    assert path.read_text() == "1\n39\n"


def test_masks_lifted_from_both_kinds_of_frames_are_those_of_the_rooms(root):
    for name in (FIRST, SECOND):
        frames = open_frames(root / "frames", name)
        assert len(frames.names) == 2
        points = np.load(root / "train" / name / "coord.npy")
        found = lift_scene(
            points, frames, frames.names, lambda view, shape, name=name: read_masks(root / "masks" / name / f"{view}.png", shape)
        )
        wanted = read_lifted(root / "lifted" / f"{name}.npz", len(points))
        assert (found == wanted).mean() > 0.97, "depths were rounded to millimetres"
        assert (found >= 0).mean() > 0.2
        assert frames.picture(frames.names[0]).size == (80, 60)
    assert chosen_views([str(k) for k in range(100)], 10, 3) == ["0", "40", "90"]


def test_s3dis_is_tested_on_one_area(tmp_path):
    s3dis(tmp_path, points=200)
    data = S3DISDataModule(tmp_path, labelled_share=0.05, batch_size=2, num_workers=0)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (10, 2)
    assert data.train_set[0]["token"] == "Area_1-conferenceRoom_1"
    assert data.point_masks(0).shape[0] == 1
    filed = S3DISDataModule(tmp_path, labelled_share=0.05, mask_source="files", voxel_size=1e-4)
    filed.setup("fit")
    assert np.array_equal(filed.point_masks(1), read_lifted(tmp_path / "lifted" / "Area_1-office_1.npz", 200))
    full = S3DISDataModule(tmp_path, supervision="full", voxel_size=1e-4)
    full.setup("fit")
    assert (full.label_store.original(0)[0] != 255).all()


def test_nothing_in_a_list_of_points_is_run(root):
    class Bad:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"scene": Bad()}, root / "bad")
    with pytest.raises(BrokenRecordError, match=r"bad: labelled points: can't be read .*print"):
        read_labelled_points(root / "bad")
    (root / "old").write_bytes(pickle.dumps({"scene": [1]}))
    with pytest.raises(BrokenRecordError, match=r"old: labelled points.*torch 1\.6"):
        read_labelled_points(root / "old")


# ---- ten kinds of bad input --------------------------------------------------------------------------------------------------------------


def lifted(root, name=SECOND):
    frames = open_frames(root / "frames", name)
    points = np.load(root / "train" / name / "coord.npy")
    return lift_scene(points, frames, frames.names, lambda view, shape: read_masks(root / "masks" / name / f"{view}.png", shape))


def _depth_in_metres(root):
    path = root / "frames" / SECOND / "depth" / "20.png"
    Image.fromarray((np.asarray(Image.open(path)) // 1000).astype(np.uint16)).save(path)


def _pose_with_scale(root):
    path = root / "frames" / SECOND / "pose" / "20.txt"
    pose = np.loadtxt(path)
    pose[:3, :3] *= 1.5
    np.savetxt(path, pose)


def _pose_lost(root):
    np.savetxt(root / "frames" / SECOND / "pose" / "20.txt", np.full((4, 4), -np.inf))


def _pose_with_words(root):
    (root / "frames" / SECOND / "pose" / "20.txt").write_text("1 0 0\n")


def _no_pose(root):
    (root / "frames" / SECOND / "pose" / "20.txt").unlink()


def _small_mask(root):
    path = root / "masks" / SECOND / "20.png"
    Image.fromarray(np.asarray(Image.open(path))[:30]).save(path)


def _no_mask(root):
    (root / "masks" / SECOND / "20.png").unlink()


def _intrinsic_of_nothing(root):
    np.savetxt(root / "frames" / SECOND / "intrinsic" / "intrinsic_depth.txt", np.zeros((4, 4)))


def _empty_depth(root):
    path = root / "frames" / SECOND / "depth" / "20.png"
    Image.fromarray(np.zeros((60, 80), np.uint16)).save(path)


def _truncated_depth(root):
    path = root / "frames" / SECOND / "depth" / "20.png"
    path.write_bytes(path.read_bytes()[:90])


@pytest.mark.parametrize(
    ("damage", "file", "field"),
    [
        (_depth_in_metres, "depth/20.png", r"depth: the median depth is 0\.00\d+ m.*millimetres"),
        (_pose_with_scale, "pose/20.txt", r"pose: it isn't rigid .*determinant 3\.38"),
        (_pose_lost, "pose/20.txt", "pose: it isn't finite: the camera was lost"),
        (_pose_with_words, "pose/20.txt", "pose: expected 4 lines of 4 numbers"),
        (_no_pose, "pose/20.txt", "pose: no such file"),
        (_small_mask, "20.png", "masks: 30 x 80 pixels, and the depth image has 60 x 80"),
        (_no_mask, "20.png", "masks: no such file.*lit lift"),
        (_intrinsic_of_nothing, "intrinsic_depth.txt", "intrinsic: focal lengths 0 and 0"),
        (_empty_depth, "depth/20.png", "depth: no pixel has a depth"),
        (_truncated_depth, "depth/20.png", "depth: can't be decoded"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_frame_that_cant_be_right_is_named(root, damage, file, field):
    damage(root)
    with pytest.raises(BrokenRecordError, match=f"{file}: {field}"):
        lifted(root)


def _array(name, change):
    def damage(root):
        path = root / "train" / FIRST / f"{name}.npy"
        np.save(path, change(np.load(path)))

    damage.__name__ = name
    return damage


def _listed(change):
    def damage(root):
        path = root / "points20"
        lists = dict(read_labelled_points(path))
        change(lists)
        torch.save(lists, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _array("segment20", lambda a: np.where(np.arange(len(a)) == 3, 77, a)),
            r"segment20\.npy: segment20: has the class 77, .* 0 to 19",
        ),
        (_array("segment20", lambda a: a[:-1]), r"segment20\.npy: segment20: has the shape \(399,\)"),
        (_array("segment20", lambda a: a + 0.5), r"segment20\.npy: segment20: .*"),
        (_array("coord", lambda a: np.where(np.arange(3) == 1, np.nan, a)), r"coord\.npy: coord: value \[0, 1\] is nan"),
        (_array("coord", lambda a: 1000 * a), r"coord\.npy: coord: the scene is .* long, expected metres"),
        (_array("coord", lambda a: a[:0]), r"color\.npy: color|coord\.npy: coord: no points"),
        (_array("color", lambda a: a / 255), r"color\.npy: color: from .* expected 0 to 255"),
        (_array("color", lambda a: a[:, :2]), r"color\.npy: color: has the shape \(400, 2\), expected \(points, 3\)"),
        (_array("normal", lambda a: np.array(["x"] * len(a))), r"normal\.npy: normal: holds"),
        (_listed(lambda lists: lists.update({FIRST: [5, 4000]})), r"points20: labelled points of scene0000_00: rows 5 to 4000"),
        (_listed(lambda lists: lists.pop(FIRST)), r"points20: labelled points: no entry for scene0000_00"),
        (lambda root: (root / "train" / FIRST / "normal.npy").unlink(), r"normal\.npy: normal: no such file"),
    ],
)
def test_a_scene_that_cant_be_right_is_named(root, damage, message):
    damage(root)
    with pytest.raises(BrokenRecordError, match=message):
        module(root).setup("fit")


def test_masks_and_roots_that_cant_be_right(root, tmp_path):
    data = module(root)
    data.setup("fit")
    np.savez(root / "lifted" / f"{FIRST}.npz", mask_ids=np.zeros((2, 7), dtype=np.int64))
    with pytest.raises(BrokenRecordError, match=r"mask_ids: has the shape \(2, 7\), expected \(views, 400\)"):
        data.point_masks(0)
    with pytest.raises(MissingFileError, match="make it by lit lift"):
        _with(module(root, masks=tmp_path / "nowhere"))
    with pytest.raises(WrongRootError, match="has no scenes in train"):
        module(root / "train").setup("fit")
    path = root / "frames" / f"{FIRST}.sens"
    content = path.read_bytes()
    for damaged, message in (
        (content[:-40], "frame 1: truncated"),
        (b"\x05" + content[1:], "version: 5, expected 4"),
        (content[:60], "header: truncated"),
        (content[:272] + b"\x07" + content[273:], "compression"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(BrokenRecordError, match=message):
            open_frames(root / "frames", FIRST)
    with pytest.raises(MissingFileError, match=r"neither this folder nor nowhere\.sens"):
        open_frames(root / "frames", "nowhere")


def _with(data):
    data.setup("fit")
    return data.point_masks(0)
