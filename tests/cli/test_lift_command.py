"""``lit lift``: masks of points from files, by SAM 2 with random weights, and from geometry."""

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.cli.main import main
from lit_methods.datamodules.indoor.fake import scannet
from lit_methods.datamodules.indoor.prepared import read_lifted
from lit_methods.lidar.image_masks import distinct_masks, image_masks, sam2_network


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    """A folder with the configuration of a tiny network."""
    transformers = pytest.importorskip("transformers", "4.56")
    hiera = transformers.Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        blocks_per_stage=[1, 1, 1, 1], global_attention_blocks=[], window_size_per_stage=[8, 4, 4, 2],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=16
    )
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    folder = tmp_path_factory.mktemp("sam2")
    config.save_pretrained(folder)
    return folder


def test_masks_from_files_are_lifted_and_kept(tmp_path, capsys):
    scannet(tmp_path)
    wanted = {name: read_lifted(tmp_path / "lifted" / f"{name}.npz", 400) for name in ("scene0000_00", "scene0001_00")}
    assert main(["lift", str(tmp_path), "--out", str(tmp_path / "new")]) == 0
    assert "masks of 2 scenes, and 0 that were there" in capsys.readouterr().out
    for name, masks in wanted.items():
        assert (read_lifted(tmp_path / "new" / f"{name}.npz", 400) == masks).mean() > 0.97
    assert main(["lift", str(tmp_path), "--out", str(tmp_path / "new")]) == 0
    assert "masks of 0 scenes, and 2 that were there" in capsys.readouterr().out


def test_superpoints_need_no_frames(tmp_path):
    scannet(tmp_path)
    assert main(["lift", str(tmp_path), "--source", "geometric", "--force"]) == 0
    assert read_lifted(tmp_path / "lifted" / "scene0000_00.npz", 400).max() > 4


def test_sam2_makes_masks_which_are_kept(tmp_path, sam2):
    scannet(tmp_path)
    words = [
        "--source",
        "sam2",
        "--model",
        str(sam2),
        "--untrained",
        "--grid",
        "3",
        "--score",
        "0.4",
        "--every",
        "1",
        "--masks",
        str(tmp_path / "m"),
    ]
    torch.manual_seed(0)
    assert main(["lift", str(tmp_path), "--out", str(tmp_path / "new"), *words]) == 0
    files = sorted((tmp_path / "m" / "scene0001_00").iterdir())
    assert [file.name for file in files] == ["0.png", "20.png"]
    assert np.asarray(Image.open(files[0])).shape == (60, 80)
    assert read_lifted(tmp_path / "new" / "scene0001_00.npz", 400).shape == (2, 400)


def test_certain_and_distinct_masks_stay(sam2):
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, :2, :3], masks[2, 3], masks[3, :2] = True, True, True, True
    assert distinct_masks(masks, torch.tensor([0.5, 0.9, 0.1, 0.5]), 0.7).tolist() == [1, 2]
    assert distinct_masks(masks, torch.tensor([0.5, 0.9, 0.1, 0.5]), 0.8).tolist() == [1, 0, 2]
    network = sam2_network(str(sam2), untrained=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    none = image_masks(network, picture, (15, 20), grid=2, least_score=0.99)
    assert (none == -1).all()
    some = image_masks(network, picture, (15, 20), grid=2, least_score=0.3, least_stability=0.0, least_pixels=1, at_once=3)
    whole = image_masks(network, picture, (15, 20), grid=2, least_score=0.3, least_stability=0.0, least_pixels=1)
    assert torch.equal(some, whole)
    assert some.shape == (15, 20)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--part", "nowhere"], 2, "has no folder nowhere"),
        (["--source", "sam3"], 2, "give one of files, sam2, geometric"),
        (["--views", "0"], 2, "must be 1 or more"),
        (["--masks", "nowhere", "--force"], 1, "nowhere/scene0000_00 has no masks of a frame"),
        (["--frames", "nowhere", "--force"], 1, "neither this folder nor scene0000_00.sens is there"),
        (["--source", "sam2", "--model", "./nowhere", "--force"], 1, "neither a folder nor a name on the hub"),
        (["--depth-scale", "1", "--force"], 1, "the median depth is"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, capsys, words, status, said):
    monkeypatch.chdir(tmp_path)
    scannet(tmp_path)
    (tmp_path / "lifted" / "scene0001_00.npz").unlink()
    if "--depth-scale" in words:
        (tmp_path / "lifted" / "scene0000_00.npz").rename(tmp_path / "kept.npz")
        (tmp_path / "train" / "scene0000_00").rename(tmp_path / "other")
    assert main(["lift", ".", *words]) == status
    assert said in " ".join(capsys.readouterr().err.split())
