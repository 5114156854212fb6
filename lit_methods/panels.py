"""What a technique shows: panels are declared once, as data, and every dashboard renders them in its own way.

A LightningModule or a Callback declares::

    class MyTechnique(LightningModule):
        panels: ClassVar[tuple[Panel, ...]] = (
            Curve("Loss", ("my_technique/loss",), goal="min"),
            CloudPanel("Prediction", "my_technique/cloud", note="Colour: predicted class."),
        )

        def dashboard_media(self) -> dict[str, Media]:
            return {"my_technique/cloud": CloudMedia(self.points, self.colors, "validation scan 0")}

``dashboard_media`` is called on rank 0 alone, at the end of each validation epoch and at the end of fit, validate and test.
It must not call a collective: gather what it needs earlier, on all ranks, and no later than ``on_validation_epoch_end`` or
``on_test_epoch_end``, so that the order of the callbacks doesn't matter. It returns what it has: a key may be missing.

What is to be kept with a run but is no picture, such as the masks of a sparse network, a module or callback returns by name; it needs no
panel for that::

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        return {"masks": self.masks}

At the same times as the media, and under the same rule about collectives, each is written to ``artifacts/<name>.pt`` in the run's folder
(``torch.load(path, weights_only=True)`` gives the dict back, on the CPU) and logged to W&B as an artifact ``<name>-<run id>`` of type
``mask``, if it has changed since the last time. Names are unique in a run and made of ASCII letters, digits, ``.``, ``_`` and ``-``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray


def _array(value: Any, name: str) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}: convert a tensor with .cpu().numpy()")
    return value


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class ImageMedia:
    """A picture.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        alt: What the picture shows, in words, for readers who can't see it; not empty.
    """

    pixels: NDArray[np.uint8]
    alt: str

    def __post_init__(self) -> None:
        pixels = _array(self.pixels, "ImageMedia.pixels")
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise ValueError(f"ImageMedia.pixels must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        if not self.alt.strip():
            raise ValueError("ImageMedia.alt is empty: say in a few words what the picture shows")


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class CloudMedia:
    """A point cloud.

    Attributes:
        points: (N, 3) floating point, x, y, z in metres.
        colors: (N, 3) uint8 RGB per point.
        caption: One line under the cloud.
        labels: (N,) integer class of each point, for the legend and on hover; None: no legend.
        class_names: Names of the classes; label ``i`` is ``class_names[i]``, labels outside are shown by number.
    """

    points: NDArray[np.floating[Any]]
    colors: NDArray[np.uint8]
    caption: str
    labels: NDArray[np.integer[Any]] | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        points, colors = _array(self.points, "CloudMedia.points"), _array(self.colors, "CloudMedia.colors")
        if points.ndim != 2 or points.shape[1] != 3 or not np.issubdtype(points.dtype, np.floating):
            raise ValueError(f"CloudMedia.points must be (N, 3) floating point, got {points.shape} {points.dtype}")
        if colors.shape != points.shape or colors.dtype != np.uint8:
            raise ValueError(f"CloudMedia.colors must be {points.shape} uint8, one colour a point, got {colors.shape} {colors.dtype}")
        if self.labels is not None:
            labels = _array(self.labels, "CloudMedia.labels")
            if labels.shape != points.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(f"CloudMedia.labels must be {points.shape[:1]} integers, got {labels.shape} {labels.dtype}")


@dataclass(frozen=True)
class TableMedia:
    """A table.

    Attributes:
        columns: Headings.
        rows: Rows of numbers, strings, bools or None, each as long as ``columns``.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"TableMedia.rows[{index}] has {len(row)} cells, but there are {len(self.columns)} columns")


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class HistogramMedia:
    """A histogram that has been counted already.

    Attributes:
        counts: (bins,) non-negative numbers.
        edges: (bins + 1,) rising bin edges, in the unit of the counted quantity.
    """

    counts: NDArray[Any]
    edges: NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        counts, edges = _array(self.counts, "HistogramMedia.counts"), _array(self.edges, "HistogramMedia.edges")
        if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or not len(counts):
            raise ValueError(
                f"HistogramMedia needs counts (bins,) and edges (bins + 1,), got {counts.shape} and {edges.shape}: "
                "numpy.histogram returns the right pair"
            )
        if not (np.isfinite(counts).all() and np.isfinite(edges).all()):
            raise ValueError("HistogramMedia.counts and edges must be finite: leave non-finite values out before counting")


Media = ImageMedia | CloudMedia | TableMedia | HistogramMedia


@dataclass(frozen=True)
class Curve:
    """A chart of logged metrics over the training step.

    Attributes:
        title: Heading of the chart.
        metrics: Names as logged, such as ``superflow/loss``. Lightning's ``_step`` and ``_epoch`` forms of a name are found too, and a
            name may end in ``*``: ``segmentor/iou/*`` is every class.
        note: What to look for, in a sentence or two.
        goal: ``min`` where lower is better, ``max`` where higher is, None where neither: decides which value counts as the best.
    """

    title: str
    metrics: tuple[str, ...]
    note: str = ""
    goal: Literal["min", "max"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.metrics, str):
            raise TypeError(f"Curve {self.title!r}: metrics must be a tuple of names, got the string {self.metrics!r}: add a comma")
        for name in self.metrics:
            if "*" in name[:-1]:
                raise ValueError(f"Curve {self.title!r}: {name!r} has a * inside; only a last * is understood, as in 'segmentor/iou/*'")
        if self.goal not in (None, "min", "max"):
            raise ValueError(f"Curve {self.title!r}: goal must be 'min', 'max' or None, got {self.goal!r}")

    def select(self, names: list[str]) -> list[str]:
        """The logged ``names`` that this chart shows, in the order of ``metrics``, each once."""
        selected: dict[str, None] = {}
        for metric in self.metrics:
            if metric.endswith("*"):
                selected.update(dict.fromkeys(name for name in names if name.startswith(metric[:-1])))
            else:
                selected.update(dict.fromkeys(name for name in names if name in (metric, f"{metric}_step", f"{metric}_epoch")))
        return list(selected)


@dataclass(frozen=True)
class _MediaPanel:
    """A place for what ``dashboard_media()`` returns under ``key``.

    Attributes:
        title: Heading.
        key: Key in ``dashboard_media()``, by convention ``<technique>/<name>``.
        note: What to look for, in a sentence or two.
    """

    title: str
    key: str
    note: str = ""

    media: ClassVar[type]


class HistogramPanel(_MediaPanel):
    """A place for a :class:`HistogramMedia`."""

    media = HistogramMedia


class ImagePanel(_MediaPanel):
    """A place for an :class:`ImageMedia`."""

    media = ImageMedia


class CloudPanel(_MediaPanel):
    """A place for a :class:`CloudMedia`."""

    media = CloudMedia


class TablePanel(_MediaPanel):
    """A place for a :class:`TableMedia`."""

    media = TableMedia


Panel = Curve | HistogramPanel | ImagePanel | CloudPanel | TablePanel
