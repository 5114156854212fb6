"""A W&B workspace for a technique, built from the panels that its classes declare; no run is needed for that.

Panels are found through the catalogue (:mod:`lit_methods.catalog`), so a technique that is added has a workspace without anyone
remembering to. The library ``wandb-workspaces`` is imported on first use.
"""

import importlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lit_methods.catalog import Technique
from lit_methods.panels import Curve, HistogramPanel, Panel, TablePanel

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

STEP = "trainer/global_step"  # the horizontal axis that Lightning's WandbLogger logs with every metric


def declared_panels(technique: Technique) -> dict[str, tuple[Panel, ...]]:
    """Short class name -> its panels, for those of the technique's classes that have any; a panel stands where it comes first.

    Raises:
        ImportError: A class needs a library that is not installed.
    """
    declared: dict[str, tuple[Panel, ...]] = {}
    seen: set[Panel] = set()
    for path in technique.classes:
        module, _, name = path.rpartition(".")
        panels = [panel for panel in getattr(getattr(importlib.import_module(module), name), "panels", ()) if panel not in seen]
        seen.update(panels)
        if panels:
            declared[name] = tuple(panels)
    return declared


def metric_pattern(curve: Curve) -> str:
    """Regular expression (the same in RE2, JavaScript and Python) for the logged names that the curve shows, as ``curve.select`` does."""
    escaped = [re.escape(metric.removesuffix("*")).replace(r"\-", "-") for metric in curve.metrics]
    exact = [name for name, metric in zip(escaped, curve.metrics, strict=True) if not metric.endswith("*")]
    parts = [f"^({'|'.join(exact)})(_step|_epoch)?$"] if exact else []
    parts += [f"^{name}.*$" for name, metric in zip(escaped, curve.metrics, strict=True) if metric.endswith("*")]
    return "|".join(parts)


def summary_names(curve: Curve) -> list[str]:
    """Names under which a run's summary may hold the best value of the curve's metrics: none without a goal, or for ``name/*``."""
    if curve.goal is None:
        return []
    plain = [metric for metric in curve.metrics if not metric.endswith("*")]
    return [f"{metric}{form}.{curve.goal}" for metric in plain for form in ("", "_epoch")]


def workspace(technique: Technique, entity: str, project: str, name: str | None = None) -> "Workspace":
    """The technique's workspace, as an object that ``.save()`` sends to W&B.

    A section for each class: its curves over the optimiser step, unsmoothed, then pictures, clouds, tables and histograms. A last
    section compares the arms of a claim: bars of the best values, a bar for each job type, and the runs' configs side by side. Only runs
    with the technique's slug as a tag are shown; the Dashboard callback and ``lit claims`` set it.

    Args:
        technique: An entry of the catalogue.
        entity: W&B user or team.
        project: W&B project.
        name: Name of the view; default ``lit-methods: <slug>``.

    Raises:
        ImportError: A class of the technique needs a library that is not installed.
    """
    import wandb_workspaces.workspaces as ws

    panels = declared_panels(technique)
    sections = [_section(title, [_panel(panel) for panel in own], is_open=True) for title, own in panels.items()]
    if sections:
        sections[0].panels.insert(0, _about(technique, panels))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name or f"lit-methods: {technique.slug}",
        sections=[*sections, _comparison(panels)],
        settings=ws.WorkspaceSettings(x_axis=STEP, smoothing_type="none"),
        runset_settings=ws.RunsetSettings(filters=f"Metric('Tags') in ['{technique.slug}']"),
    )


def _section(title: str, panels: list[Any], is_open: bool) -> "Section":
    import wandb_workspaces.workspaces as ws

    settings = ws.SectionPanelSettings(x_axis=STEP, smoothing_type="none")  # its default would win over the workspace's
    return ws.Section(name=title, panels=panels, is_open=is_open, panel_settings=settings)


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if isinstance(panel, Curve):
        return wr.LinePlot(title=panel.title, x=STEP, metric_regex=metric_pattern(panel), title_x="step", smoothing_type="none")
    if isinstance(panel, HistogramPanel):  # W&B draws histograms over the step as a heat map
        return wr.LinePlot(title=panel.title, x=STEP, y=[panel.key], title_x="step", smoothing_type="none")
    if isinstance(panel, TablePanel):
        return wr.WeavePanelSummaryTable(table_name=panel.key)
    return wr.MediaBrowser(title=panel.title, media_keys=[panel.key])


def _about(technique: Technique, panels: dict[str, tuple[Panel, ...]]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    paper = f"[arXiv:{technique.arxiv}](https://arxiv.org/abs/{technique.arxiv})" if technique.arxiv else ""
    notes = [f"- **{panel.title}**: {panel.note}" for own in panels.values() for panel in own if panel.note]
    return wr.MarkdownPanel(markdown="\n\n".join(filter(None, [f"## {technique.title}", technique.summary, paper, "\n".join(notes)])))


def _comparison(panels: dict[str, tuple[Panel, ...]]) -> "Section":
    import wandb_workspaces.reports.v2 as wr

    curves = [panel for own in panels.values() for panel in own if isinstance(panel, Curve) and summary_names(panel)]
    bars = [
        wr.BarPlot(
            title=f"Best of: {curve.title}",
            metrics=[wr.SummaryMetric(name) for name in summary_names(curve)],
            groupby="JobType",
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
        )
        for curve in curves
    ]
    return _section("Arms of a claim (job types)", [*bars, wr.RunComparer(diff_only="split")], is_open=False)


# ---- reading a workspace -----------------------------------------------------------------------------------------------------------------


def lines(space: "Workspace") -> Iterator[str]:
    """The workspace's structure for readers, line by line."""
    yield f"{space.name}  ({space.entity}/{space.project})"
    yield f"runs: {space.runset_settings.filters or 'all'}"
    for section in space.sections:
        yield f"\n{section.name}"
        for panel in section.panels:
            kind = type(panel).__name__.replace("WeavePanelSummaryTable", "Table").replace("MarkdownPanel", "Text")
            title = getattr(panel, "title", None) or ""
            yield f"  {kind:<13}{title + '  ' if title else ''}{_shown(panel)}".rstrip()


def _shown(panel: Any) -> str:
    if keys := getattr(panel, "media_keys", None) or getattr(panel, "y", None):
        return ", ".join(keys)
    if metrics := getattr(panel, "metrics", None):
        return ", ".join(metric.name for metric in metrics)
    return getattr(panel, "metric_regex", None) or getattr(panel, "table_name", None) or ""


def spec(space: "Workspace") -> dict[str, Any]:
    """What ``.save()`` would send: plain dicts, lists, strings and numbers. The ids of panels differ from call to call."""
    view = space._to_model()
    content = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": view.entity, "project": view.project, "name": view.display_name, "spec": content}
