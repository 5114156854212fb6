"""BilevelLearning by a Trainer against the page's loop: MAID with probes, and HOAG, past a validation."""

import pytest
import torch

from lit_methods import BilevelLearning
from lit_methods.datamodules import QuadraticBilevelDataModule, WeightDecayDataModule
from lit_methods.inverse_problems.problems import make_problem
from lit_methods.seeds import own_seed
from trajectories import assert_same_logs, assert_same_state, page_loop, run


@pytest.mark.parametrize(("name", "method"), [("quadratic", "maid"), ("quadratic", "hoag"), ("weight_decay", "maid")])
def test_a_run_is_the_loop(name, method):
    make = {"quadratic": QuadraticBilevelDataModule, "weight_decay": WeightDecayDataModule}[name]
    data, beta = make(steps_per_epoch=2, seed=3), 0.05 if name == "quadratic" else 50.0
    module = BilevelLearning(name, method, epsilon=0.2, beta=beta, nu=1.25, seed=5, evaluation_accuracy=0.1)
    logs = run(module, data, max_epochs=2, limit_val_batches=1.0)

    problem = make_problem(name, data.train_set[0])
    probes = torch.Generator().manual_seed(own_seed("maid probes", 5))
    theta, x, wanted = page_loop("maid").train(problem, 4, method, probes, epsilon=0.2, beta=beta, nu=1.25, probe=name != "quadratic")
    assert_same_logs(logs, wanted, 1e-6)  # logged in float32
    assert_same_state(module.state_dict(), {"theta": theta, "x": x}, 1e-12)
    assert wanted[-1]["bilevel/loss"] < wanted[0]["bilevel/loss"]
