"""Supervised dictionaries and their three axes against the authors' code; see tests/golden/data/sae_evals/README.md for the origin."""

import numpy as np
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods import SparseAutoencoder
from lit_methods.callbacks.sparse_autoencoders.sae_evals import core


def supervised_dictionary(case: GoldenCase) -> dict[str, Tensor]:
    ids, sizes = [case.tensor(f"in_{name}") for name in ("io", "s", "pos")], [case.hp("n_io"), case.hp("n_s"), 2]
    activations, counterfactual = case.tensor("in_activations"), case.tensor("in_io_counterfactual")
    sums = core.attribute_sums(activations, ids, sizes)
    mean = core.mean_codes(sums, sizes)
    return {
        "out_mean_bias": mean.bias,
        **{f"out_mean_{name}": code for name, code in zip(("io", "s", "pos"), mean.codes, strict=True)},
        "out_mean_reconstruction": core.reconstruct_by_codes(mean, ids),
        "out_mse_reconstruction": core.reconstruct_by_codes(core.mse_codes(sums, sizes), ids),
        "out_edit_arithmetic": core.edit_arithmetic(activations, mean.codes[0], ids[0], counterfactual),
        "out_edit_zero_ablate_subspace": core.edit_subspace(activations, mean.codes[0], ids[0], counterfactual),
    }


def least_squares_as_the_reference_cut_it(case: GoldenCase, key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    """The reference's LAPACK call took some columns as pivots at random and stopped at the first of them that depended on the ones before.

    So it solves the normal equations of these columns alone, with the smallest norm. Which they were is seen in its residual; ours solves
    those of all columns.
    """
    if key != "out_mse_reconstruction":
        return entrywise(key, ours, reference)
    ids, sizes = [case.arrays[f"in_{name}"] for name in ("io", "s", "pos")], [case.hp("n_io"), case.hp("n_s"), 2]
    activations = case.arrays["in_activations"]
    design = np.concatenate([np.ones((len(activations), 1)), *(np.eye(n)[one] for one, n in zip(ids, sizes, strict=True))], 1)
    np.testing.assert_allclose(design.T @ (activations - ours), 0, atol=1e-8)
    solved = np.abs(design.T @ (activations - reference)).max(1) < 1e-8
    assert solved[0], "the reference's residual has no mean: the column of ones is always taken"
    left, lengths, _ = np.linalg.svd(design[:, solved], full_matrices=False)
    basis = left[:, lengths > 1e-8]
    cut = design @ np.linalg.pinv(basis.T @ design) @ (basis.T @ activations)
    entrywise(key, cut, reference)
    if solved.all():
        entrywise(key, ours, reference)


def entrywise(key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    assert ours.shape == reference.shape, key
    assert np.array_equal(np.isnan(ours), np.isnan(reference)), key
    assert np.nanmax(np.abs(ours - reference), initial=0.0) <= 1e-8 * (1 + np.nanmax(np.abs(reference), initial=0.0)), key


def f1_interpretability(case: GoldenCase) -> dict[str, Tensor]:
    active = case.tensor("in_activation_pattern")
    counts = core.activity_counts(active, case.tensor("in_attribute_value"), case.hp("n_values"))
    scores, pos = core.f1_scores(counts), core.f1_scores(core.activity_counts(active, case.tensor("in_pos"), 2))
    best, index = core.best_values(scores.f1)
    order = core.value_order(scores.f1, case.hp("max_group_size"))
    return {
        **{f"out_{name}": value for name, value in scores._asdict().items()},
        "out_best_single_f1_value": best,
        "out_best_single_f1_index": index,
        "out_best_pos_f1": core.best_values(pos.f1)[0],
        "out_group_value_order": order,
        "out_group_f1": core.union_f1(counts, order),
    }


def equal_up_to_ties(case: GoldenCase, key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    """The order among equal or undefined F1 is free: the reference's must fall as ours does, and its unions have our F1."""
    if key == "out_best_single_f1_index":
        f1 = np.nan_to_num(case.arrays["out_f1"], nan=-np.inf)
        assert np.array_equal(np.take_along_axis(f1, ours[:, None], 1), np.take_along_axis(f1, reference[:, None], 1))
        return
    if key == "out_group_value_order":
        f1 = np.nan_to_num(case.arrays["out_f1"], nan=-np.inf)
        assert all(len(set(row)) == len(row) for row in ours.tolist())
        assert np.array_equal(np.take_along_axis(f1, ours, 1), np.take_along_axis(f1, reference, 1))
        return
    if key == "out_group_f1":
        counts = core.activity_counts(case.tensor("in_activation_pattern"), case.tensor("in_attribute_value"), case.hp("n_values"))
        theirs = core.union_f1(counts, case.tensor("out_group_value_order")).numpy()
        order = core.value_order(core.f1_scores(counts).f1, case.hp("max_group_size")).numpy()
        same = (order == case.arrays["out_group_value_order"]).all(1)
        np.testing.assert_array_equal(ours[same], theirs[same])
        ours = theirs
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def sparse_edit(case: GoldenCase) -> dict[str, Tensor]:
    activations, target = case.tensor("in_A_clean"), case.tensor("in_A_counterfactual")
    directions = case.tensor("in_W_dec")
    sae = SparseAutoencoder(directions.shape[1], directions.shape[0], activation="relu").double()
    names = {"decoder": directions, "encoder": case.tensor("in_W_enc").T, "encoder_bias": case.tensor("in_b_enc")}
    sae.load_state_dict(sae.state_dict() | names | {"decoder_bias": case.tensor("in_b_dec")})
    clean, counterfactual = (sae.encode(one).detach() for one in (activations, target))
    k, scale = case.hp("num_exchange"), case.hp("normalization_scale")
    delta = target - activations if case.hp("diff_is_activation") else (counterfactual - clean) @ directions
    greedy = core.greedy_edit(activations, clean, counterfactual, directions, delta, k, scale)
    weights = core.feature_weights(clean, directions)
    old, new = case.tensor("in_value_clean"), case.tensor("in_value_counterfactual")
    guided = core.guided_edit(activations, clean, counterfactual, directions, case.tensor("in_f1_feature_order"), old, new, k, scale)
    return {
        "out_feature_magnitudes_clean": clean,
        "out_edited": greedy.edited,
        "out_edited_features": greedy.features,
        "out_residual_norms": greedy.residuals,
        "out_edited_features_clean_acts": clean.gather(1, greedy.features),
        "out_edited_features_cf_acts": counterfactual.gather(1, greedy.features),
        "out_feature_weights": weights,
        "out_removed_weight": core.removed_weight(weights, greedy.features),
        "out_l2_distance": core.l2_distance(target, greedy.edited / scale),
        "out_attribution_distance": core.attribution_distance(target, greedy.edited / scale, case.tensor("in_target_grad")),
        "out_f1_edited": guided.edited,
        "out_f1_features_removed": guided.removed,
        "out_f1_features_added": guided.added,
    }


def same_active_features(case: GoldenCase, key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    """Beyond the active features of an example the guided edit may name any inactive ones."""
    if key.startswith("out_f1_features"):
        weight, bias, centre = (case.arrays[f"in_{name}"] for name in ("W_enc", "b_enc", "b_dec"))
        inputs = case.arrays["in_A_clean" if key.endswith("removed") else "in_A_counterfactual"]
        active = (inputs - centre) @ weight + bias > 0
        for row, (mine, theirs) in enumerate(zip(ours.tolist(), reference.tolist(), strict=True)):
            assert len(mine) == len(theirs)
            assert [j for j in mine if active[row, j]] == [j for j in theirs if active[row, j]]
        return
    if np.issubdtype(reference.dtype, np.integer):
        assert np.array_equal(ours, reference), key
    else:
        entrywise(key, ours, reference)


test_golden = golden_test(
    "sae_evals",
    {
        "supervised_dictionary": Kind(supervised_dictionary, compare=least_squares_as_the_reference_cut_it),
        "f1_interpretability": Kind(f1_interpretability, compare=equal_up_to_ties),
        "sparse_edit": Kind(sparse_edit, compare=same_active_features),
    },
)
