"""Makes the pictures of the gallery out of the techniques' own runs.

    python docs/make_gallery.py                                      # of every technique that has no picture yet
    python docs/make_gallery.py superflow                            # of one, with its first config, from its first step
    python docs/make_gallery.py superflow --run runs/superflow/<time>    # of one, out of a run that is there
    python docs/make_gallery.py slct --run runs/slct/<time> --panel Samples    # of another panel than the first

The picture is a WebP file of at most 100 kB in ``docs/gallery/``. It is drawn by ``draw(run)`` in ``docs/gallery/<slug>.py`` where there is
such a file; else it is the first panel that the technique declares and for which the run has something: a chart with its axes, a picture or
a cloud from above. A run without panels gives the newest picture among its media, or the curve of the metric with the most entries.
The technique's page shows the picture and gives its alternative text.
"""

import argparse
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_methods.catalog import Technique, published, techniques
from lit_methods.claims.comparison import ticks
from lit_methods.files import write_atomically
from lit_methods.panels import CloudMedia, Curve, HistogramMedia, ImageMedia, Media, Panel
from lit_methods.reports.html import Series, short_names, thin
from lit_methods.reports.page import series_by_name
from lit_methods.reports.record import is_run, load_run

GALLERY = Path(__file__).resolve().parent / "gallery"
MAX_BYTES = 100_000
SIZE = (1152, 648)
BOX = (130, 64, 1112, 556)  # of a chart: left, top, right, bottom; what is outside has room for titles, ticks and labels
BACKGROUND, LINE, GRID, TEXT = (13, 20, 33), (125, 180, 240), (40, 52, 72), (214, 222, 235)
LINES = (LINE, (250, 176, 70), (120, 210, 140), (235, 110, 120), (190, 150, 240), (230, 220, 120))

Place = Callable[[float, float], tuple[float, float]]  # values on both axes -> pixels


def train(entry: Technique, folder: Path) -> Path:
    """Run the technique's first config, the one on built-in data, and return the run's folder."""
    command = [sys.executable, "-m", "lit_methods", "fit", "--config", f"configs/{entry.configs[0]}", "--run_root", str(folder)]
    subprocess.run([*command, "--name", entry.slug], check=True)
    return sorted((folder / entry.slug).iterdir())[-1]


def draw(entry: Technique, run: Path, title: str = "") -> Image.Image:
    """The technique's picture out of a run's folder.

    Args:
        entry: The technique.
        run: Folder of a run of it.
        title: Title of the panel to draw, whoever declares it; "": the technique's own way.

    Raises:
        FileNotFoundError: The run has neither pictures nor metrics, or nothing for a panel of that title.
    """
    own = GALLERY / f"{entry.slug}.py"
    if own.is_file() and not title:
        spec = importlib.util.spec_from_file_location(f"gallery_{entry.slug}", own)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.draw(run)
    if not is_run(run) and not (run / "media").is_dir():
        raise FileNotFoundError(f"{run} has neither media/ nor metrics.jsonl: is it the folder of a run?")
    data = load_run(run) if is_run(run) else None
    series = series_by_name(data.history) if data else {}
    sections = list(data.sections) if data else []
    if not title:
        named = [section for section in sections if section.title.split(" ")[0] in entry.names]
        sections = sorted(named, key=lambda section: entry.names.index(section.title.split(" ")[0]))
    for section in sections:
        for panel in section.panels:
            if title in ("", panel.title) and (picture := drawn(panel, section.media, series)):
                return picture
    if title:
        titles = ", ".join(dict.fromkeys(panel.title for section in sections for panel in section.panels))
        raise FileNotFoundError(f"{run} has nothing for a panel {title!r}; declared are: {titles or 'none'}")
    pictures = sorted((run / "media").rglob("*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        return on_canvas(Image.open(pictures[-1]).convert("RGB"))
    metrics = {name: values for name, values in series.items() if "/" in name}
    if not metrics:
        raise FileNotFoundError(f"{run} holds no picture and no metric")
    name = max(metrics, key=lambda name: len(metrics[name][0]))
    return curves(name, {name: metrics[name]})


def drawn(panel: Panel, media: Mapping[str, Media], series: Mapping[str, Series]) -> Image.Image | None:
    """One panel as a picture; None if the run has nothing for it, or if it is a table."""
    if isinstance(panel, Curve):
        chosen = panel.select(list(series))
        return curves(panel.title, {name: series[name] for name in chosen}) if chosen else None
    item = media.get(panel.key)
    if isinstance(item, ImageMedia):
        return on_canvas(Image.fromarray(item.pixels))
    if isinstance(item, HistogramMedia):
        return histogram(panel.title, item)
    return cloud(panel.title, item) if isinstance(item, CloudMedia) else None


def on_canvas(picture: Image.Image) -> Image.Image:
    """The picture as large as it fits on a canvas of the gallery's shape."""
    scale = min(SIZE[0] / picture.width, SIZE[1] / picture.height)
    filter_ = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
    picture = picture.resize((round(scale * picture.width), round(scale * picture.height)), filter_)
    canvas = Image.new("RGB", SIZE, BACKGROUND)
    canvas.paste(picture, ((SIZE[0] - picture.width) // 2, (SIZE[1] - picture.height) // 2))
    return canvas


def curves(title: str, series: Mapping[str, Series]) -> Image.Image:
    """Metrics over the training step, values that are not finite left out."""
    finite = {name: [point for point in zip(*thin(*values), strict=True) if np.isfinite(point[1])] for name, values in series.items()}
    lines = {name: points for name, points in finite.items() if points}
    steps, values = zip(*(point for points in lines.values() for point in points), strict=True) if lines else ((0,), (0.0,))
    canvas, names = Image.new("RGB", SIZE, BACKGROUND), short_names(list(lines))
    place = axes(canvas, title, (min(steps), max(steps)), (min(values), max(values)), "step", names[0] if len(names) == 1 else "value")
    pen = ImageDraw.Draw(canvas)
    for points, colour in zip(lines.values(), LINES, strict=False):
        pixels = [place(*point) for point in points]
        pen.line(pixels, fill=colour, width=5, joint="curve")
        if len(pixels) == 1:  # no line
            x, y = pixels[0]
            pen.ellipse([x - 6, y - 6, x + 6, y + 6], fill=colour)
    if len(names) > 1:
        legend(pen, names)
    return canvas


def histogram(title: str, item: HistogramMedia) -> Image.Image:
    """Bars over the edges of their bins."""
    canvas = Image.new("RGB", SIZE, BACKGROUND)
    place = axes(canvas, title, (float(item.edges[0]), float(item.edges[-1])), (0.0, float(item.counts.max())), "value", "count")
    pen = ImageDraw.Draw(canvas)
    for count, left, right in zip(item.counts, item.edges[:-1], item.edges[1:], strict=True):
        if count:
            pen.rectangle([*place(left, count), *place(right, 0.0)], fill=LINE, outline=BACKGROUND)
    return canvas


def cloud(title: str, item: CloudMedia) -> Image.Image:
    """A cloud from above, higher points over lower ones, the same scale on both axes."""
    points = item.points[np.isfinite(item.points).all(axis=1)]
    colours = item.colors[np.isfinite(item.points).all(axis=1)]
    low, high = np.percentile(points[:, :2], [1, 99], axis=0) if len(points) else np.zeros((2, 2))
    width, height = BOX[2] - BOX[0], BOX[3] - BOX[1]
    middle, per_pixel = (low + high) / 2, max(float((high - low)[0]) / width, float((high - low)[1]) / height, 1e-9)
    canvas = Image.new("RGB", SIZE, BACKGROUND)
    ends = [(float(m - size * per_pixel / 2), float(m + size * per_pixel / 2)) for m, size in zip(middle, (width, height), strict=True)]
    place = axes(canvas, title, *ends, "x in metres", "y in metres", widen=False)
    pen = ImageDraw.Draw(canvas)
    for index in np.argsort(points[:, 2], kind="stable"):
        x, y = place(float(points[index, 0]), float(points[index, 1]))
        if BOX[0] <= x <= BOX[2] and BOX[1] <= y <= BOX[3]:
            pen.rectangle([x, y, x + 2, y + 2], fill=tuple(int(part) for part in colours[index]))
    return canvas


def axes(
    canvas: Image.Image,
    title: str,
    across: tuple[float, float],
    up: tuple[float, float],
    x_label: str,
    y_label: str,
    widen: bool = True,
) -> Place:
    """Draw a chart's title, grid, ticks and labels.

    Args:
        canvas: Is drawn on.
        title: Heading of the chart.
        across: Lowest and highest value on the horizontal axis.
        up: Lowest and highest value on the vertical axis.
        x_label: What the horizontal axis shows, with its unit.
        y_label: What the vertical axis shows, with its unit.
        widen: Let both axes end at round numbers.

    Returns:
        From values on both axes to pixels.
    """
    pen, small = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    left, top, right, bottom = BOX
    marks = [ticks(*ends) for ends in (across, up)]
    (x_low, x_high), (y_low, y_high) = [(found[0], found[-1]) for found in marks] if widen else (across, up)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x_low) / (x_high - x_low) * (right - left), bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    for mark in (mark for mark in marks[0] if x_low <= mark <= x_high):
        x, _ = place(mark, y_low)
        pen.line([(x, top), (x, bottom)], fill=GRID, width=2)
        pen.text((x, bottom + 10), f"{mark:g}", font=small, fill=TEXT, anchor="mt")
    for mark in (mark for mark in marks[1] if y_low <= mark <= y_high):
        _, y = place(x_low, mark)
        pen.line([(left, y), (right, y)], fill=GRID, width=2)
        pen.text((left - 12, y), f"{mark:g}", font=small, fill=TEXT, anchor="rm")
    pen.text((left, 14), title, font=ImageFont.load_default(28), fill=TEXT)
    pen.text(((left + right) / 2, SIZE[1] - 16), x_label, font=small, fill=TEXT, anchor="mb")
    upright = Image.new("L", (bottom - top, 30))
    ImageDraw.Draw(upright).text((upright.width / 2, 15), y_label, font=small, fill=255, anchor="mm")
    upright = upright.rotate(90, expand=True)
    canvas.paste(TEXT, (12, top), upright)
    return place


def legend(pen: ImageDraw.ImageDraw, names: Sequence[str]) -> None:
    """Names in the colours of their lines, one below the other in the chart's upper right corner."""
    font = ImageFont.load_default(20)
    for row, (name, colour) in enumerate(zip(names, LINES, strict=False)):
        y = BOX[1] + 18 + 28 * row
        pen.text((BOX[2] - 50, y), name, font=font, fill=TEXT, anchor="rm")
        pen.line([(BOX[2] - 40, y), (BOX[2] - 10, y)], fill=colour, width=5)


def encoded(picture: Image.Image) -> bytes:
    """The picture as WebP of at most ``MAX_BYTES``, in the best quality that fits."""
    for quality in (90, 80, 70, 60, 50, 35):
        stream = io.BytesIO()
        picture.save(stream, "WEBP", quality=quality, method=6)
        if stream.tell() <= MAX_BYTES:
            return stream.getvalue()
    raise ValueError(f"the picture ({picture.width} x {picture.height}) stays larger than {MAX_BYTES} bytes: draw it with less detail")


def main() -> None:
    """Read the command line, draw, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("slugs", nargs="*", help="techniques; default: those without a picture")
    parser.add_argument("--run", type=Path, help="a finished run of the technique; default: its first config is run")
    parser.add_argument("--panel", default="", help="title of the panel to draw; default: the technique's own script, or its first panel")
    arguments = parser.parse_args()
    known = techniques()
    missing = [slug for slug in published() if not any((GALLERY / f"{slug}.{kind}").is_file() for kind in ("webp", "png", "svg"))]
    slugs = arguments.slugs or missing
    if unknown := [slug for slug in slugs if slug not in known]:
        parser.error(f"no technique {unknown[0]!r}; `lit list` prints them")
    if arguments.run is not None and len(slugs) != 1:
        parser.error("--run goes with one technique")
    for slug in slugs:
        with tempfile.TemporaryDirectory() as folder:
            run = arguments.run or train(known[slug], Path(folder))
            data = encoded(draw(known[slug], run, arguments.panel))
        write_atomically(GALLERY / f"{slug}.webp", data)
        print(f"docs/gallery/{slug}.webp: {len(data) / 1000:.0f} kB; the page shows it: ![alternative text](../gallery/{slug}.webp)")


if __name__ == "__main__":
    main()
