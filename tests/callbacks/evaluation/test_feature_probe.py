"""FeatureProbe, and the linear probe and the neighbours that it asks."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader

from helpers import Classifier, Images, cloned_state, left_behind, run_two_processes, tiny_trainer
from lit_methods import ImageClassifier
from lit_methods.callbacks import FeatureProbe
from lit_methods.datamodules import DigitsDataModule
from lit_methods.self_supervised.probe import linear_probe, nearest_neighbours


def iris():
    data = load_iris()
    return torch.from_numpy(data.data), torch.from_numpy(data.target).long()


def test_the_linear_probe_is_scikit_learns_logistic_regression():
    x, y = iris()
    x, y = x[::2], y[::2]
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    l2 = 0.01
    theirs = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-8).fit(standard, y.numpy())
    ours = linear_probe(x, y, x, 3, l2).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(standard)).max() < 1e-3
    assert linear_probe(x.float(), y, x[:0].float(), 3).shape == (0, 3)
    constant = linear_probe(torch.cat([x, torch.ones(len(x), 1)], 1), y, torch.cat([x, torch.ones(len(x), 1)], 1), 3, l2)
    assert constant.isfinite().all()


def test_neighbours_vote_by_their_similarity():
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-3.0, 0.0]]), torch.tensor([0, 1, 1, 2])
    asked = torch.tensor([[2.0, 0.1]])
    assert nearest_neighbours(bank, labels, asked, 3, neighbours=1).tolist() == [[1.0, 0.0, 0.0]]
    shares = nearest_neighbours(bank, labels, asked, 3, neighbours=9, temperature=1.0)
    cosine = torch.nn.functional.cosine_similarity(asked, bank)
    weights = cosine.exp() / cosine.exp().sum()
    torch.testing.assert_close(shares[0], torch.stack([weights[0], weights[1] + weights[2], weights[3]]))


class Embeds(ImageClassifier):
    """Has a method that pools, and one that doesn't."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), learning_rate=0.01)

    def embed(self, images):
        return self.network[:3](images)

    def rows(self, images):
        return images[:, 0]


def fit(callback, model=None, **kwargs):
    model = Embeds() if model is None else model
    trainer = tiny_trainer(**{"max_epochs": 2, "callbacks": [callback]} | kwargs)
    trainer.fit(model, DigitsDataModule(num_train=300, batch_size=50))
    return trainer


def test_it_judges_features_by_classifiers_that_it_fits():
    trainer = fit(FeatureProbe("embed"))
    figures = trainer.callback_metrics
    model, data = trainer.lightning_module, trainer.datamodule
    parts = []
    for part in (data.train_set, data.val_set):
        images = torch.stack([part[i]["image"] for i in range(len(part))])
        parts += [model.embed(images).detach(), torch.tensor([part[i]["label"] for i in range(len(part))])]
    scores = linear_probe(*parts[:3], 10)
    assert float(figures["probe/val_linear"]) == pytest.approx(float((scores.argmax(1) == parts[3]).float().mean()), abs=5e-3)
    votes = nearest_neighbours(*parts[:3], 10)
    assert float(figures["probe/val_neighbours"]) == pytest.approx(float((votes.argmax(1) == parts[3]).float().mean()), abs=5e-3)
    assert float(figures["probe/val_linear"]) > 0.5


def test_the_training_is_the_same_with_and_without_it():
    states = []
    for callbacks in ([FeatureProbe("embed")], []):
        torch.manual_seed(3)
        trainer = tiny_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(model := Embeds(), DigitsDataModule(num_train=300, batch_size=50))
        states.append(cloned_state(model))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_between_two_measurements_nothing_is_logged():
    trainer = fit(FeatureProbe("embed", every_n_epochs=3))
    assert not any(name.startswith("probe/") for name in trainer.callback_metrics)


def test_testing_needs_a_datamodule():
    trainer, data = tiny_trainer(callbacks=[FeatureProbe("embed")]), DigitsDataModule(num_train=300, batch_size=50)
    (figures,) = trainer.test(Embeds(), data, verbose=False)
    assert 0 <= figures["probe/test_linear"] <= 1
    data.setup("test")
    with pytest.raises(ValueError, match="FeatureProbe: the training data are needed, and validate and test have them from a datamodule"):
        tiny_trainer(callbacks=[FeatureProbe("embed")]).test(Embeds(), data.test_dataloader(), verbose=False)


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        ("nowhere.at", TypeError, "has no 'nowhere.at' that maps inputs to them"),
        ("class_names", TypeError, "has no 'class_names'"),
        ("rows", ValueError, r"FeatureProbe: features='rows' gives \(50, 8, 8\) for 50 samples, expected \(B, D\)"),
    ],
)
def test_what_gives_no_features_is_refused(features, error, words):
    with pytest.raises(error, match=words):
        fit(FeatureProbe(features), num_sanity_val_steps=1)


def test_labels_of_another_form_are_refused():
    with pytest.raises(ValueError, match="expected one class a sample"):
        fit(FeatureProbe("embed", labels="image"), num_sanity_val_steps=1)
    with pytest.raises(ValueError, match="neighbours is 0"):
        FeatureProbe(neighbours=0)


def test_nothing_is_left_behind():
    assert not left_behind(Classifier, lambda: FeatureProbe("network"), DataLoader(Images(), 6))


def two():
    trainer = fit(FeatureProbe("embed"), devices=2, strategy="ddp", use_distributed_sampler=False, max_epochs=1)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("probe/")}


def test_two_processes_judge_all_samples_together():
    torch.set_num_threads(1)
    one, other = run_two_processes(two)
    assert one == other
    assert one["probe/val_linear"] > 0.5
