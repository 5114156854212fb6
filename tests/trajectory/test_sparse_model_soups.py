"""IMP by a Trainer against the page's loop: dense training, pruning, momentum, rates; and the average of two candidates."""

import copy

import pytest
import torch
from torch import nn

from lit_methods.callbacks import IMP
from lit_methods.callbacks.sparsity.sparse_model_soups.core import recalibrating, uniform_soup
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


def decaying(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.01)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"},
    }


@pytest.mark.parametrize("schedule", ["LLR", "ALLR", "SLR"])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, schedule):
    network, batches = small_mlp(dtype), labelled(5, dtype)
    module = PlainClassifier(copy.deepcopy(network), decaying)
    pruning = IMP(sparsity=0.8, phases=2, dense_epochs=1, retrain_epochs=2, schedule=schedule)
    logs = run(module, batches, [pruning], max_epochs=5)

    parts = decaying(network.parameters())
    weights = {f"{place}.weight": network[place].weight for place in (0, 2, 4)}
    scheduler = parts["lr_scheduler"]["scheduler"]
    wanted = page_loop("sparse_model_soups").train(network, weights, parts["optimizer"], scheduler, batches * 5, 5, 10, 0.8, 2, schedule)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    gone = [int((weight == 0).sum()) for weight in weights.values()]
    assert sum(gone) == pytest.approx(0.8 * sum(weight.numel() for weight in weights.values()), abs=1)


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_candidates_of_one_phase_and_their_average(dtype, tmp_path):
    batches = labelled(4, dtype)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    torch.save({f"network.{name}": value for name, value in dense.state_dict().items()}, tmp_path / "dense.pt")

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    loop, ours, theirs = page_loop("sparse_model_soups"), [], []
    for order in (batches, batches[::-1]):
        module = PlainClassifier(copy.deepcopy(dense), sgd)
        run(module, order, [IMP(sparsity=0.5, phases=1, retrain_epochs=1, start=str(tmp_path / "dense.pt"))])
        ours.append(module.network.state_dict())
        network = copy.deepcopy(dense)
        weights = {"0": network[0].weight, "3": network[3].weight}
        loop.train(network, weights, sgd(network.parameters()), None, order, 0, 4, 0.5, 1, history=[0.1])
        theirs.append(network.state_dict())
    for one, other in zip(ours, theirs, strict=True):
        assert_same_state(one, other, TOLERANCE[dtype])
    soup = copy.deepcopy(dense).train()
    soup.load_state_dict(uniform_soup(ours))
    with recalibrating(soup):
        for batch in batches:
            soup(batch["image"])
    assert_same_state(soup, loop.average(copy.deepcopy(dense), theirs, batches), TOLERANCE[dtype])
    assert float((soup[0].weight == 0).double().mean()) > 0.3
