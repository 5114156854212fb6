"""A tiny release in the nuScenes layout for the tests of modules."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the release."""
    from lit_methods.datamodules.driving.fake import nuscenes

    return nuscenes(tmp_path_factory.mktemp("nuscenes"))
