"""Sparse Model Soups against the authors' code; see tests/golden/data/sparse_model_soups/README.md for the origin of each kind."""

import itertools

import numpy as np
import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.sparse_model_soups.core import (
    diversity,
    greedy_selection,
    masked_state,
    nominal_sparsity,
    phase_fraction,
    pruned_masks,
    retrain_rates,
    uniform_soup,
)


def imp_schedule(case: GoldenCase) -> dict[str, Tensor]:
    names = [str(place) for place in itertools.takewhile(lambda place: f"in_weight_{place}" in case.arrays, itertools.count())]
    weights = {name: case.tensor(f"in_weight_{name}") for name in names}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    phases, found = case.hp("n_phases"), dict[str, Tensor]()
    fraction = phase_fraction(case.hp("goal_sparsity"), phases)
    for phase in range(1, phases + 1):
        masks = pruned_masks(weights, masks, fraction, case.hp("selector"))
        weights = masked_state(weights, masks)
        found |= {f"out_keep_mask_phase{phase}_weight_{name}": mask for name, mask in masks.items()}
        if phase < phases:  # survivors alone are retrained
            updates = {name: case.tensor(f"in_update_after_phase{phase}_weight_{name}") for name in names}
            weights = masked_state({name: weights[name] + updates[name] for name in names}, masks)
    found["out_nominal_sparsity_per_phase"] = torch.tensor(nominal_sparsity(case.hp("goal_sparsity"), phases), dtype=torch.float64)
    return found | {f"out_final_weight_{name}": weight for name, weight in weights.items()}


def soup(case: GoldenCase) -> dict[str, Tensor | float]:
    weights, biases, mask = case.tensor("in_weights"), case.tensor("in_biases"), case.tensor("in_keep_mask")
    states = [masked_state({"weight": weight, "bias": bias}, {"weight": mask}) for weight, bias in zip(weights, biases, strict=True)]

    def accuracy(places: list[int]) -> float:
        mean = uniform_soup(states[place] for place in places)
        logits = case.tensor("in_val_x") @ mean["weight"].T + mean["bias"]
        return float((logits.argmax(1) == case.tensor("in_val_y")).double().mean())

    chosen = list(range(len(states)))
    if case.hp("method") == "greedy":
        chosen, _ = greedy_selection(case.arrays["in_candidate_val_accuracy"].tolist(), accuracy)
    mean = uniform_soup(states[place] for place in chosen)
    apart = diversity(torch.stack([torch.cat([state["weight"].flatten(), state["bias"]]) for state in states]))
    return {
        "out_soup_weight": mean["weight"],
        "out_soup_bias": mean["bias"],
        "out_selected": torch.tensor(sorted(chosen)),
        "out_soup_val_accuracy": accuracy(chosen),
        **{f"out_{name}": value for name, value in apart.items()},
    }


def retrain_lr(case: GoldenCase) -> dict[str, Tensor]:
    per_epoch = case.hp("steps_per_epoch")
    return {
        name: retrain_rates(
            case.tensor("in_original_lr_per_step"),
            case.hp("retrain_epochs") * per_epoch,
            name.removeprefix("out_lr_"),
            original_warmup=case.hp("original_warmup_epochs") * per_epoch,
            norm_drop=case.hp("relative_norm_drop"),
            fraction=case.hp("prune_fraction"),
        )
        for name in case.expected
    }


def rates(case: GoldenCase, key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    """1e-9; CLR within 1 % of the largest original rate, as the released scheduler wiggles around the closed form."""
    limit = 1e-2 * case.arrays["in_original_lr_per_step"].max() if key == "out_lr_CLR" else 1e-9
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=0, atol=limit, err_msg=key)


test_golden = golden_test(
    "sparse_model_soups",
    {
        "imp_schedule": Kind(imp_schedule, rtol=0, atol=1e-6, overrides={"out_nominal": (0, 1e-9)}),
        "soup": Kind(soup, rtol=1e-4, overrides={"out_soup": (0, 1e-6)}),
        "retrain_lr": Kind(retrain_lr, compare=rates),
    },
)
