"""Written-back autoencoders in FLUX.2's, Qwen-Image's and Stable Diffusion's pipelines,
with tiny random networks.
"""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_diffusers_pipelines_decode_with_exported_autoencoders(tmp_path):
    """In a process with transformers, which is 140 MB, slows every import of diffusers,
    and is not installed.
    """
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
    ]
    subprocess.run(
        [*pip, "--target", tmp_path / "site", "transformers", "tokenizers", "regex"], check=True
    )
    environment = {**os.environ, "PYTHONPATH": f".{os.pathsep}{tmp_path / 'site'}"}
    command = [sys.executable, "-m", "tests.export.pipelines", tmp_path / "vae"]
    (tmp_path / "vae").mkdir()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if "Pipeline" in line] == [
        *("Flux2Pipeline", "QwenImagePipeline", "StableDiffusionPipeline")
    ]
