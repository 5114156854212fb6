"""FeatureRecovery, BidirectionalityMonitor and SteeringProbe on modules that aren't ours."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import left_behind, run_two_processes, tiny_trainer
from lit_methods import AbsTopK
from lit_methods.callbacks import BidirectionalityMonitor, FeatureRecovery, SteeringProbe
from lit_methods.datamodules import SparseMixturesDataModule
from lit_methods.sparse_autoencoders.recovery import max_cosine

AXES = torch.eye(4, 6)  # true features


class Given(nn.Module):
    """An autoencoder with given directions and codes of both signs, that counts its calls."""

    def __init__(self, directions: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(directions.clone())
        self.register_buffer("calls", torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.weight.T

    def decode(self, code: Tensor) -> Tensor:
        return code @ self.weight

    def decoder_directions(self) -> Tensor:
        return self.weight


class Host(pl.LightningModule):
    def __init__(self, directions: Tensor = AXES) -> None:
        super().__init__()
        self.sae = Given(directions)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self.sae.decode(self.sae.encode(batch["activation"])) - batch["activation"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def samples(count=40):
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(count, 4, generator=generator) * (torch.rand(count, 4, generator=generator) < 0.5)
    return [{"activation": x @ AXES, "code": x} for x in code.split(8)]


def loader(count=40):
    return DataLoader(samples(count), batch_size=None)


def measured(callback, module=None, data=None):
    module = module or Host()
    trainer = tiny_trainer(callbacks=[callback])
    trainer.validate(module, data or loader(), verbose=False)
    assert not hasattr(module, "sae") or module.sae.calls == 0  # only the copy was run
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


# ---- recovery --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def truth(tmp_path):
    np.save(tmp_path / "truth.npy", AXES.numpy())
    return tmp_path / "truth.npy"


def test_cosines_come_in_pieces(monkeypatch):
    torch.manual_seed(0)
    rows, others = torch.randn(30, 5), torch.randn(11, 5)
    whole = torch.nn.functional.cosine_similarity(rows[:, None], others[None], dim=2).amax(1)
    monkeypatch.setattr("lit_methods.sparse_autoencoders.recovery._CHUNK", 40)
    torch.testing.assert_close(max_cosine(rows, others), whole)
    assert max_cosine(torch.zeros(2, 5), others).tolist() == [0, 0]
    assert len(max_cosine(rows[:0], others)) == 0
    with pytest.raises(ValueError, match="same width"):
        max_cosine(rows, torch.randn(3, 4))


def test_recovered_and_split_features(truth):
    directions = torch.cat([AXES[:2] * 3, -AXES[:1], torch.tensor([[0.0, 0, 1, 1, 0, 0]])])
    found = measured(FeatureRecovery(truth=truth, taus=[0.6, 0.9], autoencoder="sae"), Host(directions))
    assert found["recovery/frr_0.9"] == 0.5
    assert found["recovery/frr_0.6"] == 1.0  # two axes share a direction at a cosine of 0.71
    assert found["recovery/split_0.9"] == 0.25  # the first has both poles


def test_a_datamodule_knows_its_features():
    data = SparseMixturesDataModule(6, 4, active=[1], num_train=32, num_val=32, batch_size=16)
    data.setup("fit")
    module, trainer = Host(-data.directions), tiny_trainer(callbacks=[FeatureRecovery(absolute=True, autoencoder="sae")])
    trainer.validate(module, data, verbose=False)
    assert float(trainer.callback_metrics["recovery/max_cosine"]) == pytest.approx(1.0)


def test_another_run_is_read_from_its_checkpoint(tmp_path):
    other, trainer = Host(torch.cat([AXES[:3], torch.ones(1, 6)])), tiny_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(other, loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    found = measured(FeatureRecovery(other=tmp_path / "other.ckpt", taus=[0.9], most_active=0.25, autoencoder="sae"))
    assert found["recovery/consistency_0.9"] == 0.75
    largest = torch.cat([batch["code"] for batch in samples()]).abs().amax(0).argmax()
    assert found["recovery/consistency_largest_0.9"] == float(largest < 3)
    assert "recovery/consistency_z_score_0.9" in found


def test_nothing_to_compare_with_is_said():
    with pytest.warns(UserWarning, match="nothing to compare with"):
        assert measured(FeatureRecovery(autoencoder="sae")) == {}


def test_files_that_do_not_fit(tmp_path):
    np.save(tmp_path / "narrow.npy", np.ones((3, 5), dtype=np.float32))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"is \(3, 5\) torch.float32: expected numbers \(n >= 1, 6\)"):
        measured(FeatureRecovery(truth=tmp_path / "narrow.npy", autoencoder="sae"))
    with pytest.raises(ValueError, match=r"can't be read as a \.npy file"):
        measured(FeatureRecovery(truth=tmp_path / "cut.npy", autoencoder="sae"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        measured(FeatureRecovery(truth=tmp_path / "none.npy", autoencoder="sae"))
    with pytest.raises(ValueError, match="give a cosine in"):
        FeatureRecovery(taus=[1.0])


# ---- two signs -------------------------------------------------------------------------------------------------------------------------


def test_signs_are_counted():
    found = measured(BidirectionalityMonitor(minority=0.2, opposite=-0.9, autoencoder="sae"))
    code = torch.cat([batch["code"] for batch in samples()])
    assert found["bidirectionality/positive"] == pytest.approx(float((code > 0).sum() / 40))
    assert found["bidirectionality/negative"] == pytest.approx(float((code < 0).sum() / 40))
    assert found["bidirectionality/two_signed"] == 1.0
    assert found["bidirectionality/opposite_pairs"] == 0.0


def test_split_features_are_opposite_pairs():
    found = measured(BidirectionalityMonitor(autoencoder="sae"), Host(torch.cat([AXES[:1], -AXES[:1], AXES[1:2], AXES[2:3]])))
    assert found["bidirectionality/opposite_pairs"] == 0.5


def rows(batch_size):
    return DataLoader(TensorDataset(torch.cat([batch["activation"] for batch in samples()])), batch_size)


def two_ranks():
    trainer = tiny_trainer(callbacks=[BidirectionalityMonitor(autoencoder="sae")], devices=2, strategy="ddp")
    trainer.validate(Host(), rows(4), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_two_processes_count_like_one():
    one = measured(BidirectionalityMonitor(autoencoder="sae"), data=rows(8))
    for two in run_two_processes(two_ranks):
        assert two == pytest.approx(one)


# ---- steering --------------------------------------------------------------------------------------------------------------------------


def test_the_true_feature_steers_without_side_effects():
    probe = SteeringProbe("code", column=1, autoencoder="sae")
    found = measured(probe)
    assert found["steering/clamped"] == pytest.approx(1, abs=0.1)
    assert found["steering/added"] == pytest.approx(1)
    one = torch.cat([batch["code"] for batch in samples()])[:, 1]
    with_it, without = one[one > 0].mean(), one[one <= 0].mean()
    assert found["steering/opposite"] == pytest.approx(float((-with_it - without) / (with_it - without)), abs=0.1)
    assert found["steering/off_axis_added"] == pytest.approx(0, abs=1e-5)
    assert found["steering/off_axis_clamped"] < 0.3
    rows = {row[0]: row[1] for row in probe.dashboard_media()["steering/ways"].rows}
    assert rows["clamped"] == pytest.approx(found["steering/clamped"])


def test_a_feature_may_be_named():
    found = measured(SteeringProbe("code", column=1, feature=2, value=3.0, autoencoder="sae"))
    assert found["steering/clamped"] < 0.5
    with pytest.raises(ValueError, match="SteeringProbe: feature is 4"):
        measured(SteeringProbe("code", column=1, feature=4, autoencoder="sae"))


def test_normalised_inputs_are_steered_as_the_dictionary_sees_them():
    module = AbsTopK(6, 8, k=3, normalize="sample")
    found = measured(SteeringProbe("code", column=0), module)
    assert np.isfinite(found["steering/clamped"])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"concept": "label"}, "has no 'label'"),
        ({"column": None}, r"concept='code' is \(8, 4\) for 8 activations, and column is None"),
        ({"column": 4}, "column is 4"),
    ],
)
def test_labels_that_do_not_fit(argument, words):
    with pytest.raises(ValueError, match=words):
        measured(SteeringProbe(**{"concept": "code", "column": 0, "autoencoder": "sae", **argument}))


def test_a_concept_that_nobody_has_is_said():
    data = DataLoader([{"activation": torch.randn(4, 6), "concept": torch.zeros(4)}], batch_size=None)
    with pytest.warns(UserWarning, match="0 samples with the concept and 4 without"):
        assert measured(SteeringProbe(autoencoder="sae"), data=data) == {}


# ---- all of them -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [FeatureRecovery, BidirectionalityMonitor, SteeringProbe])
def test_what_is_no_autoencoder_is_refused(judge):
    with pytest.raises(ValueError, match=f"{judge.__name__}: Host has no encode"):
        measured(judge())
    with pytest.raises(ValueError, match="autoencoder='sea' is no submodule of Host; there are sae"):
        measured(judge(autoencoder="sea"))


def test_nothing_is_left_behind():
    options = {"limit_val_batches": 0}
    assert left_behind(Host, lambda: BidirectionalityMonitor(autoencoder="sae"), loader(), **options) == {}
