"""A tiny release in the nuScenes layout for the tests of modules."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "datamodules"))  # the writer stands beside the reader's tests


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the release."""
    from tiny_nuscenes import write_release

    return write_release(tmp_path_factory.mktemp("nuscenes"))
