"""The evidence page and the comparison's table and plot, from made-up results; and that the committed page is what its records say."""

import copy
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from lit_methods.catalog import Technique, configs_folder, published, techniques
from lit_methods.claims import evidence, page
from lit_methods.claims.comparison import comparison_plot, comparison_table, frontier, frontier_plot, ranked, step_seconds, ticks
from lit_methods.claims.forest import Row, advantage, forest_plot
from lit_methods.claims.records import read_records, verdict_file, verdict_table
from lit_methods.claims.study import read_settings, read_study
from lit_methods.cli import claims as command
from lit_methods.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
TECHNIQUE = Technique("mini", "Mini Things", "", "demo", "module", (), (), (), "Good is better.", "")
RECORD: dict[str, Any] = {
    "kind": "claim",
    "slug": "mini",
    "sentence": "Good is better.",
    "source": "table 1",
    "metric": "acc",
    "higher": True,
    "gate": 0.1,
    "reference": "bad",
    "judged": ["good"],
    "units": ["steps"],
    "tolerance": 0.0,
    "threads": 1,
    "seeds": [0, 1, 2],
    "tuned": {"good": ["lr"], "bad": ["lr"]},
    "paper": {"headline": "Big Net on Big Data", "method": 46.44, "baseline": 8.1, "unit": "%", "note": "Read twice."},
    "values": {"bad": [0.1, 0.2, 0.3], "good": [0.51, 0.6, 0.72], "half": [0.3, 0.3, 0.3]},
    "reports": [{"name": "extra", "arm": "good", "metric": "other", "values": [1.0, 2.0, 3.0]}],
    "budget": {arm: [{"steps": 1000, "parameters": 10}] * 3 for arm in ("bad", "good", "half")},
    "differences": {"good": [{"kind": "steps", "text": "2 fit stages (1)", "against": "bad", "reason": "it is the claim"}], "half": []},
    "changes": {"half": ["model.x: 1 (2)"]},
    "seconds": 600.0,
    "stages": 9,
    "intervals": {"good": [0.41, 0.38, 0.44], "half": [0.1, -0.1, 0.3]},
    "verdict": {"mean": 0.41, "low": 0.38, "high": 0.44, "better": 3, "verdict": "holds"},
    "cost": {
        "method": "good", "baseline": "half", "seconds": 2.0, "baseline_seconds": 1.0, "added_seconds": 1.0, "ratio": 2.0,
        "ratio_quartiles": [1.9, 2.1], "data_seconds": 0.1, "mib": 300.0, "baseline_mib": 200.0, "added_mib": 100.0, "memory": "resident",
        "parameters": 10, "baseline_parameters": 10, "pairs": 24, "device": "cpu",
    },
    "overrides": [],
    "date": "2026-01-02",
    "git": {"commit": "0123456789abcdef" * 2, "dirty": True},
    "machine": {"cpu": "Some CPU", "cores": 2, "memory_gib": 16, "gpus": []},
    "versions": {"torch": "2.9", "python": "3.11"},
    "golden": {"loss": [3, 3], "gradient": [1, 2]},
}  # fmt: skip


def row(page: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith("| [mini]")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_page_is_what_its_records_say() -> None:
    records = read_records(ROOT / "docs" / "evidence")
    declared = {
        slug: {name: study.data for name, study in read_settings(configs_folder() / "claims" / f"{slug}.yaml").items()}
        for slug in techniques()
    }
    again = "it is written by: lit claims --page"
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == page.evidence_page(records, published(), declared), again
    assert (ROOT / "docs" / "evidence.svg").read_text(encoding="utf-8") == page.evidence_plot(records, published(), declared), again
    assert json.loads(verdict_file().read_text(encoding="utf-8")) == verdict_table(records, declared, published()), again
    assert records.keys() <= techniques().keys()
    for slug, record in records.items():
        first = read_study(configs_folder() / "claims" / f"{slug}.yaml")
        assert not command.redescribe(copy.deepcopy(record), first), f"the record of {slug} has another name, data or paper: {again}"
    for record in records.values():
        assert "/home/" not in json.dumps(record)
        assert str(ROOT) not in json.dumps(record), "a path of one machine"


def test_the_row_holds_the_verdict_ours_and_the_papers_figures_and_cost() -> None:
    cells = row(page.evidence_page({"mini": RECORD}, {"mini": TECHNIQUE}))
    assert cells[1] == "**holds**", "beside the name, where a phone shows it"
    assert cells[2] == "0.61 against 0.2: +0.41 [+0.38, +0.44]"
    assert cells[3] == "46.44 against 8.1 %"
    assert cells[4] == "+1 s (x 2.00), +100 MiB"


def test_a_figure_from_memory_says_so_in_the_table() -> None:
    def shown(memory: Any) -> str:
        return row(page.evidence_page({"mini": RECORD | {"paper": RECORD["paper"] | {"memory": memory}}}, {"mini": TECHNIQUE}))[3]

    assert shown(True) == "46.44 (mem) against 8.1 (mem) %"
    assert shown(["baseline"]) == "46.44 against 8.1 (mem) %"
    assert shown(False) == "46.44 against 8.1 %"


TWO: dict[str, Any] = RECORD | {
    "setting": "drawn",
    "data": "made: drawings",
    "settings": {
        "digits": RECORD
        | {
            "setting": "digits",
            "data": "digits of <5> people",
            "real": True,
            "sentence": "Good is better here, too.",
            "verdict": {"mean": -0.2, "low": -0.3, "high": -0.1, "better": 0, "verdict": "does not hold"},
            "named": {"commit": "abcdef0123456789", "date": "2026-01-01"},
        }
    },
}


def test_every_setting_has_its_verdict_its_figures_and_its_commit() -> None:
    declared = {"mini": {"drawn": "made: drawings", "digits": "digits", "later": "something"}}
    text = page.evidence_page({"mini": TWO}, {"mini": TECHNIQUE}, declared)
    cells = row(text)
    assert cells[1] == "**holds in 1 of 2 (1 setting not yet run)**"
    assert cells[2] == (
        "drawn: 0.61 against 0.2: +0.41 [+0.38, +0.44], holds<br>"
        "digits: 0.61 against 0.2: -0.2 [-0.3, -0.1], does not hold<br>later: not yet run"
    )
    flat = " ".join(text.split())
    assert "**1 techniques**: holds in some: 1. **2 settings run**, by verdict: holds: 1; does not hold: 1; not yet run: 1." in flat
    assert "**Setting `drawn`**: made: drawings. Metric" in flat
    assert (
        "**Setting `digits`**: digits of &lt;5> people. Real data. Named on commit abcdef012 of 2026-01-01; nothing was tuned in it."
        in flat
    )
    assert "Claim here: Good is better here, too." in flat
    assert "**Setting `later`**: something. Not yet run." in flat
    assert flat.count("Tuned hyperparameters.") == 1, "nothing is tuned in a further setting"
    assert text.count('<details markdown="1">') == text.count("</details>") == 1
    gone = " ".join(page.evidence_page({"mini": TWO}, {"mini": TECHNIQUE}, {"mini": {"drawn": "made"}}).split())
    assert "nothing was tuned in it. It is no longer in the claim file." in gone


def test_what_looks_like_markup_is_shown_as_it_stands_and_paragraphs_are_wrapped() -> None:
    assert page.text("a|b *c* [d] <e> `lr=` _f_ g_h") == "a\\|b \\*c\\* \\[d\\] &lt;e> \\`lr=\\` \\_f\\_ g_h"
    assert page.code("a`b") == "`` a`b ``"
    record = RECORD | {"sentence": "word " * 60 + "- not an item " * 20 + "1. nor this", "tuned": {"good": ["a.b`c"], "bad": []}}
    text = page.evidence_page({"mini": record}, {"mini": TECHNIQUE})
    claim = text[text.index("**Claim.**") : text.index("**Verdict over all settings: ")]
    assert max(map(len, claim.splitlines())) <= 140
    assert len(claim.splitlines()) > 3
    assert not re.search(r"^(- |1\.)", claim, flags=re.M)
    assert "good: `` a.b`c ``" in text


def test_the_forest_plot_puts_the_better_side_right_and_codes_verdicts_by_shape() -> None:
    lower = {"mean": -2.0, "low": -4.0, "high": 1.0}
    assert advantage(lower, higher=False) == (0.5, -0.25, 1.0)
    assert advantage(lower, higher=True) == (-0.5, -1.0, 0.25)
    assert advantage({"mean": 0.0, "low": 0.0, "high": 0.0}, higher=True) == (0, 0, 0)
    plot = forest_plot([
        Row("one", "drawn", 0.5, 0.2, 1.0, "holds"), Row("one", "digits", -0.5, -1.0, -0.1, "does not hold"),
        Row("two <b>", "", 0.1, -0.5, 1.0, "undecided"),
    ])  # fmt: skip
    root = ElementTree.fromstring(plot)
    space = {"s": "http://www.w3.org/2000/svg"}
    counts = {tag: len(root.findall(f"s:{tag}", space)) for tag in ("circle", "rect", "path")}
    assert counts == {"circle": 2, "rect": 2, "path": 2}, "one of each in the legend"
    assert [one.text for one in root.findall("s:text[@class='slug']", space)] == ["one", "two <b>"]
    (_, holds), (_, against) = (
        [float(mark.get(key, "nan")) for mark in root.findall(f"s:{tag}", space)] for tag, key in (("circle", "cx"), ("rect", "x"))
    )
    assert against < 278 < holds
    assert "one, digits: does not hold" in (root.findtext("s:desc", "", space))
    assert "prefers-color-scheme: dark" in plot


def test_the_section_holds_everything_per_seed() -> None:
    text = page.evidence_page({"mini": RECORD}, {"mini": TECHNIQUE})
    section = text[text.index("\n## mini") :]
    for part in (
        "**Claim.** Good is better.",
        "| good | 0.51 | 0.6 | 0.72 | 0.61 | 0.11 |",
        "| half | 0.3 | 0.3 | 0.3 | 0.3 | 0 |",
        "| extra (`other`) | 1 | 2 | 3 | 2 | 1 |",
        "+0.41, paired 95 % t-interval [+0.38, +0.44], better in 3 of 3 seeds, gate 0.1: holds.",
        "Big Net on Big Data: 46.44 against 8.1 %. Read twice.",
        "good against bad, steps: 2 fit stages (1): it is the claim",
        "half: `model.x: 1 (2)`",
        "loss 3 of 3, gradient 1 of 2",
        "ratio 2.00, quartiles 1.90 to 2.10",
        "with uncommitted changes; Some CPU, 2 cores, 16 GiB, no GPU; torch 2.9, python 3.11; 9 stages of 1 thread each, 10 minutes",
    ):
        assert part in section or part in " ".join(section.split()), part
    assert text.count("\n## ") == 2


def test_a_verdict_that_does_not_hold_is_shown_as_such() -> None:
    record = copy.deepcopy(RECORD)
    record["verdict"]["verdict"] = "does not hold"
    record |= {"cost": None, "golden": None, "git": None, "paper": {}}
    cells = row(page.evidence_page({"mini": record}, {"mini": TECHNIQUE}))
    assert cells[1] == "**does not hold**"
    assert cells[3:5] == ["-", "-"]


def test_a_technique_without_a_record_is_not_yet_run_and_a_stray_record_is_left_out() -> None:
    text = page.evidence_page({"gone": RECORD}, {"mini": TECHNIQUE})
    assert row(text)[:2] == ["[mini](techniques/mini.md)", "not yet run"]
    assert "## gone" not in text


def test_every_row_has_the_columns_of_the_head() -> None:
    text = page.evidence_page({"mini": RECORD}, {"mini": TECHNIQUE, "other": TECHNIQUE})
    table = [line for line in text.splitlines() if line.startswith("|")][:4]
    assert len({line.count("|") for line in table}) == 1


def test_golden_cases_are_counted_by_kind() -> None:
    xml = (
        '<testsuites><testsuite><testcase name="test_golden[seg_loss-0]"/><testcase name="test_golden[seg_loss-1]"><failure/></testcase>'
        '<testcase name="test_golden[loss-10]"/><testcase name="test_golden[loss-no-case-found]"><failure/></testcase>'
        '<testcase name="test_else"/></testsuite></testsuites>'
    )
    counts = evidence.read_golden_report(xml)
    assert counts["seg_loss"] == [1, 2]
    assert counts["loss"] == [1, 1]
    assert sum(total - passed for passed, total in counts.values()) == 2, "a kind without a case counts as failed"


def test_golden_tests_really_run(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "golden"
    folder.mkdir(parents=True)
    (folder / "test_mini.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', [0, 1], ids=['a-0', 'b-0'])\ndef test_golden(n):\n    assert n\n"
    )
    assert evidence.golden_counts(tmp_path, "mini") == {"a": [0, 1], "b": [1, 1]}
    assert evidence.golden_counts(tmp_path, "none") is None


def test_facts_name_the_machine() -> None:
    found = evidence.facts(None, "mini", ["GPU X"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_gib"] >= 1
    assert found["machine"]["cpu"]
    assert found["machine"]["gpus"] == ["GPU X"]
    assert {"torch", "lightning", "python"} <= found["versions"].keys()
    git = evidence.git_commit(ROOT)
    assert git is None or re.fullmatch(r"[0-9a-f]{40}", git["commit"])


def test_two_seeds_get_no_verdict() -> None:
    record = RECORD | {"verdict": None, "values": {"good": [0.3, 0.4], "bad": [0.1, 0.2]}, "seeds": [0, 1]}
    assert evidence.verdict_line(record) == "good - bad: +0.2; no verdict: that needs at least 3 seeds"


def test_the_page_goes_to_the_checkout_or_to_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "techniques", lambda: {"mini": TECHNIQUE})
    store = tmp_path / "runs" / "claims" / "evidence"
    store.mkdir(parents=True)
    (store / "mini.json").write_text(json.dumps(RECORD))
    assert main(["claims", "--page"]) == 0
    assert "**holds**" in (tmp_path / "runs" / "claims" / "evidence.md").read_text()
    for name in ("lit_methods", "docs", "configs/claims"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lit_methods" / "catalog.py").touch()
    assert main(["claims", "--page"]) == 0
    assert "not yet run" in (tmp_path / "docs" / "evidence.md").read_text()


# ---- comparison ------------------------------------------------------------------------------------------------------------------------

COMPARISON = RECORD | {"judged": ["good", "half"], "cost": {"good": 2.0}, "sentence": "Which <one>?"}


def test_the_comparison_is_sorted_and_shows_the_difference_to_the_reference() -> None:
    assert ranked(COMPARISON) == ["good", "half", "bad"]
    assert ranked(COMPARISON | {"higher": False}) == ["bad", "half", "good"]
    lines = comparison_table(COMPARISON).splitlines()
    assert lines[2] == "| good | 0.51 | 0.6 | 0.72 | 0.61 | 0.11 | +0.41 [+0.38, +0.44] | 10 | 1,000 | 2 |"
    assert lines[4] == "| bad | 0.1 | 0.2 | 0.3 | 0.2 | 0.1 | - | 10 | 1,000 | - |"
    assert len({line.count("|") for line in lines}) == 1


def test_the_plot_shows_every_seed_and_says_so_in_words() -> None:
    root = ElementTree.fromstring(comparison_plot(COMPARISON))
    space = {"s": "http://www.w3.org/2000/svg"}
    assert len(root.findall("s:circle", space)) == 9
    assert len(root.findall("s:path", space)) == 3
    title, described = root.find("s:title", space), root.find("s:desc", space)
    assert title is not None
    assert title.text == "Which <one>?"
    assert described is not None
    assert "good: mean 0.61" in (described.text or "")
    assert "prefers-color-scheme: dark" in comparison_plot(COMPARISON)
    places = [float(circle.get("cx", "nan")) for circle in root.findall("s:circle", space)][:3]
    assert places[0] < places[1] < places[2], "0.51, 0.6, 0.72 from left to right"
    assert all(0 < float(circle.get("cx", "nan")) < 720 for circle in root.findall("s:circle", space))


def test_the_plot_of_one_seed_and_of_equal_values_is_drawn() -> None:
    one = COMPARISON | {"values": {"good": [0.5], "bad": [0.5]}, "seeds": [0]}
    assert comparison_plot(one).count("<circle") == 2


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.07, 0.31), (-3.0, 250.0), (0.5, 0.5), (1e-5, 2e-5)])
def test_ticks_are_few_round_and_span_the_values(span: tuple[float, float]) -> None:
    marks = ticks(*span)
    assert marks[0] <= span[0]
    assert marks[-1] >= span[1]
    assert 1 <= len(marks) <= 9


def test_step_seconds_are_medians_over_all_rounds() -> None:
    assert step_seconds({"a": [{"seconds": [1.0, 9.0]}, {"seconds": [2.0]}], "b": [{"seconds": []}]}) == {"a": 2.0}


# ---- the frontier ------------------------------------------------------------------------------------------------------------------------


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    points = {"a": (1.0, 0.4), "b": (2.0, 0.1), "c": (3.0, 0.2), "d": (2.0, 0.3), "e": (4.0, 0.1)}
    assert frontier(points, higher=False) == ["a", "b"]
    assert frontier(points, higher=True) == ["a"]
    assert frontier({name: (cost, 1 - value) for name, (cost, value) in points.items()}, higher=True) == ["a", "b"]


@pytest.mark.parametrize(("costs", "marks"), [((1.0, 32.0, 70.5), {"1", "10", "100"}), ((0.0, 4.0, 8.0), {"0", "2", "8"})])
def test_the_frontier_is_drawn_with_both_axes_and_every_arm(costs: tuple[float, ...], marks: set[str]) -> None:
    arms = dict(zip(("good", "half", "bad"), costs, strict=True))
    reports = [{"name": arm, "arm": arm, "metric": "size", "values": [cost] * 3} for arm, cost in arms.items()]
    summary = COMPARISON | {"reports": reports, "over": "size"}
    root = ElementTree.fromstring(frontier_plot(summary))
    space = {"s": "http://www.w3.org/2000/svg"}
    words = [text.text or "" for text in root.findall("s:text", space)]
    assert marks <= set(words)
    assert {"size", f"{summary['metric']} over size"} <= set(words)
    assert len([word for word in words if word.split(":")[0] in arms]) == 3
    assert len(root.findall("s:circle", space)) == 9, "three seeds of each"
    places = [float(text.get("y", "nan")) for text in root.findall("s:text", space) if (text.text or "").split(":")[0] in arms]
    assert all(abs(a - b) >= 17.9 for a, b in itertools.combinations(places, 2)), "names lie apart"
    diamonds = {path.get("d", "") for path in root.findall("s:path", space) if path.get("class") == "mean"}
    assert len(diamonds) == 3


def test_the_kept_pictures_of_comparisons_are_drawn_from_the_kept_figures() -> None:
    files = sorted(Path("docs/comparisons").glob("*.json"))
    assert files
    for file in files:
        summary = json.loads(file.read_text(encoding="utf-8"))
        name, drawn = ("_frontier.svg", frontier_plot) if summary["over"] else (".svg", comparison_plot)
        picture = file.with_name(f"{file.stem}{name}").read_text(encoding="utf-8")
        assert picture == drawn(summary), "python docs/tools/comparison.py"
