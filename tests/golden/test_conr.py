"""ConR, LDS and FDS against the authors' code; see tests/golden/data/conr/README.md for the origin of each kind."""

import numpy as np
import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.imbalanced_regression.conr import core as conr
from lit_methods.callbacks.imbalanced_regression.fds import core as fds
from lit_methods.tasks.imbalanced_regression import metrics, weights

HYPER = {"window": "similarity_window", "temperature": "temperature", "eta": "eta"}


def loss(case: GoldenCase) -> dict[str, Tensor]:
    features = case.tensor("in_features").requires_grad_()
    rarity = case.tensor("in_weights") if case.hp("use_weights") else None
    data = case.tensor("in_targets"), case.tensor("in_preds"), rarity
    found = conr.conr_loss(features, *data, **{ours: case.hp(theirs) for ours, theirs in HYPER.items()})
    (grad,) = torch.autograd.grad(found.loss, features)
    counts = {"out_num_negatives": found.negatives, "out_num_positives": found.positives}
    return {"out_loss": found.loss, "out_grad_features": grad} | counts


def loss_dense(case: GoldenCase) -> dict[str, Tensor]:
    features = case.tensor("in_features").requires_grad_()
    data = (case.tensor(f"in_{name}") for name in ("depth", "pred_depth", "weights"))
    found = conr.conr_dense_loss(features, *data, **{ours: case.hp(theirs) for ours, theirs in HYPER.items()})
    return {"out_loss": found.loss, "out_grad_features": torch.autograd.grad(found.loss, features)[0]}


def lds_weights(case: GoldenCase) -> dict[str, np.ndarray]:
    names = {"reweight": "reweight", "kernel": "kernel", "kernel_size": "kernel_size", "sigma": "sigma", "num_bins": "max_target"}
    arguments = {ours: case.hp(theirs) for ours, theirs in names.items()}
    return {"out_weights": weights.label_weights(case.arrays["in_labels"], lds=bool(case.hp("lds")), **arguments)}


def smoothing(case: GoldenCase) -> dict[str, Tensor]:
    buckets = fds.Buckets(case.hp("bucket_start"), case.hp("bucket_num") - 1)
    features, labels = case.tensor("in_epoch_features"), case.tensor("in_epoch_labels")
    probe, probe_labels = case.tensor("in_batch_features"), case.tensor("in_batch_labels").flatten()
    window = fds.bucket_kernel("gaussian", case.hp("kernel_size"), case.hp("sigma"))
    start = case.hp("start_update")
    state = fds.initial_state(buckets, features.shape[-1], start)
    smoothed = []
    for epoch in range(len(features)):
        smoothed.append(fds.calibrate(probe, probe_labels, state, buckets, epoch, case.hp("start_smooth")))
        state = fds.begin_epoch(state, epoch, window)
        sums = fds.MomentSums(len(buckets) + 2)
        sums.add(features[epoch], buckets.places(labels[epoch]))
        state = fds.update(state, sums.moments(), epoch, start, case.hp("momentum"))
    return {
        "out_smoothed_batch_per_epoch": torch.stack(smoothed),
        "out_running_mean": state.mean,
        "out_running_var": state.variance,
        "out_smoothed_mean_last_epoch": state.smoothed_mean,
        "out_smoothed_var_last_epoch": state.smoothed_variance,
    }


def shot_metrics(case: GoldenCase) -> dict[str, Tensor]:
    predictions, labels = case.tensor("in_preds"), case.tensor("in_labels")
    counts = metrics.label_counts(labels, case.tensor("in_train_labels"))
    metric = metrics.ShotMetrics(case.hp("many_shot_thr"), case.hp("low_shot_thr"))
    metric.update(predictions, labels, counts)
    return {f"out_{name}": value for name, value in metric.compute().items()}


test_golden = golden_test(
    "conr",
    {
        "loss": Kind(loss, atol=1e-8),
        "loss_dense": Kind(loss_dense, atol=1e-8),
        "lds_weights": Kind(lds_weights, rtol=1e-5, atol=1e-8),
        "fds": Kind(smoothing, rtol=1e-4, atol=1e-5),
        "shot_metrics": Kind(shot_metrics, atol=1e-8),
    },
)
