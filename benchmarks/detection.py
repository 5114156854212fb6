"""What the matcher of detectors and its losses cost, beside a plain formulation of the same rule, image by image and box by box.

    python benchmarks/detection.py [--rounds 7] [--threads 1] [--images 8] [--proposals 300] [--truths 8] [--json FILE]

``matcher``: which truth each proposal answers for, for two noise levels of six heads: :func:`dynamic_k_match` at once; and a loop over
levels, heads and images with torchvision's ``box_iou`` and ``generalized_box_iou``, and over the truths of each. ``losses``: the set losses
with their gradients at once, and the same loop with torchvision's ``sigmoid_focal_loss`` and ``generalized_box_iou_loss``. A round times
both in turn, and the median ratio is printed. Target: 2. The script fails if both don't give the same. Then it counts the lines of Python
that our matcher runs: as many for 8 truths as for 64, so nothing loops over boxes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from lit_methods.detection.matcher import Targets, focal_cost
from lit_methods.functional import dynamic_k_match, set_losses

LEVELS, HEADS, CLASSES, WIDTH, HEIGHT = 2, 6, 80, 1333.0, 800.0


def boxes_of(*shape: int) -> Tensor:
    """Boxes inside an image, as corners in pixels."""
    size = torch.tensor([WIDTH, HEIGHT])
    low = 0.75 * torch.rand(*shape, 2) * size
    return torch.cat([low, low + (0.02 + 0.2 * torch.rand(*shape, 2)) * size], dim=-1)


def problem(images: int, proposals: int, truths: int) -> tuple[Tensor, Tensor, Targets]:
    """Logits and boxes of all heads, and targets; some proposals lie near the truths, as after some training."""
    wanted = boxes_of(images, truths)
    boxes = boxes_of(LEVELS * HEADS, images, proposals)
    near = min(proposals, 4 * truths)
    noise = 8 * torch.randn(LEVELS * HEADS, images, near, 2).repeat(1, 1, 1, 2)
    boxes[:, :, :near] = wanted.repeat(1, -(-near // truths), 1)[:, :near] + noise
    valid = torch.arange(truths) < torch.randint(truths // 2, truths + 1, (images, 1))
    size = torch.tensor([[WIDTH, HEIGHT]]).expand(images, 2)
    return (
        torch.randn(LEVELS * HEADS, images, proposals, CLASSES),
        boxes,
        Targets(torch.randint(CLASSES, (images, truths)), wanted, valid, size),
    )


@torch.no_grad()
def plain_match(logits: Tensor, boxes: Tensor, labels: Tensor, truths: Tensor) -> Tensor:
    """The rule for one image of one head: (P,) index of the truth, or -1."""
    scale = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    middle, reach = (truths[:, :2] + truths[:, 2:]) / 2, 2.5 * (truths[:, 2:] - truths[:, :2])
    inside = ((centre > truths[:, :2]) & (centre < truths[:, 2:])).all(-1)
    near = ((centre > middle - reach) & (centre < middle + reach)).all(-1)
    cost = (
        5 * torch.cdist(boxes / scale, truths / scale, p=1.0) + 2 * focal_cost(logits)[:, labels] - 2 * generalized_box_iou(boxes, truths)
    )
    cost = cost + 100 * ~(inside & near)
    cost[~(inside | near).any(1)] += 10_000
    count = box_iou(boxes, truths).topk(5, dim=0).values.sum(0).int().clamp(min=1)
    taken = torch.zeros_like(cost)
    for truth in range(len(truths)):
        taken[cost[:, truth].topk(int(count[truth]), largest=False).indices, truth] = 1
    contested = taken.sum(1) > 1
    taken[contested] = torch.nn.functional.one_hot(cost[contested].argmin(1), len(truths)).to(taken)
    cost[taken.sum(1) > 0] += 100_000
    for truth in (taken.sum(0) == 0).nonzero().flatten().tolist():
        taken[cost[:, truth].argmin(), truth] = 1
    return torch.where(taken.any(1), taken.argmax(1), -1)


def plain_losses(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """The weighted losses, a loop over heads and images."""
    scale, total = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]), logits.new_zeros(())
    for head in range(len(logits)):
        label = l1 = giou = logits.new_zeros(())
        matched = 0
        for image in range(logits.shape[1]):
            labels, truths = (part[image][targets.valid[image]] for part in (targets.labels, targets.boxes))
            match = plain_match(logits[head, image], boxes[head, image], labels, truths)
            rows = match >= 0
            hot = torch.zeros_like(logits[head, image])
            hot[rows, labels[match[rows]]] = 1
            ours, wanted = boxes[head, image, rows], truths[match[rows]]
            label = label + sigmoid_focal_loss(logits[head, image], hot, reduction="sum")
            l1, giou = l1 + (ours / scale - wanted / scale).abs().sum(), giou + generalized_box_iou_loss(ours, wanted, reduction="sum")
            matched += int(rows.sum())
        total = total + (2 * label + 5 * l1 + 2 * giou) / max(1, matched)
    return total


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turn(ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians of both, and of their ratio."""
    pairs = [(seconds(ours), seconds(plain)) for _ in range(rounds + 1)][1:]
    mine, theirs = ([1e3 * pair[side] for pair in pairs] for side in (0, 1))
    return {"ms": statistics.median(mine), "plain_ms": statistics.median(theirs), "ratio": statistics.median(b / a for a, b in pairs)}


def lines_run(call: Callable[[], Any]) -> int:
    """Lines of Python that a call runs in our package."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line" and "detection" in frame.f_code.co_filename
        return trace

    sys.settrace(trace)
    call()
    sys.settrace(None)
    return count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("threads", 1), ("images", 8), ("proposals", 300), ("truths", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    logits, boxes, targets = problem(given.images, given.proposals, given.truths)
    several = targets.repeat(len(logits))

    def match() -> Tensor:
        return dynamic_k_match(logits.flatten(0, 1), boxes.flatten(0, 1), several)

    def plain() -> Tensor:
        rows = [
            plain_match(logits[head, image], boxes[head, image], *(part[image][targets.valid[image]] for part in targets[:2]))
            for head in range(len(logits))
            for image in range(given.images)
        ]
        return torch.stack(rows)

    if not torch.equal(match(), plain()):
        raise SystemExit("the matcher and the loop match other boxes")
    found = {"matcher": in_turn(match, plain, given.rounds)}
    leaves = [part.clone().requires_grad_() for part in (logits, boxes)]

    def losses() -> tuple[Tensor, ...]:
        parts = set_losses(*leaves, targets)
        total = (2 * parts.label + 5 * parts.l1 + 2 * parts.giou).sum()
        return total, *torch.autograd.grad(total, leaves)

    def looped() -> tuple[Tensor, ...]:
        total = plain_losses(*leaves, targets)
        return total, *torch.autograd.grad(total, leaves)

    for ours, theirs in zip(losses(), looped(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    found["losses"] = in_turn(losses, looped, given.rounds)
    for name, figures in found.items():
        print("{}: {ms:.1f} ms, the loop {plain_ms:.1f} ms: {ratio:.1f} times as fast (target: 2)".format(name, **figures))
    counts = []
    for truths in (8, 64):
        one = problem(1, given.proposals, truths)
        counts.append(lines_run(lambda one=one: dynamic_k_match(one[0][:, 0], one[1][:, 0], one[2].repeat(len(one[0])))))
    print(f"lines of Python: {counts[0]} with 8 truths, {counts[1]} with 64")
    if counts[0] != counts[1]:
        raise SystemExit("the matcher loops over boxes")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
