"""Unequal chances are found, declared ones are let through, and declarations without a difference are errors."""

import copy
from typing import Any

import pytest

from lit_methods.claims import fairness
from lit_methods.claims.fairness import Difference, ResolvedStage

TRAINER = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": None, "accumulate_grad_batches": 1}
DATA = {"class_path": "Data", "init_args": {"seed": 0, "batch_size": 4, "root": None}}
FIT = {"trainer": TRAINER, "data": DATA, "model": {"init_args": {"lr": 0.1}}, "seed_everything": 0}
SEEDS = ("seed_everything", "data.init_args.seed")


def changed(**changes: Any) -> dict[str, Any]:
    """``FIT`` with other values under dotted keys (dots written as two underscores)."""
    config: dict[str, Any] = copy.deepcopy(FIT)
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return config


def kinds(ours: list[ResolvedStage], theirs: list[ResolvedStage], **options: Any) -> list[str]:
    found = fairness.before_running(
        "a", "b", {"a": ours, "b": theirs}, **({"seed_keys": SEEDS, "tuned": {"a": [], "b": []}, "units": ["steps"]} | options)
    )
    return [difference.kind for difference in found]


def test_equal_arms_are_fair_whatever_their_models_and_seeds() -> None:
    other = changed(model__init_args__lr=0.2, seed_everything=5, data__init_args__seed=5)
    assert kinds([ResolvedStage("fit", other)], [ResolvedStage("fit", FIT)]) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__init_args__root": "/other"}, ["data"]),
        ({"data__init_args__batch_size": 8}, ["data", "steps"]),
        ({"trainer__max_epochs": 3}, ["steps"]),
        ({"trainer__max_steps": 10}, ["steps"]),
        ({"trainer__limit_train_batches": 3}, ["steps"]),
        ({"trainer__accumulate_grad_batches": 2}, ["steps"]),
    ],
)
def test_other_data_or_another_budget_is_found(changes: dict[str, Any], expected: list[str]) -> None:
    assert kinds([ResolvedStage("fit", changed(**changes))], [ResolvedStage("fit", FIT)]) == expected


def test_a_further_fit_is_more_budget_and_a_validation_is_none() -> None:
    one = [ResolvedStage("fit", FIT)]
    assert kinds([*one, *one], one) == ["steps"]
    assert kinds([*one, ResolvedStage("validate", FIT)], one) == []
    assert kinds([*one, *one], one, units=["parameters"]) == []  # measured, not read from the configs


def test_only_the_last_stage_is_the_evaluation() -> None:
    elsewhere = ResolvedStage("fit", changed(data__init_args__root="/other"))
    last = ResolvedStage("validate", FIT)
    assert kinds([elsewhere, last], [ResolvedStage("fit", FIT), last]) == []


def test_more_tuning_and_own_seeds_are_found() -> None:
    one = [ResolvedStage("fit", FIT)]
    assert kinds(one, one, tuned={"a": ["x", "y"], "b": ["x"]}) == ["tuned"]
    assert kinds([ResolvedStage("fit", FIT, ("seed_everything", "x"))], one) == ["seeds"]


def test_the_message_names_both_values() -> None:
    stages = {"a": [ResolvedStage("fit", changed(trainer__max_epochs=3))], "b": [ResolvedStage("fit", FIT)]}
    (found,) = fairness.before_running("a", "b", stages, seed_keys=SEEDS, tuned={}, units=["steps"])
    assert found.text == "fit 1: max_epochs: 3 (2)"


def test_measured_budgets_are_compared_in_every_seed() -> None:
    measured = {
        "a": [{"steps": 10, "parameters": 100}, {"steps": 12, "parameters": 104}],
        "b": [{"steps": 10, "parameters": 100}, {"steps": 10, "parameters": 100}],
    }
    found = fairness.after_running(measured, "a", "b", ["steps"], 0.0)
    assert found == [Difference("steps", "12 steps (10)")]
    assert fairness.after_running(measured, "a", "b", ["parameters"], 0.05) == []
    assert [one.kind for one in fairness.after_running(measured, "a", "b", ["parameters"], 0.01)] == ["parameters"]


def test_one_kind_is_said_once() -> None:
    found = [Difference("steps", "x"), Difference("data", "y"), Difference("steps", "z"), Difference("steps", "x")]
    assert fairness.merged(found) == [Difference("steps", "x; z"), Difference("data", "y")]


def test_declared_differences_pass_and_stale_declarations_are_named() -> None:
    found = [Difference("steps", "x"), Difference("data", "y")]
    assert fairness.undeclared(found, {"steps": "why"}) == [Difference("data", "y")]
    assert fairness.stale(found, {"steps": "why", "tuned": "why"}, ["data", "tuned"]) == ["tuned"]
    assert fairness.stale(found, {"steps": "why", "flops": "why"}, ["data", "tuned"]) == []  # not decided yet


def test_a_tuned_key_must_exist() -> None:
    stages = {"a": [ResolvedStage("fit", FIT)]}
    assert fairness.unknown_tuned({"a": ["model.init_args.lr"]}, stages) == []
    assert fairness.unknown_tuned({"a": ["model.init_args.rate"]}, stages) == ["a: model.init_args.rate"]
