"""TCM: its pairs, on modules that aren't ours, over ranks, precision, accumulation, resume; the recipe MetricLearning."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.transformer import LightningTransformer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    compiled_classifier,
    fingerprint,
    kill_and_resume,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods import MLP, MetricLearning, ProxySoftmax
from lit_methods.callbacks import TCM, ExactResume
from lit_methods.callbacks.metric_learning.tcm import tcm_loss
from lit_methods.cli.main import main
from lit_methods.datamodules import OpenWorldDataModule
from lit_methods.datamodules.loaders import make_loader
from lit_methods.datamodules.metric_learning.base import ClassBalancedSampler
from lit_methods.runs.checkpoints import read_state_dict
from lit_methods.tasks.metric_learning.losses import proxy_softmax

TINY = {"num_train_classes": 6, "num_val_classes": 5, "per_class": 6, "classes_per_batch": 4, "samples_per_class": 3, "steps_per_epoch": 4}


def by_hand(embeddings, labels, margin_pos=0.9, margin_neg=0.5):
    """Pair by pair."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    hard = {True: [], False: []}
    for i in range(len(labels)):
        for j in range(len(labels)):
            alike, s = bool(labels[i] == labels[j]), (unit[i] * unit[j]).sum()
            if i != j and (s <= margin_pos if alike else s >= margin_neg):
                hard[alike].append(margin_pos - s if alike else s - margin_neg)
    return sum(torch.stack(part).mean() for part in hard.values() if part)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_over_hard_pairs_alone(dtype):
    torch.manual_seed(0)
    embeddings, labels = torch.randn(12, 3).to(dtype), torch.arange(12) % 4
    found = tcm_loss(embeddings, labels)
    assert found.loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.loss.double(), by_hand(embeddings.double(), labels), rtol=1e-5, atol=1e-6)
    apart = torch.eye(3).repeat(2, 1)
    easy = tcm_loss(apart.requires_grad_(), torch.arange(6) % 3)
    assert easy.loss == 0
    assert easy.hard_positives == easy.hard_negatives == 0
    assert torch.autograd.grad(easy.loss, apart)[0].abs().sum() == 0


def test_half_precision_computes_the_pairs_in_float32():
    torch.manual_seed(0)
    embeddings, labels = torch.randn(16, 8), torch.arange(16) % 4
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tcm_loss(embeddings, labels).loss
    assert mixed.dtype == torch.float32
    assert mixed == tcm_loss(embeddings, labels).loss


def test_a_margin_on_the_proxy_makes_the_loss_larger():
    torch.manual_seed(0)
    embeddings, proxies, labels = torch.randn(6, 4), torch.randn(3, 4), torch.arange(6) % 3
    plain = proxy_softmax(embeddings, proxies, labels)
    cosine = nn.functional.cosine_similarity(embeddings[:, None], proxies[None], dim=2)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(16 * cosine, labels))
    torch.testing.assert_close(proxy_softmax(embeddings, proxies, labels, margin=1e-4, margin_on="angle"), plain, rtol=1e-2, atol=1e-2)
    shifted = cosine - 0.2 * nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(proxy_softmax(embeddings, proxies, labels, margin=0.2), nn.functional.cross_entropy(16 * shifted, labels))
    assert proxy_softmax(embeddings, proxies, labels, margin=0.2, margin_on="angle") > plain


# ---- modules that aren't ours ----------------------------------------------------------------------------------------------------------


class OfflineTransformer(LightningTransformer):
    def prepare_data(self) -> None:
        """The demo would download its text here."""


def images(batch_size=12):
    return make_loader(Images(), batch_size, shuffle=True, seed=3, drop_last=True)


def timm_classifier():
    """A network that knows nothing of the term; its embeddings are what its last pooling puts out."""
    import timm

    torch.manual_seed(0)
    return Classifier(timm.create_model("resnet10t", num_classes=4))


def words():
    """Pairs of a word and the next one: the demo's classes."""
    tokens = torch.randint(0, 4, (12, 1), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens, tokens.flip(0)), batch_size=6)


STRANGERS = {
    "dict": (Classifier, images, "network.5"),
    "resnet18": (resnet_classifier, images, "network.avgpool"),
    "compiled": (compiled_classifier, images, "network.5"),
    "timm": (timm_classifier, images, "network.global_pool"),
    "transformer": (lambda: OfflineTransformer(vocab_size=4), words, "model.decoder"),  # shipped by Lightning
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_module_learns_from_the_term_and_is_left_as_it_was(name):
    build, data, embedding = STRANGERS[name]

    def run(*callbacks):
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        module = build()
        trainer = tiny_trainer(max_steps=2, limit_val_batches=0, callbacks=[*callbacks])
        trainer.fit(module, data())
        if callbacks:
            assert trainer.callback_metrics["tcm/hard_negatives"] + trainer.callback_metrics["tcm/hard_positives"] > 0
        return cloned_state(module), fingerprint(module)

    term = {"margin_pos": 1.0, "margin_neg": -1.0}
    (plain, after), (changed, after_term), (silent, after_silent) = (
        run(*callbacks) for callbacks in ([], [TCM(embedding, **term, weight=10.0)], [TCM(embedding, **term, weight=0.0)])
    )
    assert after_term == after_silent == after
    assert_state_dicts_equal(silent, plain)
    assert any(not torch.equal(changed[key], value) for key, value in plain.items())


YAML = """
model: {class_path: helpers.Classifier}
trainer:
  max_steps: 2
  limit_val_batches: 0
  log_every_n_steps: 1
  callbacks+:
    - class_path: TCM
      init_args: {embedding: network.5, margin_pos: 1.0, margin_neg: -1.0, weight: WEIGHT}
"""


def test_a_strangers_module_takes_the_term_from_yaml(tmp_path, monkeypatch):
    (tmp_path / "strange_pairs.py").write_text(
        "from lightning.pytorch import LightningDataModule\n"
        "from torch.utils.data import DataLoader\n"
        "from helpers import Images\n\n\n"
        "class StrangePairs(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return DataLoader(Images(), 12)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    weights = []
    for weight in ("0.0", "10.0"):
        file = tmp_path / f"{weight}.yaml"
        file.write_text("seed_everything: 0\ndata: {class_path: strange_pairs.StrangePairs}" + YAML.replace("WEIGHT", weight))
        assert main(["fit", "--config", str(file), "--run_root", str(tmp_path / weight), "--trainer.accelerator", "cpu"]) == 0
        (run,) = (tmp_path / weight).glob("*/*")
        logged = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any("tcm/hard_negatives" in record for record in logged)
        weights.append(read_state_dict(run / "checkpoints" / "last.ckpt"))
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_is_missing_is_said():
    for kwargs, problem in (
        ({"embedding": "nothing"}, "nothing"),
        ({"embedding": "network.*"}, "matches 8 submodules"),
        ({"embedding": "network.5", "labels": "class"}, "labels"),
        ({"embedding": "network.5", "labels": 0}, "one value a sample"),
    ):
        with pytest.raises(ValueError, match=problem):
            tiny_trainer(max_steps=1, limit_val_batches=0, callbacks=[TCM(**kwargs)]).fit(Classifier(), images())
    with pytest.raises(ValueError, match="calls backward itself"):
        tiny_trainer(max_steps=1, limit_val_batches=0, callbacks=[TCM("network.5")]).fit(TwoOptimisers(), images())
    with pytest.raises(ValueError, match="cosines"):
        TCM("network", margin_pos=0.2, margin_neg=0.5)


def test_views_share_the_labels_of_the_batch():
    callback = TCM("network", gather_ranks=False)
    torch.manual_seed(0)
    one, other, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 0, 1, 2])
    inputs = {"feature_calls": {"network": [one, other]}, "batch": {"label": labels}}
    expected = tcm_loss(torch.cat([one, other]), labels.repeat(2)).loss
    assert callback.term(inputs)[0] == expected
    assert callback.term({**inputs, "feature_calls": {"network": [torch.cat([one, other])]}})[0] == expected


# ---- the recipe ------------------------------------------------------------------------------------------------------------------------


def recipe(**kwargs):
    torch.manual_seed(1)
    return MetricLearning(MLP([64, 16, 8]), ProxySoftmax(6, 8), **kwargs)


def fit(data, callbacks, **kwargs):
    pl.seed_everything(0, verbose=False)
    module = recipe()
    trainer = tiny_trainer(callbacks=callbacks, **{"max_steps": 6, "limit_val_batches": 0, **kwargs})
    trainer.fit(module, data)
    return cloned_state(module), trainer


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    def build():
        return recipe(), OpenWorldDataModule(**TINY), [TCM("network"), ExactResume()]

    whole, resumed = kill_and_resume(build, 10, 6, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)


def two_ranks():
    state, trainer = fit(OpenWorldDataModule(**TINY), [TCM("network")], max_steps=4, devices=2, strategy="ddp")
    evaluator = tiny_trainer(devices=2, strategy="ddp")
    scores = evaluator.validate(trainer.lightning_module, OpenWorldDataModule(**TINY), verbose=False)[0]
    return state, {name: float(value) for name, value in scores.items()}


class Doubled(OpenWorldDataModule):
    """One process that sees the batches of two ranks at once."""

    def train_dataloader(self):
        parts = [
            list(ClassBalancedSampler(self.train_set, self.train_labels, 4, 3, batches=4, rank=rank, world_size=2)) for rank in range(2)
        ]
        draws = [draw for k in range(0, 4 * 12, 12) for part in parts for draw in part[k : k + 12]]
        return DataLoader(self.train_set, 24, sampler=draws, collate_fn=self.train_set.collate)


def test_two_processes_equal_one_that_sees_all_pairs():
    (state, scores), (other, _) = run_two_processes(two_ranks)
    assert_state_dicts_equal(other, state)
    whole, trainer = fit(Doubled(**TINY), [TCM("network")], max_steps=4)
    assert_state_dicts_equal(state, whole, atol=1e-6)
    single = tiny_trainer().validate(trainer.lightning_module, OpenWorldDataModule(**TINY), verbose=False)[0]
    assert set(single) == set(scores)
    assert single == pytest.approx(scores, abs=1e-4)


def test_accumulation_is_the_mean_over_micro_batches():
    seen = []

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    data = OpenWorldDataModule(**TINY)
    fit(data, [TCM("network"), Keep()], max_steps=1, accumulate_grad_batches=2)
    module = recipe()
    loader = iter(data.train_dataloader())
    for _ in range(2):
        batch = next(loader)
        embeddings = module(batch["image"])
        loss = module.loss(embeddings, batch["label"]) + tcm_loss(embeddings, batch["label"]).loss
        (loss / 2).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(seen[0][name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_bf16_trains():
    state, trainer = fit(OpenWorldDataModule(**TINY), [TCM("network")], precision="bf16-mixed")
    assert all(value.isfinite().all() for value in state.values())
    assert trainer.callback_metrics["tcm/loss"].dtype == torch.float32


def test_a_loss_of_pytorch_metric_learning_is_a_base_loss():
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="needs the extra metric-learning")
    module = MetricLearning(MLP([64, 16, 8]), losses.ProxyAnchorLoss(6, 8))
    before = cloned_state(module)
    trainer = tiny_trainer(max_steps=2, limit_val_batches=0, callbacks=[TCM("network")])
    trainer.fit(module, OpenWorldDataModule(**TINY))
    after = cloned_state(module)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert "loss.proxies" in trained
    assert not any(torch.equal(before[name], after[name]) for name in trained)
    assert trainer.callback_metrics["retrieval/loss"] > 0


def test_collapsed_embeddings_are_said_and_the_run_goes_on():
    module = recipe()
    with torch.no_grad():
        module.network.layers[1].weight.zero_()
        module.network.layers[1].bias.zero_()[0] = 1.0
    with pytest.warns(UserWarning, match="equally far apart"):
        (found,) = tiny_trainer().validate(module, OpenWorldDataModule(**TINY), verbose=False)
    assert "retrieval/val_opis" not in found
    assert 0 <= found["retrieval/val_recall_at_1"] <= 1


def test_the_curves_of_each_class_are_a_picture():
    module = recipe()
    tiny_trainer().validate(module, OpenWorldDataModule(**TINY), verbose=False)
    picture = module.dashboard_media()["retrieval/utility"]
    assert "5 classes" in picture.alt
    colours = {tuple(colour) for colour in picture.pixels.reshape(-1, 3).tolist()}
    assert {(200, 70, 60), (60, 130, 210), (20, 20, 20)} <= colours  # worst, best, mean


def test_evaluation_without_pairs_says_so():
    module = recipe()
    with pytest.warns(UserWarning, match="make no pairs"):
        found = tiny_trainer(limit_val_batches=1).validate(module, OpenWorldDataModule(**TINY, eval_batch_size=1), verbose=False)
    assert found == [{}]


def test_an_open_world_of_digits_keeps_the_higher_ones_unseen():
    data = OpenWorldDataModule(3, 4, 20, classes_per_batch=3, samples_per_class=5, steps_per_epoch=2, eval_batch_size=80, source="digits")
    data.setup("fit")
    train, (held_out,) = list(data.train_dataloader()), list(data.val_dataloader())
    assert {label for batch in train for label in batch["label"].tolist()} == {0, 1, 2}
    assert held_out["label"].bincount().tolist() == [0, 0, 0, 20, 20, 20, 20]
    stored = {tuple(row): int(label) for row, label in zip(load_digits().data / 8 - 1, load_digits().target, strict=True)}
    assert [stored[tuple(row)] for row in held_out["image"].double().tolist()] == held_out["label"].tolist()
    assert len({tuple(row) for row in held_out["image"].tolist()}) == 80, "no image twice"


@pytest.mark.parametrize(
    ("options", "word"), [({"num_val_classes": 8}, "num_val_classes"), ({"per_class": 175}, "per_class"), ({"source": "mnist"}, "source")]
)
def test_an_open_world_of_digits_refuses_what_there_is_not(options, word):
    with pytest.raises(ValueError, match=word):
        OpenWorldDataModule(**({"num_train_classes": 3, "num_val_classes": 3, "source": "digits"} | options))
