"""Clips for restoration: made ones, REDS and GT layouts, lists, stills, pairs to predict, the staged loader, and bad input."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import VideoRestorationDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.fake import write_fake
from lit_methods.datamodules.restoration.blind import FaceDegradation
from lit_methods.datamodules.restoration.clips import VideoPairs, moving_textures

BLUR = FaceDegradation(kernel_size=3, blur=(0.5, 0.6), downsample=(4, 4), noise=(1, 2), quality=None)


def data(root=None, **kwargs):
    return VideoRestorationDataModule(root, **{"size": 16, "eval_frames": None, "per_clip": 4, "num_eval": 2, "batch_size": 2, **kwargs})


def clip(folder: Path, frames: int = 4, size: tuple[int, int] = (32, 24)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(folder.name))
    for index in range(frames):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{index:08d}.png")


def ready(module, stage="fit"):
    module.setup(stage)
    return module


def test_made_clips_move_by_whole_pixels_and_follow_from_epoch_and_index():
    still = moving_textures(np.random.default_rng(3), 4, 20, 2, still=True)
    assert still.min() >= 0
    assert still.max() <= 1
    shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    inner = [np.abs(still[1, :, 4:8, 2:-2] - still[0, :, 4 + dy : 8 + dy, 2 + dx : 18 + dx]).max() for dy, dx in shifts]
    assert min(inner) < 1e-6
    module = ready(data())
    assert torch.equal(module.train_set[0, 1]["lq"], module.train_set.at(0, 1)["lq"])
    assert not torch.equal(module.train_set[0, 1]["lq"], module.train_set[1, 1]["lq"])
    assert torch.equal(module.val_set[0]["gt"], ready(data(seed=5)).val_set[0]["gt"])


def test_batches_follow_the_stage_and_a_resume_takes_the_next_one_of_each():
    def names(loader, count, stages):
        found, batches = [], iter(loader)
        for stage in stages[:count]:
            loader.stage = stage
            found.append(next(batches)["name"])
        return found

    stages = [0, 1, 1, 2, 0, 1]
    module = ready(data(per_clip=12))
    whole = names(module.train_dataloader(), 6, stages)
    assert [name[0][:4] for name in whole] == ["clip", "stil", "stil", "stil", "clip", "stil"]
    first = ready(data(per_clip=12)).train_dataloader()
    assert names(first, 3, stages) == whole[:3]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = ready(data(per_clip=12)).train_dataloader()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert names(second, 3, stages[3:]) == whole[3:]
    with pytest.raises(ValueError, match="is of other data"):
        second.load_state_dict({"taken": 0, "loaders": []})


def test_the_stills_begin_anew_where_they_are_fewer(tmp_path):
    clip(tmp_path / "stills", 2)
    module = ready(data(stills=tmp_path / "stills", per_clip=2))
    module.set_stage(1)
    assert len(list(module.train_dataloader())) == 1
    module = ready(data(stills=tmp_path / "stills", per_clip=2, batch_size=1, hold_out=[]))
    module.set_stage(1)
    module.still_set.per_still = 1
    assert len({batch["name"][0] for batch in module.train_dataloader()}) == 2


def test_reds_is_read_with_its_reductions(tmp_path):
    write_fake(VideoRestorationDataModule, tmp_path, size=16)
    module = ready(data(tmp_path))
    assert len(module.train_set) == 8
    sample, batch = module.val_set[0], next(iter(module.train_dataloader()))
    assert sample["gt"].shape == sample["lq"].shape == (4, 3, 24, 28)
    assert batch["lq"].shape == (2, 3, 3, 16, 16)
    assert -1 <= batch["lq"].min() < batch["lq"].max() <= 1
    low = np.asarray(Image.open(tmp_path / "val_sharp_bicubic" / "X4" / "000" / "00000000.png"), dtype=np.float32) / 127.5 - 1
    assert abs(sample["lq"][0].mean() - low.mean()) < 0.05


def test_one_folder_of_clips_with_some_held_out(tmp_path):
    for name in ("a", "bb", "ccc"):
        clip(tmp_path / "GT" / name)
    module = ready(data(tmp_path, hold_out=["bb"], degradation=BLUR, eval_size=16, eval_frames=3))
    assert {file.parent.name for files in module.train_set.clips for file in files} == {"a", "ccc"}
    assert module.val_set[0]["name"] == "bb"
    assert module.val_set[0]["lq"].shape == (3, 3, 16, 16)
    with pytest.raises(WrongRootError, match=r"hold_out has \['x'\]"):
        ready(data(tmp_path, hold_out=["x"]))
    with pytest.raises(ValueError, match="is the string"):
        data(tmp_path, hold_out="bb")


def test_lists_of_clips_and_stills(tmp_path):
    clip(tmp_path / "videos" / "one")
    clip(tmp_path / "pictures", 3)
    (tmp_path / "clips.txt").write_text("# clips\nvideos/one\n")
    (tmp_path / "stills.txt").write_text("".join(f"pictures/{n:08d}.png\n" for n in range(3)))
    module = ready(data(train_list=tmp_path / "clips.txt", stills=tmp_path / "stills.txt"))
    assert len(module.train_set.clips) == 1
    assert len(module.still_set.files) == 3
    moved = module.still_set[0]["gt"]
    assert moved.shape == (3, 3, 16, 16)


def test_predict_takes_folders_of_frames(tmp_path):
    clip(tmp_path / "in" / "a", 3, (8, 6))
    clip(tmp_path / "in" / "b", 2, (10, 6))
    module = ready(data(input=tmp_path / "in"), "predict")
    found = list(module.predict_dataloader())
    assert [batch["name"][0] for batch in found] == ["a/00000000", "a/00000001", "a/00000002", "b/00000000", "b/00000001"]
    assert found[0]["lq"].shape == (1, 2, 3, 24, 32)
    assert torch.equal(found[0]["lq"][0, 0], found[0]["lq"][0, 1])
    assert torch.equal(found[1]["lq"][0, 0], found[0]["lq"][0, 1])
    assert len(ready(data(input=tmp_path / "in" / "a"), "predict").predict_set) == 3


def test_predict_takes_a_video(tmp_path):
    av = pytest.importorskip("av", reason="the extra video isn't installed")
    assert av
    from lit_methods.restoration.dloral.module import write_video

    clip(tmp_path / "frames", 5, (32, 24))
    write_video(tmp_path / "frames", tmp_path / "clip.mp4", 25.0)
    pairs = pickle.loads(pickle.dumps(VideoPairs(tmp_path / "clip.mp4", 2)))
    assert len(pairs) == 5
    assert pairs[4]["lq"].shape == (2, 3, 48, 64)
    in_order = [pairs[index]["lq"] for index in range(5)]
    assert torch.equal(in_order[2][0], in_order[1][1])
    assert torch.equal(pairs[1]["lq"], in_order[1])  # back again
    for name, content in (("text.mp4", b"no video"), ("empty.mp4", b""), ("cut.mp4", (tmp_path / "clip.mp4").read_bytes()[:300])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenRecordError, match=name):
            VideoPairs(tmp_path / name, 2)


def read(module):
    """All of it."""
    module.setup("fit")
    return [*(module.train_set[index] for index in range(4)), module.val_set[0]]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(WrongRootError, match="holds no clips"):
        ready(data(tmp_path))
    clip(tmp_path / "GT" / "a")
    clip(tmp_path / "BIx4" / "a", size=(8, 6))
    assert ready(data(tmp_path)).val_set[0]["lq"].shape == (4, 3, 24, 32)

    def broken(change, error, match, **kwargs):
        change()
        with pytest.raises(error, match=match):
            read(data(tmp_path, **kwargs))

    last, low = tmp_path / "GT" / "a" / "00000003.png", tmp_path / "BIx4" / "a" / "00000003.png"
    content, small = last.read_bytes(), low.read_bytes()
    broken(lambda: Image.new("RGB", (30, 24)).save(last), BrokenRecordError, r"30 x 24 pixels, and 0000000\d.png .* has 32 x 24")
    broken(lambda: last.write_bytes(content[:200]), BrokenRecordError, "00000003.png")
    broken(lambda: last.write_text("no picture"), BrokenRecordError, "00000003.png")
    last.write_bytes(content)
    broken(low.unlink, MissingFileError, "no such file for a")
    broken(lambda: Image.new("RGB", (9, 6)).save(low), BrokenRecordError, "9 x 6 pixels, and")
    low.write_bytes(small)
    broken(lambda: None, BrokenRecordError, "fewer than size=40", size=40)
    broken(lambda: None, BrokenRecordError, "expected 5 or more", frames=5)
    (tmp_path / "BIx4").rename(tmp_path / "BIx2")
    broken(lambda: None, BrokenRecordError, "expected 16 x 12", scale=2)
    (tmp_path / "BIx2").rename(tmp_path / "BIx4")
    broken(lambda: None, BrokenRecordError, "fewer than eval_size=30", eval_size=30)


def test_bad_lists_and_inputs_are_named(tmp_path):
    with pytest.raises(WrongRootError, match=r"train_list=.* is no file"):
        ready(data(train_list=tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(BrokenRecordError, match="has no path"):
        ready(data(train_list=tmp_path / "empty.txt"))
    (tmp_path / "gone.txt").write_text("nowhere\n")
    with pytest.raises(BrokenRecordError, match="nowhere isn't there"):
        ready(data(train_list=tmp_path / "gone.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BrokenRecordError, match="is no text"):
        ready(data(stills=tmp_path / "binary.txt"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(WrongRootError, match=r"stills=.* holds no images"):
        ready(data(stills=tmp_path / "bare"))
    with pytest.raises(WrongRootError, match=r"input=.* holds no frames"):
        ready(data(input=tmp_path / "bare"), "predict")
    for arguments, match in (({"frames": 2}, "frames is 2"), ({"scale": 0}, "scale is 0"), ({"speed": -1}, "speed is -1")):
        with pytest.raises(ValueError, match=match):
            data(**arguments)
