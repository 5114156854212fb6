"""Shared fixtures; makes ``tests/`` and ``tests/golden/`` importable for the helpers that stand there."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "golden")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two-process tests on two cores
os.environ.setdefault("WANDB_MODE", "offline")  # a test never talks to a service


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data samples; tests that ask for it skip without one."""
    folder = os.environ.get("LIT_METHODS_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LIT_METHODS_TEST_DATA names no folder of real data samples")
    return Path(folder)
