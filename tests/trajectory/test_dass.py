"""DASS's search by a Trainer against the page's loop, through its three phases; and ScorePruning against a loop of the score functions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from lit_methods import DASSSearch, SearchNetwork
from lit_methods.callbacks import ScorePruning
from lit_methods.callbacks.sparsity.score_masks import scaled_scores, score_mask, scored_weight
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


def supernet(dtype):
    torch.manual_seed(0)
    return SearchNetwork(2, 3, 1, ["none", "max_pool_3x3", "sep_conv_3x3"], in_channels=1, num_classes=4).to(dtype)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_search_is_the_loop(dtype, order):
    halves = zip(labelled(6, dtype, shape=(1, 6, 6)), reversed(labelled(6, dtype, shape=(1, 6, 6))), strict=True)
    batches = [own | {f"search_{name}": value for name, value in other.items()} for own, other in halves]
    network = supernet(dtype)
    module = DASSSearch(copy.deepcopy(network), num_classes=4, keep=0.4, pretrain_steps=2, prune_steps=2, finetune_steps=2, order=order)
    logs = run(module, batches)
    wanted = page_loop("dass").train(network, batches, keep=0.4, steps=(2, 2, 2), order=order)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert network.genotype() == module.network.genotype()


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_score_pruning_is_a_loop(dtype):
    network, batches = small_mlp(dtype), labelled(6, dtype)
    module = PlainClassifier(
        copy.deepcopy(network), lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    )
    logs = run(module, batches, [ScorePruning(0.3, pretrain_steps=2, prune_steps=2, prune_learning_rate=0.5)])

    layers = [network[0], network[2], network[4]]
    scores, masks = [], []
    wanted = []
    for step, batch in enumerate(batches):
        if step == 2:
            scores = [scaled_scores(layer.weight).requires_grad_() for layer in layers]
            optimizer = torch.optim.SGD(scores, lr=0.5, momentum=0.9, weight_decay=0.01)
        if step == 4:
            masks = [score_mask(score, 0.3) for score in scores]
        if step in (0, 4):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        if step in (2, 3):
            masks = [score_mask(score, 0.3) for score in scores]
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * (step - 2) / 2)) / 2
        x = batch["image"]
        for place, layer in enumerate(layers):
            weight = scored_weight(layer.weight, scores[place], masks[place]) if masks else layer.weight
            x = F.linear(x, weight, layer.bias)
            x = F.relu(x) if place < 2 else x
        loss = F.cross_entropy(x, batch["label"])
        network.zero_grad()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted.append({"loss": loss.detach()})
    with torch.no_grad():
        for layer, mask in zip(layers, masks, strict=True):
            layer.weight.mul_(mask)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
