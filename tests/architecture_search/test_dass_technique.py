"""DASS's search: phases, what moves in them, kills between the two steps, two processes, genotypes and their networks, refusals."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import Killed, assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import DASSSearch, GenotypeClassifier, GenotypeNetwork, SearchNetwork, SparseConv2d, SparseLinear
from lit_methods.architecture_search.dass.core import architecture_gradient, derive_cell, mixed_operation
from lit_methods.architecture_search.genotype import KNOWN, Genotype, draw_genotype, read_genotype
from lit_methods.architecture_search.layers import scored_layers
from lit_methods.architecture_search.networks import SIZES, drop_path
from lit_methods.architecture_search.space import OPERATIONS, FactorizedReduce, make_operation
from lit_methods.callbacks import ExactResume, ScorePruning
from lit_methods.datamodules import DigitsDataModule, SearchHalvesDataModule

OPERATIONS_TRIED = ["none", "skip_connect", "sep_conv_3x3"]


def supernet(**kwargs):
    torch.manual_seed(0)
    return SearchNetwork(**{"channels": 2, "cells": 3, "nodes": 1, "operations": OPERATIONS_TRIED, "in_channels": 1} | kwargs)


class MixedLinear(nn.Module):
    """Two sparse linear maps, mixed; without a norm, so that a batch is the mean of its parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(SparseLinear(64, 10) for _ in range(2))
        self.alpha = nn.Parameter(torch.tensor([0.3, -0.2]))

    def alphas(self):
        return {"alpha": self.alpha}

    def forward(self, images):
        return mixed_operation(self.alpha.softmax(-1), [layer(images.flatten(1)) for layer in self.maps])

    def genotype(self):
        return KNOWN["dass_10"]


def search(network=None, **kwargs):
    steps = {"pretrain_steps": 2, "prune_steps": 2, "finetune_steps": 2, "keep": 0.3}
    return DASSSearch(network or MixedLinear(), **steps | kwargs)


def halves(batch_size=8, num_train=64):
    return SearchHalvesDataModule(DigitsDataModule(num_train=num_train), batch_size=batch_size)


def fit(module, data=None, callbacks=(), **kwargs):
    trainer = tiny_trainer(**{"max_epochs": -1, "limit_val_batches": 0, "callbacks": list(callbacks)} | kwargs)
    trainer.fit(module, data or halves())
    return trainer


# ---- phases ------------------------------------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """State behind each batch."""

    def __init__(self):
        self.states = []

    def on_train_start(self, trainer, module):
        self.states.append(cloned_state(module))

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append(cloned_state(module))


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_phase_moves_what_is_its_own():
    watch, module = Watch(), search(supernet())
    trainer = fit(module, callbacks=[watch])
    steps = [moved(*pair) for pair in zip(watch.states, watch.states[1:], strict=False)]
    assert len(steps) == 6
    assert trainer.global_step == 10  # alpha steps in four of the six batches
    of = {kind: [{name for name in step if name.endswith(kind)} for step in steps] for kind in ("scores", "weight", "mask")}
    for place, step in enumerate(steps):
        alpha = {name for name in step if "alpha" in name}
        assert bool(alpha) == (place in (0, 1, 4, 5)), place
        assert bool(of["weight"][place]) == (place in (0, 1, 4, 5))
        assert bool(of["scores"][place]) == (place in (2, 3))
    assert not of["mask"][0]
    assert of["mask"][2]
    assert not of["mask"][4]
    for layer in scored_layers(module.network).values():
        assert int((~layer.mask).sum()) == int((1 - 0.3) * layer.mask.numel())
    weights, alphas = (optimizer.param_groups[0]["params"] for optimizer in trainer.optimizers)
    assert not {id(p) for p in weights} & {id(p) for p in alphas}
    assert [tuple(p.shape) for p in alphas] == [(2, 3), (2, 3)]


def test_the_gradient_of_alpha_changes_nothing_else():
    module = search(supernet())
    module.network.train()
    batch = {"image": torch.rand(4, 1, 8, 8), "label": torch.tensor([1, 2, 3, 4])}
    before = cloned_state(module)
    loss = module._loss_of(batch["image"], batch["label"])
    found = architecture_gradient(loss, loss, dict(module.network.alphas()), dict(module.moved()), rate=0.1)
    assert_state_dicts_equal(cloned_state(module), before)
    assert all(torch.isfinite(value).all() for value in found.gradient.values())
    assert any(value.abs().max() > 0 for value in found.gradient.values())


def test_finite_differences_are_the_exact_gradient():
    network = MixedLinear().double()
    for layer in network.maps:
        layer.set_keep(0.3, rescore=True)
    module = search(network)
    module.phase = "finetune"
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 64, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (16,), generator=generator)
    losses = [module._loss_of(images[part], labels[part]) for part in (slice(8), slice(8, None))]
    memory = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in module.moved().items()}
    options = {"rate": 0.5, "weight_decay": 1e-3, "momentum": 0.9, "buffers": memory}
    first, second, exact = (
        architecture_gradient(*losses, dict(network.alphas()), dict(module.moved()), **options, order=order).gradient["alpha"]
        for order in ("first", "second", "exact")
    )
    torch.testing.assert_close(second, exact, rtol=1e-5, atol=1e-9)
    assert (first - exact).abs().max() > 1e-4


def test_without_pruning_it_is_darts():
    module = search(supernet(), keep=1.0, prune_steps=0, order="first")
    fit(module)
    assert all(layer.mask.all() for layer in scored_layers(module.network).values())
    assert module.weights_done == 4


def test_alpha_may_move_while_scores_learn():
    module = search(alpha_while_pruning=True)
    assert fit(module).global_step == 12


def test_a_second_fit_begins_anew():
    module = search()
    fit(module)
    watch = Watch()
    assert fit(module, callbacks=[watch]).global_step == 10
    assert watch.states[1]["network.maps.0.mask"].all()


# ---- kill and resume ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [2, 5, 8])
def test_a_killed_search_ends_bit_equal(kill_at, tmp_path):
    def build():
        return search(supernet()), halves(), [ExactResume()]

    whole, resumed = kill_and_resume(build, 10, kill_at, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


class KillBetween(pl.Callback):
    """Saves before the step of one of the optimisers in one batch, and ends the run."""

    def __init__(self, batch, path, optimizer=0):
        self.batch, self.path, self.optimizer = batch, path, optimizer

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if optimizer is trainer.optimizers[self.optimizer] and module.weights_done == self.batch:
            trainer.save_checkpoint(self.path)
            raise Killed


@pytest.mark.parametrize(("batch", "optimizer"), [(1, 0), (4, 0), (4, 1)])
def test_a_checkpoint_in_the_middle_of_a_batch_goes_on_with_what_is_left(batch, optimizer, tmp_path):
    def run(*callbacks, ckpt_path=None):
        pl.seed_everything(0, verbose=False)
        module = search(supernet())
        trainer = tiny_trainer(max_epochs=-1, limit_val_batches=0, callbacks=[ExactResume(), *callbacks], default_root_dir=tmp_path)
        trainer.fit(module, halves(), ckpt_path=ckpt_path, weights_only=True)
        return cloned_state(module)

    whole = run()
    with pytest.raises(Killed):
        run(KillBetween(batch, tmp_path / "between.ckpt", optimizer))
    state = torch.load(tmp_path / "between.ckpt", weights_only=True)["dass"]
    assert (state["alpha_done"], state["weights_done"]) == (batch + (optimizer == 0), batch)
    assert_state_dicts_equal(run(ckpt_path=tmp_path / "between.ckpt"), whole)


def test_a_finished_search_is_not_done_again(tmp_path):
    module = search()
    trainer = fit(module, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    done, again = cloned_state(module), search()
    (tmp_path / "genotype.json").unlink()
    trainer = tiny_trainer(max_epochs=-1, limit_val_batches=0, default_root_dir=tmp_path, callbacks=[ExactResume()])
    trainer.fit(again, halves(), ckpt_path=tmp_path / "done.ckpt", weights_only=True)
    assert trainer.global_step == 10
    assert_state_dicts_equal(cloned_state(again), done)
    assert read_genotype(tmp_path / "genotype.json") == KNOWN["dass_10"]


def train_once(batch_size, devices=1, tmp_path=None):
    module = search(weight_decay=1e-2)
    fit(module, halves(batch_size), devices=devices, strategy="ddp" if devices > 1 else "auto")
    return cloned_state(module)


def one_of_two():
    return train_once(4, devices=2)


def test_two_processes_are_one():
    whole = train_once(8)
    for state in run_two_processes(one_of_two):
        assert_state_dicts_equal(state, whole, atol=1e-6, rtol=1e-5)


def test_bf16_keeps_the_gradient_of_alpha_in_float32():
    seen = []

    class Dtypes(MixedLinear):
        def forward(self, images):
            logits = super().forward(images)
            seen.append(logits.dtype)
            return logits

    fit(search(Dtypes()), precision="bf16-mixed", max_steps=2)
    assert seen == [torch.float32] * 4 + [torch.bfloat16]


# ---- layers and cells --------------------------------------------------------------------------------------------------------------------


def test_layers_see_the_mask_of_their_scores_and_learn_through_it():
    layer = SparseConv2d(2, 3, 3, padding=1, bias=False).double()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))
    layer.set_keep(0.25, learning=True, rescore=True)
    largest = layer.weight.abs().flatten().topk(54 - int(0.75 * 54)).indices
    assert set(layer.mask.flatten().nonzero().flatten().tolist()) == set(largest.tolist())
    layer(x).square().sum().backward()
    assert (layer.scores.grad != 0).all()
    assert ((layer.weight.grad != 0) == layer.mask).all()
    with torch.no_grad():
        layer.scores.copy_(layer.scores.flip(0))
    assert not torch.equal(layer.eval()(x), layer.train()(x))  # evaluation waits for refresh
    layer.refresh()
    assert torch.equal(layer.eval()(x), layer.train()(x))


@pytest.mark.parametrize("name", OPERATIONS[1:])
@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 8), (2, 7)])
def test_operations_keep_channels_and_divide_the_size(name, stride, size):
    assert make_operation(name, 4, stride)(torch.randn(2, 4, size, size)).shape == (2, 4, -(-size // stride), -(-size // stride))


def test_factorized_reduction_looks_at_pixels_one_apart():
    reduce = FactorizedReduce(1, 2).eval()
    with torch.no_grad():
        reduce.even.weight.fill_(1)
        reduce.odd.weight.fill_(1)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    even, odd = reduce(x)[0]
    torch.testing.assert_close(even, x[0, 0, ::2, ::2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(odd, x[0, 0, 1::2, 1::2], rtol=1e-4, atol=1e-4)


def test_equal_edges_and_operations_go_to_the_first():
    assert derive_cell(torch.zeros(5, 3), 2).tolist() == [[1, 0], [1, 1], [1, 0], [1, 1]]
    alpha = torch.zeros(5, 3)
    alpha[:, 0] = 9  # none, however strong
    alpha[4, 2] = 10
    assert derive_cell(alpha, 2).tolist() == [[1, 0], [1, 1], [2, 2], [1, 0]]
    with pytest.raises(ValueError, match="2 nodes have 5 edges"):
        derive_cell(torch.zeros(4, 3), 2)
    with pytest.raises(ValueError, match="no operation but"):
        derive_cell(torch.zeros(2, 1), 1)


def test_dropped_paths_are_whole_samples_and_keep_the_mean():
    torch.manual_seed(0)
    x = drop_path(torch.ones(2000, 2, 1, 1), torch.tensor(0.25))
    rows = x.flatten(1)
    torch.testing.assert_close(rows.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (rows[:, 0] == rows[:, 1]).all()
    assert abs(float(x.mean()) - 1) < 0.05


def test_the_four_sizes():
    assert SIZES == {"tiny": (30, 16), "small": (36, 20), "medium": (86, 12), "large": (108, 14)}
    with torch.device("meta"):
        network = GenotypeNetwork("dass_5", size="small")
    assert len(network.cells) == 20
    assert network.cells[0].first[1].out_channels == 36
    assert network.cells[-1].first[1].out_channels == 144


def test_final_network_trains_prunes_and_loads_plainly(tmp_path):
    def network():
        return GenotypeNetwork("dass_10", channels=4, cells=3, in_channels=1, auxiliary=True)

    module = GenotypeClassifier(network(), drop_path=0.2)
    pruning = ScorePruning(keep=0.2, pretrain_steps=2, prune_steps=2)
    trainer = tiny_trainer(max_steps=6, limit_val_batches=0, callbacks=[pruning])
    with pytest.raises(ValueError, match="auxiliary head needs 5 x 5"):
        trainer.fit(module, DigitsDataModule(num_train=64, batch_size=8))
    images = [{"image": torch.rand(4, 1, 32, 32), "label": torch.randint(10, (4,))} for _ in range(6)]
    trainer = tiny_trainer(max_steps=6, limit_val_batches=0, callbacks=[ScorePruning(keep=0.2, pretrain_steps=2, prune_steps=2)])
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=None))
    plain = network()
    plain.load_state_dict(module.network.state_dict())
    for part in plain.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            assert int((part.weight == 0).sum()) >= int(0.8 * part.weight.numel())
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(plain.eval()(x), module.network.eval()(x))


def test_imagenet_stem_divides_by_eight_before_the_cells():
    with torch.device("meta"):
        network = GenotypeNetwork("dass_5", channels=4, cells=3, num_classes=7, stem="imagenet", auxiliary=True)
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 7)


# ---- genotypes ---------------------------------------------------------------------------------------------------------------------------


def test_a_genotype_comes_back_from_its_file(tmp_path):
    network = supernet(nodes=2, operations=list(OPERATIONS))
    found = network.genotype()
    found.save(tmp_path / "genotype.json")
    assert read_genotype(tmp_path / "genotype.json") == found
    assert isinstance(found, Genotype)
    assert len(found.normal) == 4
    picture = draw_genotype(found)
    assert picture.dtype == np.uint8
    assert (picture < 200).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"normal": [["sep_conv_3x4", 0], ["skip_connect", 1]]},
            r"normal\[0\]: unknown operation 'sep_conv_3x4': did you mean sep_conv_3x3",
        ),
        ({"normal": [["none", 0], ["skip_connect", 1]]}, "unknown operation 'none'"),
        ({"reduce": [["skip_connect", 0], ["skip_connect", 2]]}, r"reduce\[1\]: predecessor 2 doesn't come before node 0: give 0 to 1"),
        ({"reduce": [["skip_connect", 0]]}, "two for each node"),
        ({"normal": [["skip_connect"], ["skip_connect", 1]]}, r"normal\[0\]: is \['skip_connect'\]"),
        ({"normal_concat": [7]}, "give a list of nodes from 2 to 2"),
    ],
)
def test_a_file_that_is_no_genotype_is_refused(change, message, tmp_path):
    edges = [["skip_connect", 0], ["sep_conv_3x3", 1]]
    content = {"normal": edges, "reduce": edges, "normal_concat": [2], "reduce_concat": [2]} | change
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        GenotypeNetwork(path, channels=4, cells=3)


def test_a_checkpoint_of_a_search_is_a_genotype_and_another_one_is_not(tmp_path):
    trainer = fit(search(supernet(nodes=2, operations=list(OPERATIONS))), max_steps=2, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "search.ckpt")
    assert read_genotype(tmp_path / "search.ckpt") == read_genotype(tmp_path / "genotype.json")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="the checkpoint of something else than a search"):
        read_genotype(tmp_path / "other.ckpt")


def test_a_missing_genotype_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="dass_10, dass_5"):
        GenotypeNetwork(tmp_path / "nothing.json")


# ---- data and refusals -------------------------------------------------------------------------------------------------------------------


def test_halves_share_no_image_and_partners_change():
    data = halves(num_train=20)
    data.setup("fit")
    samples = data.train_set
    first, second = set(samples.first.tolist()), set(samples.second.tolist())
    assert not first & second
    assert first | second == set(range(20))
    epochs = [samples.partners(epoch) for epoch in (0, 1)]
    assert all(set(found.tolist()) == second for found in epochs)
    assert not np.array_equal(*epochs)
    sample = samples[1, 3]
    assert set(sample) == {"image", "label", "search_image", "search_label"}
    assert torch.equal(sample["search_image"], samples.samples[int(epochs[1][3])]["image"])


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="no search_image and no search_label, only image, label"):
        fit(search(), DigitsDataModule(num_train=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, r"keep is 0.0: give the share"),
        ({"keep": 1e-20}, "leaves none"),
        ({"network": nn.Linear(2, 2)}, "no alphas"),
        ({"pretrain_steps": 0, "prune_steps": 0, "finetune_steps": 0}, "steps is 0"),
        ({"min_learning_rate": 1.0}, "at most learning_rate"),
        ({"order": "third"}, "give one of first, second, exact"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        search(**change)


def test_wrong_networks_are_refused():
    with pytest.raises(ValueError, match="cells is 2: give 3 or more"):
        supernet(cells=2)
    with pytest.raises(ValueError, match="there is no operation 'conv'"):
        supernet(operations=["conv"])
    with pytest.raises(ValueError, match="at least one that isn't 'none'"):
        supernet(operations=["none"])


def test_pure_half_precision_is_refused():
    with pytest.raises(ValueError, match="needs weights and gradients in float32"):
        fit(search(), precision="bf16-true")


def test_a_checkpoint_of_another_module_is_refused():
    with pytest.raises(ValueError, match="no state of a search"):
        search().on_load_checkpoint({})
