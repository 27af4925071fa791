from pathlib import Path

import pytest

from olvae.cli.evaluate import results_folder
from olvae.config import ConfigError
from olvae.runs import Run


def test_where_results_go(tmp_path):
    weights = tmp_path / "step=5.ckpt"
    weights.touch()
    assert results_folder(Path("here"), str(weights), None) == Path("here")
    assert results_folder(None, str(tmp_path), Run(tmp_path)) == tmp_path
    assert results_folder(None, str(weights), None) == tmp_path / "step=5_results"
    with pytest.raises(ConfigError, match="--out DIR"):
        results_folder(None, str(tmp_path), None)  # an export
    with pytest.raises(ConfigError, match="--out DIR"):
        results_folder(None, "diffusers:some/vae", None)
    with pytest.raises(NotADirectoryError, match="results need a folder"):
        results_folder(weights, str(weights), None)
