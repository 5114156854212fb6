"""MaskSparsity against the authors' code; see tests/golden/data/masksparsity/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor, nn

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.channels import agree, apply_plan, channel_groups, make_plan, merge_keep_masks
from lit_methods.callbacks.sparsity.masksparsity.core import keep_masks, ot_threshold, sparse_gradient

PENALTIES: dict[str, Any] = {"L1": "l1", "L2": "l2", "smoothL1": "smooth_l1", "shiyan": "bounded_l2"}


def bn_sparse_grad(case: GoldenCase) -> dict[str, Tensor]:
    prune = case.tensor("in_prune_mask") if case.hp("masked") else None
    gamma, grad, penalty = case.tensor("in_gamma"), case.tensor("in_grad"), PENALTIES[case.hp("method")]
    return {"out_grad": sparse_gradient(gamma, grad, prune, penalty, case.hp("lambda"), case.hp("lr"))}


def residual_group_mask(case: GoldenCase) -> dict[str, Tensor]:
    return {"out_keep": merge_keep_masks(case.tensor("in_keep_masks"))}


class Network(nn.Module):
    """The network of the README, with the case's weights."""

    def __init__(self, case: GoldenCase) -> None:
        super().__init__()
        weights = {name[3:]: case.tensor(name) for name in case.arrays if name.startswith("in_") and name != "in_x"}
        (middle, inside), outside = weights["conv1_weight"].shape[:2], len(weights["bn2_weight"])
        self.conv1 = nn.Conv2d(inside, middle, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.fc = nn.Linear(outside, len(weights["fc_bias"]))
        self.to(weights["conv1_weight"].dtype)
        state = {name.replace("_", ".", 1): value for name, value in weights.items()}
        self.load_state_dict(state | {f"bn{i}.num_batches_tracked": torch.tensor(0) for i in (1, 2)})
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def channel_prune(case: GoldenCase) -> dict[str, Tensor]:
    network, x = Network(case), case.tensor("in_x")
    before = network(x)
    gammas = {"bn1": network.bn1.weight, "bn2": network.bn2.weight}
    keep = keep_masks(gammas, "threshold", threshold=case.hp("threshold"), min_channels=case.hp("min_channels"))
    groups, _ = channel_groups(network, x)
    apply_plan(network, make_plan(groups, agree(groups, keep, gammas, case.hp("min_channels"))))
    found = {f"out_{name.replace('.', '_')}": value for name, value in network.state_dict().items()}
    return found | {"out_keep1": keep["bn1"], "out_keep2": keep["bn2"], "out_y_before": before, "out_y_after": network(x)}


def ot(case: GoldenCase) -> dict[str, Tensor]:
    gamma = case.tensor("in_gamma")
    threshold = ot_threshold(gamma, case.hp("energy_discard"))
    return {"out_threshold": threshold, "out_keep": gamma.abs() > threshold}


test_golden = golden_test(
    "masksparsity",
    {
        "bn_sparse_grad": Kind(bn_sparse_grad, rtol=1e-6, atol=1e-8),
        "residual_group_mask": Kind(residual_group_mask),
        "channel_prune": Kind(channel_prune, rtol=1e-5),
        "ot_threshold": Kind(ot, rtol=1e-9),
    },
)
