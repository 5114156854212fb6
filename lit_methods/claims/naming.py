"""The commit on which a further setting of a claim was named, before anyone could know its result."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_methods.claims.keys import config_file
from lit_methods.claims.settings import SettingError, content_of, listed
from lit_methods.errors import CommandError
from lit_methods.git import git

_WORDS = ("claim", "source", "data", "real")  # what says nothing about how a setting is run and judged


def named(file: Path, name: str) -> dict[str, str] | None:
    """The first commit on which a further setting stood as it stands now, with the config files that it lays over the arms'.

    Words that only describe it (claim, source, what its data is) may have changed since.

    Args:
        file: The claim file.
        name: The setting.

    Returns:
        ``commit`` and ``date`` (``2026-01-31``); None where the file is in no git checkout, or git ignores it.

    Raises:
        CommandError: It isn't committed as it stands.
    """
    folder = file.resolve().parent
    try:
        top = Path(git(folder, "rev-parse", "--show-toplevel").strip())
        path = file.resolve().relative_to(top).as_posix()
        if _ignored(top, path):
            return None  # an installed package in a project's own environment
        present = yaml.safe_load(file.read_text(encoding="utf-8"))
        overlays = [config_file(f"configs/{config}") for config in listed(present["settings"][name].get("config") or [])]
        paths = [path, *(one.resolve().relative_to(top).as_posix() for one in overlays if one and one.resolve().is_relative_to(top))]
        now = _decisive([(top / one).read_text(encoding="utf-8") for one in paths], name)
        if sorted(git(top, "ls-files", "-z", "--", *paths).split("\0")[:-1]) != sorted(paths) or _at(top, "HEAD", paths, name) != now:
            raise CommandError(
                f"{file}: settings.{name} isn't committed as it stands: commit it before it runs, so that its result can't choose it\n"
                f"  git add {' '.join(paths)} && git commit; or try it with --quick"
            )
        lines = git(top, "log", "--topo-order", "--reverse", "--format=%H %cs", "--", *paths).splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    for commit, date in (line.split() for line in lines):
        if _at(top, commit, paths, name) == now:
            return {"commit": commit, "date": date}
    return None


def _ignored(top: Path, path: str) -> bool:
    try:
        git(top, "check-ignore", "-q", path)
    except subprocess.CalledProcessError:
        return False
    return True


def _at(top: Path, commit: str, paths: Sequence[str], name: str) -> Any:
    try:
        return _decisive([git(top, "show", f"{commit}:{path}") for path in paths], name)
    except (subprocess.CalledProcessError, yaml.YAMLError, KeyError, TypeError, AttributeError, SettingError):
        return None  # one of the files wasn't there, or wasn't such a claim


def _decisive(texts: Sequence[str], name: str) -> Any:
    claim, *overlays = (yaml.safe_load(text) for text in texts)
    return {key: value for key, value in content_of(claim, name).items() if key not in _WORDS}, overlays
