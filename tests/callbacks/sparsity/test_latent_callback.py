"""LatentCallback: what a technique that trains latent weights gets from its base, shown by one that trains changes of a few rows alone."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from helpers import Classifier, Images, assert_state_dicts_equal, cloned_state, fingerprint, kill_and_resume, tiny_trainer
from lit_methods.callbacks.sparsity.latent import LatentCallback, LatentWeight, ParametrizedWeight
from lit_methods.datamodules.loaders import make_loader

ROWS = 2


class Change(LatentWeight):
    """Latent weight -> the pretrained weight, with the latent one in its first rows alone."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("start", weight.detach().clone(), persistent=False)

    def forward(self, weight):
        return torch.cat([weight[:ROWS], self.start[ROWS:].to(weight)])


class TrainRows(LatentCallback):
    """Trains the first rows of each chosen weight."""

    def __init__(self, targets=(), skip=()):
        super().__init__(targets, skip)
        self.finished = []

    def make_layers(self, trainer, pl_module, chosen, places):
        return {name: ParametrizedWeight(place.module, place.attribute, Change(place.weight)) for name, place in places.items()}

    def finish(self, trainer, pl_module):
        self.finished.append(trainer.global_step)

    def state(self):
        return {"latent": {name: layer.latent.detach() for name, layer in self._layers.items()}}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, latent in state["latent"].items():
            self._layers[name].latent.copy_(latent)


def plain():
    torch.manual_seed(2)
    layers = [nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    return Classifier(nn.Sequential(*layers))


def loader():
    return torch.utils.data.DataLoader(Images(), batch_size=4)


def test_the_inner_layer_alone_is_chosen_and_an_ordinary_module_is_left():
    module, callback = plain(), TrainRows()
    before, start = {name: found for name, found in fingerprint(module).items() if name}, module.network[3].weight.detach().clone()
    tiny_trainer(max_steps=5, callbacks=[callback]).fit(module, loader())
    assert {name: found for name, found in fingerprint(module).items() if name} == before
    weight = module.network[3].weight.detach()
    assert torch.equal(weight[ROWS:], start[ROWS:])
    assert not torch.equal(weight[:ROWS], start[:ROWS])
    assert list(callback.state_dict()["latent"]) == ["network.3.weight"], "the state stays readable"
    assert callback.finished == [5, 5], "behind the last batch, and when training ends"


def test_a_killed_run_ends_bit_equal(tmp_path):
    def build():
        return plain(), make_loader(Images(), batch_size=4, shuffle=True, seed=3), [TrainRows()]

    whole, resumed = kill_and_resume(build, steps=10, kill_at=4, tmp_path=tmp_path)
    assert_state_dicts_equal(resumed, whole)


def test_a_run_that_raises_leaves_an_ordinary_module():
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop")

    module = plain()
    names = list(module.state_dict())
    with pytest.raises(RuntimeError, match="stop"):
        tiny_trainer(max_steps=5, callbacks=[TrainRows(), Fails()]).fit(module, loader())
    assert list(cloned_state(module)) == names
    assert not hasattr(module.network[3], "parametrizations")


def test_a_second_one_on_the_same_weight_is_refused():
    with pytest.raises(ValueError, match="belongs to another parametrisation"):
        tiny_trainer(max_steps=1, callbacks=[TrainRows(["network.3"]), TrainRows(["network.*"])]).fit(plain(), loader())
