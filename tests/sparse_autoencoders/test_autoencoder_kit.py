"""The kit of sparse autoencoders: sparse products, activations, dead features, and the module around them."""

import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import SparseAutoencoder
from lit_methods.datamodules import AttributeSumsDataModule, SparseMixturesDataModule
from lit_methods.sparse_autoencoders import activations, dead
from lit_methods.sparse_autoencoders.dictionary import decode, dense, keep_entries, project, project_gradient, standardize, unit_rows

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def small(**arguments):
    torch.manual_seed(0)
    return SparseAutoencoder(**{"width": 6, "features": 40, "settings": {"k": 2}, "learning_rate": 1e-2, **arguments})


def batches(count=4, size=16, width=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"activation": torch.randn(size, width, generator=generator)} for _ in range(count)]


def trained(module, data=None, **options):
    Trainer(max_epochs=1, **{**QUIET, **options}).fit(module, torch.utils.data.DataLoader(data or batches(), batch_size=None))
    return module


@pytest.mark.parametrize("features", [4, 200])  # a dense product, and sparse ones
@pytest.mark.parametrize("name", ["topk", "batchtopk", "abstopk"])
def test_sparse_codes_give_what_dense_ones_give(name, features):
    generator = torch.Generator().manual_seed(0)
    x, w, v = (torch.randn(5, 7, generator=generator), *torch.randn(2, features, 7, generator=generator))
    x, w, v = (one.double().requires_grad_() for one in (x, w, v))
    found = decode(getattr(activations, name)(project(x, w), k=3), v)
    grads = torch.autograd.grad(found.square().sum(), (x, w, v))

    u = x @ w.T
    scores = u.abs() if name == "abstopk" else u
    if name == "batchtopk":
        mask = torch.zeros(5 * features, dtype=torch.bool)
        mask[scores.flatten().argsort(descending=True)[:15]] = True
        mask = mask.view_as(u)
    else:
        mask = scores.argsort(dim=1, descending=True).argsort(dim=1) < 3
    z = (u if name == "abstopk" else u.relu()) * mask
    wanted = z @ v
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted.square().sum(), (x, w, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_sparse_code_is_decoded_without_its_dense_form():
    x, w = torch.randn(64, 8), torch.randn(4096, 8, requires_grad=True)
    code = activations.topk(project(x, w), k=4)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t):
        decode(code, torch.randn(4096, 8, requires_grad=True)).sum().backward()
    assert max(largest) < 64 * 4096


@pytest.mark.parametrize("taken", [3, 60])  # a sparse code of dead features beside the sparse code, and a dense one
def test_both_losses_share_the_pre_activations(taken):
    module = small(features=80, aux_features=taken, dead_after=1).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    found = module.losses({"activation": x})
    found.loss.backward()
    assert found.aux > 0
    encoder, decoder, bias = (p.detach().clone().requires_grad_() for p in (module.encoder, module.decoder, module.decoder_bias))
    u = ((x - bias) @ encoder.T).relu()
    z = u * (u.argsort(dim=1, descending=True).argsort(dim=1) < 2)
    alive = (z > 0).any(dim=0)
    left = u * ~alive
    left = left * (left.argsort(dim=1, descending=True).argsort(dim=1) < taken)
    residual = x - z @ decoder - bias
    loss = residual.square().mean() + (left @ decoder - residual).square().mean() / 32
    torch.testing.assert_close(found.loss, loss)
    wanted = torch.autograd.grad(loss, (encoder, decoder, bias))
    for parameter, grad in zip((module.encoder, module.decoder, module.decoder_bias), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("k", [1, 9])  # 9 of 5 features: all
@pytest.mark.parametrize("name", ["topk", "batchtopk", "abstopk"])
def test_few_samples_and_many_entries(name, k, batch):
    u = torch.randn(batch, 5)
    z = dense(getattr(activations, name)(u, k=k))
    assert z.shape == (batch, 5)
    if k == 9:
        torch.testing.assert_close(z, u if name == "abstopk" else u.relu())
    assert decode(getattr(activations, name)(u, k=k), torch.randn(5, 3)).shape == (batch, 3)


def test_the_choice_is_made_in_float32_and_products_may_be_bfloat16():
    module = small().bfloat16()
    u = torch.randn(3, 40, dtype=torch.bfloat16)
    assert activations.topk(u, 2).values.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = small().losses(batches()[0])
        found.loss.backward()
    assert found.reconstruction.dtype == torch.float32
    assert module.encode(torch.randn(3, 6)).shape == (3, 40)


def test_jumprelu_and_its_penalty_move_the_threshold():
    u = torch.tensor([[0.5, 1.2, 1.04, -2.0]], dtype=torch.float64, requires_grad=True)
    log_threshold = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    z = activations.jumprelu(u, log_threshold, bandwidth=0.1)
    torch.testing.assert_close(z, torch.tensor([[0, 1.2, 1.04, 0]], dtype=torch.float64))
    grads = torch.autograd.grad(z.sum(), (u, log_threshold))
    torch.testing.assert_close(grads[0], torch.tensor([[0, 1.0, 1.0, 0]], dtype=torch.float64))
    torch.testing.assert_close(grads[1], torch.tensor([0, 0, -10.0, 0], dtype=torch.float64))
    l0 = activations.l0(z.detach().requires_grad_(), log_threshold, bandwidth=0.1)
    assert l0 == 2
    torch.testing.assert_close(torch.autograd.grad(l0, log_threshold)[0], torch.tensor([0, 0, -10.0, 0], dtype=torch.float64))


def test_gated_and_bias_adapted_codes():
    projection, bias = torch.tensor([[2.0, 3.0, 0.5]]), torch.tensor([-1.0, -4.0, 0.0])
    gated = activations.gated(projection + bias, projection, torch.full((3,), 2.0).log(), torch.tensor([0.0, 0.0, -3.0]))
    torch.testing.assert_close(gated, torch.tensor([[4.0, 0.0, -2.0]]))
    torch.testing.assert_close(activations.gba(projection + bias, projection), torch.tensor([[2.0, 0.0, 0.5]]))
    torch.testing.assert_close(activations.gba(projection + bias, projection, jump=False), torch.tensor([[1.0, 0.0, 0.5]]))


def test_normalization_and_its_inverse():
    x = torch.randn(5, 6) * 3 + 1
    normal, mean, std = standardize(x)
    torch.testing.assert_close(normal.std(dim=1), torch.ones(5), rtol=1e-4, atol=0)
    torch.testing.assert_close(normal * std + mean, x, rtol=1e-4, atol=1e-4)
    for kind, norm in (("norm_1", 1.0), ("norm_sqrt", 6**0.5)):
        module = trained(small(normalize=kind, bias_from_data=True, learning_rate=1e-12), batches(1))
        first = batches(1)[0]["activation"]
        assert module.normalized(first).norm(dim=1).mean() == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(module.decoder_bias, module.normalized(first).mean(dim=0))
        code = module.encode(first)
        torch.testing.assert_close(module.decode(code, like=first), module.decode(code) * module.input_scale)
        scale = module.input_scale.clone()
        assert trained(module, batches(1, seed=5)).input_scale == scale, "a second fit keeps the first batch's statistics"


def test_the_encoder_begins_as_asked():
    assert torch.equal(small(encoder_start="decoder").encoder, small().decoder)
    norms = small(width=200, features=400).encoder.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(400), rtol=0, atol=0.2)  # sqrt(2 x 200 / 400)


def test_rows_keep_unit_norm_and_the_gradient_turns_them():
    weight, grad = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close((project_gradient(weight, grad) * weight).sum(dim=1), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    after = trained(small(renormalize="after"))
    torch.testing.assert_close(after.decoder.norm(dim=1), torch.ones(40))


def test_the_projection_comes_behind_the_clipping():
    """Clipping changes the length of the gradient and no angle; a projection before it would leave the rest too long."""
    module, seen = small(), []
    original = module.project_decoder
    module.project_decoder = lambda: (seen.append(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])), original())
    trained(module, gradient_clip_val=1e-3)
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for norm in seen)
    assert ((module.decoder.grad * module.decoder).sum(dim=1).abs() < 1e-4).all()


def test_dead_features_are_counted_by_magnitude():
    z = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.0, 0.0]])
    assert dead.active_features(z).tolist() == [True, False, True]
    sparse = keep_entries(z, torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert dead.active_features(sparse).tolist() == [True, False, False]
    assert dead.count_inactive(torch.tensor([3, 3]), torch.tensor([True, False])).tolist() == [0, 4]


@pytest.mark.parametrize("signed", [False, True])
def test_the_loss_of_dead_features(signed):
    u, residual, decoder = torch.randn(4, 9, requires_grad=True), torch.randn(4, 3, requires_grad=True), torch.randn(9, 3)
    is_dead = torch.arange(9) >= 4
    loss = dead.auxiliary_loss(u, is_dead, residual, decoder, 2, 0.5, signed)
    alone = u[:, 4:] if signed else u[:, 4:].relu()
    chosen = alone.abs().argsort(dim=1, descending=True).argsort(dim=1) < 2
    wanted = 0.5 * F.mse_loss((alone * chosen) @ decoder[4:], residual)
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(torch.autograd.grad(loss, (u, residual)), torch.autograd.grad(wanted, (u, residual)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert dead.auxiliary_loss(u, torch.zeros(9, dtype=torch.bool), residual, decoder) == 0


def test_dead_features_begin_anew_out_of_bad_samples():
    module = small(features=40, activation="relu", settings=None, resample_at=[3], dead_after=2, learning_rate=1e-3, aux_coeff=0.0)
    with torch.no_grad():
        module.encoder_bias[:20] = -100.0  # never active
    before = module.decoder.detach().clone()
    data = batches(3)
    optimizers = []
    module.configure_optimizers, build = lambda: optimizers.append(build()) or optimizers[0], module.configure_optimizers
    trained(module, data)
    rows, directions = module.decoder.detach()[:20], F.normalize(data[2]["activation"] - module.decoder_bias.detach(), dim=1)
    assert ((rows @ directions.T).max(dim=1).values > 0.999).all()
    assert not torch.equal(before[:20], rows)
    torch.testing.assert_close(module.decoder.detach()[20:], before[20:], rtol=0, atol=0.02)
    assert (module.encoder_bias[:20] == 0).all()
    assert (module.num_batches_not_active[:20] == 0).all()
    assert (optimizers[0].state[module.encoder]["exp_avg"][:20] == 0).all()
    assert (optimizers[0].state[module.encoder]["exp_avg"][20:] != 0).any()


VARIANTS = {
    "relu": {"penalties": {"l1": 0.01}},
    "gated": {"penalties": {"gate_l1": 0.01, "gate_reconstruction": 1.0}},
    "jumprelu": {"penalties": {"l0": 0.01}, "centre": False},
    "topk": {"settings": {"k": 2}},
    "batchtopk": {"settings": {"k": 2}},
    "topafa": {"penalties": {"afa": 0.03}, "normalize": "sample"},
    "abstopk": {"settings": {"k": 2, "per_batch": True}},
    "gba": {"tied": True, "output_scale": 0.1, "renormalize": "after", "aux_coeff": 0.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name):
    module = small(activation=name, **{"settings": None, **VARIANTS[name]})
    x = batches()[0]["activation"]
    before = (module.reconstruct(x) - x).square().mean()
    trained(module, batches() * 10, detect_anomaly=False)
    assert (module.reconstruct(x) - x).square().mean() < before
    torch.testing.assert_close(module.decode(module.encode(x), like=x), module.reconstruct(x))
    directions = module.encode(x) @ module.decoder_directions + module.decoder_bias
    torch.testing.assert_close(directions, module.decode(module.encode(x)), rtol=1e-4, atol=1e-5)


def test_a_variant_of_ones_own_is_a_function_and_a_line(tmp_path, monkeypatch):
    (tmp_path / "my_codes.py").write_text(
        textwrap.dedent(
            """
            def above(u, share, decoder_norms):
                assert decoder_norms.shape == u.shape[1:]
                return u * (u > share * u.max(dim=1, keepdim=True).values)

            def sizes(code, gradient):
                return (code.abs().sum(dim=1) * gradient.abs().sum(dim=1)).mean()
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = small(activation="my_codes.above", settings={"share": 0.5}, penalties={"my_codes.sizes": 0.1})
    with pytest.raises(ValueError, match=r"my_codes.sizes needs gradient: give it under settings, or in the batches"):
        trained(module)
    trained(module, [{**one, "gradient": torch.ones(16, 6)} for one in batches()])
    import my_codes

    assert small(activation=my_codes.above, settings={"share": 0.5}).hparams["activation"] == "my_codes.above"
    del sys.modules["my_codes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"k": 41}}, "k=41, and there are 40 features"),
        ({"settings": None}, "activation topk needs k"),
        ({"settings": {"k": 2, "kk": 3}}, "settings has kk, and topk takes k"),
        ({"activation": "topkk"}, "did you mean topk"),
        ({"activation": "no_such.module"}, "can't be imported"),
        ({"activation": "torch.relu"}, r"'torch.relu' is built into Python or torch, .* such as def mine\(u\): return relu\(u\)"),
        ({"activation": max}, "activation <built-in function max> is built into Python"),
        ({"penalties": {"builtins.max": 1.0}}, "penalty 'builtins.max' is built into Python"),
        ({"activation": "torch.nn.ReLU"}, "is a class: give a function"),
        ({"activation": torch.nn.ReLU()}, r"activation ReLU\(\) is a ReLU: give a function"),
        ({"activation": "math.pi"}, "is a float: give a function"),
        ({"activation": 3}, "activation 3 is a int: give a function"),
        ({"activation": "gc.isenabled"}, "has no first argument"),
        ({"normalize": "unit"}, "normalize is 'unit': give one of none, sample"),
        ({"normalize": "sample", "width": 1}, "width is 1"),
        ({"dead_after": 0}, "dead_after is 0"),
        ({"aux_coeff": -1.0}, "aux_coeff is -1.0"),
        ({"resample_at": [0]}, "resample_at is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_bad_batches():
    module = small()
    with pytest.raises(ValueError, match="width 7, and width is 6"):
        module.losses({"activation": torch.randn(3, 7)})
    with pytest.raises(TypeError, match=r"the batch is \['image'\]"):
        module.losses({"image": torch.randn(3, 6)})


def mixtures(batch_size=16):
    return SparseMixturesDataModule(width=6, atoms=12, active=[1, 2], num_train=192, num_val=32, batch_size=batch_size)


@pytest.mark.parametrize(
    "options", [{}, {"resample_at": [3], "resample_warmup": 3, "dead_after": 1}, {"normalize": "norm_1", "bias_from_data": True}]
)
def test_a_killed_run_ends_like_a_whole_one(tmp_path, options):
    whole, resumed = kill_and_resume(lambda: (small(**options), mixtures(), []), 6, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def figures(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("sae/val")}


def in_two(options):
    module = small(**options)
    trainer = tiny_trainer(devices=2, strategy="ddp", max_steps=4, limit_val_batches=1.0, val_check_interval=4)
    trainer.fit(module, datamodule=mixtures(8))
    return cloned_state(module), figures(trainer)


@pytest.mark.parametrize("options", [{"dead_after": 1}, {"normalize": "norm_1", "bias_from_data": True}])
def test_two_processes_end_like_one(options):
    alone = small(**options)
    trainer = tiny_trainer(max_steps=4, limit_val_batches=1.0, val_check_interval=4)
    trainer.fit(alone, datamodule=mixtures(16))
    (first, logged), (second, _) = run_two_processes(in_two, options)
    assert len(logged) == 4
    assert logged == pytest.approx(figures(trainer), rel=1e-4, abs=1e-6)
    assert_state_dicts_equal(first, second)
    assert_state_dicts_equal(first, cloned_state(alone), rtol=1e-4, atol=1e-6)


def test_evaluation_is_over_all_samples():
    module, data = small(normalize="sample"), mixtures()
    found = tiny_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)[0]
    x = data.val_set.tensors["activation"]
    z, output = module.encode(x), module.reconstruct(x).detach()
    assert found["sae/val_nmse"] == pytest.approx(float((output - x).square().sum() / x.square().sum()), rel=1e-5)
    assert found["sae/val_l0"] == pytest.approx(float((z != 0).sum() / len(x)))
    assert found["sae/val_dead"] == pytest.approx(float((z == 0).all(dim=0).float().mean()))


def test_made_activations_are_what_they_say():
    data = SparseMixturesDataModule(width=8, atoms=16, active=[3, 5], signed=True, num_train=500, num_val=10)
    data.setup("fit")
    parts = data.train_set.tensors
    torch.testing.assert_close(parts["code"] @ data.directions, parts["activation"])
    counts, sizes = (parts["code"] != 0).sum(dim=1), parts["code"][parts["code"] != 0].abs()
    assert sorted(counts.unique().tolist()) == [3, 5]
    assert sizes.min() >= 0.5
    assert sizes.max() <= 1.5
    assert 0.4 < (parts["code"] < 0).sum() / counts.sum() < 0.6
    torch.testing.assert_close(data.directions.norm(dim=1), torch.ones(16))

    data = SparseMixturesDataModule(width=8, atoms=16, active=[3], coefficients="normal", unit_norm=True, num_train=500, num_val=10)
    data.setup("fit")
    assert data.train_set.tensors["activation"].norm(dim=1).mean() == pytest.approx(1.0, rel=1e-4)
    assert (data.train_set.tensors["code"] >= 0).all()

    data = AttributeSumsDataModule(names=5, magnitude=0.3, noise=0.0, num_train=100, num_val=10)
    data.setup("fit")
    parts = data.train_set.tensors
    torch.testing.assert_close(sum(data.codes[name][parts[name]] for name in ("io", "s", "pos")), parts["activation"])
    torch.testing.assert_close(data.codes["s"].norm(dim=1), torch.full((5,), 0.3))


@pytest.mark.parametrize(("arguments", "message"), [({"active": []}, "active is empty"), ({"active": [13], "atoms": 12}, "active is 13")])
def test_bad_arguments_of_made_activations(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseMixturesDataModule(**arguments)
