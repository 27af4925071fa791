"""Commands in this process."""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from olvae.cli.main import main
from olvae.config import save
from olvae.evaluation import round_trip
from olvae.files import warn_once
from olvae.training import run as training
from tests.conftest import one_width, tiny_config
from tests.export.latents import tiny_vae
from tests.forks import fork_ranks


@pytest.fixture(autouse=True)
def _no_macs(monkeypatch) -> None:
    """Counting them was a quarter of the time of an evaluation of twelve small images."""
    monkeypatch.setattr(round_trip, "count_macs", lambda *_, **__: 0)


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> None:
    """What earlier tests were warned of is warned of again."""
    warn_once.cache_clear()


class Ended(NamedTuple):
    """A command that ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


def run_once(*arguments: object) -> Ended:
    """Run a command for a module's fixture, which has no capfd."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as leaving,
        ):
            main([str(a) for a in arguments])
    return Ended(leaving.value.code or 0, out.getvalue(), err.getvalue())


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
def olvae_on_two(capfd) -> Callable[..., str]:
    """Run a command in two processes, as torchrun does; what both write to standard error."""

    def run(*arguments: object, exits: Sequence[int] = (0, 0)) -> str:
        capfd.readouterr()
        fork_ranks(main, [str(a) for a in arguments], exits=exits)
        return capfd.readouterr().err

    return run


@pytest.fixture
def done(olvae) -> Callable[..., str]:
    """Run a command that succeeds; returns standard error."""

    def run(*arguments: object) -> str:
        code, _, err = olvae(*arguments)
        assert code == 0, err
        return err

    return run


@pytest.fixture
def refused(olvae) -> Callable[..., str]:
    """Run a command that ends with this code and one line of standard error; returns the line."""

    def run(code: int, *arguments: object) -> str:
        found, out, err = olvae(*arguments)
        assert (found, out, err.count("\n")) == (code, "", 1), err
        return err

    return run


@pytest.fixture
def target(tmp_path) -> Path:
    """An export."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def config(tmp_path, image_folder) -> Path:
    """The file of a tiny training on twelve images."""
    path: Path = tmp_path / "tiny.yaml"
    save(tiny_config(image_folder, encoder_config=one_width()), path)
    return path


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
