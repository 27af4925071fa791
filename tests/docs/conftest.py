"""What the docs assume to be in the working directory: pictures, a run,
and what was made with it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from olvae.cli.main import main
from olvae.config import save
from olvae.training.run import RUN_ENV
from tests.conftest import tiny_config
from tests.docs.markdown import ROOT

RUN = "runs/2026-01-31T12-00-00_demo_32"


def run_command(words: list[str]) -> None:
    """Run ``olvae`` here, its arguments expanded as by a shell.

    --out is made anew, two steps are trained.
    """
    if "--out" in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    arguments: list[str] = []
    for word in words[1:]:
        arguments += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    short = [f"lightning.trainer.{key}=2" for key in ("max_steps", "val_check_interval")]
    with pytest.raises(SystemExit) as leaving:
        main(arguments + short * (words[1] == "train"))
    assert leaving.value.code == 0, " ".join(words)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, quick_training) -> Path:
    """The folder, made once: a tiny model with the demo's name and 12 latent channels stands for
    the demo's."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    pictures = [*(f"photos/class{i % 3}/{i}.jpg" for i in range(12)), "holiday/1.jpg", "photo.jpg"]
    for name in pictures:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        size = (300, 280) if name == "photo.jpg" else (72, 66)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    (folder / "olvae").mkdir()
    (folder / "olvae" / "recipes").symlink_to(ROOT / "olvae" / "recipes")
    config = tiny_config("photos", embed_dim=12, use_ema=True)
    config["model"]["params"]["decoder_config"]["params"]["z_channels"] = 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RUN_ENV, "")  # so that what training sets is taken back
        patch.chdir(folder)
        save(config, "tiny.yaml")
        run_command(["olvae", "train", "--base", "tiny.yaml", "--gpus", "0"])
        (run,) = Path("runs").iterdir()
        run.rename(RUN)
        run_command(["olvae", "export", RUN, "--out", "my-vae"])
        shutil.copytree("my-vae", "demo-vae")
        run_command(["olvae", "encode", RUN, "--data", "photos", "--out", "latents"])
    return folder


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of the folder, as the working directory."""
    shutil.copytree(prepared, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"
