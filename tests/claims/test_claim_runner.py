"""The runner with stages that take milliseconds: cache, locks, order, failures, a clean stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lit_methods.claims.cost import compare_cost, cost_nodes, measure
from lit_methods.claims.display import Display, clock, estimate
from lit_methods.claims.plan import Node, Plan
from lit_methods.claims.runner import Runner, last_metrics, stop, value_of, why_missing
from lit_methods.claims.sources import changed_sources, imported_sources, sha256
from lit_methods.claims.study import Cost
from lit_methods.errors import CommandError
from lit_methods.files import try_lock

FAKE = Path(__file__).parent / "fake_lit.py"
HANGS = 300.0  # seconds that only end what would never end


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log.txt"
    monkeypatch.setenv("FAKE_LOG", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def started(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()] if log.is_file() else []


def node(stage: str, seed: int = 0, upstream: Node | None = None, **options: Any) -> Node:
    words = ["fit", "--stage", stage, "--seed", str(seed), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    words += ["--from", "{checkpoint}"] if upstream else []
    return Node(f"{stage}{seed}", f"{stage}-{seed}", words, seed, upstream, [stage], kind=stage)


def runner(root: Path) -> Runner:
    return Runner(root, 1, "mini", (sys.executable, str(FAKE)))


def test_a_stage_runs_once_and_gets_the_checkpoint_of_the_one_before(log: Path, tmp_path: Path) -> None:
    first = node("pre")
    nodes = [first, node("good", upstream=first), node("bad", upstream=first)]
    results = runner(tmp_path / "root").run(nodes, jobs=2)
    assert sorted(started(log)) == ["bad-0", "good-0", "pre-0"]
    assert started(log)[0] == "pre-0"
    came_from = [line.split()[3] for line in log.read_text().splitlines() if not line.startswith("pre")]
    assert came_from == [str(tmp_path / "root/stages/pre-0/run/20260101-000000/checkpoints/last.ckpt")] * 2
    assert results["good0"]["metrics"]["acc"] == 0.7
    assert results["good0"]["upstream"] == results["pre0"]["id"]
    assert results["good0"]["run"] == "stages/good-0/run/20260101-000000"
    assert runner(tmp_path / "root").run(nodes, jobs=1) == results
    assert len(started(log)) == 3, "nothing ran again"


def test_independent_stages_fill_both_places_whatever_their_seed(log: Path, tmp_path: Path) -> None:
    quick = node("quick", 0)
    nodes = [node("slow", 0, until="last-1"), quick, node("after", 0, quick), node("last", 1)]
    runner(tmp_path).run(nodes, jobs=2)  # the slow one ends only when the last one has started, or fails
    assert sorted(started(log)[:2]) == ["quick-0", "slow-0"]
    assert started(log)[2:] == ["after-0", "last-1"]


def test_a_result_counts_as_long_as_its_sources_checkpoint_and_upstream_do(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "mine.py"
    module.write_text("one = 1")
    monkeypatch.setenv("FAKE_SOURCES", json.dumps({"./mine.py": sha256(module)}))
    first = node("pre")
    nodes = [first, node("good", upstream=first)]
    runner(tmp_path).run(nodes)
    module.write_text("one = 2")
    monkeypatch.setenv("FAKE_SOURCES", json.dumps({"./mine.py": sha256(module)}))
    runner(tmp_path).run(nodes, display=Display(2, 1, live=False))
    assert started(log) == ["pre-0", "good-0"] * 2, "a changed source"
    said = capsys.readouterr().out
    assert "pre-0 starts again: changed since: ./mine.py" in said
    assert "good-0 starts again: the stage before has run again" in said
    (tmp_path / "stages/pre-0/run/20260101-000000/checkpoints/last.ckpt").unlink()
    runner(tmp_path).run(nodes)
    assert started(log) == ["pre-0", "good-0"] * 3, "a lost checkpoint, and with it what came from it"
    (tmp_path / "stages/good-0/result.json").write_text("{half")
    runner(tmp_path).run(nodes)
    assert started(log) == [*["pre-0", "good-0"] * 3, "good-0"], "half a result"
    module.unlink()
    assert changed_sources({"./mine.py": "abc"}) == ["./mine.py"]


def test_a_failure_is_shown_and_what_ran_beside_it_is_kept(log: Path, tmp_path: Path) -> None:
    bad = node("bad", behave="fail")
    nodes = [bad, node("good", seconds=0.5), node("never", upstream=bad), node("later")]
    with pytest.raises(CommandError, match="bad, seed 0: stage failed with status 3") as caught:
        runner(tmp_path).run(nodes, jobs=2)
    assert "last line" in str(caught.value)
    assert str(tmp_path / "stages/bad-0/output.txt") in str(caught.value)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "stages/bad-0/result.json").exists()
    assert (tmp_path / "stages/good-0/result.json").is_file()
    assert "never-0" not in started(log)
    fixed = [node("bad"), node("good", seconds=0.5)]
    runner(tmp_path).run(fixed)
    assert started(log).count("good-0") == 1
    assert started(log).count("bad-0") == 2


def test_a_run_that_a_signal_ended_early_is_not_taken_as_finished(log: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="stopped before its end"):
        runner(tmp_path).run([node("good", behave="preempted")])
    assert not (tmp_path / "stages/good-0/result.json").exists()


def test_two_commands_that_want_the_same_stage_run_it_once(log: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(runner(tmp_path).run([node("good", seconds=0.5)]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANGS)
    assert started(log) == ["good-0"]
    assert len(found) == 2
    assert found[0] == found[1]


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    held = try_lock(tmp_path / "lock")
    assert held is not None
    assert try_lock(tmp_path / "lock") is None
    held.close()
    again = try_lock(tmp_path / "lock")
    assert again is not None
    again.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_no_process_and_goes_on(log: Path, tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_claim_runner as t;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell starts what it runs in the background deaf to it
        "from lit_methods.claims.runner import stops_on_sigterm\n"
        "try:\n"
        "    with stops_on_sigterm():\n"
        "        t.runner(Path(sys.argv[2])).run([t.node('good'), t.node('hung', behave='hang')])\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(FAKE.parent), str(tmp_path)])
    child = Path(f"{log}.child")
    deadline = time.monotonic() + HANGS
    while not (child.is_file() and child.read_text()):
        assert process.poll() is None, "the command ended by itself"
        assert time.monotonic() < deadline, "the stage did not start"
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=HANGS) == 130
    for pid in [int(child.read_text()), *(int(line.split()[2]) for line in log.read_text().splitlines())]:
        while alive(pid):
            assert time.monotonic() < deadline, "a process was left behind"
            time.sleep(0.05)
    assert not (tmp_path / "stages/hung-0/result.json").exists()
    runner(tmp_path).run([node("good"), node("hung")])
    assert started(log) == ["good-0", "hung-0", "hung-0"], "the finished stage was kept, the other one started anew"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_stop_kills_what_does_not_listen() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(3600)"
    process = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    stop([process], grace=0.3)
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()


def test_a_stage_knows_its_threads_and_how_wandb_groups_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_TAGS", "mine")
    monkeypatch.setenv("LIT_METHODS_RUN_FOLDER", "/elsewhere")
    one = node("good", 2)
    one.arms = ["good", "bad"]
    environment = Runner(tmp_path, 3, "mini").environment(one)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert (environment["WANDB_RUN_GROUP"], environment["WANDB_JOB_TYPE"], environment["WANDB_TAGS"]) == ("mini-claim", "good+bad", "mine")
    assert "LIT_METHODS_RUN_FOLDER" not in environment
    monkeypatch.delenv("WANDB_TAGS")
    assert Runner(tmp_path, 3, "mini").environment(one)["WANDB_TAGS"] == "claim,mini,seed-2"


def test_a_value_that_is_missing_or_no_number_names_arm_seed_and_stage(log: Path, tmp_path: Path) -> None:
    diverged = node("good", 1, behave="diverge")
    result = runner(tmp_path).run([diverged])["good1"]
    with pytest.raises(CommandError, match=r"good, seed 1, stage good-1: acc is nan"):
        value_of(result, "acc", diverged)
    with pytest.raises(CommandError, match=r"no metric 'accuracy'; logged were: acc, other"):
        value_of(result, "accuracy", diverged)
    assert value_of(result, "other", diverged) == 1.0
    assert last_metrics(tmp_path / "nothing") == {}
    with pytest.raises(CommandError, match=r"no metric 'val_acc'.*\n  validation did not run: trainer\.limit_val_batches is 0"):
        value_of(result, "val_acc", diverged, {"trainer": {"limit_val_batches": 0}})


@pytest.mark.parametrize(
    ("metric", "logged", "trainer", "reason"),
    [
        (
            "m/val_miou",
            [],
            {"log_every_n_steps": 50},
            "nothing: it may have ended before its first entry (trainer.log_every_n_steps is 50)",
        ),
        ("m/val_miou", ["m/loss"], {"check_val_every_n_epoch": 5, "max_epochs": 2}, "every 5 epochs, and trainer.max_epochs is 2"),
        ("val/miou", ["loss"], {"val_check_interval": 100, "max_steps": 10}, "every 100 batches, and trainer.max_steps is 10"),
        ("val_loss", ["loss"], {"limit_val_batches": 0}, "trainer.limit_val_batches is 0"),
        ("val_loss", ["interval"], {}, "no metric of a validation was logged"),
        ("m/val_miou", ["m/val_iou", "m/loss"], {"limit_val_batches": 0}, "nearest: m/val_iou"),
        ("cast/flips", ["m/loss_step"], {}, "does the model or a callback log it"),
    ],
)
def test_why_a_metric_is_missing(metric: str, logged: list[str], trainer: dict[str, Any], reason: str) -> None:
    assert reason in why_missing(metric, logged, "fit", trainer)
    if logged and "nearest" not in reason:
        assert "did not run" not in why_missing(metric, logged, "test", trainer), "only a fit has a validation of its own"


def test_imported_sources_are_those_of_ours_and_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_claims.py").write_text("x = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("mine_for_claims")
    __import__("lit_methods.callbacks")
    found = imported_sources()
    assert found["./mine_for_claims.py"] == sha256(tmp_path / "mine_for_claims.py")
    assert {"lit_methods.callbacks/__init__.py", "lit_methods/catalog.py"} <= found.keys()
    assert not any("claims/" in name or "site-packages" in name or "pytest" in name for name in found), "the runner computes nothing"
    assert changed_sources(found) == []
    assert imported_sources(started=0.0)["./mine_for_claims.py"] == "changed during the run"
    del sys.modules["mine_for_claims"]


# ---- cost ------------------------------------------------------------------------------------------------------------------------------


def test_cost_runs_take_turns_and_equal_stages_are_timed_each_time(log: Path, tmp_path: Path) -> None:
    nodes = {arm: node(arm) for arm in ("good", "bad")}
    for one in nodes.values():
        one.words.append("--trainer.callbacks+=StepCost")
    plan = Plan(list(nodes.values()), {arm: {0: [one]} for arm, one in nodes.items()}, {})
    runs = cost_nodes(Cost(("good", "bad"), 0, 5), plan, 0, 5)
    assert [arm for arm, _ in runs] == ["good", "bad"] * 3
    assert len({one.key for _, one in runs}) == 6
    assert "--trainer.max_steps 5" in " ".join(runs[0][1].words)
    found = measure(runner(tmp_path), runs)
    assert [name.partition("-")[0] for name in started(log)] == ["good", "bad"] * 3
    assert [len(rounds) for rounds in found.values()] == [3, 3]
    times = [float(line.split()[1]) for line in log.read_text().splitlines()]
    assert times == sorted(times)


def test_what_is_added_comes_from_paired_steps() -> None:
    def cost(seconds: list[float], mib: float) -> dict[str, Any]:
        return {"seconds": seconds, "data_seconds": [0.1] * len(seconds), "peak_mib": mib, "memory": "m", "parameters": 5, "device": "cpu"}

    found = compare_cost([cost([2.0, 4.0], 30), cost([3.0, 6.0], 34)], [cost([1.0, 2.0], 10), cost([1.0, 2.0], 12)])
    assert found["added_seconds"] == pytest.approx(2.0)
    assert found["ratio"] == pytest.approx(2.5)
    assert found["ratio_quartiles"] == pytest.approx([2.0, 3.0])
    assert found["added_mib"] == pytest.approx(21.0)
    assert found["pairs"] == 4
    with pytest.raises(ValueError, match="no step"):
        compare_cost([cost([], 1)], [cost([], 1)])


# ---- display ---------------------------------------------------------------------------------------------------------------------------


def test_the_rest_is_estimated_by_kind() -> None:
    assert estimate({}, ["a"], 1) == 0.0
    assert estimate({"a": [10.0, 20.0], "b": [5.0]}, ["a", "b", "unseen"], 2) == pytest.approx((15 + 5 + 10) / 2)
    assert [clock(75), clock(3675)] == ["1:15", "1:01:15"]


def test_lines_say_what_is_done_and_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(3, 1, live=False)
    display.kept()
    display.begins("good-0")
    display.ends("good-0", "good", 60.0, ["good"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/3] good-0 starts"
    assert lines[1].startswith("[2/3] good-0: 60 s, 0:00 so far, about 1:00 to go")


def test_a_bar_is_drawn_on_a_terminal(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(1, 1, live=True)
    runner(tmp_path).run([node("good")], display=display)
    display.close()
    assert "[1/1] good-0: " in capsys.readouterr().out
