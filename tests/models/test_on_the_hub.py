"""Repositories of the hub: read from its cache, refused, pushed."""

import http.server
import json
import threading
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from olvae import LiteVAE
from olvae.config import ConfigError, save
from olvae.data.dataset import SamplePhotographs
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.metrics.metric import psnr
from olvae.models import on_the_hub
from olvae.models.loading.targets import find_target
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import LOADER_NAME
from tests.conftest import tiny
from tests.models.files import same_weights, training_config
from tests.models.loading.names import hub_folder
from tests.reference import published_names


def test_published_model_is_known_by_its_hub_id(tmp_path, monkeypatch):
    state = {
        name: torch.tensor(0.01 * (k % 7)).expand(shape)  # a single value in the file
        for k, (name, shape) in enumerate(published_names().items())
    }
    folder = hub_folder(tmp_path, monkeypatch, "RGenDiff/olitevaeB_im_f8c12")
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, folder / "olitevae.ckpt")
    # Random weights, which those of the file replace, take a second.
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, **_: weight)
    model = LiteVAE.from_pretrained("RGenDiff/olitevaeB_im_f8c12")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    return hub_folder(tmp_path, monkeypatch, "RGenDiff/tiny")


def test_hub_repository_in_the_cache_is_loaded(cached, tmp_path):
    """With its config; not with one that names other code."""
    model, config = tiny(), training_config(tiny())
    save(config, cached / "some_name.yaml")
    torch.save({"state_dict": model.state_dict()}, cached / "epoch=3.ckpt")
    assert same_weights(LiteVAE.from_pretrained("RGenDiff/tiny"), model)
    assert same_weights(find_target("RGenDiff/tiny").load(), model)
    save_file(model.state_dict(), cached / "weights.safetensors")  # goes before a pickle
    (cached / "epoch=3.ckpt").unlink()
    assert same_weights(LiteVAE.from_pretrained("RGenDiff/tiny", local_files_only=True), model)
    with pytest.raises(FileNotFoundError, match="hub's cache"):
        LiteVAE.from_pretrained(
            "RGenDiff/tiny", local_files_only=True, cache_dir=tmp_path / "elsewhere"
        )
    config["model"]["params"]["encoder_config"]["target"] = "subprocess.run"
    save(config, cached / "some_name.yaml")
    with pytest.raises(ConfigError, match=r"subprocess\.run"):
        LiteVAE.from_pretrained("RGenDiff/tiny")


def test_hub_errors_are_one_line(tmp_path, monkeypatch):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(404, "RevisionNotFound" if "revision/v9" in self.path else "RepoNotFound")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(403 if b"theirs" in body else 401, "RepoNotFound")

        def answer(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    with pytest.raises(FileNotFoundError, match=r"^nobody/nothing: .*such repository"):
        LiteVAE.from_pretrained("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"^a/b@v9: .*such revision"):
        LiteVAE.from_pretrained("a/b", revision="v9")
    with pytest.raises(OSError, match=r"^me/mine: .*HF_TOKEN.* \(401\)$"):
        tiny().push_to_hub("me/mine")
    with pytest.raises(OSError, match=r"^me/theirs: .*HF_TOKEN.* \(403\)$"):
        tiny().push_to_hub("me/theirs")
    server.shutdown()
    server.server_close()
    with pytest.raises(FileNotFoundError, match=r"^nobody/nothing: .*reached") as caught:
        LiteVAE.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"^nobody/nothing: not uploaded"):
        tiny().push_to_hub("nobody/nothing", token="none")


def test_a_download_that_fails_names_its_cause(monkeypatch):
    def failing(error: Exception, cause: Exception | None):
        def download(*_, **__):
            raise error from cause

        monkeypatch.setattr(on_the_hub, "snapshot_download", download)

    failing(LocalEntryNotFoundError("the outer one"), OSError("no route\nand more"))
    with pytest.raises(FileNotFoundError, match=r"^a/b: .*: no route$"):
        on_the_hub.snapshot("a/b", [])
    failing(LocalEntryNotFoundError("the outer one"), None)
    with pytest.raises(FileNotFoundError, match=r": the outer one$"):
        on_the_hub.snapshot("a/b", [])
    failing(RuntimeError("it broke\noff"), None)
    with pytest.raises(OSError, match=r"^a/b: .*: it broke$"):
        on_the_hub.snapshot("a/b", [])


def test_an_export_is_written_into_a_new_folder_and_over_an_old_one(tmp_path):
    written = []
    export = on_the_hub.HubExport(lambda folder: written.append(folder.is_dir()), {"a": 1})
    folder = tmp_path / "new" / "export"
    for _ in range(2):
        export.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text()) == {"a": 1}
    assert written == [True, True]


def test_push_to_hub_uploads_weights_config_and_card(monkeypatch):
    """Through huggingface_hub's mixin, to a hub that takes everything."""

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return huggingface_hub.RepoUrl(
                f"https://huggingface.co/{'' if '/' in repo_id else 'me/'}{repo_id}"
            )

        def upload_folder(self, repo_id, folder_path, commit_message, revision, **_):
            calls.append(
                (
                    "upload",
                    repo_id,
                    sorted(p.name for p in folder_path.iterdir()),
                    commit_message,
                    revision,
                )
            )
            assert same_weights(LiteVAE.from_pretrained(folder_path), model)
            card = huggingface_hub.ModelCard.load(folder_path / "README.md")
            assert {"litevae", "model_hub_mixin"} <= set(card.data.tags)
            assert "arxiv.org/abs/2405.14477" in card.text
            return "https://huggingface.co/me/mine/commit/1"

    calls, model = [], tiny()
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    where = model.push_to_hub(
        "me/mine", private=True, commit_message="First", token="t", branch="b"
    )
    assert where.endswith("commit/1")
    assert calls == [
        ("token", "t"),
        ("create", "me/mine", True, True),
        (
            "upload",
            "me/mine",
            ["README.md", LOADER_NAME, "config.json", WEIGHTS_NAME],
            "First",
            "b",
        ),
    ]
    with pytest.raises(ValueError, match="Repo id"):
        model.push_to_hub("a/b/c")
    del calls[:]
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="non-finite"):
        model.push_to_hub("me/broken")
    assert not calls


@pytest.mark.network
def test_the_published_model_reconstructs_photographs():
    model = LiteVAE.from_pretrained("RGenDiff/olitevaeB_im_f8c12")
    batch = next(iter(SamplePhotographs(size=128, batch_size=8).test_loader()))
    with torch.no_grad():
        reconstruction, _ = model(from_uint8(batch["image"]))
    assert psnr(batch["image"], to_uint8(reconstruction)).mean() > 24
