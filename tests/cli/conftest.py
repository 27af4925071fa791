"""Commands in this process, and a run folder to use them on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from olvae.cli.main import main
from olvae.config import save
from olvae.training import run as training
from tests.conftest import tiny_config


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
def trained(tmp_path_factory, quick_training) -> Iterator[Path]:
    """A run folder after two steps, on a folder of twelve pictures beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(12):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    save(tiny_config(folder / "photos"), folder / "tiny.yaml")
    arguments = ["--base", folder / "tiny.yaml", "--logdir", folder / "runs", "--gpus", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(training.RUN_ENV, "")  # so that what training sets is taken back
        with pytest.raises(SystemExit) as leaving:
            main(["train", *map(str, arguments), "lightning.trainer.max_steps=2"])
        assert leaving.value.code == 0
        yield next((folder / "runs").iterdir())
