"""The command's training with a config of the test's, as a fixture."""

import pytest

from olvae.config import save
from olvae.runs import Run
from olvae.training import run as training
from olvae.training.run import TrainOptions, train
from tests.training.origins import without_networks


@pytest.fixture
def train_with(tmp_path, image_folder, monkeypatch, quick_training):
    """Train with a config; returns the run."""
    monkeypatch.delenv(training.RUN_ENV, raising=False)

    def run(*overrides: str, config: dict | None = None, **options) -> Run:
        save(without_networks(image_folder) if config is None else config, tmp_path / "cfg.yaml")
        base = [] if "resume" in options else [tmp_path / "cfg.yaml"]
        settings = {"base": base, "logdir": tmp_path / "runs", "gpus": "0", "overrides": overrides}
        return train(TrainOptions(**{**settings, **options}))

    return run
