"""Group bias adaptation: the maths by hand, and the callback on modules that aren't ours."""

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods.callbacks import ExactResume, GroupBiasAdaptation
from lit_methods.callbacks.sparse_autoencoders.gba.core import bias_update, firing_statistics, neuron_groups, target_frequencies
from lit_methods.datamodules.loaders import make_loader

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_groups_are_as_equal_as_they_can_be():
    assert neuron_groups(7, 3).bincount().tolist() == [3, 2, 2]
    assert neuron_groups(4, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="groups is 5: give as many groups"):
        neuron_groups(4, 5)


def test_targets_have_a_constant_ratio():
    targets = target_frequencies(4, 0.5, 0.004)
    assert (targets[1:] / targets[:-1]).tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert target_frequencies(1, 0.3, 0.3).tolist() == [0.3]
    with pytest.raises(ValueError, match="lowest"):
        target_frequencies(3, 0.1, 0.2)


def test_no_rows_and_no_peaks_change_nothing():
    firing, peak = firing_statistics(torch.zeros(0, 3))
    assert firing.tolist() == [0, 0, 0]
    assert peak.tolist() == [0, 0, 0]
    bias = torch.tensor([-0.2, 0.0, -1.0])
    found = bias_update(bias, firing, peak, 8, torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.1]))
    assert torch.equal(found.bias, bias)
    assert found.raised.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_biases_stay_between_minus_one_and_zero(dtype):
    firing, peak = torch.tensor([10, 0, 3]), torch.tensor([50.0, 0.0, 2.0], dtype=dtype)
    found = bias_update(
        torch.tensor([-0.9, -0.1, -0.5], dtype=dtype), firing, peak, 10, torch.zeros(3, dtype=torch.int64), torch.tensor([0.5])
    )
    assert found.bias.tolist() == pytest.approx([-1.0, 0.0, -0.5])
    assert found.bias.dtype == dtype
    assert float(found.group_peak) == 26.0


def test_a_target_is_a_bound_that_may_be_reached():
    found = bias_update(torch.zeros(2), torch.tensor([5, 6]), torch.ones(2), 10, torch.zeros(2, dtype=torch.int64), torch.tensor([0.5]))
    assert found.lowered.tolist() == [False, True]


# ---- on somebody's module --------------------------------------------------------------------------------------------------------------

NEURONS = 12


class Stranger(pl.LightningModule):
    """An autoencoder that knows nothing of the callback; ``inside``: its encoder puts out the bias as well."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(6, NEURONS, bias=False), nn.Linear(NEURONS, 6)
        self.register_buffer("threshold", torch.zeros(NEURONS))
        self.shifted, self.inside = nn.Identity(), inside

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        s = self.encoder(batch)
        y = self.shifted(s + self.threshold)
        loss = (self.decoder(s * (y > 0)) - batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Held(Stranger):
    """Its optimiser holds the bias."""

    def __init__(self) -> None:
        super().__init__()
        del self.threshold
        self.threshold = nn.Parameter(torch.zeros(NEURONS))


class Rows(Dataset):
    def __init__(self, shape=(6,)) -> None:
        self.rows = torch.randn(96, *shape, generator=torch.Generator().manual_seed(3)) / shape[-1] ** 0.5

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw):
        return self.rows[draw[1] if isinstance(draw, tuple) else draw]


def loader(batch_size=8, shuffle=True, **kwargs):
    return make_loader(Rows(**kwargs), batch_size, shuffle=shuffle, seed=0, drop_last=True, with_epoch=False)


def adaptation(**kwargs):
    defaults = {"groups": 3, "htf": 0.4, "ltf": 0.02, "gamma_plus": 0.1, "gamma_minus": 0.1, "every_n_steps": 3}
    names = {"pre_activations": "encoder", "bias": "threshold", "includes_bias": False}
    return GroupBiasAdaptation(**{**defaults, **names, **kwargs})


def fit(callback, module=None, steps=9, data=None, **kwargs):
    module = module or Stranger()
    trainer = tiny_trainer(max_steps=steps, callbacks=[callback], **{"log_every_n_steps": 1, **kwargs})
    trainer.fit(module, data or loader())
    return module, trainer


def test_both_ways_of_naming_pre_activations_are_the_same():
    one, trainer = fit(adaptation())
    other, _ = fit(adaptation(pre_activations="shifted", includes_bias=True))
    assert_state_dicts_equal(cloned_state(one), cloned_state(other))
    assert (one.threshold < 0).any()
    assert {"gba/above_target", "gba/dead", "gba/bias", "gba/frequency", "gba/silent_groups"} <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["gba/bias"]) == pytest.approx(float(one.threshold.mean()))


def test_frequencies_come_below_their_targets():
    callback = adaptation(every_n_steps=2, gamma_minus=0.3)
    fit(callback, steps=80, data=loader(32))
    group = {row[0]: row for row in callback.dashboard_media()["gba/groups"].rows}
    assert [group[k][3] <= 1.5 * group[k][1] for k in range(3)] == [True] * 3  # medians
    assert group[0][3] > group[2][3]


def test_sequences_are_rows():
    callback = adaptation()
    module, _ = fit(callback, data=loader(shape=(5, 6)), steps=4)
    assert module.threshold.any()
    assert callback._samples == 8 * 5


def test_steps_are_those_of_the_optimiser():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((trainer.global_step, bool(pl_module.threshold.any())))

    callback = adaptation()
    tiny_trainer(max_steps=4, callbacks=[callback, Watch()], accumulate_grad_batches=2).fit(Stranger(), loader())
    assert [step for step, moved in seen if not moved] == [0, 1, 1, 2, 2]  # 3 optimiser steps, of two batches each
    assert callback._samples == 16  # the two batches of the fourth


def test_bf16_counts_in_float32():
    callback = adaptation()
    module, _ = fit(callback, precision="bf16-mixed", steps=4)
    assert callback._peak.dtype == torch.float32
    assert module.threshold.dtype == torch.float32
    assert module.threshold.any()


def test_nothing_is_left_behind():
    assert left_behind(Stranger, adaptation, loader()) == {}


def test_a_second_fit_counts_anew():
    callback = adaptation(every_n_steps=100)
    fit(callback, steps=5)
    fit(callback, steps=2)
    assert callback._samples == 16


@pytest.mark.parametrize("kill_at", [4, 6])  # between two updates, and right behind one
def test_a_killed_run_ends_like_the_whole_one(tmp_path, kill_at):
    whole, resumed = kill_and_resume(lambda: (Stranger(), loader(), [adaptation(), ExactResume()]), 11, kill_at, tmp_path)
    assert_state_dicts_equal(resumed, whole)
    assert whole["threshold"].any()


def two_ranks(folder):
    callback = adaptation()
    module, trainer = fit(callback, steps=5, data=loader(4), devices=2, strategy="ddp")
    trainer.save_checkpoint(f"{folder}/five.ckpt")
    return cloned_state(module), callback.state_dict()


def test_two_processes_end_like_one(tmp_path):
    (state, counts), (other, _) = run_two_processes(two_ranks, str(tmp_path))
    assert_state_dicts_equal(other, state)
    callback = adaptation()
    whole, _ = fit(callback, steps=5, data=loader(8))
    assert_state_dicts_equal(state, cloned_state(whole), atol=1e-5)
    assert counts["samples"] == callback.state_dict()["samples"] == 16
    assert torch.equal(counts["firing"], callback.state_dict()["firing"])
    saved = torch.load(tmp_path / "five.ckpt", weights_only=True)["callbacks"]
    assert next(value for name, value in saved.items() if name.startswith("GroupBiasAdaptation"))["samples"] == 16


# ---- what can't be -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"groups": 0}, "groups is 0"),
        ({"htf": 0.0}, "highest"),
        ({"ltf": 0.5}, "lowest is 0.5"),
        ({"gamma_plus": -1.0}, "gamma_plus"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"every_n_steps": 0}, "every_n_steps is 0: give optimiser steps"),
    ],
)
def test_arguments_out_of_range(argument, words):
    with pytest.raises(ValueError, match=words):
        adaptation(**argument)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"bias": "treshold"}, "bias='treshold' is no vector in the state of Stranger.*vectors are threshold, decoder.bias"),
        ({"bias": "decoder.weight"}, "is no vector"),
        ({"pre_activations": "encodr"}, "nearest of"),
        ({"pre_activations": "*coder"}, "matches 2 submodules"),
        ({"groups": 13}, "groups is 13"),
        ({"bias": "decoder.bias"}, "an optimiser holds bias='decoder.bias'"),
        ({"pre_activations": "decoder"}, r"puts out \(8, 6\) torch.float32, and bias='threshold' is \(12,\)"),
    ],
)
def test_what_the_module_lacks(argument, words):
    with pytest.raises(ValueError, match=words):
        fit(adaptation(**argument))


def test_a_bias_that_is_trained_is_refused():
    with pytest.raises(ValueError, match="make it a buffer"):
        fit(adaptation(), Held())


def test_a_bias_that_is_not_saved_is_refused():
    module = Stranger()
    module.register_buffer("threshold", torch.zeros(NEURONS), persistent=False)
    with pytest.raises(ValueError, match="which its checkpoints hold"):
        fit(adaptation(), module)


def test_a_submodule_that_never_runs_is_refused():
    module = Stranger()
    module.unused = nn.Identity()
    with pytest.raises(ValueError, match="put out nothing in 3 optimiser steps"):
        fit(adaptation(pre_activations="unused"), module)


class Restores(pl.Callback):
    """Puts a state back when fit starts, as Lightning's tuners do."""

    def __init__(self, callback: GroupBiasAdaptation, neurons: int) -> None:
        figures = {"firing": torch.ones(neurons, dtype=torch.int64), "peak": torch.ones(neurons), "samples": 3, "last_step": 0}
        self.restore = lambda: callback.load_state_dict(figures)

    def on_fit_start(self, trainer, pl_module):
        self.restore()


@pytest.mark.parametrize("first", [True, False])
def test_what_a_tuner_puts_back_goes_on(first):
    callback = adaptation()
    callbacks = [Restores(callback, NEURONS), callback] if first else [callback, Restores(callback, NEURONS)]
    tiny_trainer(max_steps=2, callbacks=callbacks).fit(Stranger(), loader())
    assert callback._samples == 3 + 16


def test_a_checkpoint_of_another_width_is_refused():
    callback = adaptation()
    with pytest.raises(ValueError, match="counts 5 neurons"):
        tiny_trainer(max_steps=2, callbacks=[Restores(callback, 5), callback]).fit(Stranger(), loader())
