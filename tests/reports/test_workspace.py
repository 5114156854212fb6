"""Workspaces of every technique, and that what they show is what a run logs."""

import json
import re
from typing import ClassVar

import pytest

from lit_methods.catalog import Technique, techniques
from lit_methods.cli.main import main
from lit_methods.panels import CloudPanel, Curve, HistogramPanel, ImagePanel, Panel, TablePanel
from wandb_log import no_login

pytest.importorskip("wandb_workspaces")
from lit_methods.reports.workspace import declared_panels, metric_pattern, spec, summary_names, workspace

__all__ = ["no_login"]


class First:
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("two-views/loss", "two-views/val_loss"), goal="min", note="It falls."),
        Curve("Per class", ("two-views/iou/*",), goal="max"),
        ImagePanel("Picture", "two_views/image"),
        CloudPanel("Cloud", "two_views/cloud"),
        TablePanel("Table", "two_views/table"),
        HistogramPanel("Histogram", "two_views/histogram"),
    )


class Second:
    panels: ClassVar[tuple[Panel, ...]] = (First.panels[0], Curve("Rank", ("two_views/rank",)))


class Silent:
    pass


TWO_VIEWS = Technique(
    "two_views", "Two views", "2101.00001", "metric", "module", tuple(f"test_workspace.{name}" for name in ("First", "Silent", "Second")),
    (), (), "", "Compares two views.",
)  # fmt: skip


def test_a_section_for_each_class_with_panels() -> None:
    space = workspace(TWO_VIEWS, "somebody", "project")
    assert [section.name for section in space.sections] == ["First", "Second", "Arms of a claim (job types)"]
    about, loss, per_class, image, cloud, table, histogram = space.sections[0].panels
    assert "Compares two views." in about.markdown
    assert "https://arxiv.org/abs/2101.00001" in about.markdown
    assert "- **Loss**: It falls." in about.markdown
    assert (loss.title, loss.x, loss.smoothing_type) == ("Loss", "trainer/global_step", "none")
    assert re.search(loss.metric_regex, "two-views/val_loss_epoch")
    assert re.search(per_class.metric_regex, "two-views/iou/car")
    assert (image.media_keys, cloud.media_keys) == (["two_views/image"], ["two_views/cloud"])
    assert (table.table_name, histogram.y) == ("two_views/table", ["two_views/histogram"])
    assert [panel.title for panel in space.sections[1].panels] == ["Rank"]  # the loss is shown already
    bars, configs = space.sections[2].panels
    assert [metric.name for metric in bars.metrics][:2] == ["two-views/loss.min", "two-views/loss_epoch.min"]
    assert bars.groupby == "JobType"
    assert configs.diff_only == "split"


def test_the_spec_is_plain_and_holds_axis_filter_and_grouping() -> None:
    content = json.loads(json.dumps(spec(workspace(TWO_VIEWS, "somebody", "project", name="Mine"))))
    assert (content["entity"], content["project"], content["name"]) == ("somebody", "project", "Mine")
    section = content["spec"]["section"]
    assert section["settings"]["xAxis"] == "trainer/global_step"
    assert section["settings"]["smoothingType"] == "none"
    text = json.dumps(section["runSets"])
    assert '"two_views"' in text  # only runs with the tag
    assert '"tags"' in text
    (bars,) = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"] if panel["viewType"] == "Bar Chart"]
    assert "jobType" in json.dumps(bars["config"]["groupBy"])


@pytest.mark.parametrize("name", ["a/b", "a/b_step", "a/b_epoch", "a/bc", "x/a/b", "a/c/d", "a/c", "a.b-c", "axb-c"])
def test_the_pattern_finds_what_the_curve_selects(name: str) -> None:
    curve = Curve("", ("a/b", "a/c/*", "a.b-c"))
    assert bool(re.search(metric_pattern(curve), name)) == bool(curve.select([name]))


def test_best_values_need_a_goal_and_a_name() -> None:
    assert summary_names(Curve("", ("a/*", "b"), goal="max")) == ["b.max", "b_epoch.max"]
    assert summary_names(Curve("", ("b",))) == []


# ---- every technique -------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_login")
@pytest.mark.parametrize("slug", sorted(techniques()))
def test_every_technique_has_a_workspace_without_login_and_network(slug: str, capsys: pytest.CaptureFixture[str]) -> None:
    technique = techniques()[slug]
    panels = declared_panels(technique)
    assert panels, f"no class of {slug} declares panels"
    assert main(["dashboard", slug, "--entity", "somebody", "--project", "mine", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"lit-methods: {slug}  (somebody/mine)\n")
    for section, own in panels.items():
        assert f"\n{section}\n" in text
        for panel in own:
            assert (panel.title if not isinstance(panel, TablePanel) else panel.key) in text
    assert main(["dashboard", slug, "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:-1] == list(panels)


@pytest.mark.usefixtures("no_login")
def test_errors_are_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["dashboard", "superflwo", "--dry-run"]) == 2
    assert "no technique 'superflwo'\n  nearest: superflow" in capsys.readouterr().err
    assert main(["dashboard", "superflow", "--entity", "somebody"]) == 1
    assert "no W&B login on this machine: run `wandb login` first, or look at the workspace with --dry-run" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    from wandb_workspaces.workspaces import Workspace

    def refuse(self: Workspace) -> None:
        raise ValueError("project somebody/mine not found\nand more")

    monkeypatch.setattr(Workspace, "save", refuse)
    assert main(["dashboard", "superflow", "--entity", "somebody"]) == 1
    assert "W&B did not take the workspace: ValueError: project somebody/mine not found\n  check" in capsys.readouterr().err


def test_with_a_login_the_workspace_is_saved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from wandb_workspaces.workspaces import Workspace

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    saved: list[Workspace] = []
    monkeypatch.setattr(Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(Workspace, "url", property(lambda self: f"https://example.org/{self.entity}/{self.project}"))
    assert main(["dashboard", "superflow", "--entity", "somebody", "--project", "mine", "--name", "Mine"]) == 0
    assert [(space.name, space.entity) for space in saved] == [("Mine", "somebody")]
    assert capsys.readouterr().out.strip() == "https://example.org/somebody/mine"
