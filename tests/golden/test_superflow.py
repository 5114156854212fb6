"""SuperFlow++ against the authors' code; see tests/golden/data/superflow/README.md for the origin of each kind."""

import numpy as np
import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.lidar.superflow import core

POSES = (
    "lidar2ego_rotation",
    "lidar2ego_translation",
    "ego2global_rotation",
    "ego2global_translation",
    "cam_sensor2ego_rotation",
    "cam_sensor2ego_translation",
    "cam_ego2global_rotation",
    "cam_ego2global_translation",
    "cam_intrinsic",
)


def infonce(case: GoldenCase) -> dict[str, Tensor]:
    k, q = case.tensor("in_k").requires_grad_(), case.tensor("in_q").requires_grad_()
    loss = core.info_nce(k, q, case.hp("temperature"))
    grad_k, grad_q = torch.autograd.grad(loss, (k, q))
    return {"out_loss": loss, "out_grad_k": grad_k, "out_grad_q": grad_q}


def loss(case: GoldenCase) -> dict[str, Tensor]:
    batch, cameras, size = case.hp("batch_size"), case.hp("num_cameras"), case.hp("superpixel_size")
    leaves, views = {}, {}
    for view in ("cur", "prev", "next", "sweep"):
        get = {key.removeprefix(f"in_{view}_"): case.tensor(key) for key in case.arrays if key.startswith(f"in_{view}_")}
        voxels = leaves[f"{view}_voxel_features"] = get["voxel_features"].requires_grad_()
        if view != "sweep":
            images = leaves[f"{view}_image_features"] = get["image_features"].requires_grad_()
            superpixels = get["superpixels"].view(batch, cameras, *get["superpixels"].shape[1:])
            groups = core.superpixel_groups(superpixels, size)
        else:
            groups = core.superpixel_groups(case.tensor("in_cur_superpixels").view(superpixels.shape), size)
        point2voxel = core.to_batch_rows(get["point2voxel"], get["points_per_sample"], get["voxels_per_sample"])
        pair = core.Pairs(get["pairing_points"], get["pairing_images"], get["pairs_per_sample"])
        pair_voxel, pair_group = core.look_up_pairs(pair, point2voxel, get["points_per_sample"], groups)
        points, counts = core.pool_points(voxels, pair_voxel, pair_group, batch * size)
        pixels = core.pool_pixels(images, groups, batch * size) if view != "sweep" else None
        views[view] = core.PooledView(points, counts > 0, pixels)
    losses = core.superflow_losses(views["cur"], [views["prev"], views["next"]], views["sweep"], temperature=case.hp("temperature"))
    grads = torch.autograd.grad(losses["total"], list(leaves.values()))
    return {f"out_loss_{name}": value for name, value in losses.items()} | {f"out_grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def voxelize(case: GoldenCase) -> dict[str, Tensor]:
    points = case.tensor("in_points")
    sample = torch.full((points.shape[0],), case.hp("batch_index"))
    voxels = core.voxelize(points, sample, case.tensor("in_voxel_size"), case.hp("voxel_type"))
    return {
        "out_voxel_features": voxels.features,
        "out_voxel_coords": voxels.coords,
        "out_point2voxel": voxels.point2voxel,
        "out_voxel_first_index": voxels.first_point,
    }


def project(case: GoldenCase) -> dict[str, Tensor]:
    poses = [case.tensor(f"in_{name}") for name in POSES]
    size = case.hp("image_height"), case.hp("image_width")
    rows, pixels = core.project_points(case.tensor("in_points"), *poses, *size, min_dist=case.hp("min_dist"))
    return {"out_pairing_points": rows, "out_pairing_images": pixels}


def compare_project(case: GoldenCase, key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    """Exact; with general poses +-1 px where the coordinate (here from one float64 chain of matrices) is within 1e-3 of k + .5."""
    assert ours.shape == reference.shape
    wrong = ours != reference
    if key == "out_pairing_points" or not wrong.any():
        assert not wrong.any(), f"{key}: {wrong.sum()} entries differ"
        return
    a = case.arrays
    general = any((~np.isin(np.abs(a[f"in_{name}"]), (0, 1))).any() for name in POSES if name.endswith("rotation"))
    assert general, f"{key}: {wrong.sum()} entries differ, and axis-aligned poses leave no room for rounding"
    assert not wrong[:, 0].any(), "cameras differ"
    assert np.abs(ours - reference).max() <= 1
    camera, xyz = reference[:, 0], a["in_points"][case.expected["out_pairing_points"], :3].astype(np.float64)
    world = (xyz @ a["in_lidar2ego_rotation"].T + a["in_lidar2ego_translation"]) @ a["in_ego2global_rotation"].T + a[
        "in_ego2global_translation"
    ]
    ego = np.einsum("nj,njk->nk", world - a["in_cam_ego2global_translation"][camera], a["in_cam_ego2global_rotation"][camera])
    seen = np.einsum("nj,njk->nk", ego - a["in_cam_sensor2ego_translation"][camera], a["in_cam_sensor2ego_rotation"][camera])
    image = np.einsum("nkj,nj->nk", a["in_cam_intrinsic"][camera], seen)
    row_col = (image[:, :2] / image[:, 2:])[:, ::-1]
    near_tie = np.abs(row_col - np.floor(row_col) - 0.5) < 1e-3
    assert near_tie[wrong[:, 1:]].all(), "pixels differ away from a rounding tie"


def pairs_resize_flip(case: GoldenCase) -> dict[str, Tensor]:
    superpixels, size = case.tensor("in_superpixels"), (case.hp("out_height"), case.hp("out_width"))
    pairs = core.resize_pairs(case.tensor("in_pairing_images"), tuple(superpixels.shape[1:]), size)
    resized = core.resize_superpixels(superpixels, size)
    flipped_pairs, flipped, _ = core.flip_cameras(case.tensor("in_flip_camera"), pairs, resized)
    return {
        "out_pairing_points": case.tensor("in_pairing_points"),
        "out_resized_pairing_images": pairs,
        "out_resized_superpixels": resized,
        "out_flipped_pairing_images": flipped_pairs,
        "out_flipped_superpixels": flipped,
    }


def sweeps(case: GoldenCase) -> dict[str, Tensor]:
    number = case.hp("sweeps_num")
    clouds = case.tensor("in_sweeps").split(case.arrays["in_sweep_sizes"].tolist())
    return {"out_sweep_points": core.dense_cloud(case.tensor("in_points"), clouds[:number], case.tensor("in_lidar2sensor")[:number])}


def seg_loss(case: GoldenCase) -> dict[str, Tensor]:
    logits = case.tensor("in_logits").requires_grad_()
    losses = core.segmentation_losses(logits, case.tensor("in_labels"), case.hp("ignore_index"), case.hp("lovasz_weight"))
    (grad,) = torch.autograd.grad(losses["total"], logits)
    return {"out_loss_ce": losses["ce"], "out_loss_lovasz": losses["lovasz"], "out_grad_logits": grad}


def temporal_vote(case: GoldenCase, mode: str = "soft") -> dict[str, Tensor]:
    vote = core.temporal_vote(
        *(case.tensor(f"in_{name}") for name in ("points", "frame", "frame_to_current", "probs")),
        **{name: case.hp(name) for name in ("current_frame", "voxel_size", "min_frames", "confidence_threshold", "ignore_index")},
        mode=mode,
    )
    return {"out_labels": vote.labels, "out_confidence": vote.confidence, "out_num_frames": vote.num_frames}


test_golden = golden_test(
    "superflow",
    {
        "infonce": Kind(infonce, rtol=1e-6, atol=1e-9),
        "loss": Kind(loss, rtol=1e-5, overrides={"out_grad": (1e-5, 1e-7)}),
        "voxelize": Kind(voxelize, rtol=0, atol=0),
        "project": Kind(project, compare=compare_project),
        "pairs_resize_flip": Kind(pairs_resize_flip),
        "sweeps": Kind(sweeps, rtol=1e-6, atol=1e-5),
        "seg_loss": Kind(seg_loss, rtol=1e-5, overrides={"out_grad": (1e-5, 1e-7)}),
        "temporal_vote": Kind(temporal_vote, rtol=1e-6),
        "temporal_vote_hard": Kind(lambda case: temporal_vote(case, "hard"), rtol=1e-6),
    },
)
