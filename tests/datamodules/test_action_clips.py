"""Clips of actions: which frames, whole videos, decoding, the three releases with what may be wrong in them, moving shapes."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import (
    JHMDBActionsDataModule,
    MovingShapesDataModule,
    UCF101ActionsDataModule,
    YouTubeVOSDataModule,
)
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.fake import write_fake
from lit_methods.datamodules.video.clips import clip_around, clips_of_all, drawn_share, filled_boxes
from lit_methods.datamodules.video.moving_shapes import shape_masks
from lit_methods.datamodules.video.ucf101 import BoxTube, interpolated, read_annotation_pickle, read_tubes
from lit_methods.video.video_action_detection.metrics import Tube, frame_map, video_map
from lit_methods.video.video_action_detection.pictures import outline

SMALL = {"image_size": (16, 24), "resize": None, "batch_size": 2, "eval_batch_size": 2}
REAL = os.environ.get("LIT_METHODS_TEST_DATA")
real_data = pytest.mark.skipif(REAL is None, reason="LIT_METHODS_TEST_DATA names no folder of real data")


@pytest.fixture
def decoding():
    pytest.importorskip("av", reason="PyAV, which reads videos")
    from lit_methods.datamodules.video import decoding

    return decoding


# ---- frames ----------------------------------------------------------------------------------------------------------------------------


def test_clips_lie_around_their_frame_and_inside_the_video():
    assert clip_around(50, 100, 8, 2).tolist() == list(range(42, 58, 2))
    assert clip_around(5, 100, 8, 2).tolist() == list(range(1, 9)), "every frame near the beginning"
    assert clip_around(1, 100, 8, 2).tolist() == list(range(8))
    assert clip_around(98, 100, 8, 2).tolist() == list(range(84, 100, 2))
    assert clip_around(3, 5, 8, 2).tolist() == [0, 1, 2, 3, 4, 4, 4, 4], "the last frame again"
    for length in (1, 7, 8, 16, 17, 40):
        seen = np.concatenate(clips_of_all(length, 8, 2))
        assert sorted(seen[seen >= 0].tolist()) == list(range(length)), "each frame once"


def test_boxes_are_filled_and_bad_ones_named():
    masks = filled_boxes([np.array([[1.0, 2, 3, 2]]), np.zeros((0, 4))], 6, 8, "file", "boxes")
    assert masks.sum(axis=(1, 2)).tolist() == [6, 0]
    assert masks[0, 2:4, 1:4].all()
    assert filled_boxes([np.array([[-1.0, 0, 4, 7]])], 6, 8, "file", "boxes").sum() == 18, "a pixel may stick out"
    for box, said in (([7, 2, 3, 2], "outside the image of 8 x 6"), ([0, 0, 0, 3], "no area"), ([0, np.nan, 2, 3], "no area")):
        with pytest.raises(BrokenRecordError, match=f"boxes: the box .*{said}"):
            filled_boxes([np.array([box], dtype=float)], 6, 8, "file", "boxes")


def test_boxes_between_annotated_frames_are_linear():
    boxes = np.array([[0, 0, 2, 2], [9, 9, 9, 9], [4, 2, 2, 4], [9, 9, 9, 9]], dtype=float)
    found = interpolated(BoxTube(10, boxes, np.array([10, 12]), 0))
    assert found.tolist() == [[0, 0, 2, 2], [2, 1, 2, 3], [4, 2, 2, 4], [4, 2, 2, 4]]
    assert interpolated(BoxTube(10, boxes, np.array([50]), 0)) is boxes


def test_the_same_share_of_each_class_is_labelled():
    labels = [0] * 10 + [1] * 5
    chosen = np.array(drawn_share([""] * 15, labels, 0.2, 0))
    assert (chosen[:10].sum(), chosen[10:].sum()) == (2, 1)
    assert drawn_share([""] * 15, labels, 0.2, 0) == chosen.tolist() != drawn_share([""] * 15, labels, 0.2, 1)


# ---- decoding --------------------------------------------------------------------------------------------------------------------------


def test_a_number_means_the_same_frame_in_every_container(decoding, tmp_path):
    frames = np.stack([np.full((16, 32, 3), 8 * number, np.uint8) for number in range(30)])
    for ending in ("avi", "mp4", "mkv"):
        path = tmp_path / f"video.{ending}"
        decoding.write_video(path, frames)
        assert decoding.frame_count(path) == 30
        found = decoding.read_frames(path, np.array([29, 3, 3, 17])).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(found, [232, 24, 24, 136], atol=4)


@real_data
def test_real_videos_are_read_by_frame(decoding):
    folder = Path(REAL or "") / "video_clips"
    for name, count, size in (
        ("demo.mp4", 280, (256, 340)), ("demo_spatiotemporal_det.mp4", 57, (256, 340)), ("flipping_a_pancake.mkv", 310, (240, 426)),
    ):  # fmt: skip
        path = folder / name
        assert decoding.frame_count(path) == count
        several = decoding.read_frames(path, np.array([12, 5, 40]))
        assert several.shape == (3, *size, 3)
        for place, number in enumerate((12, 5, 40)):
            assert np.array_equal(several[place], decoding.read_frames(path, np.array([number]))[0]), "the same alone as among others"
        assert not np.array_equal(several[0], several[2])


@real_data
def test_broken_copies_of_a_real_video_are_named(decoding, tmp_path):
    folder = Path(REAL or "") / "video_clips"
    for name in ("demo.mp4", "flipping_a_pancake.mkv"):
        content = (folder / name).read_bytes()
        path = tmp_path / name
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(BrokenRecordError, match=rf"{name}.*truncated"):
            decoding.read_frames(path, np.array([270]))


def test_what_is_no_video_is_named(decoding, tmp_path):
    frames = np.zeros((10, 16, 16, 3), np.uint8)
    good = tmp_path / "good.avi"
    decoding.write_video(good, frames)
    with pytest.raises(BrokenRecordError, match=r"good.avi: video: has 10 frames, and frame 12 \(from 0\)"):
        decoding.read_frames(good, np.array([2, 12]))
    with pytest.raises(MissingFileError, match=r"none\.avi"):
        decoding.frame_count(tmp_path / "none.avi")
    for name, content in (
        ("empty.avi", b""), ("text.avi", b"no video"), ("list.avi", f"#EXTM3U\n#EXTINF:1,\n{good}\n".encode()),
        ("concat.avi", f"ffconcat version 1.0\nfile '{good}'\n".encode()), ("cut.avi", good.read_bytes()[:300]),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        for read in (decoding.frame_count, lambda file: decoding.read_frames(file, np.array([0]))):
            with pytest.raises(BrokenRecordError, match=name):
                read(path)


# ---- releases --------------------------------------------------------------------------------------------------------------------------


def made(kind, root, **options):
    if kind is UCF101ActionsDataModule:
        pytest.importorskip("av", reason="PyAV, which writes and reads videos")
    return kind(**write_fake(kind, root, **(SMALL | options)), **(SMALL | options))


KINDS = [
    (UCF101ActionsDataModule, {}),
    (UCF101ActionsDataModule, {"annotations": "tubes", "labelled_share": 0.4}),
    (JHMDBActionsDataModule, {}),
    (YouTubeVOSDataModule, {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_masks_lie_on_what_moves(kind, options, tmp_path):
    """The square of the tiny releases has one colour, and nothing else has it: the mask is where it is."""
    data = made(kind, tmp_path, **options)
    data.setup("fit")
    data.setup("test")
    batch, *_ = next(iter(data.train_dataloader()))
    assert set(batch["unlabelled"]) == {"clip", "index"}
    assert batch["labelled"]["clip"].shape == batch["unlabelled"]["clip"].shape == (2, 3, 8, 16, 24)
    sample = data.test_set[0]
    clip, mask = sample["clip"], sample["mask"][0] > 0
    padded = clip.sum(dim=(0, 2, 3)) == 0
    assert mask[~padded].sum(dim=(1, 2)).eq(144).all()
    inside = mask & ~outline(mask)  # films and JPEG blur colours over edges
    colours = torch.stack([clip[:, t][:, inside[t]].std(dim=1).max() for t in range(8) if not padded[t]])
    assert colours.max() < 0.08, "one colour inside the mask"
    assert len(data.val_set) == len(data.read("val"))
    assert len(data.test_set) > len(data.val_set)
    frames = sum(int((sample["mask"].sum(dim=(0, 2, 3)) > 0).sum()) for sample in (data.test_set[i] for i in range(len(data.test_set))))
    assert frames == 20 * len(data.val_set), "each annotated frame once"
    first, again = data.train_set.at(1, 0), data.train_set.at(1, 0)
    assert torch.equal(first["clip"], again["clip"])


def test_no_root_and_no_release(tmp_path):
    for kind in (UCF101ActionsDataModule, JHMDBActionsDataModule, YouTubeVOSDataModule):
        with pytest.raises(WrongRootError, match="no built-in sample"):
            kind().setup("fit")
        with pytest.raises(WrongRootError, match="has no"):
            kind(tmp_path).setup("fit")
    for options, said in (({"image_size": (0, 4)}, "image_size"), ({"on_broken": "drop"}, "on_broken"), ({"frames": 0}, "frames is 0")):
        with pytest.raises(ValueError, match=said):
            JHMDBActionsDataModule(tmp_path, **options)


def read_every_clip(data):
    for stage in ("fit", "test"):
        data.setup(stage)
    for dataset in (data.train_set, data.unlabelled_set, data.test_set):
        for index in range(len(dataset)):
            dataset[index]


def _edit(path, change):
    entries = pickle.loads(path.read_bytes())  # the test's own file
    path.write_bytes(pickle.dumps(change(entries), protocol=2))


def _first_tube(entries, **changes):
    (name, [tube, *_]), *others = entries
    parts = dict(zip(("start", "end", "label", "boxes", "annotated", "flag"), tube, strict=True)) | changes
    return [(changes.get("name", name), [tuple(parts[key] for key in ("start", "end", "label", "boxes", "annotated", "flag"))]), *others]


class Runs:
    """What a pickle must not bring in."""


LIST = "train_annots_20_labeled.pkl"
UCF = {
    "video is missing": (lambda root: next(root.rglob("*labelled_c01.avi")).unlink(), r"labelled_c01.avi: video: no such file"),
    "video is truncated": (
        lambda root: [p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]) for p in root.rglob("*.avi")],
        r"\.avi: video: .*truncated",
    ),
    "video is another file": (lambda root: [p.write_bytes(b"x" * 5000) for p in root.rglob("*test_c01.avi")], r"test_c01.avi: video"),
    "box outside the image": (
        lambda root: _edit(root / LIST, lambda e: _first_tube(e, boxes=[[90, 2, 5, 5]] * 20)),
        r"labeled.pkl: boxes of .*outside the image of 24 x 16",
    ),
    "box without area": (lambda root: _edit(root / LIST, lambda e: _first_tube(e, boxes=[[1, 2, 0, 5]] * 20)), "no area"),
    "boxes for other frames": (lambda root: _edit(root / LIST, lambda e: _first_tube(e, end=7)), "20 boxes for the frames 0 to 7"),
    "unknown class": (lambda root: _edit(root / LIST, lambda e: _first_tube(e, label=24)), "class: is 24, expected 0 to 23"),
    "frames behind the end": (
        lambda root: _edit(root / LIST, lambda e: _first_tube(e, start=40, end=59, annotated=[44])),
        r"has 20 frames, and train_annots_20_labeled.pkl has a box in frame 59",
    ),
    "annotated frames behind the end": (
        lambda root: _edit(root / LIST, lambda e: _first_tube(e, annotated=[25])),
        "annotated frames of .* all lie behind the end of its 20 frames",
    ),
    "class is a fraction": (lambda root: _edit(root / LIST, lambda e: _first_tube(e, label=2.5)), "class: expected whole numbers"),
    "list is truncated": (lambda root: (root / LIST).write_bytes((root / LIST).read_bytes()[:60]), "labeled.pkl: annotations"),
    "list holds code": (lambda root: (root / LIST).write_bytes(pickle.dumps([("a/b", Runs())])), "no list of annotations needs|kinds that"),
    "name leads elsewhere": (lambda root: _edit(root / LIST, lambda e: [("../x", e[0][1])]), "video 0"),
    "video stands twice": (lambda root: _edit(root / LIST, lambda e: [e[0], e[0]]), "stands twice"),
}


@pytest.mark.parametrize("case", UCF)
def test_ucf101_names_what_is_wrong(case, tmp_path):
    data = made(UCF101ActionsDataModule, tmp_path)
    UCF[case][0](tmp_path)
    with pytest.raises(BrokenRecordError, match=UCF[case][1]):
        read_every_clip(data)


def _mask(root, change):
    from scipy.io import loadmat, savemat

    path = root / "puppet_mask" / "catch" / "labelled_0" / "puppet_mask.mat"
    savemat(path, {"part_mask": change(loadmat(str(path))["part_mask"])})


def _lines(path, change):
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


NAMES = "jhmdb_classes_list_per_20_labeled.txt"
JHMDB = {
    "frame is missing": (lambda root: [p.unlink() for p in root.rglob("00007.png")], "00007.png: frame: no such file, but there are later"),
    "all frames are missing": (lambda root: [shutil.rmtree(p) for p in root.glob("Rename_Images/*/labelled_0")], "frames: no images"),
    "frame is truncated": (lambda root: [p.write_bytes(p.read_bytes()[:60]) for p in root.rglob("00003.png")], "00003.png: frame"),
    "frame of another size": (
        lambda root: [Image.new("RGB", (8, 8)).save(p) for p in root.rglob("00004.png")],
        "00004.png: frame: frames of .* pixels in one video",
    ),
    "frame without a number": (lambda root: [p.rename(p.with_name("first.png")) for p in root.rglob("00001.png")], "are no numbers"),
    "mask is missing": (lambda root: [p.unlink() for p in root.rglob("puppet_mask.mat")], "puppet_mask.mat: masks: no such file"),
    "mask is truncated": (
        lambda root: [p.write_bytes(p.read_bytes()[:100]) for p in root.rglob("puppet_mask.mat")],
        "puppet_mask.mat: masks",
    ),
    "mask of the wrong size": (lambda root: _mask(root, lambda m: m[:8]), r"part_mask: is \(8, 24, 20\), expected \(16, 24, 20\)"),
    "mask of fewer frames": (lambda root: _mask(root, lambda m: m[:, :, :5]), r"is \(16, 24, 5\)"),
    "unknown class": (lambda root: _lines(root / NAMES, lambda lines: ["dance/a", *lines]), "line 1: is 'dance/a'"),
    "name leads elsewhere": (lambda root: _lines(root / NAMES, lambda lines: ["catch/../x", *lines]), "line 1"),
    "video stands twice": (lambda root: _lines(root / NAMES, lambda lines: lines * 2), "stands twice"),
}


@pytest.mark.parametrize("case", JHMDB)
def test_jhmdb_names_what_is_wrong(case, tmp_path):
    data = made(JHMDBActionsDataModule, tmp_path)
    JHMDB[case][0](tmp_path)
    with pytest.raises(BrokenRecordError, match=JHMDB[case][1]):
        read_every_clip(data)


def _meta(root, change):
    path = root / "train" / "meta.json"
    stored = json.loads(path.read_text())
    change(stored["videos"])
    path.write_text(json.dumps(stored))


def _object(videos):
    return next(iter(videos.values()))["objects"]["1"]


VOS = {
    "frame is missing": (lambda root: [p.unlink() for p in root.rglob("00015.jpg")], "00015.jpg: frame: no such file"),
    "frame is truncated": (lambda root: [p.write_bytes(p.read_bytes()[:40]) for p in root.rglob("00015.jpg")], "00015.jpg: frame"),
    "mask is missing": (lambda root: [p.unlink() for p in root.rglob("00020.png")], "00020.png: mask: no such file"),
    "mask of the wrong size": (
        lambda root: [Image.new("P", (8, 8)).save(p) for p in root.rglob("00020.png")],
        "00020.png: mask: has 8 x 8 pixels, and its frame 24 x 16",
    ),
    "mask in colours": (lambda root: [Image.new("RGB", (24, 16)).save(p) for p in root.rglob("00020.png")], "00020.png: mask"),
    "meta is truncated": (lambda root: (root / "train/meta.json").write_text('{"videos": {"a": '), "meta.json: videos"),
    "meta of another form": (lambda root: (root / "train/meta.json").write_text("[1, 2]"), "meta.json: videos: isn't there"),
    "video without objects": (lambda root: _meta(root, lambda v: v.update({"b": {"objects": {}}})), "b: has no objects"),
    "object without category": (lambda root: _meta(root, lambda v: _object(v).pop("category")), "no number from 1 to 255 and category"),
    "frames don't rise": (lambda root: _meta(root, lambda v: _object(v)["frames"].reverse()), "frames: don't rise"),
    "name leads elsewhere": (lambda root: _meta(root, lambda v: v.update({"../x": v[next(iter(v))]})), "meta.json: videos"),
}


@pytest.mark.parametrize("case", VOS)
def test_youtube_vos_names_what_is_wrong(case, tmp_path):
    data = made(YouTubeVOSDataModule, tmp_path)
    VOS[case][0](tmp_path)
    with pytest.raises(BrokenRecordError, match=VOS[case][1]):
        read_every_clip(data)


def test_broken_videos_are_skipped_and_counted(tmp_path):
    data = made(JHMDBActionsDataModule, tmp_path, on_broken="skip")
    for name in ("brush_hair/unlabelled_0", "catch/test_0"):
        (tmp_path / "puppet_mask" / name / "puppet_mask.mat").unlink()
        (tmp_path / "Rename_Images" / name / "00009.png").unlink()
    with pytest.warns(UserWarning, match="broken and left out"):
        data.setup("fit")
    with pytest.warns(UserWarning, match="broken and left out"):
        data.setup("test")
    assert data.unlabelled_set is not None
    with pytest.warns(UserWarning, match=r"skipped, the next one takes its place: .*00009\.png"):
        found = [data.unlabelled_set[index]["index"] for index in range(len(data.unlabelled_set))]
    assert found == [1, 1, 2, 3]
    assert data.unlabelled_set.num_skipped == 1
    assert (len(data.val_set), data.val_set.num_skipped) == (1, 1)
    assert {data.test_set[index]["label"] for index in range(len(data.test_set))} == {0}


def test_a_crop_that_is_too_large_says_so(tmp_path):
    data = made(JHMDBActionsDataModule, tmp_path)
    large = JHMDBActionsDataModule(tmp_path, image_size=(224, 224), resize=None)
    large.setup("fit")
    with pytest.raises(BrokenRecordError, match="are cut out: give resize"):
        large.train_set[0]
    data = JHMDBActionsDataModule(tmp_path, image_size=(32, 40), resize=(32, 48))
    data.setup("fit")
    assert data.train_set[0]["mask"].shape == (1, 8, 32, 40)
    assert set(data.train_set[0]["mask"].unique().tolist()) == {0, 1}


# ---- real annotations ------------------------------------------------------------------------------------------------------------------


def shifted(tubes, pixels):
    moved = np.array([pixels, pixels, pixels, pixels], dtype=float)
    return [Tube(tube.video, tube.label, tube.frames, tube.boxes + moved, tube.score) for tube in tubes]


def falls_with_the_shift(truth):
    assert frame_map(truth, truth) == video_map(truth, truth) == 1
    frames = [frame_map(shifted(truth, pixels), truth, 0.5) for pixels in (4, 16, 64)]
    videos = [video_map(shifted(truth, pixels), truth, 0.5) for pixels in (4, 16, 64)]
    assert 1 >= frames[0] > frames[1] > frames[2] >= 0
    assert 1 >= videos[0] > videos[1] > videos[2] >= 0
    assert video_map(shifted(truth, 16), truth, 0.2) > videos[1]
    other = [Tube(tube.video, (tube.label + 1) % 21, tube.frames, tube.boxes) for tube in truth]
    assert frame_map(other, truth) < 0.05, "the wrong class"


@real_data
def test_scores_on_the_real_boxes_of_jhmdb():
    stored = json.loads((Path(REAL or "") / "jhmdb_gt" / "jhmdb_split1_test_gt.json").read_text())
    assert len(stored) == 268
    truth = []
    for name, frames in stored.items():
        boxes = [[label - 1, number, *box] for number, found in frames for label, *box in found]
        columns = np.array(boxes, dtype=float)
        truth.append(Tube(name, int(columns[0, 0]), columns[:, 1].astype(np.int64), columns[:, 2:]))
    falls_with_the_shift(truth)


@real_data
def test_the_real_tubes_of_ucf101_are_read_and_score_as_they_must():
    videos = read_tubes(Path(REAL or "") / "ucf101_24_annots" / "finalAnnots.mat")
    assert len(videos) == 3194
    assert sum(len(tubes) for _, tubes in videos.values()) == 4458
    assert {tube.label for _, tubes in videos.values() for tube in tubes} == set(range(24))
    for name in list(videos)[::160]:
        count, tubes = videos[name]
        masks = filled_boxes([tube.boxes[:1] for tube in tubes], 240, 320, "finalAnnots.mat", name)
        assert masks.any(axis=(1, 2)).all()
        assert all(tube.start >= 0 and tube.frames[-1] < count for tube in tubes)
    chosen = [name for name in videos if "_g01_c0" in name and not name.endswith(("3", "5", "7"))]
    truth = [
        Tube(name, tube.label, tube.frames, np.concatenate([tube.boxes[:, :2], tube.boxes[:, :2] + tube.boxes[:, 2:]], axis=1))
        for name in chosen
        for tube in videos[name][1]
    ]
    assert {tube.label for tube in truth} == set(range(24))
    falls_with_the_shift(truth)


def test_a_pickle_without_the_last_entry_is_read_too(tmp_path):
    path = tmp_path / "list.pkl"
    path.write_bytes(pickle.dumps([("Biking/v_Biking_g01_c01", [(3, 4, np.int64(2), np.ones((2, 4)), [3])])]))
    (tube,) = read_annotation_pickle(path)["Biking/v_Biking_g01_c01"]
    assert (tube.start, tube.label, tube.annotated.tolist()) == (3, 2, [3])


# ---- moving shapes ---------------------------------------------------------------------------------------------------------------------


def test_shapes_by_hand():
    place = np.arange(-4.5, 5)
    x, y = (part[None, None] for part in np.meshgrid(place, place))
    areas = [int(shape_masks(np.array([kind]), x, y, np.array([4.0])).sum()) for kind in range(4)]
    assert areas[0] == 36, "a square of 6"
    assert areas[1] == pytest.approx(np.pi * 16, rel=0.1)
    assert 10 < areas[2] < areas[0]
    assert areas[3] == 2 * 2 * 8 - 4


def test_shapes_move_over_what_stands_still():
    data = MovingShapesDataModule(image_size=24, num_labelled=8, num_unlabelled=4, num_val=6, noise=0.0)
    data.setup("fit")
    sample = data.train_set[0]
    clip, mask = sample["clip"], sample["mask"][0] > 0
    never = ~mask.any(dim=0)
    assert clip[:, :, never].std(dim=1).max() == 0, "the background"
    assert mask.any(dim=(1, 2)).all()
    assert sorted({data.train_set[index]["label"] for index in range(8)}) == [0, 1, 2, 3]
    again = MovingShapesDataModule(image_size=24, num_labelled=8, num_unlabelled=4, num_val=6, noise=0.0, seed=1)
    again.setup("fit")
    assert torch.equal(data.val_set[2]["clip"], again.val_set[2]["clip"])
    assert not torch.equal(data.train_set[2]["clip"], again.train_set[2]["clip"])


def test_real_digits_are_held_out_and_long_videos_are_seen_whole():
    data = MovingShapesDataModule("digits", video_frames=20, stride=2, image_size=24, num_labelled=10, num_unlabelled=0, num_val=5)
    data.setup("fit")
    data.setup("test")
    assert len(data.class_names) == 10
    assert len(data.val_set) == 5
    assert len(data.test_set) == 5 * 4
    batch, *_ = next(iter(data.train_dataloader()))
    assert set(batch) == {"labelled"}
    assert 0 < batch["labelled"]["mask"].mean() < 0.3
