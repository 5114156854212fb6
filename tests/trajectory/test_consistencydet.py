"""ConsistencyDet by a Trainer against the page's loop: images without and with too many truths, clipped gradients, and a sampling."""

import copy

import torch

from lit_methods import CascadedHead, ConsistencyDet, SmallDetectionBackbone
from lit_methods.seeds import own_seed, seeded_noise
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run


def draws_of(step):
    """The run's own random numbers."""
    return torch.Generator().manual_seed(own_seed(f"BoxDiffusion 0 {step}", 0))


def batch_of(seed):
    generator = torch.Generator().manual_seed(seed)
    low = 20 * torch.rand(3, 7, 2, generator=generator)
    boxes = torch.cat([low, low + 4 + 8 * torch.rand(3, 7, 2, generator=generator)], dim=-1)
    label = torch.randint(3, (3, 7), generator=generator)
    label[0, 2:] = -1
    label[1] = -1  # nothing in it; the third image has more than there are proposals
    ignore = torch.zeros(3, 7, dtype=torch.bool)
    ignore[2, 0] = True
    size = torch.tensor([[32.0, 32.0]]).expand(3, 2)
    image = torch.rand(3, 3, 32, 32, generator=generator)
    return {"image": image, "boxes": boxes, "label": label, "ignore": ignore, "size": size, "index": torch.arange(3)}


def test_a_run_is_the_loop():
    torch.manual_seed(0)
    backbone, head = SmallDetectionBackbone(8, stride=8), CascadedHead(3, 8, 2, 2, 16, 4, bins=3)
    batches = [batch_of(seed) for seed in range(4)]
    parts = [copy.deepcopy(part) for part in (backbone, head)]
    module = ConsistencyDet(*parts, proposals=5, learning_rate=1e-2, eval_steps=(3,))
    logs = run(module, batches, gradient_clip_val=1.0)

    loop = page_loop("consistencydet")
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-2, weight_decay=1e-4)
    wanted = loop.train(backbone, head, optimizer, batches, draws_of, proposals=5)
    assert len({float(step["detection/loss"]) for step in wanted}) == 4
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    for ours, theirs in ((module.backbone, backbone), (module.head, head)):
        assert_same_state(ours, theirs, TOLERANCE[torch.float32])

    noise = torch.stack([seeded_noise(f"BoxDiffusion image {number}", 0, torch.empty(3, 5, 4)) for number in range(3)], dim=1)
    with torch.no_grad():
        found = module.eval().predict_step(batches[0] | {"original_size": batches[0]["size"], "name": list("abc")}, 0)["boxes"]
        boxes = loop.find(backbone.eval(), head.eval(), batches[0]["image"], batches[0]["size"], noise)
    for ours, theirs in zip(found, boxes, strict=True):
        torch.testing.assert_close(ours, theirs.boxes, rtol=1e-4, atol=1e-3)
