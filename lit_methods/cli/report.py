"""``lit report``: a run's report drawn anew, or several runs side by side on one page."""

import argparse
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lit_methods.catalog import package_folder
from lit_methods.claims.records import verdict_of, verdicts_of
from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError, suggest
from lit_methods.files import shown, write_atomically

DESCRIPTION = "One run: its report.html drawn anew from what its folder holds. Several: one page that compares them. A sweep: its trials."
SWEEP = "sweep.json"  # a folder with it is a sweep's
MARKS = ("report.json", "metrics.jsonl", "config.yaml")  # a folder with one of them is a run's


def report(words: list[str]) -> int:
    """``lit report <run>...``."""
    parser = Parser(prog="lit report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="a run's folder; a name under runs/ for its newest run; a pattern such as 'runs/probe*/*'; or a sweep's folder",
    )
    parser.add_argument(
        "--out", type=Path, help="file to write (default: the run's own report.html, or comparison.html where the runs lie)"
    )
    parser.add_argument("--notes", default="", help="text to show on the page; what stands in a run's notes.md is shown always")
    parser.add_argument("--no-media", action="store_true", help="leave out pictures, clouds, histograms and tables")
    parser.add_argument("--force", action="store_true", help="replace --out whatever it is")
    parser.add_argument("--run_root", type=Path, default=Path("runs"), help="parent of all runs (default: %(default)s)")
    options = parsed(parser, words)
    if options is None:
        return 0
    if len(options.runs) == 1 and (sweep := _sweep(options)) is not None:
        print(f"report of a sweep: {shown(sweep)}")
        return 0
    folders = find_runs(options.runs, options.run_root)

    from lit_methods.reports.compare import render_comparison
    from lit_methods.reports.page import render_report
    from lit_methods.reports.record import load_run

    mark = hashlib.blake2b("\n".join(map(str, sorted(folders))).encode(), digest_size=8).hexdigest()
    out = target(options.out, folders, mark, options.force)
    try:
        runs = [load_run(folder, media=not options.no_media) for folder in folders]
    except (OSError, ValueError) as error:
        hint = "" if options.no_media else "\n  without pictures, clouds and tables: lit report --no-media"
        raise CommandError(f"{error}{hint if 'media' in str(error) else ''}", exit_code=1) from error
    if len(runs) == 1:
        from dataclasses import replace

        notes = "\n\n".join(filter(None, (options.notes, runs[0].notes)))
        text = render_report(replace(runs[0], notes=notes), mark, verdict)
    else:
        text = render_comparison(list(zip(short_names(folders), runs, strict=True)), options.notes, mark, verdict)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
    except OSError as error:
        raise CommandError(f"{out} can't be written: {error}\n  choose another file with --out", exit_code=1) from error
    print(f"{'report' if len(runs) == 1 else f'comparison of {len(runs)} runs'}: {shown(out)}")
    return 0


def _sweep(options: argparse.Namespace) -> Path | None:
    """The page of a sweep that was written, where the word means one."""
    folder = next(
        (path for path in (Path(options.runs[0]), options.run_root / "sweeps" / options.runs[0]) if (path / SWEEP).is_file()), None
    )
    if folder is None:
        return None
    from lit_methods.reports.html import origin_of
    from lit_methods.reports.sweep import read_summary, render_sweep

    mark = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    out: Path = options.out or folder / "report.html"
    if options.out is not None and out.exists() and not (options.force or origin_of(out) == mark):
        raise CommandError(f"--out {out} exists and is no report of this sweep: choose another name, or add --force to replace it")
    try:
        summary = read_summary(folder)
        assert summary is not None
        write_atomically(out, render_sweep(summary, folder, out.parent, mark))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{folder / SWEEP} can't be read or {out} not be written: {error}", exit_code=1) from error
    return out


# ---- which runs ------------------------------------------------------------------------------------------------------------------------


def find_runs(words: Sequence[str], root: Path) -> list[Path]:
    """Absolute folders of the runs that the words mean, each once, in the order given.

    Args:
        words: A run's folder, a folder of runs or a name under ``root`` (its newest run), or a pattern (all runs that match).
        root: Parent of all runs.

    Raises:
        CommandError: A word means no run; the message names the nearest ones.
    """
    folders: dict[Path, None] = {}
    for word in words:
        folders.update(dict.fromkeys(path.resolve() for path in _meant(word, root)))
    return list(folders)


def _meant(word: str, root: Path) -> list[Path]:
    path = Path(word)
    if path.is_file() and path.parent != Path() and _is_run(path.parent):  # runs/.../report.html
        return [path.parent]
    for folder in (path, root / word):
        if _is_run(folder):
            return [folder]
        if newest := _newest(folder):
            return [newest]
    if glob.has_magic(word):
        matches = sorted(Path(match) for match in {*glob.glob(word), *glob.glob(str(root / word))})
        runs = [match for match in matches if _is_run(match)] or [run for match in matches if (run := _newest(match))]
        if runs:
            return runs
    names = _known_names(root)
    what = f"no run matches {word!r}" if glob.has_magic(word) else f"no run {word!r}: neither a run's folder nor a name under {root}/"
    raise CommandError(
        what + suggest(word.rstrip("/"), names, otherwise=f"{root}/ holds no runs; lit fit makes one, --run_root says where they lie")
    )


def _is_run(folder: Path) -> bool:
    """As :func:`lit_methods.reports.record.is_run`, which would cost an import of NumPy."""
    return any((folder / name).is_file() for name in MARKS)


def _newest(folder: Path) -> Path | None:
    """The run in a folder of runs whose files were written last; None for no such folder."""
    runs = [path for path in folder.glob("*") if path.is_dir() and _is_run(path)] if folder.is_dir() else []
    return max(runs, key=_last_written) if runs else None


def _last_written(run: Path) -> tuple[float, str]:
    return max((run / name).stat().st_mtime for name in MARKS if (run / name).is_file()), run.name


def _known_names(root: Path) -> list[str]:
    """Names under ``root`` and the runs below them, as they would be given."""
    runs = [path for path in root.glob("*/*") if path.is_dir() and _is_run(path)]
    names = {path.parent.name for path in runs} | {path.name for path in root.glob("*") if _is_run(path)}
    return sorted(names | {str(path) for path in runs} | {f"{path.parent.name}/{path.name}" for path in runs})


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each run, as short as tells them apart: ``superflow``, or else ``superflow/20260101-120000``, or more of the path."""
    for form in (lambda path: path.parent.name, lambda path: f"{path.parent.name}/{path.name}"):
        names = [form(folder) for folder in folders]
        if all(names) and len(set(names)) == len(names):
            return names
    shared = Path(os.path.commonpath(folders))
    return [str(folder.relative_to(shared)) for folder in folders]


# ---- where to --------------------------------------------------------------------------------------------------------------------------


def target(out: Path | None, folders: Sequence[Path], mark: str, force: bool = False) -> Path:
    """The file to write. Only a report of the same runs is replaced.

    Args:
        out: What the user gave; None: ``report.html`` in the run's folder, or ``comparison[-k].html`` in the folder that holds the runs.
        folders: The runs.
        mark: The runs' mark in a page.
        force: Replace ``out`` whatever it is.

    Raises:
        CommandError: ``out`` is a folder, or a file that isn't a report of these runs.
    """
    from lit_methods.reports.html import origin_of

    if out is None and len(folders) == 1:
        return folders[0] / "report.html"  # always this run's
    if out is None:
        parent = Path(os.path.commonpath(folders))
        taken = (parent / f"comparison{'' if count == 1 else f'-{count}'}.html" for count in range(1, 10_000))
        return next(path for path in taken if not path.exists() or origin_of(path) == mark)
    if out.is_dir():
        raise CommandError(f"--out {out} is a folder: give the name of a file, such as {out / 'comparison.html'}")
    own_report = len(folders) == 1 and out.resolve() == folders[0] / "report.html"
    if out.exists() and not (force or own_report or origin_of(out) == mark):
        raise CommandError(f"--out {out} exists and is no report of these runs: choose another name, or add --force to replace it")
    return out


def verdict(slug: str) -> str:
    """The measured verdict on a technique's claim in words, from ``docs/evidence`` of the checkout; "" where none is kept."""
    path = package_folder("lit_methods").parent / "docs" / "evidence" / f"{slug}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("settings"):
            each = "; ".join(f"{name or 'first setting'}: {verdict}" for name, verdict in verdicts_of(record, {}).items())
            return f"{verdict_of(record, {})} ({each})"
        judged, seeds = record["verdict"], record["seeds"]
        return f"{judged['verdict']}: better in {judged['better']} of {len(seeds)} seeds, measured on {record['date']}"
    except (OSError, ValueError, KeyError, TypeError):  # never measured, or of another version
        return ""
