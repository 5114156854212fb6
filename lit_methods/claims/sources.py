"""Which source files a stage of a claim imported, by their hashes."""

import functools
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lit_methods.catalog import package_folder

PACKAGES = ("lit_methods.callbacks", "lit_methods.datamodules", "lit_methods")  # the last may hold the others


def imported_sources(started: float = float("inf")) -> dict[str, str]:
    """SHA-256 of every source file of ours, or below the current folder, that this process has imported.

    Left out are installed libraries (their versions stand in a stage's key) and this package, which runs claims and computes nothing in
    them. Not seen: what other processes of the run (data loader workers) import by themselves.

    Args:
        started: Time in seconds since the epoch. A file changed after it may not be what was imported: it gets a hash that no file has.

    Returns:
        ``<package>/<path>``, or ``./<path>`` below the current folder -> 64 hex digits.
    """
    roots = [(package, package_folder(package).resolve()) for package in PACKAGES] + [(".", Path.cwd().resolve())]
    this_package = Path(__file__).resolve().parent
    hashes = {}
    for module in list(sys.modules.values()):
        name = getattr(module, "__file__", None) or ""
        if not name.endswith(".py"):
            continue
        folder = _real_folder(os.path.dirname(name))
        package, root = next(((package, root) for package, root in roots if folder.is_relative_to(root)), ("", folder))
        installed = package == "." and any(part in ("site-packages", "dist-packages") for part in folder.parts)
        file = folder / os.path.basename(name)
        if package and not installed and folder != this_package and file.is_file():
            changed = file.stat().st_mtime > started
            hashes[f"{package}/{file.relative_to(root).as_posix()}"] = "changed during the run" if changed else sha256(file)
    return dict(sorted(hashes.items()))


@functools.cache
def _real_folder(folder: str) -> Path:
    return Path(folder).resolve()


def sha256(file: Path) -> str:
    """Hash of a file's content, 64 hex digits; "" where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def changed_sources(sources: Mapping[str, str]) -> list[str]:
    """Files out of :func:`imported_sources` that have another content by now, or are gone."""

    def file(label: str) -> Path:
        package, _, path = label.partition("/")
        return (Path.cwd() if package == "." else package_folder(package)) / path

    return [label for label, digest in sources.items() if sha256(file(label)) != digest]
