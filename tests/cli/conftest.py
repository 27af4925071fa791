"""Commands in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from olvae.cli.main import main
from olvae.training import run as training


@pytest.fixture
def olvae(capfd, monkeypatch, quick_training) -> Callable[..., tuple[int, str, str]]:
    """Run a command; returns exit code, standard output and standard error."""
    monkeypatch.delenv(training.RUN_ENV, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return leaving.value.code, out, err

    return run


@pytest.fixture
def terminal(monkeypatch) -> None:
    """Make rich believe that standard error is a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="session")
def photos(trained) -> Path:
    """The pictures of the session's run."""
    folder: Path = trained.parent.parent / "photos"
    return folder
