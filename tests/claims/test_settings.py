"""Claims in several settings: what a file may declare, on which commit a setting was named, what is run, skipped and kept."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_methods.catalog import Technique
from lit_methods.claims.cost import cost_nodes, timed_study
from lit_methods.claims.naming import named
from lit_methods.claims.plan import make_plan
from lit_methods.claims.records import (
    setting_records,
    verdict_of,
    verdict_over_all,
    verdict_table,
    verdict_words,
    verdicts,
    verdicts_of,
    with_setting,
)
from lit_methods.claims.runner import Runner
from lit_methods.claims.settings import SettingError, content_of
from lit_methods.claims.study import Study, read_settings, read_study
from lit_methods.claims.verdict import overall
from lit_methods.cli import claims as command
from lit_methods.cli.main import main
from lit_methods.cli.stage import what_is_missing
from lit_methods.errors import CommandError

FAKE = Path(__file__).parent / "fake_lit.py"
CLAIM: dict[str, Any] = {
    "claim": "Good is better.",
    "setting": "drawn",
    "data": "made: drawn figures",
    "metric": "acc",
    "direction": "higher",
    "method": "good",
    "baseline": "bad",
    "seeds": [0, 1, 2],
    "seed_keys": ["seed"],
    "budget": {"unit": "steps"},
    "tuned": {"good": ["stage"], "bad": ["stage"]},
    "arms": {
        "good": [{"config": "a.yaml", "set": {"stage": "good", "rate": 1}}],
        "bad": [{"config": "a.yaml", "set": {"stage": "bad"}}],
        "half": [{"config": ["a.yaml", "b.yaml"], "set": {"stage": "half"}}],
    },
    "reports": [{"name": "of half", "arm": "half", "metric": "acc"}, {"name": "of good", "arm": "good", "metric": "other"}],
}
DIGITS = {"data": "real digits", "real": True, "config": "claims/mini_digits.yaml", "set": {"rate": 2, "size": 8}}


def studies(tmp_path: Path, **settings: Any) -> dict[str, Study]:
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump(CLAIM | {"settings": settings}, sort_keys=False))
    return read_settings(path)


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def test_a_further_setting_lies_over_every_stage_and_has_nothing_tuned(tmp_path: Path) -> None:
    read = studies(tmp_path, digits=DIGITS)
    assert list(read) == ["drawn", "digits"]
    assert read["drawn"] == read_study(tmp_path / "mini.yaml")
    assert (read["drawn"].data, read["drawn"].real, read["drawn"].first) == ("made: drawn figures", None, True)
    digits = read["digits"]
    assert (digits.data, digits.real, digits.first, digits.setting) == ("real digits", True, False, "digits")
    assert digits.arms["half"][0].configs == ("a.yaml", "b.yaml", "claims/mini_digits.yaml")
    assert list(digits.arms["good"][0].set.items()) == [("stage", "good"), ("rate", 2), ("size", 8)], "the setting's come last"
    assert read["drawn"].arms["good"][0].set["rate"] == 1
    assert digits.tuned == {"good": (), "bad": (), "half": ()}
    assert (digits.cost, digits.paper, digits.sentence) == (None, {}, "Good is better.")


def test_a_further_setting_may_replace_what_is_judged_and_choose_arms(tmp_path: Path) -> None:
    own = {"data": "d", "metric": "loss", "direction": "lower", "seeds": [5, 6, 7], "arms": ["good", "bad"], "claim": "Otherwise."}
    read = studies(tmp_path, other=own)["other"]
    assert (read.metric, read.higher, read.seeds, list(read.arms), read.sentence) == (
        "loss",
        False,
        (5, 6, 7),
        ["good", "bad"],
        "Otherwise.",
    )
    assert [report.name for report in read.reports] == ["of good"], "a report of an arm that isn't there is left out"


def test_a_difference_in_tuning_is_no_difference_where_nothing_is_tuned() -> None:
    content = CLAIM | {"differences": {"tuned": "it is the claim", "steps": "it is longer"}, "settings": {"digits": DIGITS}}
    assert content_of(content, "digits")["differences"] == {"steps": "it is longer"}


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"data": "d", "tuned": {}}, "nothing is tuned"),
        ({"data": "d", "metrc": "x"}, "metric"),
        ({"set": {}}, r"settings\.other\.data is missing"),
        ({"data": "d", "arms": ["good", "bat"]}, "bad"),
        ({"data": "d", "set": {"stage": "same", "rate": 0}}, "overwrites their difference"),
        ({"data": "d", "cost": {}}, "cost"),
        ({"data": "d", "real": "yes"}, "true or false"),
        ("digits", "mapping"),
    ],
)
def test_a_wrong_setting_is_named(setting: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=problem) as caught:
        studies(tmp_path, other=setting)
    assert "mini.yaml: settings.other" in str(caught.value)


def test_settings_need_names_and_words_on_their_data(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="lower-case words"):
        studies(tmp_path, **{"Big One": DIGITS})
    with pytest.raises(CommandError, match="two settings are called 'drawn'"):
        studies(tmp_path, drawn=DIGITS)
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in CLAIM.items() if key != "setting"} | {"settings": {"digits": DIGITS}}))
    with pytest.raises(CommandError, match="needs `setting`"):
        read_settings(path)


def test_what_is_missing_is_found_in_the_chain_of_causes() -> None:
    wrapped = CommandError("Digits can't be imported")
    wrapped.__cause__ = ModuleNotFoundError("No module named 'digits'")
    assert what_is_missing(wrapped) == "No module named 'digits'"
    assert what_is_missing(FileNotFoundError("no such set")) == "no such set"
    assert what_is_missing(ValueError("wrong")) == ""


# ---- the commit ------------------------------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True).stdout.strip()


def committed(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "configs" / "claims" / "mini.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "c")
    return git(folder, "rev-parse", "HEAD")


def test_the_commit_of_a_setting_is_the_first_one_with_it_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    committed(tmp_path, CLAIM)
    file = Path("configs/claims/mini.yaml")
    with_digits = CLAIM | {"settings": {"digits": DIGITS}}
    overlay = tmp_path / "configs" / "claims" / "mini_digits.yaml"
    overlay.write_text("data: {size: 8}\n")
    first = committed(tmp_path, with_digits)
    committed(
        tmp_path, with_digits | {"claim": "In other words.", "settings": {"digits": DIGITS | {"data": "real, small digits"}, "x": DIGITS}}
    )
    found = named(file, "digits")
    assert found is not None
    assert found["commit"] == first, "words may change, and other settings may come"
    assert len(found["date"]) == 10
    changed = committed(tmp_path, CLAIM | {"seeds": [3, 4, 5], "settings": {"digits": DIGITS}})
    assert (named(file, "digits") or {})["commit"] == changed, "what it takes from the first setting counts, too"
    overlay.write_text("data: {size: 9}\n")
    with pytest.raises(CommandError, match="isn't committed as it stands"):
        named(file, "digits")
    git(tmp_path, "commit", "-qam", "another size")
    assert (named(file, "digits") or {})["commit"] == git(tmp_path, "rev-parse", "HEAD")
    file.write_text(file.read_text().replace("rate: 2", "rate: 3"))
    with pytest.raises(CommandError, match=r"git add configs/claims/mini\.yaml"):
        named(file, "digits")


def test_a_file_in_no_checkout_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(CLAIM | {"settings": {"digits": DIGITS}}))
    assert named(tmp_path / "mini.yaml", "digits") is None
    git(tmp_path, "init", "-q")
    with pytest.raises(CommandError, match="isn't committed"):
        named(tmp_path / "mini.yaml", "digits")
    (tmp_path / ".gitignore").write_text("mini.yaml\n")
    assert named(tmp_path / "mini.yaml", "digits") is None, "as in an environment inside somebody's project"


# ---- verdicts and records --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["holds"], "holds"),
        (["does not hold"], "does not hold"),
        (["holds", "holds"], "holds everywhere"),
        (["holds", "does not hold"], "holds in 1 of 2"),
        (["undecided", "holds", "holds"], "holds in 2 of 3"),
        (["undecided", "undecided"], "undecided"),
        (["undecided", "does not hold"], "does not hold"),
    ],
)
def test_the_verdict_over_all_settings(verdicts: list[str], words: str) -> None:
    assert overall(verdicts) == words


def kept(setting: str, verdict: str) -> dict[str, Any]:
    return {"setting": setting, "verdict": {"verdict": verdict}, "sentence": "s"}


def test_no_setting_leaves_the_record_and_none_that_was_run_leaves_the_verdict() -> None:
    old = {"verdict": {"verdict": "holds"}, "sentence": "kept from before settings had names"}
    declared = {"drawn": "made", "digits": "real"}
    assert verdict_of(old, declared) == "holds (1 setting not yet run)"
    record = with_setting(old, kept("digits", "does not hold"), first=False)
    assert verdict_of(record, declared) == "holds in 1 of 2"
    assert list(setting_records(record)) == ["", "digits"]
    assert verdicts_of(record, {"drawn": "made"}) == {"drawn": "holds", "digits": "does not hold"}, "removed from the file, and still there"
    record = with_setting(record, kept("drawn", "undecided"), first=True)
    assert verdicts_of(record, declared) == {"drawn": "undecided", "digits": "does not hold"}
    record = with_setting(record, kept("other", "holds"), first=True)
    assert set(verdicts_of(record, {"other": "new"})) == {"other", "digits", "drawn"}, "another first setting doesn't hide the one before"
    alone = with_setting(None, kept("digits", "holds"), first=False)
    assert verdicts_of(alone, declared) == {"drawn": "not yet run", "digits": "holds"}
    table = verdict_table({"mini": record}, {"mini": {"other": "new"}}, ["mini", "new"])
    assert table["mini"]["verdict"] == "holds in 1 of 3"
    assert table["new"] == {"verdict": "not yet run", "settings": {}}


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def resolve(commands: dict[str, list[str]], threads: int) -> dict[str, Any]:
    """The words themselves as the config, but for the seed."""
    return {
        name: {"stage": 0, "words": " ".join(words).replace(f"--seed {words[words.index('--seed') + 1]}", "")}
        for name, words in commands.items()
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.txt"))
    monkeypatch.setattr("lit_methods.claims.plan.make_plan", functools.partial(make_plan, resolve=resolve))
    monkeypatch.setattr("lit_methods.claims.runner.Runner", functools.partial(Runner, child=(sys.executable, str(FAKE))))
    technique = Technique("mini", "Mini Things", "", "demo", "module", (), (), (), "Good is better.", "")
    monkeypatch.setattr(command, "techniques", lambda: {"mini": technique})
    write_claim(tmp_path, shapes={"data": "made: shapes", "arms": ["good", "bad"], "set": {"rate": 3}})
    return tmp_path


def write_claim(folder: Path, **settings: Any) -> None:
    path = folder / "configs" / "claims" / "mini.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(CLAIM | {"settings": settings}, sort_keys=False))


def records(folder: Path) -> dict[str, Any]:
    return dict(setting_records(json.loads((folder / "runs/claims/evidence/mini.json").read_text())))


def test_every_setting_runs_and_is_kept_for_itself(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "mini"]) == 0
    said = capsys.readouterr().out
    assert "mini in the setting drawn (made: drawn figures): Good is better." in said
    assert "mini in the setting shapes (made: shapes): Good is better." in said
    found = records(workplace)
    assert {name: list(one["values"]) for name, one in found.items()} == {"drawn": ["good", "bad", "half"], "shapes": ["good", "bad"]}
    assert found["shapes"]["named"] is None, "it's in no checkout"
    assert (workplace / "runs/claims/mini/shapes/summary.json").is_file()
    assert "holds everywhere" in (workplace / "runs/claims/evidence.md").read_text()
    write_claim(workplace)
    assert main(["claims", "--page"]) == 0
    page = " ".join((workplace / "runs/claims/evidence.md").read_text().split())
    assert "holds everywhere" in page
    assert "It is no longer in the claim file." in page
    assert main(["claims", "mini"]) == 0
    assert records(workplace)["shapes"] == found["shapes"], "running the others leaves it"


def test_one_setting_by_name(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "mini", "--setting", "shapes"]) == 0
    assert list(records(workplace)) == ["shapes"]
    assert "6 stages" in capsys.readouterr().out
    assert main(["claims", "mini", "--setting", "shape"]) == 2
    assert "nearest: shapes" in capsys.readouterr().err


def test_a_plan_and_a_quick_look_take_all_settings_and_need_no_commit(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(workplace, "init", "-q")
    (workplace / ".gitignore").write_text("runs\n")
    git(workplace, "add", ".gitignore")
    git(workplace, "commit", "-qm", "c")
    assert main(["claims", "mini", "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.count("fair as declared") == 2
    assert "can't be run yet: configs/claims/mini.yaml: settings.shapes isn't committed" in said
    assert main(["claims", "mini", "--setting", "shapes"]) == 2
    assert "isn't committed as it stands" in capsys.readouterr().err
    assert not (workplace / "log.txt").exists()
    assert main(["claims", "mini", "--quick"]) == 0
    assert (workplace / "runs/claims/mini/shapes/quick.json").is_file()
    git(workplace, "add", "-A")
    git(workplace, "commit", "-qm", "named")
    assert main(["claims", "mini", "--setting", "shapes"]) == 0
    assert records(workplace)["shapes"]["named"]["commit"] == git(workplace, "rev-parse", "HEAD")


def test_a_setting_without_its_data_is_skipped_and_the_others_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = {"data": "real", "arms": ["good", "bad"], "set": {"behave": "missing"}}
    write_claim(workplace, gone=gone, shapes={"data": "made", "set": {"rate": 3}})
    assert main(["claims", "mini"]) == 0
    said = capsys.readouterr().out
    assert "mini, setting gone: skipped, as its data or a library isn't there\n  no digits here" in said
    assert list(records(workplace)) == ["drawn", "shapes"]
    assert main(["claims", "mini", "--setting", "gone"]) == 1
    assert "no digits here" in capsys.readouterr().err


def test_a_cost_is_measured_alone_and_stands_beside_the_kept_result(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace / "configs/claims/mini.yaml"
    assert main(["claims", "mini", "--cost"]) == 2
    assert "declares no cost" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(CLAIM | {"cost": {"method": "good", "baseline": "bad", "stage": 0, "steps": 5}}, sort_keys=False))
    assert main(["claims", "mini", "--cost"]) == 2
    assert "run lit claims mini" in capsys.readouterr().err
    assert main(["claims", "mini"]) == 0
    before = records(workplace)["drawn"]
    log = (workplace / "log.txt").read_text().count("\n")
    assert main(["claims", "mini", "--cost"]) == 0
    assert (workplace / "log.txt").read_text().count("\n") == log, "stages that are kept don't run again"
    after = records(workplace)["drawn"]
    measured = after["cost"].pop("measured")
    assert measured["date"]
    assert measured["load"] >= 0
    assert after == before


def test_a_config_beside_the_claims_is_no_claim(workplace: Path) -> None:
    (workplace / "configs/claims/mini_digits.yaml").write_text("data: {size: 8}\n")
    assert "mini" in command.find_studies("claims", [])
    assert "mini_digits" not in command.find_studies("claims", [])


def test_a_setting_error_is_one_message() -> None:
    with pytest.raises(SettingError, match=r"settings\.x has no 'setts'"):
        content_of(CLAIM | {"settings": {"x": {"data": "d", "setts": 1}}}, "x")


# ---- cost ------------------------------------------------------------------------------------------------------------------------------


def test_a_cost_may_time_fits_that_are_no_arms(tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    bare = {"name": "bare", "config": "a.yaml", "set": {"callbacks": []}}
    path.write_text(yaml.safe_dump(CLAIM | {"cost": {"method": "good", "baseline": bare, "steps": 5}}))
    study = read_study(path)
    plan = make_plan(timed_study(study), [0], [], resolve)
    assert list(plan.chains) == ["good", "bare"], "the other arms don't run"
    runs = cost_nodes(study.cost or pytest.fail("no cost"), plan, 0, 5)
    assert [arm for arm, _ in runs] == ["good", "bare"] * 3
    bare_words, good_words = " ".join(runs[1][1].words), " ".join(runs[0][1].words)
    assert "--callbacks [] --trainer.callbacks+=StepCost" in bare_words
    assert "--callbacks []" not in good_words
    path.write_text(yaml.safe_dump(CLAIM | {"cost": {"method": "good", "baseline": bare | {"name": "bad"}, "steps": 5}}))
    with pytest.raises(CommandError, match="a name that no arm has"):
        read_study(path)


@pytest.mark.catalogue
def test_lit_info_says_whether_the_claim_holds(capsys: pytest.CaptureFixture[str]) -> None:
    for slug in verdicts():
        assert main(["info", slug]) == 0
        assert f"verdict    {verdict_words(slug)}\n" in capsys.readouterr().out


def test_the_words_of_a_verdict_name_the_settings_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "a": {"verdict": "holds", "settings": {"": "holds"}},
        "b": {"verdict": "holds in 1 of 2", "settings": {"x": "holds", "y": "undecided"}},
    }
    monkeypatch.setattr("lit_methods.claims.records.verdicts", lambda: table)
    assert [verdict_words(slug) for slug in ("a", "b", "none")] == ["holds", "holds in 1 of 2 (x: holds; y: undecided)", "not yet run"]
    assert [verdict_over_all(slug) for slug in ("b", "none")] == ["holds in 1 of 2", "not yet run"]
