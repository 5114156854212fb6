"""top-AFA's rule and the AFA evaluation, on data, on modules that aren't ours, and in two processes."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers import Classifier, assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods import SparseAutoencoder, TopAFA
from lit_methods.callbacks import AFAEvaluation
from lit_methods.datamodules import ImagePatchesDataModule, SparseMixturesDataModule
from lit_methods.sparse_autoencoders.top_afa.core import afa_loss, band_slopes, decoder_coherence, topafa, zf_metrics


def mixtures(batch_size=16):
    return SparseMixturesDataModule(width=6, atoms=12, active=[1, 2], num_train=192, num_val=40, batch_size=batch_size)


def small():
    torch.manual_seed(0)
    return TopAFA(width=6, features=24, learning_rate=1e-2, dead_after=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_features_is_the_one_whose_norm_is_nearest(dtype):
    generator = torch.Generator().manual_seed(0)
    u, centred = torch.randn(20, 9, generator=generator, dtype=dtype), 2 * torch.randn(20, 4, generator=generator, dtype=dtype)
    norms = 0.5 + torch.rand(9, generator=generator, dtype=dtype)
    found = topafa(u, centred, norms)
    for row, x, code in zip(u, centred, found, strict=True):
        a, target = row.clamp(min=0), float(x.norm())
        order = (a * norms).argsort(descending=True).tolist()
        roots = [sum(float(a[i] * norms[i]) ** 2 for i in order[: j + 1]) ** 0.5 for j in range(8)] + [1e4]
        last = min(range(9), key=lambda j: (abs(roots[j] - target), j))
        wanted = torch.zeros_like(a)
        wanted[order[: last + 1]] = a[order[: last + 1]]
        torch.testing.assert_close(
            code, wanted, rtol=0, atol=0 if dtype == torch.float64 else 1e-2
        )  # the least entries are lost in float32


def test_edges_of_the_rule():
    norms = torch.ones(3)
    assert torch.equal(topafa(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 2), norms), torch.tensor([[0.0, 0.0, 3.0]]))
    assert torch.equal(topafa(-torch.ones(1, 3), torch.ones(1, 2), norms), torch.zeros(1, 3)), "nothing positive: nothing kept"
    assert torch.equal(topafa(torch.tensor([[1.0, 2.0, 3.0]]), torch.full((1, 2), 1e4), norms), torch.tensor([[1.0, 2.0, 3.0]])), "all"
    assert torch.equal(topafa(torch.tensor([[2.0]]), torch.ones(1, 2), torch.ones(1)), torch.tensor([[2.0]]))
    assert topafa(torch.ones(0, 3), torch.ones(0, 2), norms).shape == (0, 3)
    code = torch.zeros(2, 3, requires_grad=True)
    afa_loss(code, torch.ones(2, 2)).backward()
    assert torch.equal(code.grad, torch.zeros(2, 3)), "a norm of 0 has gradient 0"
    with torch.autocast("cpu", torch.bfloat16):
        assert topafa(torch.randn(2, 3).bfloat16(), torch.randn(2, 2), norms).dtype == torch.bfloat16
    assert band_slopes(1.0)[1] == band_slopes(2.0)[1] == float("inf")


def test_eps_lbo_is_0_where_both_norms_agree():
    directions = torch.eye(4) * 2
    found = zf_metrics(torch.tensor([[3.0, 4, 0, 0]]), torch.tensor([[1.5, 2.0, 0, 0]]), directions, torch.zeros(4))
    assert found.norm_z == found.norm_f == 5
    assert found.eps_lbo == found.normalized_mse == 0
    half = zf_metrics(torch.tensor([[3.0, 4, 0, 0]]), torch.tensor([[1.5, 0.0, 0, 0]]), directions, torch.tensor([0, 0, 0, 4.0]))
    assert half.norm_f == 5, "the bias is a feature"
    largest, mean = decoder_coherence(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
    assert largest == 0
    assert mean == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"afa_coeff": -1.0}, "afa_coeff is -1"), ({"features": 0}, "features is 0"), ({"width": 1}, "width is 1")]
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopAFA(**{"width": 6, "features": 24, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_samples": 0}, "max_samples is 0"), ({"pairs_among": 1}, "pairs_among is 1"), ({"bands": [-1.0]}, "bands is -1")],
)
def test_bad_arguments_of_the_evaluation(arguments, message):
    with pytest.raises(ValueError, match=message):
        AFAEvaluation(**arguments)


def test_a_killed_run_ends_like_a_whole_one(tmp_path):
    whole, resumed = kill_and_resume(lambda: (small(), mixtures(), [AFAEvaluation()]), 6, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def figures(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(("top_afa/", "sae/val"))}


def in_two():
    module = small()
    trainer = tiny_trainer(devices=2, strategy="ddp", max_steps=4, limit_val_batches=1.0, callbacks=[AFAEvaluation()])
    trainer.fit(module, datamodule=mixtures(8))
    trainer.validate(module, datamodule=mixtures(8), verbose=False)
    return cloned_state(module), figures(trainer)


def test_two_processes_end_like_one():
    module = small()
    trainer = tiny_trainer(max_steps=4, limit_val_batches=1.0, callbacks=[AFAEvaluation()])
    trainer.fit(module, datamodule=mixtures(16))
    trainer.validate(module, datamodule=mixtures(16), verbose=False)
    (state, logged), _ = run_two_processes(in_two)
    assert_state_dicts_equal(state, cloned_state(module), rtol=1e-4, atol=1e-6)
    assert logged == pytest.approx(figures(trainer), rel=1e-4, abs=1e-6)


class Plain(nn.Module):
    """An autoencoder that isn't ours: no bias, raw inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6, 12))

    def encode(self, x):
        return (x @ self.weight).relu()

    def decode(self, code):
        return code @ self.weight.T

    def decoder_directions(self):
        return self.weight.T


class Host(Classifier):
    def __init__(self):
        super().__init__(nn.Linear(6, 2))
        self.sae = Plain()

    def training_step(self, batch, batch_idx):
        return (self.sae.decode(self.sae.encode(batch["activation"])) - batch["activation"]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


def test_it_judges_any_module_and_draws_its_layers():
    data, judge = mixtures(), AFAEvaluation(autoencoder="sae", layer="layer", max_samples=30, pairs_among=5)
    data.setup("validate")
    data.val_set.tensors["layer"] = torch.arange(40) % 2 + 3
    trainer = tiny_trainer(limit_val_batches=1.0, callbacks=[judge])
    found = trainer.validate(Host(), datamodule=data, verbose=False)[0]
    x = data.val_set.tensors["activation"][:30]
    f = x[:, :6].clamp(min=0)
    gap = (x.square().sum(1) - f.square().sum(1)).abs() / (11 * f.square().sum(1))
    assert found["top_afa/val_eps_lbo"] == pytest.approx(float(gap.mean()), rel=1e-5)
    media = judge.dashboard_media()
    assert [row[0] for row in sorted(media["top_afa/layers"].rows)] == [3.0, 4.0]
    assert media["top_afa/zf_plot"].pixels.shape == (520, 640, 3)
    assert media["top_afa/violins"].pixels.std() > 0
    assert sum(row[1] for row in media["top_afa/layers"].rows) == int(np.isfinite(gap.numpy()).sum())


def test_it_refuses_what_is_no_autoencoder_and_leaves_nothing_behind():
    with pytest.raises(ValueError, match="AFAEvaluation: Classifier has no encode"):
        tiny_trainer(callbacks=[AFAEvaluation()]).validate(Classifier(nn.Linear(6, 2)), datamodule=mixtures())
    loader = torch.utils.data.DataLoader([{"activation": torch.randn(4, 6)}], batch_size=None)
    assert not left_behind(lambda: SparseAutoencoder(width=6, features=12, settings={"k": 2}), AFAEvaluation(), loader)


def test_patches_are_of_the_photographs():
    data = ImagePatchesDataModule(num_train=400, num_val=100)
    data.setup("fit")
    patches = data.train_set.tensors["activation"]
    assert patches.shape == (400, 64)
    torch.testing.assert_close(patches.mean(dim=1), torch.zeros(400), rtol=0, atol=1e-5)
    assert patches.std() == pytest.approx(1.0, rel=1e-3)
    neighbours, far = (patches.view(-1, 8, 8)[:, 0] * patches.view(-1, 8, 8)[:, row] for row in (1, 7))
    assert neighbours.mean() > far.mean(), "pixels beside each other are alike"
