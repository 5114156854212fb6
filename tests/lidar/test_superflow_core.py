"""Edge cases and independent recomputations of the SuperFlow maths; the authors' numbers are in tests/golden."""

import numpy as np
import pytest
import torch

from lit_methods.lidar import contrast
from lit_methods.lidar.superflow import core


def random_views(seed=0, samples=2, cameras=2, ids=5, dim=4, size=(4, 6), pairs=20):
    generator = torch.Generator().manual_seed(seed)
    superpixels = torch.randint(ids, (samples, cameras, *size), generator=generator)
    voxels = torch.randn(samples * 30, dim, generator=generator)
    images = torch.randn(samples * cameras, dim, *size, generator=generator)
    found = core.Pairs(
        torch.randint(30, (samples * pairs,), generator=generator),
        torch.stack([torch.randint(n, (samples * pairs,), generator=generator) for n in (cameras, *size)], dim=1),
        torch.full((samples,), pairs),
    )
    return superpixels, voxels, images, found


def test_pooling_equals_a_loop_over_groups_and_pairs():
    superpixels, voxels, images, pairs = random_views()
    groups = core.superpixel_groups(superpixels, 5)
    pair_voxel, pair_group = core.look_up_pairs(pairs, torch.arange(60), torch.tensor([30, 30]), groups)
    k, counts = core.pool_points(voxels, pair_voxel, pair_group, 10)
    q = core.pool_pixels(images, groups, 10)
    unit3d, unit2d = torch.nn.functional.normalize(voxels, dim=1), torch.nn.functional.normalize(images, dim=1)
    for sample in range(2):
        for identity in range(5):
            rows = [
                unit3d[sample * 30 + pairs.points[m]]
                for m in range(sample * 20, sample * 20 + 20)
                if superpixels[sample, pairs.images[m, 0], pairs.images[m, 1], pairs.images[m, 2]] == identity
            ]
            g = sample * 5 + identity
            assert counts[g] == len(rows)
            expected = torch.stack(rows).sum(0) / (len(rows) + 1e-6) if rows else torch.zeros(4)
            torch.testing.assert_close(k[g], expected)
            chosen = superpixels[sample] == identity
            torch.testing.assert_close(q[g], unit2d[sample * 2 : sample * 2 + 2].permute(0, 2, 3, 1)[chosen].sum(0) / (chosen.sum() + 1e-6))
    assert k[counts > 1].norm(dim=1).max() < 0.999, "means must not be normalised again"


def test_without_view_consistency_every_image_has_its_own_groups():
    superpixels = torch.zeros(2, 3, 1, 1, dtype=torch.long)
    assert core.superpixel_groups(superpixels, 17).flatten().tolist() == [0, 0, 0, 17, 17, 17]
    assert core.superpixel_groups(superpixels, 17, view_consistency=False).flatten().tolist() == [0, 17, 34, 51, 68, 85]


def test_looking_up_pairs_leaves_the_batch_as_it_was():
    superpixels, _, _, pairs = random_views()
    before = [tensor.clone() for tensor in pairs]
    groups = core.superpixel_groups(superpixels, 5)
    first = core.look_up_pairs(pairs, torch.arange(60), torch.tensor([30, 30]), groups)
    second = core.look_up_pairs(pairs, torch.arange(60), torch.tensor([30, 30]), groups)
    assert all(torch.equal(a, b) for a, b in zip(before, pairs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0][20:].min() >= 30, "pairs of the second sample must point into its own voxels"


def test_info_nce_masks_rows_and_columns():
    a, b = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, True])
    expected = torch.nn.functional.cross_entropy(a[mask] @ b[mask].T / 0.2, torch.arange(4))
    torch.testing.assert_close(core.info_nce(a, b, 0.2, mask), expected)
    assert not torch.isclose(core.info_nce(a, b, 0.2), expected)
    assert not torch.isclose(core.info_nce(b, a, 0.2, mask), expected), "one direction only"


@pytest.mark.parametrize("rows", [0, 5])
def test_info_nce_over_nothing_is_zero_with_zero_gradients(rows):
    a, b = torch.randn(rows, 3, requires_grad=True), torch.randn(rows, 3, requires_grad=True)
    loss = core.info_nce(a, b, 0.07, torch.zeros(rows, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert a.grad.abs().sum() == 0
    assert b.grad.abs().sum() == 0


@pytest.mark.parametrize("device_rows", [contrast._chosen_rows, contrast._silenced_rows], ids=["cpu", "no host sync"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_info_nce_equals_the_cross_entropy_of_the_masks_rows_on_every_device(monkeypatch, device_rows, share):
    monkeypatch.setattr(contrast, "_chosen_rows", device_rows)
    a, b = (torch.randn(30, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(30) < share
    with torch.no_grad():
        a[~mask] = torch.nan  # rows that don't take part may hold anything
    loss = core.info_nce(a, b, 0.2, mask)
    expected = 3 * torch.nn.functional.cross_entropy(a[mask] @ b[mask].T / 0.2, torch.arange(int(mask.sum())), reduction="sum")
    expected = expected / max(int(mask.sum()), 1)
    torch.testing.assert_close(3 * loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (a, b)), torch.autograd.grad(expected, (a, b)))


def test_info_nce_keeps_one_matrix_and_no_more():
    a, b = (torch.randn(256, 4, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        core.info_nce(a, b, 0.07, torch.ones(256, dtype=torch.bool))
    assert sum(n == 256 * 256 for n in kept) == 1
    assert max(kept) == 256 * 256


@pytest.mark.parametrize("fixed", [0, 1])
def test_info_nce_of_a_fixed_side_gives_the_other_its_gradient(fixed):
    sides = [torch.randn(9, 4, dtype=torch.float64) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda x: core.info_nce(*sides[:fixed], x, *sides[fixed + 1 :], 0.3), sides[fixed].clone().requires_grad_()
    )


def test_info_nce_stays_exact_under_autocast():
    a, b = torch.randn(32, 64), torch.randn(32, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = core.info_nce(a, b, 0.07)
    torch.testing.assert_close(loss, core.info_nce(a, b, 0.07), rtol=0, atol=0)


def test_losses_react_to_their_switches():
    k = [torch.nn.functional.normalize(torch.randn(8, 4), dim=1) for _ in range(4)]
    mask = torch.ones(8, dtype=torch.bool)
    cur, prev, dense = core.PooledView(k[0], mask, k[1]), core.PooledView(k[2], mask, k[3]), core.PooledView(k[0], mask)
    full = core.superflow_losses(cur, [prev], dense)
    assert set(full) == {"spatial", "d2s", "temporal", "total"}
    torch.testing.assert_close(full["total"], full["spatial"] + full["d2s"] + full["temporal"])
    torch.testing.assert_close(full["spatial"], (core.info_nce(k[0], k[1], 0.07) + core.info_nce(k[2], k[3], 0.07)) / 2)
    alone = core.superflow_losses(cur, [prev], None, use_temporal=False, spatial_neighbours=False)
    assert set(alone) == {"spatial", "total"}
    torch.testing.assert_close(alone["spatial"], core.info_nce(k[0], k[1], 0.07))
    cosine = core.superflow_losses(cur, [], dense, d2s_mode="cosine")["d2s"]
    torch.testing.assert_close(cosine, torch.tensor(0.0), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="nce"):
        core.dense_to_sparse_loss(k[0], k[0], mask, mode="l2")


def test_dense_to_sparse_keeps_a_group_without_a_dense_pair_as_a_zero_row():
    k = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    dense = k.clone()
    dense[1] = 0
    expected = torch.nn.functional.cross_entropy(k @ dense.T / 0.07, torch.arange(3))
    torch.testing.assert_close(core.dense_to_sparse_loss(k, dense, torch.ones(3, dtype=torch.bool)), expected)


def test_voxels_of_a_batch_are_those_of_its_samples():
    clouds = [torch.randn(n, 4) * 5 for n in (40, 1, 60)]
    sample = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 1, 60]))
    together = core.voxelize(torch.cat(clouds), sample, (0.5, 10.0, 0.5))
    start_point = start_voxel = 0
    for index, cloud in enumerate(clouds):
        alone = core.voxelize(cloud, torch.full((len(cloud),), 0), (0.5, 10.0, 0.5))
        rows = slice(start_voxel, start_voxel + len(alone.features))
        assert torch.equal(together.features[rows], alone.features)
        assert torch.equal(together.coords[rows, :3], alone.coords[:, :3])
        assert (together.coords[rows, 3] == index).all()
        assert torch.equal(together.point2voxel[start_point : start_point + len(cloud)] - start_voxel, alone.point2voxel)
        start_point, start_voxel = start_point + len(cloud), rows.stop
    assert torch.equal(torch.cat(clouds)[together.first_point], together.features)


def test_a_voxel_has_the_features_of_its_first_point_not_their_mean():
    points = torch.tensor([[5.0, 0, 0, 1], [5.01, 0, 0, 9], [0, 0, 0, 3]])
    voxels = core.voxelize(points, torch.zeros(3, dtype=torch.long), (0.1, 0.1, 0.1), "cubic")
    assert voxels.features[voxels.point2voxel[1], 3] == 1


def test_an_empty_scan_and_an_unknown_voxel_type_are_named():
    with pytest.raises(ValueError, match="empty scan"):
        core.voxelize(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), (1, 1, 1))
    with pytest.raises(ValueError, match="'sphere'"):
        core.voxelize(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), (1, 1, 1), "sphere")  # type: ignore[arg-type]


def test_ego_motion_between_lidar_and_camera_moves_the_pixels():
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    forward = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]], dtype=torch.float64)  # camera looks along the vehicle's x
    intrinsic = torch.tensor([[[50.0, 0, 50], [0, 50, 50], [0, 0, 1]]], dtype=torch.float64)
    points = torch.tensor([[10.0, 1, 0]])

    def column(camera_x: float) -> int:
        at = torch.tensor([[camera_x, 0, 0]], dtype=torch.float64)
        rows, pixels = core.project_points(points, eye, zero, eye, zero, forward[None], zero[None], eye[None], at, intrinsic, 100, 100)
        assert rows.tolist() == [0]
        return int(pixels[0, 2])

    assert column(0.0) == 45
    assert column(5.0) == 40, "5 m nearer: half the depth, twice the offset"


def test_lovasz_against_the_definition():
    """Sum over thresholds of the Jaccard loss's discrete derivative, written with loops."""
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(12, 4, generator=generator, dtype=torch.float64), torch.randint(4, (12,), generator=generator)
    labels[::5] = 3
    probs, keep = logits.softmax(1), labels != 3
    per_class = []
    for c in range(4):
        truth = (labels[keep] == c).double()
        if truth.sum() == 0:
            continue
        error, order = (truth - probs[keep, c]).abs().sort(descending=True)
        truth, previous, total = truth[order], 0.0, 0.0
        for i in range(len(error)):
            union = truth.sum() + (1 - truth[: i + 1]).sum()
            jaccard = 1 - (truth.sum() - truth[: i + 1].sum()) / union
            total, previous = total + error[i] * (jaccard - previous), jaccard
        per_class.append(total)
    torch.testing.assert_close(core.lovasz_softmax(probs, labels, 3), torch.stack(per_class).mean())


@pytest.mark.parametrize("valid", [0, 1])
def test_segmentation_loss_with_no_or_one_valid_point(valid):
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.full((4,), 2)
    labels[:valid] = 1
    losses = core.segmentation_losses(logits, labels, ignore_index=2)
    losses["total"].backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[valid:] == 0).all(), "ignored points get no gradient"
    assert (losses["total"] > 0) == bool(valid)


def vote_scene():
    points = torch.tensor([[0.1, 0.1, 0.1], [0.2, 0.1, 0.1], [5.1, 0.1, 0.1], [0.15, 0.1, 0.1]], dtype=torch.float64)
    frame = torch.tensor([0, 1, 1, 1])
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.45, 0.55]], dtype=torch.float64)
    return points, frame, torch.eye(4, dtype=torch.float64).repeat(2, 1, 1), probs


def test_voting_is_a_plain_mean_over_points_of_all_frames():
    vote = core.temporal_vote(*vote_scene(), current_frame=1)
    assert vote.labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(vote.probs[0], torch.tensor([(0.9 + 0.4 + 0.45) / 3, (0.1 + 0.6 + 0.55) / 3], dtype=torch.float64))
    assert vote.num_frames.tolist() == [2, 1, 2]


def test_excluded_classes_neither_give_nor_take_votes():
    vote = core.temporal_vote(*vote_scene(), current_frame=1, exclude_classes=[0])
    assert vote.labels.tolist() == [1, 1, 1], "frame 0's only voter is of an excluded class"
    vote = core.temporal_vote(*vote_scene(), current_frame=1, exclude_classes=[1])
    torch.testing.assert_close(vote.probs, vote_scene()[3][1:])


def test_voting_in_a_batch_equals_voting_sample_by_sample():
    generator = np.random.default_rng(0)
    scenes = []
    for _ in range(3):
        motion = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
        motion[:, :3, 3] = torch.from_numpy(generator.normal(size=(3, 3)))
        probs = torch.from_numpy(generator.dirichlet(np.ones(4), 50))
        scenes.append((torch.from_numpy(generator.uniform(-1, 1, (50, 3))), torch.from_numpy(generator.integers(0, 3, 50)), motion, probs))
    sample = torch.repeat_interleave(torch.arange(3), 50)
    points, frame, motion, probs = (torch.cat(x) if i != 2 else torch.stack(x) for i, x in enumerate(zip(*scenes, strict=True)))
    together = core.temporal_vote(points, frame, motion, probs, 1, voxel_size=0.5, sample=sample)
    alone = [core.temporal_vote(*scene, 1, voxel_size=0.5) for scene in scenes]
    torch.testing.assert_close(together.probs, torch.cat([vote.probs for vote in alone]))
    assert torch.equal(together.num_frames, torch.cat([vote.num_frames for vote in alone]))
    assert (together.num_frames > 1).any()


def test_effective_rank_counts_directions():
    mask = torch.tensor([True] * 4 + [False] * 2)
    rows = torch.cat([torch.eye(4), torch.randn(2, 4)])
    torch.testing.assert_close(core.effective_rank(rows, mask), torch.tensor(4.0))
    torch.testing.assert_close(core.effective_rank(torch.ones(6, 4), mask), torch.tensor(1.0), atol=1e-3, rtol=0)
