"""Boxes, matching, losses, pooling and suppression, each against a computation of its own."""

import math

import pytest
import torch
import torchvision
from torch import Tensor

from lit_methods.detection import pooling
from lit_methods.detection.boxes import cxcywh_to_xyxy, overlaps, xyxy_to_cxcywh
from lit_methods.detection.consistencydet.core import detection_levels, nearest_level, renewal_step
from lit_methods.detection.criterion import federated_classes, focal_loss, set_losses
from lit_methods.detection.diffusiondet import cosine_shares
from lit_methods.detection.matcher import MatchCosts, Targets, dynamic_k_match
from lit_methods.detection.nms import Detections, detections_of, suppress_by_rounds
from lit_methods.detection.noise import clean_boxes, kept_first
from lit_methods.detection.scores import DetectionScores


def random_boxes(*shape: int, side: float = 100.0, dtype: torch.dtype = torch.float64) -> Tensor:
    low = torch.rand(*shape, 2, dtype=dtype) * side * 0.7
    return torch.cat([low, low + (0.02 + 0.28 * torch.rand(*shape, 2, dtype=dtype)) * side], dim=-1)


def targets_of(labels: Tensor, boxes: Tensor, valid: Tensor, side: float = 100.0) -> Targets:
    return Targets(labels, boxes, valid, torch.full((len(labels), 2), side, dtype=boxes.dtype))


def test_boxes_and_overlaps_are_torchvisions():
    torch.manual_seed(0)
    a, b = random_boxes(7), random_boxes(5)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(a)), a)
    iou, giou = overlaps(a[:, None], b)
    torch.testing.assert_close(iou, torchvision.ops.box_iou(a, b))
    torch.testing.assert_close(giou, torchvision.ops.generalized_box_iou(a, b))
    empty = torch.zeros(1, 4, requires_grad=True)
    both = overlaps(empty, torch.zeros(1, 4))
    assert [float(part.detach()) for part in both] == [0.0, 0.0]
    assert torch.autograd.grad(sum(part.sum() for part in both), empty)[0].isfinite().all()


# ---- matching --------------------------------------------------------------------------------------------------------------------------


def plain_match(logits: Tensor, boxes: Tensor, labels: Tensor, truths: Tensor, side: float) -> list[int]:
    """The rule for one image, box by box, as it is told on the page."""
    proposals, count = len(boxes), len(truths)
    cost, iou = torch.zeros(count, proposals, dtype=torch.float64), torchvision.ops.box_iou(truths, boxes)
    giou = torchvision.ops.generalized_box_iou(truths, boxes)
    for q in range(proposals):
        centre, anywhere = (boxes[q, :2] + boxes[q, 2:]) / 2, False
        for g in range(count):
            p = torch.sigmoid(logits[q, labels[g]])
            focal = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8) - 0.75 * p**2 * -torch.log(1 - p + 1e-8)
            inside = bool((centre > truths[g, :2]).all() and (centre < truths[g, 2:]).all())
            size, middle = truths[g, 2:] - truths[g, :2], (truths[g, :2] + truths[g, 2:]) / 2
            near = bool(((centre - middle).abs() < 2.5 * size).all())
            anywhere = anywhere or inside or near
            distance = (boxes[q] / side - truths[g] / side).abs().sum()
            cost[g, q] = 5 * distance + 2 * focal - 2 * giou[g, q] + (0 if inside and near else 100)
        if not anywhere:
            cost[:, q] += 10_000
    owners: list[set[int]] = [set() for _ in range(proposals)]
    for g in range(count):
        k = max(1, int(iou[g].sort(descending=True).values[:5].sum()))
        for q in cost[g].sort(stable=True).indices[:k].tolist():
            owners[q].add(g)
    contested = {q for q in range(proposals) if len(owners[q]) > 1}
    for q in contested:
        owners[q] = {int(cost[:, q].argmin())}
    without = [g for g in range(count) if not any(g in owner for owner in owners)]
    penalty = torch.tensor([1e5 if owner else 0.0 for owner in owners], dtype=torch.float64)
    chosen = {g: int((cost[g] + penalty).argmin()) for g in without}
    for g, q in chosen.items():
        if q not in contested:
            owners[q].add(g)
    return [min(owner) if owner else -1 for owner in owners]


@pytest.mark.parametrize(("proposals", "count"), [(20, 3), (12, 12), (8, 1), (4, 2), (6, 9), (40, 25), (1, 1)])
def test_the_match_is_that_of_a_loop_over_boxes(proposals: int, count: int):
    torch.manual_seed(proposals * count)
    images, classes = 5, 3
    logits, boxes = torch.randn(images, proposals, classes, dtype=torch.float64), random_boxes(images, proposals)
    labels, truths = torch.randint(classes, (images, count)), random_boxes(images, count)
    boxes[:, : min(count, proposals)] = (truths[:, : min(count, proposals)] + torch.rand(images, 1, 4)).sort(-1).values  # some that fit
    boxes = torch.cat([boxes[..., :2].minimum(boxes[..., 2:] - 1), boxes[..., 2:]], dim=-1)
    numbers = torch.tensor([count, max(0, count - 1), 1, 0, count])
    valid = torch.arange(count) < numbers[:, None]
    found = dynamic_k_match(logits, boxes, targets_of(labels, truths, valid))
    for image in range(images):
        number = int(numbers[image])
        wanted = plain_match(logits[image], boxes[image], labels[image, :number], truths[image, :number], 100.0)
        assert found[image].tolist() == (wanted if number else [-1] * proposals), f"image {image}"


def test_padding_of_truths_changes_nothing():
    torch.manual_seed(1)
    logits, boxes, labels, truths = torch.randn(2, 9, 3), random_boxes(2, 9).float(), torch.randint(3, (2, 2)), random_boxes(2, 2).float()
    plain = dynamic_k_match(logits, boxes, targets_of(labels, truths, torch.ones(2, 2, dtype=torch.bool)))
    wide = targets_of(
        torch.cat([labels, torch.full((2, 3), -1)], 1),
        torch.cat([truths, torch.full((2, 3, 4), torch.nan)], 1),
        torch.tensor([[True, True, False, False, False]] * 2),
    )
    assert torch.equal(dynamic_k_match(logits, boxes, wide), plain)
    none = targets_of(labels[:, :0], truths[:, :0], torch.zeros(2, 0, dtype=torch.bool))
    assert (dynamic_k_match(logits, boxes, none) == -1).all()


def test_equal_truths_and_equal_proposals_are_matched_without_a_loss_of_any():
    truths = torch.tensor([[[10.0, 10, 30, 30], [10, 10, 30, 30]]])
    boxes, logits = truths[:, :1].repeat(1, 6, 1), torch.zeros(1, 6, 2)
    targets = targets_of(torch.tensor([[0, 0]]), truths, torch.ones(1, 2, dtype=torch.bool))
    found = dynamic_k_match(logits, boxes, targets)[0]
    assert set(found.tolist()) >= {0, 1}, "the second truth, equal to the first, takes a free proposal"
    assert int((found >= 0).sum()) == 6, "k is 5, the sum of five IoU of 1, and one proposal is left for the second"


def test_bfloat16_and_autocast_match_in_float32():
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 10, 3).bfloat16(), random_boxes(1, 10).float()
    targets = targets_of(torch.randint(3, (1, 3)), random_boxes(1, 3).float(), torch.ones(1, 3, dtype=torch.bool))
    with torch.autocast("cpu", torch.bfloat16):
        inside = dynamic_k_match(logits, boxes, targets)
    assert torch.equal(inside, dynamic_k_match(logits.float(), boxes, targets))


# ---- losses ----------------------------------------------------------------------------------------------------------------------------


def test_focal_loss_is_torchvisions():
    torch.manual_seed(0)
    logits, target = 8 * torch.randn(6, 4), torch.rand(6, 4).round()
    torch.testing.assert_close(focal_loss(logits, target), torchvision.ops.sigmoid_focal_loss(logits, target))
    assert focal_loss(torch.tensor([300.0, -300.0]), torch.tensor([0.0, 1.0])).isfinite().all()


def test_set_losses_are_the_sum_over_matched_proposals():
    torch.manual_seed(2)
    logits, boxes = torch.randn(2, 3, 10, 4, dtype=torch.float64), random_boxes(2, 3, 10)
    labels, truths = torch.randint(4, (3, 2)), random_boxes(3, 2)
    targets = targets_of(labels, truths, torch.tensor([[True, True], [True, False], [False, False]]))
    found = set_losses(logits, boxes, targets)
    for head in range(2):
        match = dynamic_k_match(logits[head], boxes[head], targets)
        rows = (match >= 0).nonzero().tolist()
        hot = torch.zeros(3, 10, 4, dtype=torch.float64)
        l1 = giou = 0.0
        for image, q in rows:
            truth = truths[image, match[image, q]]
            hot[image, q, labels[image, match[image, q]]] = 1
            l1 += float((boxes[head, image, q] / 100 - truth / 100).abs().sum())
            giou += 1 - float(torchvision.ops.generalized_box_iou(boxes[head, image, q][None], truth[None]))
        label = torchvision.ops.sigmoid_focal_loss(logits[head], hot).sum()
        expected = torch.stack([label, torch.tensor(l1).double(), torch.tensor(giou).double()]) / len(rows)
        torch.testing.assert_close(torch.stack([found.label[head], found.l1[head], found.giou[head]]), expected)
        assert found.matched[head] == len(rows)


def test_a_batch_without_truths_keeps_the_graph():
    logits, boxes = torch.randn(1, 2, 5, 3, requires_grad=True), random_boxes(1, 2, 5).float().requires_grad_()
    targets = targets_of(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    found = set_losses(logits, boxes, targets)
    assert float(found.l1) == float(found.giou) == float(found.matched) == 0
    torch.testing.assert_close(found.label[0], torchvision.ops.sigmoid_focal_loss(logits[0], torch.zeros(2, 5, 3)).sum())
    to_logits, to_boxes = torch.autograd.grad((found.label + found.l1 + found.giou).sum(), (logits, boxes))
    assert to_logits.abs().sum() > 0
    assert to_boxes.abs().sum() == 0


def test_the_federated_loss_counts_present_classes_and_as_many_others():
    labels, valid = torch.tensor([[3, 7], [3, 1]]), torch.tensor([[True, True], [True, False]])
    weights = torch.ones(20)
    weights[4] = 0
    chosen = federated_classes(labels, valid, weights, torch.rand(20, generator=torch.Generator().manual_seed(0)), 6)
    assert chosen.sum() == 6
    assert chosen[3] == chosen[7] == 1
    assert chosen[4] == 0
    assert federated_classes(labels, valid, weights, torch.rand(20), 1).sum() == 2, "those that are there always count"
    heavy = torch.ones(20) * 1e-6
    heavy[15] = 1e6
    assert federated_classes(labels, valid, heavy, torch.full((20,), 0.5), 3)[15] == 1
    logits, boxes = torch.randn(1, 1, 5, 20), random_boxes(1, 1, 5).float()
    targets = targets_of(labels[:1], random_boxes(1, 2).float(), valid[:1])
    some, all_classes = (set_losses(logits, boxes, targets, class_weights=w).label for w in (chosen, torch.ones(20)))
    assert 0 < float(some) < float(all_classes)


# ---- noise, levels, renewal ------------------------------------------------------------------------------------------------------------


def test_clean_boxes_of_no_truth_and_of_too_many():
    padding = torch.zeros(3, 2, 4)
    padding[..., 2:] = -9
    truths = torch.rand(3, 4, 4)
    valid = torch.tensor([[False] * 4, [True] * 4, [False, False, True, False]])
    keys = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3], [0.0, 0.0, 0.9, 0.0]])
    found = (clean_boxes(truths, valid, padding, keys) + 1) / 2
    random = torch.tensor([0.5, 0.5, 1e-4, 1e-4])
    torch.testing.assert_close(found[0], torch.stack([torch.tensor([0.5, 0.5, 1, 1]), random]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], truths[1, [1, 2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[2], torch.stack([truths[2, 2], random]), atol=1e-6, rtol=0)


def test_renewal_is_each_images_own_and_keeps_the_order():
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    logits = torch.tensor([[[9.0], [-9], [9]], [[-9.0], [-9], [-9]]])
    fresh = 100 + torch.rand(2, 3, 4)
    found = renewal_step(x, x, logits, fresh, torch.tensor(2.0), torch.tensor(1.0))
    assert found.kept.tolist() == [[True, False, True], [False] * 3]
    torch.testing.assert_close(found.boxes[0], torch.stack([x[0, 0], x[0, 2], fresh[0, 2]]))
    torch.testing.assert_close(found.boxes[1], fresh[1])
    torch.testing.assert_close(kept_first(x, torch.ones(2, 3, dtype=torch.bool), fresh), x)


def test_few_levels_are_told_by_their_nearest_training_level():
    training = detection_levels(40)[:-1]
    assert nearest_level(training, training).tolist() == list(range(40))
    assert nearest_level(detection_levels(2)[:-1], training).tolist() == [0, 39]
    assert detection_levels(1).tolist() == pytest.approx([40.0, 0.0])


def test_the_cosine_schedule_falls_from_one_to_nearly_nothing():
    shares = cosine_shares(1000)
    assert (shares.diff() < 0).all()
    assert float(shares[0]) == pytest.approx(
        math.cos((1 / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    assert float(shares[-1]) < 1e-4


# ---- pooling and suppression -----------------------------------------------------------------------------------------------------------


def test_roi_align_by_products_is_the_operators():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 13, dtype=torch.float64, requires_grad=True)
    boxes = random_boxes(2, 6) - torch.tensor([10.0, 20, 10, 20], dtype=torch.float64)
    boxes[0, 0] = torch.tensor([200.0, 200, 300, 300])  # outside
    boxes[0, 1] = torch.tensor([5.0, 5, 5, 5])  # without area
    ours, rows = pooling.roi_align_by_products(features, boxes, 0.125), torch.tensor([0.0, 1.0]).repeat_interleave(6)[:, None].double()
    theirs = torchvision.ops.roi_align(features, torch.cat([rows, boxes.flatten(0, 1)], 1), 7, 0.125, 2, aligned=True).view_as(ours)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(part, features, cotangent) for part in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pyramid_reads_each_box_from_its_own_map(monkeypatch: pytest.MonkeyPatch):
    maps = [torch.full((1, 1, 64 // 2**k, 64 // 2**k), float(k)) for k in range(3)]
    sizes = torch.tensor([20.0, 60.0, 120.0, 250.0])
    boxes = torch.cat([torch.full((4, 2), 1.0), 1 + sizes[:, None].expand(4, 2)], dim=1)[None]
    found = pooling.pyramid_align(maps, boxes, [4, 8, 16], bins=2)
    assert found.amax((2, 3, 4))[0].tolist() == [0.0, 0.0, 1.0, 2.0]
    monkeypatch.setattr(pooling, "_SMALL", 0)
    torch.testing.assert_close(pooling.pyramid_align(maps, boxes, [4, 8, 16], bins=2), found)
    monkeypatch.setattr(pooling, "has_compiled_operator", lambda name: False)
    torch.testing.assert_close(pooling.pyramid_align(maps, boxes, [4, 8, 16], bins=2), found)


@pytest.mark.parametrize("seed", range(4))
def test_suppression_by_rounds_is_the_operators(seed: int):
    torch.manual_seed(seed)
    boxes, scores, labels = random_boxes(60, side=40).float(), torch.rand(60), torch.randint(3, (60,))
    assert torch.equal(suppress_by_rounds(boxes, scores, labels, 0.4), torchvision.ops.batched_nms(boxes, scores, labels, 0.4))
    assert len(suppress_by_rounds(boxes[:0], scores[:0], labels[:0], 0.4)) == 0


def test_detections_are_the_best_scores_of_all_steps():
    logits, boxes = torch.full((1, 3, 2), -5.0), random_boxes(1, 3).float()
    logits[0, 1] = torch.tensor([2.0, 3.0])
    later = logits - 1
    (found,) = detections_of([logits, later], [boxes, boxes], 0.5, most=2)
    assert found.labels.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0]).sigmoid())
    torch.testing.assert_close(found.boxes, boxes[0, [1, 1]])


def test_average_precision_knows_images_without_truth_and_boxes_to_ignore():
    pytest.importorskip("faster_coco_eval")
    scores = DetectionScores()
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40]], [[0.0, 0, 0, 0], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 1], [-1, -1]])
    scores.add_truths(torch.tensor([4, 2]), boxes, labels, torch.tensor([[False, True], [False, False]]))
    exact = Detections(boxes[0, :1], torch.tensor([0.9]), torch.tensor([0]))
    nothing = Detections(boxes[0, :0], torch.zeros(0), torch.zeros(0, dtype=torch.long))
    scores.add_found(1, torch.tensor([4, 2]), [exact, nothing])
    scores.add_found(2, torch.tensor([4, 2]), [nothing, Detections(boxes[0, :1], torch.tensor([0.9]), torch.tensor([0]))])
    figures = scores.compute()
    assert figures[1] == {"ap": pytest.approx(1.0), "ap50": pytest.approx(1.0)}, "the ignored box isn't missed"
    assert figures[2]["ap"] == 0.0
    assert MatchCosts().top == 5
