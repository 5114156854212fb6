"""Masks for weak 3D labels; see tests/golden/data/sam3d_weak/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.lidar.sam3d_weak import core
from lit_methods.lidar.lifting import link_points


def link(case: GoldenCase) -> dict[str, Tensor]:
    parts = (case.tensor(f"in_{name}") for name in ("points", "intrinsic", "rotation", "translation", "depth"))
    return {"out_link": link_points(*parts, case.hp("delta"))}


def mask_spread(case: GoldenCase) -> dict[str, Tensor]:
    options = (case.hp(name) for name in ("num_classes", "min_purity", "min_count", "ignore_index"))
    found = core.spread_masks(case.tensor("in_mask_ids"), case.tensor("in_labels"), *options)
    return {"out_votes": found.votes, "out_labels": found.labels}


def reliability_loss(case: GoldenCase) -> dict[str, Any]:
    names = ("logits", "logits_aug1", "logits_aug2", "logits_mix")
    inputs = [case.tensor(f"in_{name}").requires_grad_() for name in names]
    found = core.reliability_loss(*inputs, case.hp("tau"), case.hp("kappa"))
    grads = torch.autograd.grad(found.total, inputs, allow_unused=True, materialize_grads=True)
    about = found.reliability
    values = {"selected": about.selected, "pseudo_labels": about.pseudo_labels, "confidence": about.confidence}
    values |= {"uncertainty": about.uncertainty, "loss_reliable": found.reliable, "loss_ambiguous": found.ambiguous, "loss": found.total}
    values |= {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {f"out_{name}": value for name, value in values.items()}


test_golden = golden_test(
    "sam3d_weak",
    {
        "link": Kind(link),
        "mask_spread": Kind(mask_spread),
        "reliability_loss": Kind(reliability_loss, rtol=1e-5, overrides={"out_grad": (1e-5, 1e-7)}),
    },
)
