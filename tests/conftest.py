"""Shared fixtures; makes ``tests/`` and ``tests/golden/`` importable for the helpers that stand there; ``--technique <slug>``."""

import functools
import gc
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "golden")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two-process tests on two cores
os.environ.setdefault("WANDB_MODE", "offline")  # a test never talks to a service
os.environ.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")  # reads a file of each installed package for each run

_entry_points = importlib.metadata.entry_points
_entry_points_once = functools.cache(_entry_points)


def entry_points(**wanted: Any) -> Any:
    """Those of Lightning are read once: every Trainer asks for them, and reads a file of each installed package."""
    return (_entry_points_once if wanted.get("group", "").startswith("lightning.") else _entry_points)(**wanted)


importlib.metadata.entry_points = entry_points


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--technique", metavar="SLUG", help="only what concerns this technique of the catalogue: make test T=<slug>")


def pytest_configure(config: pytest.Config) -> None:
    if slug := config.getoption("technique"):
        from selection import find_technique

        try:
            find_technique(slug)
        except ValueError as error:
            raise pytest.UsageError(f"--technique: {error}") from None


def pytest_collection_finish() -> None:
    """What has been imported stays: collections of garbage needn't look at it, in this process and in the loaders' workers."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--technique``, files that can't hold a test of it aren't even imported."""
    if not (slug := config.getoption("technique")) or not collection_path.match("test_*.py"):
        return None
    from selection import find_technique, is_about_all, is_own_file

    return None if is_own_file(collection_path, find_technique(slug)) or is_about_all(collection_path) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (slug := config.getoption("technique")):
        return
    from selection import concerns, find_technique

    def belongs(item: pytest.Item) -> bool:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return concerns(item.path, parameters, item.get_closest_marker("catalogue") is not None, find_technique(slug))

    kept = [item for item in items if belongs(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data samples; tests that ask for it skip without one."""
    folder = os.environ.get("LIT_METHODS_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LIT_METHODS_TEST_DATA names no folder of real data samples")
    return Path(folder)


@pytest.fixture
def forked_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes that the test's code starts are forks of one that has imported Lightning already."""
    import forks

    monkeypatch.setattr(sys, "executable", forks.interpreter())
