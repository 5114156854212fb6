"""Claim files: what they may hold, and what the shipped ones hold."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_methods.catalog import configs_folder, published
from lit_methods.claims.fairness import ResolvedStage, config_differences
from lit_methods.claims.plan import Node, Plan, library_versions, make_plan, resolve_configs, stage_words
from lit_methods.claims.study import Stage, Study, read_settings, read_study
from lit_methods.claims.summary import changes, check_before, summarise
from lit_methods.cli.claims import find_studies, split_words
from lit_methods.cli.stage import resolve as resolve_file
from lit_methods.errors import CommandError

CLAIM: dict[str, Any] = {
    "claim": "Good is better.",
    "metric": "acc",
    "direction": "higher",
    "method": "good",
    "baseline": "bad",
    "seeds": [0, 1, 2],
    "seed_keys": ["seed_everything"],
    "budget": {"unit": "steps"},
    "tuned": {"good": [], "bad": []},
    "arms": {
        "good": [{"config": "a.yaml", "set": {"model.x": 1}}, {"config": "b.yaml"}],
        "bad": [{"config": "a.yaml"}, {"config": "b.yaml"}],
    },
}


def study(tmp_path: Path, kind: str = "claim", **content: Any) -> Study:
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (CLAIM | content).items() if value is not None}, sort_keys=False))
    return read_study(path, kind)


def fake_resolve(commands: dict[str, list[str]], threads: int) -> dict[str, dict[str, Any]]:
    """Every ``--key value`` as a config; the seed counts like in a real one."""
    found: dict[str, dict[str, Any]] = {}
    for name, words in commands.items():
        given = dict(pairwise(words))
        found[name] = {key[2:]: value for key, value in given.items() if key.startswith("--") and "callbacks" not in key} | {"data": "d"}
    return found


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"metrc": "acc"}, "metric"),
        ({"metric": None}, "metric is missing"),
        ({"direction": "up"}, "higher or lower"),
        ({"method": "goood"}, "good"),
        ({"baseline": "good"}, "two arms"),
        ({"seeds": [0, 0, 1]}, "different whole numbers"),
        ({"budget": {"unit": "hours"}}, "steps, parameters, flops"),
        ({"budget": {}}, "budget.unit"),
        ({"tuned": {"good": []}}, "tuned.bad"),
        ({"differences": {"step": "it is so because"}}, "steps"),
        ({"differences": {"steps": "because"}}, "reason in words"),
        ({"arms": {"good": [], "bad": [{"config": "a"}]}}, "list of stages"),
        ({"arms": {"good": [{"config": "a", "confg": 1}], "bad": [{"config": "a"}]}}, "config"),
        ({"arms": {"good": [{"config": "a", "command": "predict"}], "bad": [{"config": "a"}]}}, "fit, validate or test"),
        ({"arms": {"good": [{"config": "a", "checkpoint": "{checkpoint}"}], "bad": [{"config": "a"}]}}, "is the first"),
        ({"cost": {"method": "good", "baseline": "bad", "stage": 2, "steps": 5}}, "stage 2"),
        ({"cost": {"method": "good", "baseline": "bad", "stage": 0, "steps": 2}}, "warm-up"),
        ({"reports": [{"name": "x", "arm": "none", "metric": "acc"}]}, "one of the arms"),
    ],
)
def test_a_mistake_is_named_with_its_file(content: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=problem) as caught:
        study(tmp_path, **content)
    assert "mini.yaml" in str(caught.value)


def test_a_comparison_judges_every_arm_against_its_reference(tmp_path: Path) -> None:
    content = {"claim": None, "method": None, "baseline": None, "question": "Which?", "reference": "bad"}
    read = study(tmp_path, "compare", **content, differences={"good": {"steps": "for a good reason"}})
    assert (read.judged, read.reference, read.differences) == (("good",), "bad", {"good": {"steps": "for a good reason"}})
    with pytest.raises(CommandError, match="good"):
        study(tmp_path, "compare", **content, differences={"steps": {"steps": "for a good reason"}})


def test_a_comparison_may_be_drawn_over_a_metric_that_every_arm_reports(tmp_path: Path) -> None:
    content = {"claim": None, "method": None, "baseline": None, "question": "Which?", "reference": "bad", "over": "size"}
    reports = [{"name": arm, "arm": arm, "metric": "size"} for arm in ("good", "bad")]
    assert study(tmp_path, "compare", **content, reports=reports).over == "size"
    with pytest.raises(CommandError, match="over is size, which reports doesn't have of bad"):
        study(tmp_path, "compare", **content, reports=reports[:1])
    with pytest.raises(CommandError, match="over"):
        study(tmp_path, over="size")


def test_stage_words() -> None:
    stage = Stage("fit", ("x.yaml",), {"model.a": "{checkpoint}", "model.b": False, "model.c": None}, ("TemporalVoting",))
    words = stage_words(stage, 3, ["seed_everything"], ["--data.n", "1"])
    assert words[:5] == ["fit", "--config", "configs/x.yaml", "--seed_everything", "3"]
    assert words[5:11] == ["--model.a", "{checkpoint}", "--model.b", "false", "--model.c", "null"]
    assert words[11:] == ["--data.n", "1", "--trainer.callbacks+=TemporalVoting", "--trainer.callbacks+=StepCost"]
    assert "--trainer.callbacks.flops" in stage_words(stage, 3, [], flops=True)
    evaluation = stage_words(Stage("validate", ("x.yaml",), checkpoint="{checkpoint}"), 0, [])
    assert evaluation == ["validate", "--config", "configs/x.yaml", "--ckpt_path", "{checkpoint}"]


def test_words_for_every_stage_are_told_from_our_own() -> None:
    own, passed = split_words(["a", "--data.init_args.root", "x y", "b", "--trainer.max_epochs=3", "--seeds", "0", "1", "--model", "M"])
    assert own == ["a", "b", "--seeds", "0", "1"]
    assert passed == ["--data.init_args.root", "x y", "--trainer.max_epochs=3", "--model", "M"]


# ---- keys ------------------------------------------------------------------------------------------------------------------------------


def keys(nodes: list[Node]) -> list[str]:
    return [node.key for node in nodes]


def test_equal_beginnings_are_one_stage_and_everything_else_differs(tmp_path: Path) -> None:
    b = {"config": "b.yaml"}
    arms = {"good": [{"config": "a.yaml"}, b], "bad": [{"config": "a.yaml"}, {"config": "c.yaml"}], "third": [{"config": "z.yaml"}, b]}
    report = {"name": "r", "arm": "good", "metric": "acc", "stage": {"command": "validate", "config": "b.yaml"}}
    plan = make_plan(study(tmp_path, arms=arms, reports=[report]), [0, 1], [], fake_resolve)
    good, bad, third = (plan.chains[arm][0] for arm in arms)
    assert good[0] is bad[0]
    assert good[0].arms == ["good", "bad"]
    assert good[1].key != third[1].key, "the same command behind another stage is another stage"
    assert plan.chains["report: r"][0][:2] == good
    assert plan.chains["report: r"][0][2].upstream is good[1]
    assert len(plan.nodes) == 2 * 6
    assert not set(keys(plan.chains["good"][0])) & set(keys(plan.chains["good"][1])), "another seed is another stage"
    assert [node.kind for node in plan.chains["good"][0]] == [node.kind for node in plan.chains["good"][1]]


def test_a_key_changes_with_config_overrides_threads_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(extra: list[str] | None = None, resolve: Any = fake_resolve, **content: Any) -> str:
        return make_plan(study(tmp_path, **content), [0], extra or [], resolve).chains["bad"][0][1].key

    def edited(commands: dict[str, list[str]], threads: int) -> dict[str, Any]:
        return {name: config | {"inside_the_file": 1} for name, config in fake_resolve(commands, threads).items()}

    before = key()
    assert key() == before
    others = [key(["--data.n", "1"]), key(resolve=edited), key(threads=2)]
    monkeypatch.setattr("lit_methods.claims.plan.library_versions", lambda: library_versions() | {"torch": "99"})
    others.append(key())
    assert len({before, *others}) == 5


def test_unfair_arms_are_refused_with_the_way_out(tmp_path: Path) -> None:
    arms = {"good": [{"config": "a.yaml"}, {"config": "b.yaml"}], "bad": [{"config": "b.yaml"}], "third": [{"config": "b.yaml"}] * 3}
    unfair = study(tmp_path, arms=arms)
    plan = make_plan(unfair, [0], [], fake_resolve)
    with pytest.raises(CommandError, match=r"2 fit stages \(1\)") as caught:
        check_before(unfair, plan, Path("mini.yaml"))
    assert 'steps: "the reason in words"' in str(caught.value)
    assert caught.value.exit_code == 2
    declared = study(tmp_path, arms=arms, differences={"steps": "pretraining is the claim"})
    found = check_before(declared, plan, Path("mini.yaml"))
    assert [one.text for one in found["third"]] == ["3 fit stages (2)"], "a further arm is held against the method, and not refused"
    with pytest.raises(CommandError, match=r"declares data.*remove"):
        check_before(study(tmp_path, arms=arms, differences={"steps": "it is the claim", "data": "it is the claim"}), plan, Path("m"))
    with pytest.raises(CommandError, match=r"good: model\.rate"):
        check_before(study(tmp_path, arms=arms, tuned={"good": ["model.rate"], "bad": []}), plan, Path("m"))


def finished(plan: Plan, **steps: int) -> dict[str, Any]:
    """Results as the runner gives them: ``acc`` grows with the seed, arms as long as ``steps`` says."""
    results = {}
    for node in plan.nodes:
        value = 0.1 * node.seed + (0.5 if node.arms == ["good"] else 0.1)
        cost = {"steps": steps.get(node.arms[0], 4), "parameters": 7, "flops_per_batch": 3, "batches": 4}
        results[node.key] = {"metrics": {"acc": value, "other": 2.0}, "cost": cost, "seconds": 1.5, "run": "r"}
    return results


def summary(tmp_path: Path, steps: dict[str, int] | None = None, seeds: list[int] | None = None, **content: Any) -> dict[str, Any]:
    arms = {"good": [{"config": "g.yaml"}], "bad": [{"config": "b.yaml"}], "third": [{"config": "t.yaml"}]}
    read = study(tmp_path, **({"arms": arms, "reports": [{"name": "o", "arm": "good", "metric": "other"}]} | content))
    plan = make_plan(read, seeds or [0, 1, 2], [], fake_resolve)
    return summarise(read, plan, seeds or [0, 1, 2], finished(plan, **(steps or {})), check_before(read, plan, Path("m")), Path("m"))


def test_a_summary_holds_values_budget_and_verdict(tmp_path: Path) -> None:
    found = summary(tmp_path, budget={"unit": ["steps", "flops"]})
    assert found["values"]["good"] == pytest.approx([0.5, 0.6, 0.7])
    assert found["verdict"]["verdict"] == "holds", "equal differences in every seed are no error"
    assert found["verdict"]["mean"] == pytest.approx(0.4)
    assert found["budget"]["bad"] == [{"steps": 4, "parameters": 7, "flops": 12}] * 3
    assert found["reports"] == [{"name": "o", "arm": "good", "metric": "other", "values": [2.0] * 3}]
    assert (found["stages"], found["seconds"]) == (9, 13.5)
    assert json.loads(json.dumps(found))["intervals"]["third"][0] == pytest.approx(0.0)
    assert summary(tmp_path, seeds=[0, 1])["verdict"] is None


def test_what_was_measured_counts_although_the_configs_look_fair(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"5 steps \(4\)"):
        summary(tmp_path, {"good": 5})
    found = summary(tmp_path, {"good": 5}, differences={"steps": "longer is the claim"})
    (difference,) = found["differences"]["good"]
    assert (difference["kind"], difference["against"], difference["reason"]) == ("steps", "bad", "longer is the claim")
    with pytest.raises(CommandError, match=r"declares steps.*remove"):
        summary(tmp_path, differences={"steps": "longer is the claim"})
    assert summary(tmp_path, {"good": 5}, budget={"unit": "steps", "tolerance": 0.2})["differences"]["good"] == []
    assert [one["against"] for one in summary(tmp_path, {"third": 5})["differences"]["third"]] == ["good"]


def test_what_an_ablation_changes_is_listed(tmp_path: Path) -> None:
    read = study(tmp_path)
    assert changes(read, make_plan(read, [0], [], fake_resolve), "bad", "good") == ["model.x: None (1)"]
    item = {"class_path": "my.Term", "init_args": {"weight": 1, "other": 2}}
    staged = {
        arm: [ResolvedStage("fit", {"callbacks": [item, *more]})] for arm, more in (("good", []), ("bad", [{"class_path": "my.More"}]))
    }
    staged["bad"][0].config["callbacks"][0] = {"class_path": "my.Term", "init_args": {"weight": 3, "other": 2}}
    assert changes(read, Plan([], {}, staged), "bad", "good") == [
        "callbacks[More].class_path: my.More (None)",
        "callbacks[Term].weight: 3 (1)",
    ]
    staged["bad"][0].config["callbacks"].clear()
    assert changes(read, Plan([], {}, staged), "bad", "good")[-1] == "callbacks[Term].class_path: None (my.Term)", "and not its arguments"
    assert config_differences({"a": {"b": [1]}, "c": 1}, {"a": {"b": [2]}, "c": 1}) == ["a.b: [1] ([2])"]


# ---- the shipped files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.catalogue
def test_every_technique_has_a_claim_and_the_catalogue_says_the_same() -> None:
    for slug, entry in published().items():
        read = read_study(configs_folder() / "claims" / f"{slug}.yaml")
        assert read.sentence == entry.claim
        assert len(read.seeds) >= 3


@pytest.mark.catalogue
def test_every_claim_is_tried_where_nothing_was_tuned() -> None:
    folder, laid_over = configs_folder(), set()
    for slug in published():
        first, *further = read_settings(folder / "claims" / f"{slug}.yaml").values()
        assert further, f"{slug} has no further setting"
        for study in further:
            assert study.data != first.data
            assert len(study.seeds) >= 3
            laid_over |= {name for arm in study.arms.values() for stage in arm for name in stage.configs if "/settings/" in name}
    assert laid_over == {path.relative_to(folder).as_posix() for path in (folder / "claims" / "settings").iterdir()}


SHIPPED = {path.stem: ("claim", path) for path in find_studies("claims", []).values()}
SHIPPED |= {f"compare {path.stem}": ("compare", path) for path in find_studies("compare", []).values()}
FURTHER = {f"{path.stem} {name}": path for path in find_studies("claims", []).values() for name in list(read_settings(path))[1:]}


_resolved: dict[str, dict[str, Any]] = {}  # by command; settings of a claim share some


@pytest.fixture
def resolve_here(tmp_path: Path) -> Any:
    """As ``resolve_configs``, in this process and each command once: a process for each claim would cost more than what it does."""

    def resolve(commands: dict[str, list[str]], threads: int) -> dict[str, dict[str, Any]]:
        new = [words for words in commands.values() if " ".join(words) not in _resolved]
        file = tmp_path / "commands.json"
        file.write_text(json.dumps(new))
        assert resolve_file(file) == 0
        for words, answer in zip(new, json.loads(file.read_text()), strict=True):
            assert "config" in answer, answer
            _resolved[" ".join(words)] = answer["config"]
        return {name: copy.deepcopy(_resolved[" ".join(words)]) for name, words in commands.items()}

    return resolve


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_resolves_and_is_fair_as_declared(name: str, resolve_here: Any) -> None:
    kind, file = SHIPPED[name]
    answers: dict[str, dict[str, Any]] = {}

    def resolve(commands: dict[str, list[str]], threads: int) -> dict[str, dict[str, Any]]:
        found = resolve_here(commands, threads)
        answers.update({" ".join(words): found[command] for command, words in commands.items()})
        return found

    read = read_study(file, kind)
    plan = make_plan(read, [0], [], resolve)
    check_before(read, plan, file)
    reference = answers[" ".join(plan.chains[read.reference][0][-1].words)]
    assert all(key in reference["trainer"] for key in ("max_epochs", "max_steps"))


@pytest.mark.parametrize("name", FURTHER)
def test_a_further_setting_resolves_and_is_fair_as_declared(name: str, resolve_here: Any) -> None:
    read = read_settings(FURTHER[name])[name.split()[1]]
    check_before(read, make_plan(read, [0], [], resolve_here), FURTHER[name])


@pytest.mark.usefixtures("forked_python")
def test_a_process_of_its_own_resolves_the_same(resolve_here: Any) -> None:
    read = read_study(SHIPPED["random_pruning"][1], "claim")
    here, apart = (make_plan(read, [0], [], resolve) for resolve in (resolve_here, resolve_configs))
    assert keys(here.nodes) == keys(apart.nodes), "a key covers the resolved config"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(CommandError, match="superflow"):
        find_studies("claims", ["superflwo"])
    with pytest.raises(CommandError, match="lidar"):
        find_studies("compare", ["lidr"])
