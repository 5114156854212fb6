"""The supervised dictionary as a yardstick: pairs, edits and counts against plain loops; the callback on modules that aren't ours."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from helpers import fingerprint, left_behind, run_two_processes, tiny_trainer
from lit_methods.callbacks import SupervisedDictionaryEval
from lit_methods.callbacks.sparse_autoencoders.sae_evals import axes, core
from lit_methods.datamodules import AttributeSumsDataModule

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_the_counterfactual_differs_in_one_attribute_alone():
    generator = torch.Generator().manual_seed(0)
    ids, others = torch.randint(4, (60,), generator=generator), torch.randint(3, (60, 2), generator=generator)
    partner = core.matched_pairs(ids, others)
    for row in range(60):
        fitting = [other for other in range(60) if others[other].equal(others[row]) and ids[other] != ids[row]]
        if not fitting:
            assert partner[row] == -1
            continue
        assert int(partner[row]) in fitting
        values = sorted({int(ids[other]) for other in fitting})
        following = min((value for value in values if value > ids[row]), default=values[0])
        assert int(partner[row]) == min(other for other in fitting if ids[other] == following)
    assert (partner == -1).sum() < 60


def test_pairs_of_nothing_of_one_value_and_of_one_attribute():
    assert core.matched_pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)).shape == (0,)
    assert core.matched_pairs(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)).tolist() == [-1, -1, -1]
    assert core.matched_pairs(torch.tensor([1, 0, 1]), torch.zeros(3, 0, dtype=torch.int64)).tolist() == [1, 0, 1]


def test_the_greedy_edit_is_the_search_over_all_features():
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(5, 6, generator=generator).double(), torch.randn(5, 6, generator=generator).double()
    clean, other = (torch.randn(5, 9, generator=generator).double().relu() for _ in range(2))
    directions = torch.randn(9, 6, generator=generator).double()
    found = core.greedy_edit(x, clean, other, directions, target - x, k=3, scale=2.0)
    for row in range(5):
        total, change = torch.zeros(6).double(), (other - clean)[row].clone()
        for step in range(3):
            gaps = [float((total + change[j] * directions[j] - (target - x)[row]).norm()) for j in range(9)]
            pick = gaps.index(min(gaps))
            assert int(found.features[row, step]) == pick
            assert float(found.residuals[row, step]) == pytest.approx(gaps[pick])
            total, change[pick] = total + change[pick] * directions[pick], 0.0
        torch.testing.assert_close(found.edited[row], 2 * (x[row] + total))


def test_nothing_helps_and_the_first_feature_is_picked():
    zeros, directions = torch.zeros(2, 4), torch.eye(4)
    found = core.greedy_edit(torch.ones(2, 4), zeros, zeros, directions, torch.ones(2, 4), k=2)
    assert found.features.tolist() == [[0, 0], [0, 0]]
    assert found.edited.equal(torch.ones(2, 4))
    with pytest.raises(ValueError, match="k=0"):
        core.greedy_edit(zeros, zeros, zeros, directions, zeros, k=0)


def test_a_guided_edit_with_more_picks_than_features_exchanges_everything():
    clean, other, directions = torch.rand(3, 4), torch.rand(3, 4), torch.randn(4, 5)
    x = clean @ directions
    order = torch.stack([torch.randperm(4) for _ in range(2)])
    old, new = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    found = core.guided_edit(x, clean, other, directions, order, old, new, k=7)
    torch.testing.assert_close(found.edited, other @ directions, rtol=1e-4, atol=1e-5)
    assert found.removed.tolist() == order[old].tolist()


def test_weights_sum_to_one_and_are_nan_for_nothing():
    features = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    weights = core.feature_weights(features, torch.randn(3, 4))
    assert float(weights[0].sum()) == pytest.approx(1.0, abs=1e-5)
    assert weights[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_of_balanced_attributes_are_the_true_ones(dtype):
    first, second = torch.randn(3, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    ids = [torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)]
    x = first[ids[0]] + second[ids[1]]
    sums = core.attribute_sums(x, ids, [3, 2])
    parts = [core.attribute_sums(x[part], [one[part] for one in ids], [3, 2]) for part in (slice(0, 2), slice(2, 6))]
    together = core.AttributeSums(parts[0].totals + parts[1].totals, parts[0].counts + parts[1].counts)
    torch.testing.assert_close(together, sums)
    for make in (core.mean_codes, core.mse_codes):
        codes = make(sums, [3, 2])
        torch.testing.assert_close(core.reconstruct_by_codes(codes, ids), x.double(), rtol=1e-5, atol=1e-5)
        moved = core.edit_arithmetic(x.double(), codes.codes[0], ids[0], torch.full((6,), 2))
        torch.testing.assert_close(moved, (first[2] + second[ids[1]]).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(core.code_weights(core.mean_codes(sums, [3, 2]), ids).sum(1), torch.ones(6).double())


@pytest.mark.parametrize(
    ("ids", "sizes", "said"), [([], [], "need ids"), ([torch.tensor([0, 3])], [3], "0 to 2"), ([torch.zeros(3)], [1], "need ids")]
)
def test_ids_that_do_not_fit(ids, sizes, said):
    with pytest.raises(ValueError, match=said):
        core.attribute_sums(torch.zeros(2, 4), ids, sizes)


def test_a_union_of_all_values_explains_nothing():
    always = core.activity_counts(torch.ones(6, 1, dtype=torch.bool), torch.tensor([0, 1, 0, 1, 0, 1]), 2)
    found = axes.explained(always, group_size=10)
    assert float(found.union) == pytest.approx(2 * 0.5 / 1.5)
    assert int(found.union_size) == 1


# ---- modules ---------------------------------------------------------------------------------------------------------------------------


class Dictionary(nn.Module):
    """An autoencoder that knows the true codes of the data: a feature for each value, on if the value is there."""

    def __init__(self, data: AttributeSumsDataModule) -> None:
        super().__init__()
        data.setup("fit")
        directions = torch.cat(list(data.codes.values()))
        self.decoder_directions = nn.Parameter(directions.clone(), requires_grad=False)
        self.decoder_bias = nn.Parameter(torch.zeros(directions.shape[1]), requires_grad=False)

    def encode(self, x: Tensor) -> Tensor:
        return (torch.linalg.lstsq(self.decoder_directions.T.double(), x.T.double()).solution.T > 0.5).to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.decoder_directions + self.decoder_bias


class Foreign(pl.LightningModule):
    """Somebody's module that holds an autoencoder and trains something else."""

    def __init__(self, sae: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.sae, self.head = sae, nn.Linear(width, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(batch["activation"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.01)


SMALL: dict[str, Any] = {"width": 16, "names": 4, "noise": 0.05, "num_train": 96, "num_val": 64, "batch_size": 16}
THREE: dict[str, Any] = {"attributes": ["io", "s", "pos"], "subject": "subject"}


def measured(module: pl.LightningModule, data: pl.LightningDataModule, callback: pl.Callback, **options: Any) -> dict[str, float]:
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback], **options)
    trainer.fit(module, datamodule=data)
    return {name.removeprefix("sae_evals/val_"): float(value) for name, value in trainer.callback_metrics.items()}


def test_features_that_are_the_true_codes_do_as_well_as_supervised_ones():
    data = AttributeSumsDataModule(**SMALL)
    callback = SupervisedDictionaryEval(**THREE, autoencoder="sae", monitored="io/guided_1")
    found = measured(Foreign(Dictionary(data)), data, callback)
    media = callback.dashboard_media()
    table = {(row[0], row[1]): row[2:] for row in media["sae_evals/edits"].rows}
    edits = {"none", "supervised", "subspace"} | {f"{kind}_{k}" for kind in ("greedy", "guided") for k in (1, 2, 4)}
    assert table.keys() == {(attribute, edit) for attribute in ("io", "s", "pos") for edit in edits}
    for attribute in ("io", "s", "pos"):
        agreement, weight, attribution, distance = zip(
            *(table[attribute, edit] for edit in ("none", "greedy_2", "supervised")), strict=True
        )
        assert agreement == (0, 1, 1)
        assert weight[0] == 0
        assert weight[1] == pytest.approx(weight[2], abs=0.15)
        assert attribution[1] < 0.3 * attribution[0]
        assert distance[1] < 0.3 * distance[0]
        for edit in ("supervised", "greedy_2", "greedy_4", "guided_1"):
            assert found[f"agreement/{attribute}/{edit}"] == 1
    assert (found["features/io"], found["features/pos"], found["best_f1/io"]) == (4, 2, pytest.approx(1))
    assert found["error/sae"] < 0.02
    assert found["error/mean_codes"] < 0.2
    assert found["error/mse_codes"] < 0.02
    assert found["sufficiency/sae"] == pytest.approx(1, abs=0.05)
    assert found["necessity/sae"] == pytest.approx(1, abs=0.05)
    assert found["kept/io"] == pytest.approx(1, abs=0.2)
    assert abs(found["removed/io"]) < 0.7
    assert found["edit"] == 1
    assert found["agreement/io/none"] == 0
    assert found["weight/io/greedy_2"] == pytest.approx(table["io", "greedy_2"][1])
    assert not {"weight/s/greedy_2", "distance/io/greedy_2", "agreement/s/none"} & found.keys()
    assert len(media["sae_evals/features"].rows) == 10
    assert media["sae_evals/f1"].counts[-1] == 10


def test_without_a_subject_distances_and_a_joint_attribute():
    data = AttributeSumsDataModule(**SMALL)
    callback = SupervisedDictionaryEval(
        ["io*s"], matched=["pos"], autoencoder="sae", k_edits=[1], target="reconstruction", monitored="supervised"
    )
    found = measured(Foreign(Dictionary(data)), data, callback)
    assert not [name for name in found if name.startswith(("agreement", "sufficiency", "kept"))]
    assert found["distance/io*s/supervised"] == pytest.approx(found["edit"])
    assert found["distance/io*s/supervised"] < found["distance/io*s/greedy_1"] < found["distance/io*s/none"]
    assert found["error/mean_codes"] == pytest.approx(found["error/mse_codes"], rel=1e-3)  # one attribute: the same codes


def test_the_figures_of_the_batch_are_the_answer_and_the_foil():
    class Logits(nn.Module):
        def forward(self, activation: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return activation[:, :5]

    data = AttributeSumsDataModule(**SMALL)
    data.setup("fit")
    rows = {**data.val_set.tensors, "answer": torch.zeros(64, dtype=torch.int64), "foil": torch.full((64,), 3)}
    sample = axes.Sample(rows["activation"], {"io": rows["io"]}, torch.zeros(64, 1), rows)
    subject = axes.Subject(Logits(), sample)
    torch.testing.assert_close(subject.clean[""], rows["activation"][:, 0] - rows["activation"][:, 3])
    gradient = torch.zeros(64, 16)
    gradient[:, 0], gradient[:, 3] = 1.0, -1.0
    assert subject.gradients(rows["activation"], torch.arange(64), "io").equal(gradient)


def test_nothing_is_left_behind_and_weights_and_generators_stay():
    data = AttributeSumsDataModule(**SMALL)
    assert not left_behind(
        lambda: Foreign(Dictionary(data)), lambda: SupervisedDictionaryEval(**THREE, autoencoder="sae"), data, limit_val_batches=2
    )

    def run(callbacks: list[pl.Callback]) -> Tensor:
        pl.seed_everything(3, verbose=False)
        module = Foreign(Dictionary(data))
        tiny_trainer(max_epochs=2, callbacks=callbacks).fit(module, datamodule=AttributeSumsDataModule(**SMALL))
        return torch.cat([module.head.weight.detach().flatten(), torch.rand(3)])

    assert run([]).equal(run([SupervisedDictionaryEval(**THREE, autoencoder="sae")]))


def test_validation_and_test_by_themselves_and_a_second_fit():
    data, callback = AttributeSumsDataModule(**SMALL), SupervisedDictionaryEval(**THREE, autoencoder="sae", k_edits=[1])
    module = Foreign(Dictionary(data))
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback])
    assert trainer.test(module, datamodule=data, verbose=False)[0]["sae_evals/test_agreement/io/supervised"] == 1
    before = fingerprint(module)
    first, second = (measured(module, AttributeSumsDataModule(**SMALL), callback) for _ in range(2))
    assert first["error/sae"] == second["error/sae"]
    assert before.keys() == fingerprint(module).keys()
    with pytest.raises(ValueError, match="SupervisedDictionaryEval: the codes come from training data"):
        tiny_trainer(callbacks=[callback]).validate(module, dataloaders=data.val_dataloader(), verbose=False)


def test_epochs_are_skipped_and_the_sanity_check_logs_nothing():
    data, callback = AttributeSumsDataModule(**SMALL), SupervisedDictionaryEval(**THREE, autoencoder="sae", every_n_epochs=2)
    seen: list[bool] = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(any("sae_evals" in name for name in trainer.callback_metrics))

    tiny_trainer(max_epochs=3, num_sanity_val_steps=1, callbacks=[callback, Look()]).fit(Foreign(Dictionary(data)), datamodule=data)
    assert seen == [False, False, True]


def test_bf16_and_few_samples_without_pairs():
    data = AttributeSumsDataModule(**SMALL | {"num_val": 1})
    with pytest.warns(UserWarning, match="no two samples differ in io alone"):
        found = measured(Foreign(Dictionary(data)), data, SupervisedDictionaryEval(**THREE, autoencoder="sae"), precision="bf16-mixed")
    assert "error/sae" in found
    assert not [name for name in found if name.startswith("agreement")]


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attributes": "io"}, "attributes"),
        ({"attributes": []}, "attributes is empty"),
        ({"k_edits": [0]}, "k_edits"),
        ({"threshold": 2.0}, "threshold"),
        ({"group_size": 0}, "group_size"),
        ({"monitored": "greedy_3"}, "greedy_2"),
        ({"target": "mean"}, "reconstruction"),
    ],
)
def test_arguments_out_of_range(given, said):
    with pytest.raises(ValueError, match=said):
        SupervisedDictionaryEval(**{"attributes": ["io"], **given})


def test_what_is_no_autoencoder_is_refused():
    data = AttributeSumsDataModule(**SMALL)
    module = Foreign(Dictionary(data))
    with pytest.raises(ValueError, match="SupervisedDictionaryEval: Foreign has no encode"):
        measured(module, data, SupervisedDictionaryEval(**THREE))
    with pytest.raises(ValueError, match="SupervisedDictionaryEval: autoencoder='saes' is no submodule of Foreign"):
        measured(module, data, SupervisedDictionaryEval(**THREE, autoencoder="saes"))


def test_features_without_a_fixed_direction_are_refused():
    data = AttributeSumsDataModule(**SMALL)
    sae = Dictionary(data)
    sae.decode = lambda z: (z @ sae.decoder_directions).softmax(1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="normalise the data instead"):
        axes.linear_decoder(sae, data.val_set.tensors["activation"])
    sae = Dictionary(data)
    sae.decoder_bias = nn.Parameter(torch.zeros(15))
    with pytest.raises(ValueError, match="decoder_bias \\(15,\\): expected"):
        axes.linear_decoder(sae, data.val_set.tensors["activation"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"io": None}, "no 'io'"),
        ({"io": torch.zeros(8)}, "'io' is"),
        ({"io": torch.full((8,), -1)}, "has the value -1"),
        ({"activation": torch.zeros(8, 2, 2)}, "expected \\(B, d\\)"),
    ],
)
def test_batches_of_another_form(change, said):
    batch = {"activation": torch.zeros(8, 16), "io": torch.zeros(8, dtype=torch.int64), "s": torch.zeros(8, dtype=torch.int64), **change}
    batch = {name: value for name, value in batch.items() if value is not None}
    callback = SupervisedDictionaryEval(["io", "s"])
    with pytest.raises(ValueError, match=said):
        callback._take(batch)


def test_a_subject_that_the_data_lack():
    data = AttributeSumsDataModule(**SMALL)
    with pytest.raises(ValueError, match="subject='reader' is no attribute of AttributeSumsDataModule"):
        measured(Foreign(Dictionary(data)), data, SupervisedDictionaryEval(["io"], autoencoder="sae", subject="reader"))


# ---- processes -------------------------------------------------------------------------------------------------------------------------


def figures(batch_size: int, **options: Any) -> dict[str, float]:
    data = AttributeSumsDataModule(**SMALL | {"batch_size": batch_size})
    return measured(Foreign(Dictionary(data)), data, SupervisedDictionaryEval(**THREE, autoencoder="sae"), **options)


def figures_of_two() -> dict[str, float]:
    return figures(8, devices=2, strategy="ddp")


def test_two_processes_measure_what_one_does():
    one, both = figures(16), run_two_processes(figures_of_two)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_training_data_that_are_no_loader_are_refused():
    data = AttributeSumsDataModule(**SMALL)
    module = Foreign(Dictionary(data))
    module.training_step = lambda batch, batch_idx: module.head(batch["rows"]["activation"]).square().mean()
    with pytest.raises(ValueError, match="SupervisedDictionaryEval: codes come from a training DataLoader, got dict: train on one"):
        tiny_trainer(max_epochs=1, callbacks=[SupervisedDictionaryEval(**THREE, autoencoder="sae")]).fit(
            module, {"rows": data.train_dataloader()}, data.val_dataloader()
        )
