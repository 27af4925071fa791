import importlib.metadata
import runpy

import pytest

from olvae.app import space
from olvae.app.space import write_space
from olvae.config import ConfigError
from tests.models.test_autoencoder import tiny


@pytest.fixture(autouse=True)
def _gradio(monkeypatch):
    """Only its version is asked for."""
    version = importlib.metadata.version
    monkeypatch.setattr(space.importlib.metadata, "version", lambda name: "6.1" if name == "gradio" else version(name))


def test_a_space_has_the_exports_inside(tmp_path):
    tiny().save_pretrained(tmp_path / "my-vae")
    targets = [str(tmp_path / "my-vae"), "olvae:photos-f8c12", "someone/a-vae", "diffusers:someone/sd-vae"]
    folder = tmp_path / "spaces" / "look"
    write_space(targets, folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "app.py", "requirements.txt", "models"}
    copied = folder / "models" / "my-vae" / "config.json"
    assert copied.read_bytes() == (tmp_path / "my-vae" / "config.json").read_bytes()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntitle: look\nsdk: gradio\nsdk_version: 6.1\napp_file: app.py\n")
    assert (folder / "app.py").read_text().splitlines()[-1] == (
        "page(['models/my-vae', 'olvae:photos-f8c12', 'someone/a-vae', 'diffusers:someone/sd-vae'])"
        '.launch(max_file_size="50mb")'
    )
    assert (folder / "requirements.txt").read_text().startswith("open-litevae[app]>=")
    assert not list(tmp_path.glob("spaces/.*"))


def test_what_a_space_can_not_hold(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"run: a Space holds exports: olvae export .*run --out FOLDER"):
        write_space([str(tmp_path / "run")], tmp_path / "space")
    for parent in "ab":
        tiny().save_pretrained(tmp_path / parent / "vae")
    with pytest.raises(ConfigError, match="same name"):
        write_space([str(tmp_path / parent / "vae") for parent in "ab"], tmp_path / "space")
    with pytest.raises(FileExistsError, match="not empty"):
        write_space(["olvae:photos-f8c12"], tmp_path / "a")
    assert not (tmp_path / "space").exists()


@pytest.mark.browser
def test_its_app_is_the_page(tmp_path, monkeypatch):
    import gradio

    tiny().save_pretrained(tmp_path / "my-vae")
    write_space([str(tmp_path / "my-vae")], tmp_path / "space")
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda blocks, max_file_size: launched.append(blocks.title))
    monkeypatch.chdir(tmp_path / "space")
    runpy.run_path("app.py")
    assert launched == ["open-LiteVAE"]
