"""What a claim runs in processes of their own: one stage through the ordinary ``lit`` command, or the resolving of configs.

``python -m lit_methods.cli.stage run <sources.json> fit --config ...`` is ``lit fit --config ...``, and writes at its end which source
files the run has imported, with their SHA-256. ``python -m lit_methods.cli.stage resolve <file.json>`` replaces a list of argument lists
by what ``--print_config`` says to each.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_methods.catalog import package_folder

_PACKAGES = ("lit_methods.callbacks", "lit_methods.datamodules", "lit_methods")  # the last may hold the others


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def imported_sources(started: float = float("inf")) -> dict[str, str]:
    """SHA-256 of every source file of ours, or below the current folder, that this process has imported.

    Left out are installed libraries (their versions stand in a stage's key) and this package, which runs claims and computes nothing in
    them. Not seen: what other processes of the run (data loader workers) import by themselves.

    Args:
        started: Time in seconds since the epoch. A file changed after it may not be what was imported: it gets a hash that no file has.

    Returns:
        ``<package>/<path>``, or ``./<path>`` below the current folder -> 64 hex digits.
    """
    roots = [(package, package_folder(package).resolve()) for package in _PACKAGES] + [(".", Path.cwd().resolve())]
    own = Path(__file__).resolve().parent
    found = {}
    for module in list(sys.modules.values()):
        name = getattr(module, "__file__", None) or ""
        if not name.endswith(".py"):
            continue
        folder = _real_folder(os.path.dirname(name))
        package, root = next(((package, root) for package, root in roots if folder.is_relative_to(root)), ("", folder))
        installed = package == "." and any(part in ("site-packages", "dist-packages") for part in folder.parts)
        file = folder / os.path.basename(name)
        if package and not installed and folder != own and file.is_file():
            changed = file.stat().st_mtime > started
            found[f"{package}/{file.relative_to(root).as_posix()}"] = "changed during the run" if changed else sha256(file)
    return dict(sorted(found.items()))


@functools.cache
def _real_folder(folder: str) -> Path:
    return Path(folder).resolve()


def sha256(file: Path) -> str:
    """Hash of a file's content, 64 hex digits; "" where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def changed_sources(sources: Mapping[str, str]) -> list[str]:
    """Those of :func:`imported_sources` that don't have that content any more."""

    def file(label: str) -> Path:
        package, _, path = label.partition("/")
        return (Path.cwd() if package == "." else package_folder(package)) / path

    return [label for label, digest in sources.items() if sha256(file(label)) != digest]


def run(record: Path, words: list[str]) -> int:
    """Run one ``lit`` command; its exit status."""
    from lit_methods.cli.main import main

    started = time.time()
    status = main(words)
    if status == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        write_json(record, imported_sources(started))
    return status


def resolve(file: Path) -> int:
    """Replace argument lists by ``{"config": ...}``, or ``{"error": message}``; ``{checkpoint}`` stays what it is."""
    from lit_methods.cli.main import main

    answers = []
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "upstream.ckpt"  # keys that want a file that exists get one
        stand_in.touch()
        for words in json.loads(file.read_text(encoding="utf-8")):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main([*(word.replace("{checkpoint}", str(stand_in)) for word in words), "--print_config"])
            text = out.getvalue()
            if status == 0 and "seed_everything:" in text:
                text = text[max(text.find("# lightning"), 0) :]  # behind a word about W&B
                answers.append({"config": yaml.safe_load(text.replace(str(stand_in), "'{checkpoint}'"))})
            else:
                answers.append({"error": err.getvalue().strip() or text[-2000:]})
    write_json(file, answers)
    return 0


if __name__ == "__main__":
    task, path, *arguments = sys.argv[1:]
    raise SystemExit(resolve(Path(path)) if task == "resolve" else run(Path(path), arguments))
