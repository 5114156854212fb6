"""Composed retrieval with uncertainty: the maths against independent computations, the module and the callback in a Trainer."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods import (
    ComposedRetrieval,
    ContentStyleCompositor,
    EmbeddedWords,
    LSTMText,
    ResidualCompositor,
    ResNetTrunk,
    TransformerText,
    VectorTrunk,
)
from lit_methods.callbacks import UncertaintyRegularizer
from lit_methods.datamodules import ShiftedClassesDataModule
from lit_methods.distributed import rank
from lit_methods.retrieval.cir_uncertainty.core import (
    augment_targets,
    best_of_gallery,
    coarse_weight,
    composed_info_nce,
    on_sphere,
    precision_at,
    recall_at,
    uncertainty_loss,
)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def composed(**arguments):
    torch.manual_seed(0)
    parts = VectorTrunk(64, 16, 12), EmbeddedWords(6, 5), ResidualCompositor(12, 5, 16)
    return ComposedRetrieval(*parts, **({"width": 32, "learning_rate": 0.05} | arguments))


def small_data(**arguments):
    return ShiftedClassesDataModule(**({"num_train": 60, "num_gallery": 40, "pairs_per_epoch": 24, "batch_size": 8} | arguments))


# ---- maths -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_a_targets_own_statistics_against_numpy(dtype):
    f, a, b = (draws(3, 6, seed=k, dtype=dtype) for k in range(3))
    found = augment_targets(f, a, b, alpha_scale=0.5, beta_scale=2.0)
    x, n, m = (value.double().numpy() for value in (f, a, b))
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    alpha, beta = 0.5 * (1 + std * n), 2.0 * (mean + std * m)
    wanted = alpha * (x - mean) / np.sqrt(x.var(1, keepdims=True) + 1e-5) + beta
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(found.features.numpy(), wanted, rtol=tolerance, atol=tolerance)
    assert found.features.dtype == dtype


def test_a_constant_target_stays_finite_and_bad_shapes_are_refused():
    found = augment_targets(torch.full((1, 4), 3.0), torch.ones(1, 4), torch.ones(1, 4))
    torch.testing.assert_close(found.features, torch.full((1, 4), 3.0))  # std 0: alpha 1, beta the mean
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        augment_targets(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="one target a query"):
        composed_info_nce(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="augmented ones"):
        uncertainty_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3), 0.5)


def test_the_losses_against_a_loop():
    q, t, a = (draws(4, 5, seed=k) for k in range(3))
    exact = np.mean([-math.log(math.exp(q[i] @ t[i]) / sum(math.exp(q[i] @ t[j]) for j in range(4))) for i in range(4)])
    coarse = np.mean([-math.log(math.exp(q[i] @ a[i]) / sum(math.exp(q[i] @ a[j]) for j in range(4))) for i in range(4)])
    s = a.numpy().std(ddof=1)
    found = uncertainty_loss(q, t, a, 0.3)
    assert float(found.info_nce) == pytest.approx(exact)
    assert float(found.uncertainty) == pytest.approx(0.5 * (math.exp(-s) * coarse + s))
    assert float(found.loss) == pytest.approx(0.3 * float(found.uncertainty) + 0.7 * exact)
    assert float(composed_info_nce(q[:1], t[:1])) == 0.0
    assert (coarse_weight(0.0), coarse_weight(1.0, 2.0)) == (1.0, pytest.approx(math.exp(-2)))


def test_a_batch_of_one_has_finite_losses_and_bf16_is_made_wide():
    q = on_sphere(draws(1, 8), 4.0)
    found = uncertainty_loss(q, q, q, 1.0)
    assert all(value.isfinite() for value in found)
    x = draws(4, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = uncertainty_loss(x, x + 1, x - 1, 0.5).loss
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, uncertainty_loss(x, x + 1, x - 1, 0.5).loss, rtol=0, atol=0)


def test_ranking_leaves_the_own_image_last_and_cuts_k():
    gallery = torch.eye(4, dtype=torch.float64)
    queries = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    labels, places = torch.tensor([5, 6, 6, 7]), torch.arange(4)
    found = best_of_gallery(queries, gallery, torch.tensor([6, 5]), labels, torch.tensor([0, -1]), places, top_k=9, rows=1)
    assert found.places.tolist() == [[1, 2, 3, 0], [3, 2, 1, 0]]
    assert found.hits.tolist() == [[True, True, False, False], [False, False, False, True]]
    assert recall_at(found.hits, (1, 3, 50)).tolist() == [0.5, 0.5, 1.0]
    assert precision_at(found.hits, (2, 50)).tolist() == [0.5, pytest.approx(3 / 8)]
    none = best_of_gallery(queries[:0], gallery, labels[:0], labels, labels[:0], places, 2)
    assert none.hits.shape == (0, 2)


# ---- networks --------------------------------------------------------------------------------------------------------------------------


def test_networks_have_the_shapes_that_they_say():
    ids, mask = torch.tensor([[1, 2, 0], [3, 3, 4]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **sizes}
    for encoder in (EmbeddedWords(9, 6), LSTMText(9, 4, 6), TransformerText(config=config, width=6)):
        assert encoder(ids, mask).shape == (2, 6)
        padded = encoder.eval()(torch.cat([ids, ids[:, :1]], 1), torch.cat([mask, mask[:, :1] * 0], 1))
        torch.testing.assert_close(padded, encoder(ids, mask))  # padding changes nothing
    for stride, side in ((False, 2), (True, 4)):
        trunk = ResNetTrunk("resnet18", pretrained=False, stride=stride)
        assert trunk(torch.zeros(1, 3, 64, 64)).shape == (1, trunk.channels, side, side)
    assert ResNetTrunk("resnet18", pretrained=False, library="timm").channels == 512
    with pytest.raises(ValueError, match="no model of torchvision"):
        ResNetTrunk("resnet", pretrained=False)
    with pytest.raises(ValueError, match="layer1 to layer4"):
        ResNetTrunk("vgg11", pretrained=False)


def test_the_compositor_sees_what_the_text_says():
    torch.manual_seed(0)
    compositor = ContentStyleCompositor(4, 3, 2).double()
    image = draws(2, 4, 3, 3)
    one, other = compositor(image, draws(2, 3)), compositor(image, draws(2, 3, seed=1))
    assert not torch.allclose(one, other)
    _, attention = compositor.with_attention(image, draws(2, 3))
    torch.testing.assert_close(attention.sum(-1), torch.full((2, 2, 9), 2.0, dtype=torch.float64))
    assert compositor.train()(image[:1, :, :1, :1], draws(1, 3)).isfinite().all()  # a map of one place


# ---- the module ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"norm_scale": 0.0}, "norm_scale"),
        ({"width": 1}, "width"),
        ({"loss": "triplet"}, "regularised, info_nce"),
        ({"momentum": 1.0}, "momentum"),
        ({"drop": 0.0}, "drop"),
        ({"milestones": [3, -1]}, r"milestones\[1\]"),
    ],
)
def test_bad_arguments(wrong, said):
    with pytest.raises(ValueError, match=said):
        composed(**wrong)


def test_parts_and_data_that_do_not_fit():
    with pytest.raises(ValueError, match="set channels to 12"):
        ComposedRetrieval(VectorTrunk(64, 16, 12), EmbeddedWords(6, 5), ResidualCompositor(13, 5, 16))
    with pytest.raises(ValueError, match="set its vocab_size to 12"):
        tiny_trainer(max_epochs=1).fit(composed(), datamodule=small_data(max_shift=9))
    with pytest.raises(KeyError, match="the batch needs reference, target"):
        composed().training_step({"image": torch.zeros(1)}, 0)
    with pytest.raises(ValueError, match="has none: set max_steps or max_epochs"):
        tiny_trainer(max_epochs=-1).fit(composed(), datamodule=small_data())


@pytest.mark.parametrize("loss", ["regularised", "info_nce", "uncertainty", "fixed"])
def test_each_loss_and_its_gamma(loss):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val" not in name})

    trainer = tiny_trainer(max_epochs=2, callbacks=[Watch()], log_every_n_steps=1, precision="bf16-mixed")
    module = composed(loss=loss, schedule="step", noise="gaussian" if loss == "fixed" else "statistics")
    trainer.fit(module, datamodule=small_data())
    gammas = [row["cir_uncertainty/gamma"] for row in seen]
    wanted = {"info_nce": [0.0] * 6, "uncertainty": [1.0] * 6, "fixed": [0.5] * 6, "regularised": [math.exp(-k / 6) for k in range(6)]}
    assert gammas == pytest.approx(wanted[loss])
    for row in seen:
        if loss != "info_nce":
            parts = row["cir_uncertainty/gamma"] * row["cir_uncertainty/uncertainty"]
            parts += (1 - row["cir_uncertainty/gamma"]) * row["cir_uncertainty/info_nce"]
            assert row["cir_uncertainty/loss"] == pytest.approx(parts, rel=1e-5)
    assert 0 <= float(trainer.callback_metrics["cir_uncertainty/val_recall_at_50"]) <= 1
    assert float(trainer.callback_metrics["cir_uncertainty/val_gallery"]) == 40
    assert module.dashboard_media()["cir_uncertainty/searches"].alt.startswith("4 queries")


def test_the_weight_falls_over_the_planned_epochs_also_in_a_second_fit():
    module, data = composed(), small_data()
    for epochs in (2, 4):
        trainer = tiny_trainer(max_epochs=epochs, limit_val_batches=0)
        trainer.fit(module, datamodule=data)
        assert float(trainer.callback_metrics["cir_uncertainty/gamma"]) == pytest.approx(math.exp(-(epochs - 1) / epochs))
    trainer = tiny_trainer(max_steps=5, max_epochs=-1, limit_val_batches=0)  # 3 steps an epoch: 2 epochs are planned
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["cir_uncertainty/gamma"]) == pytest.approx(math.exp(-0.5))


def test_a_text_encoder_of_its_own_rate_and_the_steps_down():
    module = composed(text_rate=0.01, warmup_epochs=2, milestones=[3], learning_rate=1.0)
    rates = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, *_):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    tiny_trainer(max_epochs=4, limit_train_batches=1, limit_val_batches=0, callbacks=[Watch()]).fit(module, datamodule=small_data())
    assert [row[0] for row in rates] == pytest.approx([0.01, 0.505, 1.0, 0.1])
    assert [row[1] for row in rates] == pytest.approx([0.0001, 0.00505, 0.01, 0.001])


def test_a_killed_run_ends_like_a_whole_one(tmp_path):
    whole, resumed = kill_and_resume(lambda: (composed(), small_data(), []), 6, 4, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(whole, resumed)


def test_an_evaluation_counts_every_row_once():
    trainer, module, data = tiny_trainer(), composed(), small_data(eval_batch_size=7)
    (figures,) = trainer.validate(module, datamodule=data, verbose=False)
    rows = [module.encode(batch) for batch in data.val_dataloader()]
    twice = [*rows, *rows[:3]]  # as a sampler that fills up the ranks would give
    module._kept = [(numbers, features.detach()) for numbers, features in twice]
    logged = {}
    module.log_dict = lambda values, **_: logged.update(values)
    module._log_evaluation("val")
    assert logged == pytest.approx(figures)
    answers = trainer.predict(module, datamodule=data)
    assert sum(len(answer["features"]) for answer in answers) == 80


def _both_ranks(gather):
    data = small_data(batch_size=4)
    module = composed(gather=gather, loss="regularised" if gather else "info_nce")
    tiny_trainer(devices=2, strategy="ddp", max_epochs=1).fit(module, datamodule=data)
    noise = composed(gather=gather)
    noise.trainer = tiny_trainer()
    f = torch.ones(2, 32)
    f[:, ::2] = 2
    return cloned_state(module), float(module.trainer.callback_metrics["cir_uncertainty/val_recall_at_10"]), noise.augmented(f, 0), rank()


def test_two_processes():
    first, second = run_two_processes(_both_ranks, True)
    assert_state_dicts_equal(first[0], second[0])
    assert first[1] == second[1]
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)  # one draw for the rows of all ranks
    one, other = run_two_processes(_both_ranks, False)
    assert not torch.allclose(one[2], other[2]), "noise must differ between ranks"


def _gathered(rows):
    module = composed(loss="info_nce", gather=True, learning_rate=0.5, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    mine = {name: value[rank() :: 2] for name, value in rows.items()}
    loader = DataLoader([mine], batch_size=None)
    trainer = tiny_trainer(devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, limit_val_batches=0)
    trainer.fit(module, loader)
    return cloned_state(module)


def test_gathered_targets_with_gradient_are_one_process_with_the_whole_batch():
    data = small_data(batch_size=8)
    data.setup("fit")
    rows = next(iter(data.train_dataloader()))
    order = [*range(0, 8, 2), *range(1, 8, 2)]
    alone = composed(loss="info_nce", learning_rate=0.5, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    batch = {name: value[order] for name, value in rows.items()}
    tiny_trainer(max_epochs=1, limit_val_batches=0).fit(alone, DataLoader([batch], batch_size=None))
    for state in run_two_processes(_gathered, rows):
        for name, value in cloned_state(alone).items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class Views(pl.LightningModule):
    """Two views through one encoder, with a loss of its own; it returns a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Linear(6, 64)

    def training_step(self, batch, batch_idx):
        a, b = nn.functional.normalize(self.encoder(batch), dim=1), nn.functional.normalize(self.encoder(batch.flip(1)), dim=1)
        self.log("own", loss := nn.functional.cross_entropy(16 * a @ b.T, torch.arange(len(a))))
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def loader():
    return DataLoader(draws(16, 6, dtype=torch.float32), batch_size=8)


def regularizer(**arguments):
    return UncertaintyRegularizer(**({"query": "encoder", "target": "encoder", "query_call": 0, "target_call": 1} | arguments))


def test_the_callback_weighs_the_modules_own_loss():
    trainer = tiny_trainer(max_epochs=2, callbacks=[regularizer()], log_every_n_steps=1)
    module = Views()
    trainer.fit(module, loader())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    gamma = math.exp(-0.5)
    assert logged["uncertainty/gamma"] == pytest.approx(gamma)
    assert logged["uncertainty/own"] == pytest.approx(logged["own"])
    assert logged["uncertainty/loss"] == pytest.approx(gamma * logged["uncertainty/uncertainty"] + (1 - gamma) * logged["own"])
    plain = Views()
    tiny_trainer(max_epochs=2).fit(plain, loader())
    assert not torch.allclose(plain.encoder.weight, module.encoder.weight)
    assert left_behind(Views, regularizer, loader()) == {}


def test_the_callback_resumes_and_refuses(tmp_path):
    rows = DataLoader(draws(16, 6, dtype=torch.float32), batch_size=16)
    whole, resumed = kill_and_resume(lambda: (Views(), rows, [regularizer(schedule="step")]), 4, 3, tmp_path)
    assert_state_dicts_equal(whole, resumed)
    with pytest.raises(ValueError, match="set query_call=0 and target_call=1"):
        UncertaintyRegularizer(query="encoder", target="encoder")
    with pytest.raises(ValueError, match="target_call is 2, and encoder was called 2 times"):
        tiny_trainer(max_epochs=1, callbacks=[regularizer(target_call=2)]).fit(Views(), loader())
    with pytest.raises(ValueError, match="matches no submodule"):
        tiny_trainer(max_epochs=1, callbacks=[regularizer(query="tower")]).fit(Views(), loader())
