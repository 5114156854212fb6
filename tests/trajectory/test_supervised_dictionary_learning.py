"""Supervised matrix factorisation by a Trainer against the page's loop: LPGD, and block descent with drawn columns, past a validation."""

import pytest
import torch

from lit_methods import SupervisedMatrixFactorization
from lit_methods.datamodules import PlantedDirectionsDataModule
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import lift_factors, random_factors
from lit_methods.seeds import own_seed
from trajectories import assert_same_logs, assert_same_state, page_loop, run


def drawn(what):
    """The run's own random numbers."""
    return torch.Generator().manual_seed(own_seed(f"supervised_dictionary_learning {what}", 5))


def columns_of(step):
    return torch.rand(3, 30, generator=drawn(f"columns {step}")).argsort(dim=1)[:, :6]


@pytest.mark.parametrize("model", ["filter", "feature"])
@pytest.mark.parametrize("solver", ["lpgd", "bcd"])
def test_a_run_is_the_loop(model, solver):
    data = PlantedDirectionsDataModule(num_rows=40, num_features=6, num_covariates=2, test_share=0.25, steps_per_epoch=3)
    module = SupervisedMatrixFactorization(
        model, solver, rank=3, xi=0.5, step_size=0.05, step_decay=0.4, radius=3.0, radius_decay=0.5, column_share=0.2, seed=5
    )
    logs = run(module, data, max_epochs=2, limit_val_batches=1.0)

    batch = data.train_set[0]
    x, labels, covariates = batch["features"].T, batch["label"].double()[None], batch["covariates"].T
    factors = random_factors(6, 30, 2, 3, drawn("start"))
    state = (factors if solver == "bcd" else lift_factors(factors, model))._asdict()
    options = {"xi": 0.5, "step_size": 0.05, "step_decay": 0.4, "radius": 3.0, "radius_decay": 0.5}
    columns = columns_of if model == "feature" else None
    wanted = page_loop("supervised_dictionary_learning").train(
        x, labels, covariates, state, 6, model, solver, columns_of=columns, **options
    )
    assert_same_logs(logs, wanted, 1e-6)  # logged in float32
    assert_same_state({name: value for name, value in module.state_dict().items() if name in state}, state, 1e-12)
    assert wanted[-1]["factorization/loss"] < wanted[0]["factorization/loss"]
