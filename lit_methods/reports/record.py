"""What a run's report shows, kept on disk, so that it can be drawn again and set beside other runs.

Beside ``metrics.jsonl`` a run's folder holds ``report.json`` (texts, panels, checkpoints, facts) and ``media/``: a PNG for a picture, an
``.npz`` for a cloud or a histogram, JSON for a table; nothing is pickled. A medium's file is named after its content: an unchanged one is
not written again, and ``report.json`` never speaks of a file that isn't whole. Neither torch nor Lightning is imported here.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from lit_methods.files import write_atomically
from lit_methods.panels import CloudMedia, Curve, HistogramMedia, ImageMedia, Media, Panel, TableMedia
from lit_methods.reports.page import ReportData, Section, Status, read_history

RECORD = "report.json"
HISTORY = "metrics.jsonl"
MEDIA = "media"
NOTES = "notes.md"
FORMAT = 1

_PANELS = {kind.__name__: kind for kind in get_args(Panel)}
_EXTENSIONS: dict[type, str] = {ImageMedia: "png", CloudMedia: "npz", HistogramMedia: "npz", TableMedia: "json"}
_OUR_MEDIA = re.compile(r"-[0-9a-f]{16}\.(png|npz|json)$")


# ---- writing ---------------------------------------------------------------------------------------------------------------------------


def save_run(folder: Path, data: ReportData) -> None:
    """Write ``report.json`` and ``media/`` of a run; the history is in ``metrics.jsonl`` already, notes are the user's own file.

    First the media that are new, then ``report.json`` in one piece, then what it no longer names is deleted: a crash at any point leaves
    a record that can be read.

    Args:
        folder: The run's folder, which exists.
        data: What the report shows.

    Raises:
        OSError: The disk is full or the folder can't be written.
    """
    named: set[str] = set()
    sections = []
    for section in data.sections:
        media = {key: _save_medium(folder / MEDIA, key, item) for key, item in section.media.items()}
        named.update(entry["file"] for entry in media.values())
        panels = [_panel_entry(panel) for panel in section.panels]
        sections.append({"title": section.title, "summary": section.summary, "url": section.url, "panels": panels, "media": media})
    record = {
        "format": FORMAT,
        "title": data.title,
        "status": data.status,
        "message": data.message,
        "progress": data.progress,
        "sections": sections,
        "config": data.config,
        "checkpoints": data.checkpoints,
        "facts": data.facts,
    }
    write_atomically(folder / RECORD, json.dumps(record, allow_nan=False, indent=1) + "\n")
    for path in (folder / MEDIA).glob("*"):
        if path.name not in named and _OUR_MEDIA.search(path.name):  # the folder may hold somebody else's files too
            path.unlink(missing_ok=True)


def _panel_entry(panel: Panel) -> dict[str, Any]:
    kind = next(kind for kind in _PANELS.values() if isinstance(panel, kind))
    return {"kind": kind.__name__} | {entry.name: getattr(panel, entry.name) for entry in fields(kind)}


def _save_medium(folder: Path, key: str, item: Media) -> dict[str, Any]:
    """Write one medium unless it is there already; its entry in ``report.json``."""
    kind = next(kind for kind in _EXTENSIONS if isinstance(item, kind))
    entry: dict[str, Any] = {"kind": kind.__name__}
    if isinstance(item, ImageMedia):
        entry["alt"] = item.alt
        content: Any = item.pixels
    elif isinstance(item, CloudMedia):
        entry |= {"caption": item.caption, "class_names": item.class_names}
        content = {"points": item.points, "colors": item.colors} | ({} if item.labels is None else {"labels": item.labels})
    elif isinstance(item, HistogramMedia):
        content = {"counts": item.counts, "edges": item.edges}
    else:
        rows = [[_plain_cell(cell) for cell in row] for row in item.rows]
        content = json.dumps({"columns": item.columns, "rows": rows}, ensure_ascii=False, allow_nan=False)
    stem = re.sub(r"[^\w.-]+", "-", key).strip("-.")[:80] or "medium"
    path = folder / f"{stem}-{_digest(kind, content)}.{_EXTENSIONS[kind]}"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        write_atomically(path, _encoded(content))
    return entry | {"file": path.name}


def _plain_cell(cell: Any) -> Any:
    """A table's cell as strict JSON; a number that isn't finite as ``{"float": "nan"}``, what JSON has no word for as text."""
    if isinstance(cell, np.generic):
        cell = cell.item()
    if isinstance(cell, float) and not math.isfinite(cell):
        return {"float": str(cell)}
    return cell if cell is None or isinstance(cell, (bool, int, float, str)) else str(cell)


def _digest(kind: type, content: Any) -> str:
    digest = hashlib.blake2b(kind.__name__.encode(), digest_size=8)
    if isinstance(content, str):
        digest.update(content.encode())
        return digest.hexdigest()
    arrays = content if isinstance(content, dict) else {"pixels": content}
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _encoded(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode()
    buffer = io.BytesIO()
    if isinstance(content, dict):
        np.savez(buffer, **content)  # not compressed: a cloud of 100,000 points in milliseconds
    else:
        from PIL import Image

        Image.fromarray(np.ascontiguousarray(content)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: it holds a record, metrics or a resolved config."""
    return any((folder / name).is_file() for name in (RECORD, HISTORY, "config.yaml"))


def load_run(folder: Path, media: bool = True) -> ReportData:
    """What a run's report shows, read from its folder.

    A folder without ``report.json`` (a run that was killed before its first epoch ended, or one of before the record) gives curves,
    configuration and facts; its status is ``unknown``.

    Args:
        folder: The run's folder.
        media: Read the pictures, clouds, histograms and tables; False leaves their places empty.

    Raises:
        FileNotFoundError: ``folder`` is no run's folder, or a medium that the record names is missing.
        ValueError: A file is broken; the message names it.
    """
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is no run's folder: it holds none of {RECORD}, {HISTORY}, config.yaml")
    history = read_history(folder / HISTORY) if (folder / HISTORY).is_file() else []
    notes = _text(folder / NOTES)
    config = read_config(folder)
    path = folder / RECORD
    if not path.is_file():
        facts = run_facts(folder)
        return ReportData(f"{folder.parent.name} · {folder.name}", "unknown", history=history, config=config, facts=facts, notes=notes)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}: update lit-methods")
        if record["status"] not in get_args(Status):
            raise ValueError(f"status {record['status']!r} is none of {', '.join(get_args(Status))}")
        sections = [
            Section(str(entry["title"]), tuple(map(_panel, entry["panels"])), {}, str(entry["summary"]), str(entry["url"]))
            for entry in record["sections"]
        ]
        described = [dict(entry["media"]) for entry in record["sections"]]
        data = ReportData(
            title=str(record["title"]),
            status=record["status"],
            history=history,
            message=str(record["message"]),
            progress=tuple((str(name), str(value)) for name, value in record["progress"]),
            config=config or str(record["config"]),
            checkpoints=tuple((str(file), str(role), str(score)) for file, role, score in record["checkpoints"]),
            facts={heading: {str(k): str(v) for k, v in facts.items()} for heading, facts in record["facts"].items()},
            notes=notes,
        )
    except KeyError as error:
        raise ValueError(f"{path}: not a record of a run, {error} is missing. Without this file the curves can still be shown") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a record of a run ({error}). Without this file the curves can still be shown") from error
    if media:
        read = [{key: _load_medium(folder / MEDIA, key, entry, path) for key, entry in entries.items()} for entries in described]
        sections = [replace(section, media=items) for section, items in zip(sections, read, strict=True)]
    return replace(data, sections=tuple(sections))


def _panel(entry: dict[str, Any]) -> Panel:
    kind = _PANELS.get(entry["kind"])
    if kind is None:
        raise ValueError(f"panel kind {entry['kind']!r} is none of {', '.join(_PANELS)}")
    given = {name: value for name, value in entry.items() if name != "kind"}
    if kind is Curve:
        given["metrics"] = tuple(given["metrics"])
    return kind(**given)  # type: ignore[no-any-return]


def _load_medium(folder: Path, key: str, entry: Any, record: Path) -> Media:
    kinds = {kind.__name__: kind for kind in _EXTENSIONS}
    try:
        kind, path = kinds[entry["kind"]], folder / Path(entry["file"]).name  # the name alone: nothing outside the folder
    except (KeyError, TypeError) as error:
        raise ValueError(f"{record}: the medium {key!r} has no file, or a kind that is none of {', '.join(kinds)}") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing (the medium {key!r} of {record.name}): copy {MEDIA}/ along with the run")
    try:
        return _READERS[kind](path, entry)
    except Exception as error:  # a broken file raises nearly anything: zipfile, PIL, struct, json errors
        raise ValueError(f"{path}: broken, or not what {record.name} says about the medium {key!r} ({error})") from error


def _read_image(path: Path, entry: dict[str, Any]) -> ImageMedia:
    from PIL import Image

    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:  # others start programs of their own
        return ImageMedia(np.array(image.convert("RGB")), entry["alt"])


def _read_cloud(path: Path, entry: dict[str, Any]) -> CloudMedia:
    with np.load(path, allow_pickle=False) as arrays:
        labels = arrays["labels"] if "labels" in arrays.files else None
        return CloudMedia(arrays["points"], arrays["colors"], entry["caption"], labels, tuple(entry["class_names"]))


def _read_histogram(path: Path, entry: dict[str, Any]) -> HistogramMedia:
    with np.load(path, allow_pickle=False) as arrays:
        return HistogramMedia(arrays["counts"], arrays["edges"])


def _read_table(path: Path, entry: dict[str, Any]) -> TableMedia:
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(tuple(float(cell["float"]) if isinstance(cell, dict) else cell for cell in row) for row in table["rows"])
    return TableMedia(tuple(table["columns"]), rows)


_READERS: dict[type, Callable[[Path, dict[str, Any]], Media]] = {
    ImageMedia: _read_image,
    CloudMedia: _read_cloud,
    HistogramMedia: _read_histogram,
    TableMedia: _read_table,
}


# ---- facts -----------------------------------------------------------------------------------------------------------------------------


def run_facts(folder: Path) -> dict[str, dict[str, str]]:
    """``git.json`` and ``environment.json`` of a run as texts by heading; lists joined, empty values left out, {} for an absent file.

    Raises:
        ValueError: A file is not JSON; the message names it.
    """
    return {"Git": _facts(folder / "git.json"), "Environment": _facts(folder / "environment.json")}


def _facts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        facts = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}): mend or delete it") from error
    joined = {name: shlex.join if name == "command" else ", ".join for name in facts}
    flat = {name: joined[name](map(str, value)) if isinstance(value, list) else value for name, value in facts.items()}
    return {name: str(value) for name, value in flat.items() if value not in (None, "")}


def read_notes(folder: Path) -> str:
    """The user's own notes about a run, ``notes.md``, as text; "" without them."""
    return _text(folder / NOTES)


def read_config(folder: Path) -> str:
    """A run's resolved config as text; bytes that aren't UTF-8 are replaced; "" without one."""
    return _text(folder / "config.yaml")


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return ""


def flat_config(text: str) -> dict[str, str]:
    """A YAML config as one text per dotted key, in order.

    ``init_args`` is left out of the keys, as on the command line; an item of a list that names a class goes by that class
    (``trainer.callbacks[EMATeacher].decay``), so that an item more does not shift the others; other lists are one value.

    Args:
        text: YAML; "" gives {}.

    Returns:
        Key to value as JSON, strings without quotes. A text that is no mapping is returned under the key ``config``.
    """
    with contextlib.suppress(yaml.YAMLError):
        config = yaml.safe_load(text)
        if config is None:
            return {}
        if isinstance(config, dict):
            return dict(_flat(config, ""))
    return {"config": text}


def _flat(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        rows = []
        for name, item in value.items():
            inner = key if name == "init_args" else f"{key}.{name}" if key else str(name)
            rows += _flat(item, inner)
        return rows
    if isinstance(value, list) and value and all(isinstance(item, dict) and "class_path" in item for item in value):
        rows, seen = [], {}  # type: ignore[var-annotated]
        for item in value:
            name = str(item["class_path"]).rpartition(".")[2]
            seen[name] = seen.get(name, 0) + 1
            rows += _flat(item, f"{key}[{name}{f' {seen[name]}' if seen[name] > 1 else ''}]")
        return rows
    return [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))]
