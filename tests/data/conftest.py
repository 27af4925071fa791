from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path) -> Path:
    """An empty folder for pictures."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"
