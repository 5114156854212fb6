"""Makes the pictures of the gallery out of the techniques' own runs.

    python docs/make_gallery.py                                      # of every technique that has no picture yet
    python docs/make_gallery.py superflow                            # of one, with its first config, from its first step
    python docs/make_gallery.py superflow --run runs/superflow/<time>    # of one, out of a run that is there

The picture is a WebP file of at most 100 kB in ``docs/gallery/``. It is drawn by ``draw(run)`` in ``docs/gallery/<slug>.py`` where there is
such a file; else it is the newest picture among the run's media, or, where there is none, the curve of the metric with the most entries.
The technique's page shows the picture and gives its alternative text.
"""

import argparse
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from lit_methods.catalog import Technique, published, techniques

GALLERY = Path(__file__).resolve().parent / "gallery"
MAX_BYTES = 100_000
SIZE = (1152, 648)
BACKGROUND, LINE, GRID = (13, 20, 33), (125, 180, 240), (40, 52, 72)


def train(entry: Technique, folder: Path) -> Path:
    """Run the technique's first config, the one on built-in data, and return the run's folder."""
    command = [sys.executable, "-m", "lit_methods", "fit", "--config", f"configs/{entry.configs[0]}", "--run_root", str(folder)]
    subprocess.run([*command, "--name", entry.slug], check=True)
    return sorted((folder / entry.slug).iterdir())[-1]


def draw(entry: Technique, run: Path) -> Image.Image:
    """The technique's picture out of a run's folder.

    Raises:
        FileNotFoundError: The run has neither pictures nor metrics.
    """
    own = GALLERY / f"{entry.slug}.py"
    if own.is_file():
        spec = importlib.util.spec_from_file_location(f"gallery_{entry.slug}", own)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.draw(run)
    pictures = sorted((run / "media").rglob("*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        return on_canvas(Image.open(pictures[-1]).convert("RGB"))
    return curve(run)


def on_canvas(picture: Image.Image) -> Image.Image:
    """The picture as large as it fits on a canvas of the gallery's shape."""
    scale = min(SIZE[0] / picture.width, SIZE[1] / picture.height)
    filter_ = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
    picture = picture.resize((round(scale * picture.width), round(scale * picture.height)), filter_)
    canvas = Image.new("RGB", SIZE, BACKGROUND)
    canvas.paste(picture, ((SIZE[0] - picture.width) // 2, (SIZE[1] - picture.height) // 2))
    return canvas


def curve(run: Path) -> Image.Image:
    """The metric of the run that was logged most often, over the training step."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{run} has neither media/ nor metrics.jsonl: is it the folder of a run?")
    series: dict[str, list[tuple[float, float]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.get("metrics", {}).items():
            if isinstance(value, int | float) and "/" in name:
                series.setdefault(name, []).append((record["step"], value))
    if not series:
        raise FileNotFoundError(f"{file} holds no metric")
    points = max(series.values(), key=len)
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    canvas = Image.new("RGB", SIZE, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for share in (0.2, 0.4, 0.6, 0.8):
        pen.line([(0, SIZE[1] * share), (SIZE[0], SIZE[1] * share)], fill=GRID, width=2)
    place = [
        (60 + (SIZE[0] - 120) * (x - left) / max(right - left, 1), 60 + (SIZE[1] - 120) * (high - y) / max(high - low, 1e-12))
        for x, y in points
    ]
    pen.line(place, fill=LINE, width=6, joint="curve")
    return canvas


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
            data = encoded(draw(known[slug], run))
        (GALLERY / f"{slug}.webp").write_bytes(data)
        print(f"docs/gallery/{slug}.webp: {len(data) / 1000:.0f} kB; the page shows it: ![alternative text](../gallery/{slug}.webp)")


if __name__ == "__main__":
    main()
