"""FixMatch, ShrinkMatch and SimMatchV2 in training: what they add, resume, two processes, precision, messages."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import MLP, FixMatch, PropagationProbe, ShrinkMatch, SimMatchV2, SmallConvNet
from lit_methods.callbacks import ExactResume, WeightEMA
from lit_methods.datamodules import DigitsDataModule, SemiSupervisedDataModule, SkimageDataModule
from lit_methods.semi.base import take_apart
from lit_methods.semi.simmatchv2.core import GraphConsistency, edges

SIM = {"num_labelled": 20, "embedding_dim": 8, "bank_size": 96, "neighbours": 4, "warmup_epochs": 0}
METHODS = {
    "fixmatch": lambda **kw: FixMatch(small(), 16, 10, **{"threshold": 0.3, **kw}),
    "fixmatch_ema": lambda **kw: FixMatch(small(), 16, 10, **{"threshold": 0.3, "distribution_alignment": "ema", **kw}),
    "shrinkmatch": lambda **kw: ShrinkMatch(small(), 16, 10, **{"threshold": 0.5, "queue_length": 4, **kw}),
    "shrinkmatch_raw": lambda **kw: ShrinkMatch(small(), 16, 10, **{"threshold": 0.5, "ranks": "raw", "hard_labels": True, **kw}),
    "simmatchv2": lambda **kw: SimMatchV2(small(), 16, 10, **{"threshold": 0.3, **SIM, **kw}),
    "simmatchv2_eman": lambda **kw: SimMatchV2(small(), 16, 10, **{"threshold": 0.3, "eman": True, "ema_decay": 0.9, **SIM, **kw}),
}


def small():
    torch.manual_seed(3)
    return SmallConvNet((8, 16), num_classes=0)


def digits(batch_size=8, ratio=3, **kwargs):
    inner = DigitsDataModule(num_train=240, batch_size=500)
    return SemiSupervisedDataModule(
        inner, **{"labels_per_class": 2, "batch_size": batch_size, "ratio": ratio, "policy": "small_grey", **kwargs}
    )


def fit(model, data=None, callbacks=(), **kwargs):
    pl.seed_everything(0, verbose=False)
    trainer = tiny_trainer(callbacks=[*callbacks], **{"max_steps": 6, "limit_val_batches": 0, "log_every_n_steps": 1, **kwargs})
    trainer.fit(model, datamodule=data or digits())
    return trainer


def batch_of(data):
    data.setup("fit")
    return take_apart(next(iter(data.train_dataloader()))[0])


def test_without_the_unlabelled_weight_it_is_supervised_training():
    found = fit(METHODS["fixmatch"](unlabelled_weight=0.0, threshold=0.1)).callback_metrics
    assert found["semi/loss"] == found["semi/labelled_loss"]
    assert found["semi/unlabelled_loss"] > 0


def test_fixmatch_is_cross_entropy_with_certain_predictions():
    model, batch = METHODS["fixmatch"](), batch_of(digits())
    model.backbone.eval()  # one statistic for joint and separate passes
    found = model.losses(batch)
    p = model(batch.weak).softmax(1)
    top, label = p.max(1)
    strong = F.cross_entropy(model(batch.strong[0]), label, reduction="none")
    expected = F.cross_entropy(model(batch.image), batch.label) + (strong * (top >= 0.3)).sum() / len(p)
    torch.testing.assert_close(found["loss"], expected)
    assert found["mask_ratio"] == (top >= 0.3).float().mean()


def test_shrinkmatch_adds_its_term_by_the_auxiliary_head():
    model, batch = METHODS["shrinkmatch"](), batch_of(digits())
    found = model.losses(batch)
    assert found["mask_ratio"] == 0
    assert found["certain_ratio"] == 0
    model.certain_ratio.fill_(0.5)
    model.ratio_momentum = 1.0
    found = model.losses(batch)
    torch.testing.assert_close(found["unlabelled_loss"], found["certain_loss"] + 0.5 * found["shrink_loss"])
    assert found["shrink_loss"] > 0
    assert torch.autograd.grad(found["shrink_loss"], model.head.weight, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(found["shrink_loss"], model.auxiliary[-1].weight)[0].abs().sum() > 0


def test_several_strong_views_count_as_their_mean():
    model = METHODS["fixmatch"]()
    model.backbone.eval()
    batch = batch_of(digits(strong_views=2))
    whole = model.losses(batch)["unlabelled_loss"]
    parts = [model.losses(replace(batch, strong=[view]))["unlabelled_loss"] for view in batch.strong]
    torch.testing.assert_close(whole, sum(parts) / 2)
    with pytest.raises(ValueError, match="one size"):
        model.losses(replace(batch, strong=[batch.strong[0][..., :4]]))


def test_simmatchv2_fills_its_banks_and_follows_its_student():
    model = METHODS["simmatchv2"](ema_decay=1.0)
    trainer = fit(model, max_steps=3)
    assert model.graph.label_bank_class.tolist() == trainer.datamodule.labelled_classes.tolist()
    assert model.graph.pointer.tolist() == [72]
    assert (model.graph.bank_probability.sum(1) > 0).tolist() == [True] * 72 + [False] * 24
    torch.testing.assert_close(model.graph.bank.norm(dim=1), torch.ones(96))
    assert fit(METHODS["simmatchv2"](), max_steps=1).callback_metrics["semi/ne_loss"] == 0  # the queue is empty
    trainer = fit(model := METHODS["simmatchv2"](ema_decay=0.0), max_steps=6)
    assert trainer.callback_metrics["semi/ne_loss"] > 0
    assert trainer.callback_metrics["semi/bank_fill"] == 1
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_the_second_network_of_simmatchv2_is_an_average():
    frozen, follower = METHODS["simmatchv2"](ema_decay=1.0), METHODS["simmatchv2"](ema_decay=0.999)
    first = [parameter.clone() for parameter in frozen.teacher.parameters()]
    for model in (frozen, follower):
        fit(model, max_steps=4, limit_train_batches=4)
    moved = [(a - b).abs().max() for a, b in zip(follower.teacher.parameters(), first, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(frozen.teacher.parameters(), first, strict=True))
    assert 0 < max(moved) < 0.05


def test_the_similarity_losses_pull_the_strong_view_to_the_weak_one():
    generator = torch.Generator().manual_seed(0)
    graph = GraphConsistency(labelled=10, bank_size=40, num_classes=5, embedding_dim=8, neighbours=4)
    graph.bank_probability.copy_(F.one_hot(torch.arange(40) % 5, 5))
    weak, free = (torch.randn(6, 8, generator=generator) for _ in range(2))
    weak, free = F.normalize(weak, dim=1), free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.1)
    weak_edges = edges(weak, graph.bank, 0.1)
    read = (weak_edges @ graph.bank_probability).log()  # what the weak view's own edges read from the bank
    losses = []
    for _ in range(100):
        found = graph(read, weak, torch.zeros(1, 6, 5), F.normalize(free, dim=1)[None])
        graph.marginal.fill_(0.2)
        losses.append((float(found.ee), float(found.ne)))
        optimizer.zero_grad()
        found.ee.backward()
        optimizer.step()
    assert losses[-1][0] == pytest.approx(float(torch.special.entr(weak_edges).sum(1).mean()), abs=0.05)  # as low as it can be
    assert losses[0][0] > losses[-1][0] + 1
    assert losses[-1][1] < losses[0][1]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_killed_run_ends_like_an_uninterrupted_one(name, tmp_path):
    def build():
        return METHODS[name](), digits(), [ExactResume(), WeightEMA(0.9)]

    whole, resumed = kill_and_resume(build, 13, 7, tmp_path, limit_val_batches=0)  # an epoch has 10 steps
    assert_state_dicts_equal(resumed, whole)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_half_precision_trains(name):
    half = fit(METHODS[name](), precision="bf16-mixed", max_steps=3).callback_metrics["semi/loss"]
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(fit(METHODS[name](), max_steps=3).callback_metrics["semi/loss"]), rel=0.2)


def test_accumulation_advances_running_means_per_micro_batch():
    model = METHODS["shrinkmatch"]()
    fit(model, max_steps=2, accumulate_grad_batches=3)
    assert model.marginals.pointer.tolist() == [6 % 4]


def without_batch_norm(name):
    model = METHODS[name](schedule="constant")
    torch.manual_seed(4)
    model.backbone = MLP([64, 32, 16])
    if isinstance(model, ShrinkMatch):
        model.auxiliary = nn.Linear(16, 10)
    if isinstance(model, SimMatchV2):
        model.teacher["backbone"] = MLP([64, 32, 16]).requires_grad_(False)
        model.teacher["backbone"].load_state_dict(model.backbone.state_dict())
    return model


def two(name, batch_size, devices):
    kwargs = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    model = without_batch_norm(name)
    fit(model, digits(batch_size), max_steps=5, **kwargs)
    return cloned_state(model)


@pytest.mark.parametrize("name", ["fixmatch_ema", "shrinkmatch", "simmatchv2"])
def test_two_processes_end_like_one(name):
    torch.set_num_threads(1)
    both, other = run_two_processes(two, name, 4, 2)
    counters = {key for key in both if key.rpartition(".")[2] in ("seen", "covered", "right")}  # each rank's own until validation
    both, other, one = ({key: value for key, value in state.items() if key not in counters} for state in (both, other, two(name, 8, 1)))
    assert_state_dicts_equal(other, both)
    assert_state_dicts_equal(both, one, atol=2e-5, rtol=1e-4)


def test_a_checkpoint_loads_without_a_trainer(tmp_path):
    model = METHODS["simmatchv2"]()
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SimMatchV2.load_from_checkpoint(tmp_path / "a.ckpt", backbone=small())
    assert_state_dicts_equal(loaded.state_dict(), model.state_dict())
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_a_table_per_class_after_validation():
    model = METHODS["shrinkmatch"]()
    trainer = fit(model, max_steps=4, limit_val_batches=1, val_check_interval=4)
    table = model.dashboard_media()["semi/pseudo_labels"]
    assert [row[0] for row in table.rows] == [str(digit) for digit in range(10)]
    assert sum(row[1] for row in table.rows) == 4 * 24
    assert all(row[1] >= row[2] >= row[3] >= 0 for row in table.rows)
    assert model.seen.sum() == 0
    assert 0 <= trainer.callback_metrics["semi/val_accuracy"] <= 1


def test_data_may_have_fewer_classes_than_the_module():
    """As a part of ImageNet has; the table counts the others from their number on."""
    model = ShrinkMatch(small(), feature_dim=16, num_classes=12)
    fit(model, max_steps=1, limit_val_batches=1, val_check_interval=1)
    table = model.dashboard_media()["semi/pseudo_labels"]
    assert [row[0] for row in table.rows] == [str(number) for number in range(12)]
    assert [row[1] for row in table.rows[10:]] == [0, 0]


def test_propagation_helps_a_linear_classifier():
    def measured(alpha):
        trainer = fit(
            PropagationProbe(10, alpha=alpha), digits(labels_per_class=4), max_steps=1, limit_val_batches=None, val_check_interval=1
        )
        return trainer.callback_metrics

    with_, without = measured(0.1), measured(0.0)
    assert with_["semi/val_nll"] < without["semi/val_nll"]
    assert with_["semi/val_accuracy"] > 0.6


def test_the_probe_predicts_two_classes_as_scikit_learn_does():
    from sklearn.linear_model import LogisticRegression

    faces = SkimageDataModule("faces", num_train=100, batch_size=100)
    data = SemiSupervisedDataModule(faces, labels_per_class=20, batch_size=8, ratio=1, policy="small_grey")
    probe = PropagationProbe(2, alpha=0.0)
    fit(probe, data, max_steps=1, limit_val_batches=None, val_check_interval=1)
    images = torch.stack([faces.val_set[(0, index)]["image"] for index in range(100)])
    labelled = torch.stack([faces.train_set.read(int(index)) for index in data.labelled])
    centre = labelled.flatten(1).mean(dim=0)
    unit = [nn.functional.normalize(part.flatten(1) - centre, dim=1).numpy() for part in (labelled, images)]
    sklearn = LogisticRegression(max_iter=1000).fit(unit[0], data.labelled_classes.numpy())
    torch.testing.assert_close(probe(images).double(), torch.from_numpy(sklearn.predict_proba(unit[1])).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: FixMatch(small(), 16, 10, threshold=1.5), ValueError, "probability"),
        (lambda: FixMatch(small(), 16, 10, distribution_alignment="mean"), ValueError, "none, queue, ema"),
        (lambda: FixMatch(small(), 16, 1), ValueError, r"num_classes is 1: give classes in \[2, inf\)"),
        (lambda: FixMatch(small(), 16, 10, schedule="linear"), ValueError, "seven_sixteenths"),
        (lambda: ShrinkMatch(small(), 16, 10, ranks="strong"), ValueError, "aligned"),
        (lambda: METHODS["simmatchv2"](ema_decay=2.0), ValueError, r"ema_decay is 2.0: give a number in \[0, 1\]"),
        (lambda: fit(METHODS["simmatchv2"](num_labelled=30), max_steps=1), ValueError, "the data have 20 labelled images"),
        (lambda: fit(METHODS["simmatchv2"](neighbours=30)), ValueError, "neighbours=30 of 20"),
        (lambda: fit(METHODS["simmatchv2"](bank_size=100), max_steps=1), ValueError, "no multiple of the 24"),
        (lambda: fit(FixMatch(small(), 8, 10), max_steps=1), ValueError, "feature_dim=8"),
        (lambda: take_apart({"labelled": {"image": 0}, "unlabelled": {}}), KeyError, "SemiSupervisedDataModule"),
    ],
)
def test_errors_say_what_to_do(build, error, says):
    with pytest.raises(error, match=says):
        build()


def test_simmatchv2_names_what_the_datamodule_lacks():
    trainer = tiny_trainer(max_steps=1)
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(ValueError, match="labelled_classes"):
        trainer.fit(METHODS["simmatchv2"](), loader)
