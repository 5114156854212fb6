"""The verdict's arithmetic, and a whole claim in miniature."""

import json

import pytest

from lit_methods import claims


def test_a_clear_advantage_holds_and_the_gate_counts():
    verdict = claims.judge([0.30, 0.32, 0.28], [0.08, 0.09, 0.07], gate=0.1)
    assert verdict.verdict == "holds"
    assert verdict.better == 3
    assert verdict.mean == pytest.approx(0.22)
    assert verdict.low < verdict.mean < verdict.high
    assert claims.judge([0.30, 0.32, 0.28], [0.08, 0.09, 0.07], gate=0.25).verdict == "does not hold"


def test_noise_is_undecided_and_a_loss_does_not_hold():
    assert claims.judge([0.3, 0.1, 0.2], [0.2, 0.2, 0.19]).verdict == "undecided"
    assert claims.judge([0.1, 0.11, 0.1], [0.2, 0.21, 0.2]).verdict == "does not hold"
    assert claims.judge([0.1, 0.11, 0.1], [0.2, 0.21, 0.2], higher=False).verdict == "holds"


def test_the_interval_is_student_t():
    verdict = claims.judge([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert verdict.high - verdict.mean == pytest.approx(4.302652729911275 / 3**0.5)


def test_two_seeds_are_refused():
    with pytest.raises(ValueError, match="at least 3"):
        claims.judge([1, 2], [0, 0])


def test_stage_words():
    stage = {"command": "fit", "config": "x.yaml", "set": {"model.a": "{checkpoint}", "model.b": False}, "callbacks": ["TemporalVoting"]}
    words = claims.stage_words(stage, 3, ["seed_everything"], "last.ckpt")
    assert words[:3] == ["fit", "--config", "configs/x.yaml"]
    assert words[3:] == ["--seed_everything", "3", "--model.a", "last.ckpt", "--model.b", "false", "--trainer.callbacks+=TemporalVoting"]


def test_finished_stages_are_not_run_again_and_a_failure_is_shown(tmp_path, monkeypatch):
    runs = []

    def pretend(self, words, folder, before):
        runs.append(words)
        folder.mkdir(parents=True)
        return {"metrics": {"m": 1.0}, "seconds": 0.1, "checkpoint": f"after {len(runs)}", "folder": str(folder)}

    monkeypatch.setattr(claims.Runner, "_run", pretend)
    runner = claims.Runner(tmp_path, 1, [])
    first, second = {"command": "fit", "config": "a.yaml"}, {"command": "fit", "config": "b.yaml", "set": {"from": "{checkpoint}"}}
    runner.run([first], 0, [])
    result = runner.run([first, second], 0, [])
    assert len(runs) == 2, "the shared first stage ran once"
    assert runs[1][-2:] == ["--from", "after 1"]
    assert result["checkpoint"] == "after 2"
    runner.run([first], 1, [])
    assert len(runs) == 3, "another seed is another run"
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="stage failed"):
        claims.Runner(tmp_path, 1, []).run([{"command": "fit", "config": "does_not_exist.yaml"}], 0, [])


def test_every_claim_file_names_arms_that_exist():
    import yaml

    from lit_methods.catalog import configs_folder, techniques

    for slug, entry in techniques().items():
        claim = yaml.safe_load((configs_folder() / "claims" / f"{slug}.yaml").read_text())
        assert {claim["method"], claim["baseline"]} <= claim["arms"].keys()
        assert len(claim["seeds"]) >= 3
        assert claim["claim"] == entry.claim
        for stage in [s for stages in claim["arms"].values() for s in stages] + [r["stage"] for r in claim.get("reports", [])]:
            assert (configs_folder() / stage["config"]).is_file(), json.dumps(stage)
