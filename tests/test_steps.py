"""Length of a training, and learning rates over it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import tiny_trainer
from lit_methods import MLP, ImageClassifier
from lit_methods.datamodules import DigitsDataModule
from lit_methods.optim import linear_rise, scheduled, warmup_cosine
from lit_methods.steps import steps_per_epoch, training_length


def module(batches: float = 10, accumulate: int = 1, estimate: float = 100) -> Any:
    loop = SimpleNamespace(setup_data=lambda: None)
    trainer = SimpleNamespace(
        num_training_batches=batches, accumulate_grad_batches=accumulate, estimated_stepping_batches=estimate, fit_loop=loop
    )
    return SimpleNamespace(trainer=trainer)


def test_the_length_is_what_was_asked_for_or_what_the_trainer_estimates() -> None:
    assert training_length(module(estimate=math.inf), 7) == 7
    assert training_length(module(estimate=100)) == 100
    assert training_length(module(estimate=0)) == 1, "no schedule divides by 0"


@pytest.mark.parametrize("estimate", [math.inf, -1])
def test_a_training_without_an_end_is_refused(estimate: float) -> None:
    with pytest.raises(ValueError, match=r"the schedule needs an end, .* none: set max_steps, max_epochs, or total_steps$"):
        training_length(module(estimate=estimate))
    with pytest.raises(ValueError, match=r"min_lr=0\.1 needs an end, and this training has none: set max_steps or max_epochs$"):
        training_length(module(estimate=estimate), what="min_lr=0.1", instead=None)


def test_a_host_says_which_argument_needs_the_end() -> None:
    trainer = tiny_trainer(max_epochs=-1)
    with pytest.raises(ValueError, match="schedule='cosine' needs an end"):
        trainer.fit(ImageClassifier(MLP([64, 10]), schedule="cosine"), DigitsDataModule())


def test_an_epoch_has_its_optimiser_steps_rounded_up() -> None:
    assert steps_per_epoch(module(batches=10, accumulate=4)) == 3
    assert steps_per_epoch(module(batches=math.inf)) == 0
    with pytest.raises(ValueError, match="milestones counts in epochs, and the training loader has no length"):
        steps_per_epoch(module(batches=math.inf), "milestones")


def test_rises_end_at_the_full_rate() -> None:
    assert [linear_rise(step, 3) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert linear_rise(0, 0) == 1
    assert [warmup_cosine(step, 6, 2, final=0.5) for step in (0, 1, 2, 4, 6, 9)] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.5])


def test_a_schedule_multiplies_the_rate() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    config: Any = scheduled(optimizer, lambda step: 1 / (1 + step), "epoch")
    assert config["lr_scheduler"]["interval"] == "epoch"
    optimizer.step()
    config["lr_scheduler"]["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == 0.25
