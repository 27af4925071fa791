import copy
import http.server
import json
import threading
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.config import ConfigError, save
from olvae.data.dataset import SamplePhotographs
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.metrics.metric import psnr
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import LOADER_NAME
from olvae.modules.base import Encoder
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from tests.conftest import tiny, tiny_config
from tests.models.loading.names import hub_folder
from tests.reference import fill, parity_case, published_names


@pytest.fixture(scope="module")
def reference() -> LiteVAE:
    """The reference's small cases as one autoencoder."""
    encoder = fill(LiteVAE_Encoder(**parity_case("encoder_S")["config"]))
    return LiteVAE(encoder, fill(LiteVAE_Decoder(**parity_case("decoder")["config"])))


PER_CHANNEL = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 0.25, 3.0, 8.0]}


def training_config(model: LiteVAE) -> dict:
    """As the published YAML has it."""
    node = {"target": "olvae.models.liteautoencoder.LiteAutoencoderKL"}
    params = {**model.config, "lossconfig": {"target": "torch.nn.Identity"}, "use_ema": False}
    return {"model": {"base_learning_rate": 1e-4, **node, "params": params}}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(t, theirs[name]) for name, t in ours.items()
    )


@pytest.mark.parametrize(
    "form", ["lightning", "safetensors", "averaged", "model_ema", "run", "export"]
)
def test_the_same_weights_through_every_format(reference, form, tmp_path):
    state = reference.state_dict()
    noise = {name: torch.randn_like(t) for name, t in state.items()}
    beside = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(3, 3)}
    config = tmp_path / "config.yaml"
    save(training_config(reference), config)
    path = tmp_path / "model.ckpt"
    match form:
        case "lightning":  # with what Lightning keeps of OmegaConf's and of its own objects
            hparams = OmegaConf.create({"ddconfig": {"ch_mult": [1, 2]}, "lr": "${x}", "x": 1e-4})
            torch.save(
                {"state_dict": state | beside, "epoch": 3, "hyper_parameters": hparams}, path
            )
        case "safetensors":
            path = tmp_path / "model.safetensors"
            save_file(state, path)
        case "averaged":
            torch.save(
                {"state_dict": state, "current_model_state": noise, "averaging_state": {}}, path
            )
        case "model_ema":
            average = {f"model_ema.{name.replace('.', '')}": t for name, t in state.items()}
            torch.save(
                {"state_dict": noise | average | beside | {"model_ema.decay": torch.ones(())}}, path
            )
        case "run":
            (tmp_path / "checkpoints").mkdir()
            torch.save({"state_dict": state | beside}, tmp_path / "checkpoints" / "last.ckpt")
            path = tmp_path
        case "export":
            path = tmp_path / "export"
            reference.save_pretrained(path)
    model = LiteVAE.from_pretrained(path)
    assert not model.training
    assert same_weights(model, reference)
    if form in ("averaged", "model_ema"):
        raw = LiteVAE.from_pretrained(path, raw=True)
        assert all(torch.equal(t, noise[name]) for name, t in raw.state_dict().items())


def test_the_published_model_is_known_by_its_id_of_the_hub(tmp_path, monkeypatch):
    state = {
        name: torch.full(shape, 0.01 * (k % 7))
        for k, (name, shape) in enumerate(published_names().items())
    }
    folder = hub_folder(tmp_path, monkeypatch, "RGenDiff/olitevaeB_im_f8c12")
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, folder / "olitevae.ckpt")
    model = LiteVAE.from_pretrained("RGenDiff/olitevaeB_im_f8c12")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "folded"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_saving_and_loading(dtype, folded, tmp_path):
    model = tiny(use_quant=True).to(dtype)
    model = model.fold() if folded else model
    model.scaling_factor, model.shift_factor = 0.7, -0.25
    model.save_pretrained(tmp_path)
    again = LiteVAE.from_pretrained(tmp_path, dtype=dtype)
    assert same_weights(again, model)
    assert (again.folded, again.scaling_factor, again.shift_factor) == (folded, 0.7, -0.25)
    x = torch.rand(1, 3, 16, 16, dtype=dtype)
    assert torch.equal(again(x)[0], model(x)[0])
    assert {t.dtype for t in LiteVAE.from_pretrained(tmp_path).parameters()} == {torch.float32}
    compiled = copy.deepcopy(again)
    compiled.encoder = torch.compile(compiled.encoder)  # which renames its tensors
    compiled.save_pretrained(tmp_path / "compiled")
    assert (
        LiteVAE.from_pretrained(tmp_path / "compiled").state_dict().keys()
        == again.state_dict().keys()
    )
    again.save_pretrained(tmp_path / "twice")
    for file in (WEIGHTS_NAME, "config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_where_the_config_is_found(tmp_path):
    model = tiny()
    files = {
        "checkpoints/step=2.ckpt": "config.yaml",
        "a/model.ckpt": "a/model.yaml",
        "b/model.pt": "b/published.yml",
    }
    for weights, config in files.items():
        (tmp_path / weights).parent.mkdir()
        torch.save(model.state_dict(), tmp_path / weights)
        with pytest.raises(ConfigError, match=r"no config beside the weights"):
            LiteVAE.from_pretrained(tmp_path / weights)
        save(training_config(model), tmp_path / config)
        assert same_weights(LiteVAE.from_pretrained((tmp_path / weights).parent), model)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config.json: not readable as JSON: .*"):
        LiteVAE.from_pretrained(tmp_path / "checkpoints" / "step=2.ckpt")


# Weights that do not fit


def test_weights_of_another_model(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS_NAME)
    missing, misshapen, *_ = state
    del state[missing]
    state[misshapen] = torch.zeros(2, 2)
    state["decoder.extra"] = torch.zeros(1)
    save_file(state, tmp_path / WEIGHTS_NAME)
    listed = rf"1 missing \({missing}\); 1 unexpected \(decoder.extra\); 1 of another shape \({misshapen} 2x2 for"
    with pytest.raises(ValueError, match=listed):
        LiteVAE.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=listed):
        loaded = LiteVAE.from_pretrained(tmp_path, allow_mismatch=True)
    own = loaded.state_dict()
    assert all(
        torch.equal(own[name], t)
        for name, t in state.items()
        if name not in ("decoder.extra", misshapen)
    )
    save_file({"encoder.other": torch.zeros(1)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"of another model"):  # nothing fits: not even on request
        LiteVAE.from_pretrained(tmp_path, allow_mismatch=True)


def test_broken_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    save(training_config(model), tmp_path / "config.yaml")
    state = model.state_dict()
    save_file(state, "whole.safetensors")
    whole = Path("whole.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file(
        state | {"encoder.aggregator.conv_out.bias": torch.full((8,), torch.nan)}, "nan.safetensors"
    )
    save_file(
        state | {"encoder.aggregator.conv_out.bias": torch.ones(8, dtype=torch.int8)},
        "int8.safetensors",
    )
    torch.save({"fc.weight": torch.zeros(3)}, "other.ckpt")
    torch.save({"state_dict": 3}, "three.ckpt")
    torch.save([1, 2], "list.ckpt")
    for file, message in {
        "cut.safetensors": "not a readable safetensors file",
        "nan.safetensors": r"1 of its tensors .* non-finite values in float32 \(encoder.aggregator.conv_out.bias",
        "int8.safetensors": r"1 of its tensors are int8, quantised perhaps \(encoder.aggregator.conv_out.bias",
        "other.ckpt": "no autoencoder in it",
        "three.ckpt": "its state_dict is a int",
        "list.ckpt": "but a list",
        "config.yaml": "not a file of weights",
    }.items():
        with pytest.raises(ValueError, match=f"^{file}: .*{message}") as caught:
            LiteVAE.from_pretrained(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [LiteVAE, AutoencoderLiteVAE])
@pytest.mark.parametrize("key", ["encoder_config", "decoder_config"])
def test_a_module_that_a_received_config_names_is_not_imported(tmp_path, monkeypatch, kind, key):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    module = f"came_along_{kind.__name__}_{key}"  # another each time: a module is only run when it is imported first
    Path(f"{module}.py").write_text(
        "from pathlib import Path; Path('harmed').touch()\nclass Network: pass\n"
    )
    tiny().save_pretrained(tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    content = json.loads(file.read_text())
    content[key]["target"] = f"{module}.Network"
    file.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=rf"{key}.target: {module}.Network is not a network of this package"
    ):
        kind.from_pretrained(tmp_path / "export")
    assert not Path("harmed").exists()


class OwnEncoder(Encoder):
    def __init__(self, latent_dim: int = 8) -> None:
        super().__init__(latent_dim, in_channels=3, downscale=8, image_size=64)
        self.conv = torch.nn.Conv2d(3, latent_dim, 8, stride=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder_config.target": "os.system"},
            "encoder_config.target: os.system is not a network of this package",
        ),
        (
            {"encoder_config.target": "olvae.training.run.train"},
            "is not a kind of olvae.modules.base.Encoder",
        ),
        (
            {"encoder_config": {"target": "olvae.runs.Run", "params": {"path": "x"}}},
            "olvae.runs.Run is not a kind of",
        ),
        (
            {"decoder_config.params.chanels": 3},
            "decoder_config.params.chanels: unknown key; did you mean channels",
        ),
        ({"embed_dims": 4}, "embed_dims: unknown key; did you mean embed_dim"),
        ({"embed_dim": "four"}, "embed_dim: expected int, got 'four'"),
        ({"scaling_factor": 0}, "scaling_factor: expected a number above 0, got 0"),
        ({"shift_factor": float("nan")}, "shift_factor: expected a number, got nan"),
        (
            {**PER_CHANNEL, "latents_mean": [0, 1, 2]},
            r"latents_mean: expected 4 numbers, one per channel, got \[0, 1, 2\]",
        ),
        (
            {**PER_CHANNEL, "latents_std": [1, 2, 3, 0]},
            "latents_std: expected 4 numbers above 0, one per channel",
        ),
        (
            {**PER_CHANNEL, "latents_mean": ["a", 1, 2, 3]},
            "latents_mean: expected Sequence.*, got ",
        ),
        ({**PER_CHANNEL, "latents_std": None}, "latents_mean, latents_std: give both, or neither"),
        (
            {"decoder_config.params.channels": -4},
            "no autoencoder can be built of this: channels must be at least 1",
        ),
        (
            {"decoder_config.params.channels": 10**20},
            "decoder_config.params.channels: more than 65536",
        ),
        (
            {"decoder_config.params.num_res_blocks": 10**9},
            "decoder_config.params.num_res_blocks: more than 24",
        ),
        ({"decoder_config.params.channel_mult": [1] * 1000}, "channel_mult: more than 10 entries"),
        (
            {"encoder_config.params.image_size": 30},
            "no autoencoder can be built of this: image_size 30 is not a mul",
        ),
        (
            {"_class_name": "AutoencoderKL"},
            "the config of diffusers' AutoencoderKL.* diffusers:FOLDER",
        ),
    ],
)
def test_configs_with_mistakes(change, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        *path, last = key.split(".")
        node = content
        for part in path:
            node = node[part]
        node[last] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"config.json: .*{message}") as caught:
        LiteVAE.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_networks_of_ones_own(tmp_path):
    decoder = tiny().decoder
    model = LiteVAE(OwnEncoder(), decoder)
    with pytest.raises(ValueError, match=r"OwnEncoder is a network of your own"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    save(training_config(model), tmp_path / "model.yaml")
    with pytest.raises(
        ConfigError, match=r"OwnEncoder is not a network of this package"
    ):  # a file that came along
        LiteVAE.from_pretrained(tmp_path / "model.ckpt")
    own = LiteVAE.from_pretrained(
        tmp_path / "model.ckpt", config=tmp_path / "model.yaml"
    )  # a file one names
    assert same_weights(own, model)


def test_folders_that_hold_none_or_several(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a run folder"):
        LiteVAE.from_pretrained(tmp_path)
    model = tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / f".partial-0123abcd-{WEIGHTS_NAME}").write_bytes(
        b"half of a file"
    )  # of a save that was killed
    (
        tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    ).touch()  # as diffusers' repositories keep it
    assert same_weights(LiteVAE.from_pretrained(tmp_path), model)
    (tmp_path / "second.safetensors").touch()
    several = (
        r"several files of weights \(diffusion_pytorch_model.safetensors, second.safetensors\): "
    )
    with pytest.raises(FileNotFoundError, match=f"{several}name one of them"):
        LiteVAE.from_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").touch()
    with pytest.raises(FileNotFoundError, match=f"{several}save them as one"):
        LiteVAE.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\(empty\): no such file or folder"):
        LiteVAE.from_pretrained("")
    with pytest.raises(
        FileNotFoundError, match=r"no such file or folder, and not an id of the hub"
    ):
        LiteVAE.from_pretrained(tmp_path / "missing")


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    return hub_folder(tmp_path, monkeypatch, "RGenDiff/tiny")


def test_a_repository_in_the_cache(cached, tmp_path):
    """With its config; not with one that names other code."""
    model, config = tiny(), training_config(tiny())
    save(config, cached / "some_name.yaml")
    torch.save({"state_dict": model.state_dict()}, cached / "epoch=3.ckpt")
    assert same_weights(LiteVAE.from_pretrained("RGenDiff/tiny"), model)
    save_file(model.state_dict(), cached / "weights.safetensors")  # goes before a pickle
    (cached / "epoch=3.ckpt").unlink()
    assert same_weights(LiteVAE.from_pretrained("RGenDiff/tiny", local_files_only=True), model)
    with pytest.raises(FileNotFoundError, match="not in the hub's cache"):
        LiteVAE.from_pretrained(
            "RGenDiff/tiny", local_files_only=True, cache_dir=tmp_path / "elsewhere"
        )
    config["model"]["params"]["encoder_config"]["target"] = "subprocess.run"
    save(config, cached / "some_name.yaml")
    with pytest.raises(
        ConfigError, match=r"subprocess.run is not a network of this package: refused"
    ):
        LiteVAE.from_pretrained("RGenDiff/tiny")


def test_the_hub_says_no(tmp_path, monkeypatch):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(404, "RevisionNotFound" if "revision/v9" in self.path else "RepoNotFound")

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(401, "RepoNotFound")

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
    with pytest.raises(
        FileNotFoundError, match=r"^nobody/nothing: .*no such repository on the hub"
    ):
        LiteVAE.from_pretrained("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"^a/b@v9: the repository has no such revision"):
        LiteVAE.from_pretrained("a/b", revision="v9")
    with pytest.raises(
        OSError, match=r"^me/mine: not uploaded: .* set HF_TOKEN, or run hf auth login \(401\)$"
    ):
        tiny().push_to_hub("me/mine")
    server.shutdown()
    server.server_close()
    with pytest.raises(
        FileNotFoundError, match=r"^nobody/nothing: .*the hub can't be reached"
    ) as caught:
        LiteVAE.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"^nobody/nothing: not uploaded"):
        tiny().push_to_hub("nobody/nothing", token="none")


def test_pushing(monkeypatch):
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
    with pytest.raises(ValueError, match=r"Repo id must be in the form"):
        model.push_to_hub("a/b/c")
    del calls[:]
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="non-finite"):
        model.push_to_hub("me/broken")
    assert not calls


def test_saving_that_fails_half_way_keeps_the_config(tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("olvae.models.weight_files.write_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_config_is_a_copy(tmp_path):
    widths = [1, 2]
    params = tiny_config()["model"]["params"]
    params["encoder_config"]["params"]["aggregate_mult"] = widths
    model = LiteVAE.from_config(
        **{name: params[name] for name in ("encoder_config", "decoder_config", "embed_dim")}
    )
    config = model.config
    config["encoder_config"]["params"]["wavelet"], widths[1] = "db2", 3
    model.save_pretrained(tmp_path)
    assert same_weights(LiteVAE.from_pretrained(tmp_path), model)
    assert LiteVAE.from_pretrained(tmp_path).config == model.config != config


def test_weights_too_large_for_a_dtype_are_refused(tmp_path):
    model = tiny()
    next(model.decoder.parameters()).data[0] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"1 of its tensors have non-finite values in float16 \(decoder\."
    ):
        LiteVAE.from_pretrained(tmp_path, dtype=torch.float16)


def test_raw_weights_of_an_export_are_told_that_there_are_none(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="an export has one kind of weights: `raw` is ignored"):
        LiteVAE.from_pretrained(tmp_path, raw=True)


def test_saving_twice_keeps_the_card_and_a_refusal_keeps_all(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert "litevae" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before["README.md"] == b"mine"
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.network
def test_the_published_model_reconstructs_photographs():
    model = LiteVAE.from_pretrained("RGenDiff/olitevaeB_im_f8c12")
    batch = next(iter(SamplePhotographs(size=128, batch_size=8).test_loader()))
    with torch.no_grad():
        reconstruction, _ = model(from_uint8(batch["image"]))
    assert psnr(batch["image"], to_uint8(reconstruction)).mean() > 24


FACTORS = {"scaling_factor": 0.5, "shift_factor": 0.25, "force_upcast": True, **PER_CHANNEL}


def test_what_a_diffusion_model_has_to_know_through_every_format(tmp_path):
    """config.json, diffusers' class and its files, a training config; and numbers from a config that are integers."""
    model = tiny().set_for_diffusion(FACTORS)
    model.save_pretrained(tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: content[name] for name in FACTORS} == FACTORS
    theirs = AutoencoderLiteVAE.from_pretrained(tmp_path / "ours")
    assert {name: theirs.config[name] for name in FACTORS} == FACTORS
    theirs.save_pretrained(tmp_path / "theirs")
    again = LiteVAE.from_pretrained(tmp_path / "theirs")
    assert again.for_diffusion == FACTORS
    assert again.fold().for_diffusion == FACTORS
    assert AutoencoderLiteVAE.from_autoencoder(again).autoencoder.for_diffusion == FACTORS

    config = training_config(model)
    config["model"]["params"] |= {
        "scaling_factor": 1,
        "latents_mean": [0, 1, 2, 3],
        "latents_std": [1, 2, 3, 4],
    }
    save(config, tmp_path / "tiny.yaml")
    torch.save(model.state_dict(), tmp_path / "tiny.ckpt")
    found = LiteVAE.from_pretrained(tmp_path / "tiny.ckpt").for_diffusion
    assert found["latents_std"] == [1.0, 2.0, 3.0, 4.0]
    assert all(
        isinstance(value, float) for value in (found["scaling_factor"], *found["latents_mean"])
    )


def test_by_default_there_is_nothing_to_know(tmp_path):
    defaults = dict.fromkeys(FACTORS) | {
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "force_upcast": False,
    }
    model = tiny()
    assert model.for_diffusion == defaults
    z = torch.randn(2, 4, 2, 2)
    assert torch.equal(model.from_diffusion(z), z)
    config = training_config(model)
    config["model"]["params"] |= dict.fromkeys(FACTORS)  # as a training config may say
    save(config, tmp_path / "tiny.yaml")
    torch.save(model.state_dict(), tmp_path / "tiny.ckpt")
    found = LiteVAE.from_pretrained(tmp_path / "tiny.ckpt")
    assert found.for_diffusion == defaults
    assert found.set_for_diffusion(PER_CHANNEL).for_diffusion == {**defaults, **PER_CHANNEL}
    assert tiny().for_diffusion == defaults  # one's own, not the class's


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("load", [LiteVAE.from_pretrained, AutoencoderLiteVAE.from_pretrained])
def test_a_flipped_bit_of_an_export_is_seen(load, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    for write in (
        model.save_pretrained,
        AutoencoderLiteVAE.from_autoencoder(model).save_pretrained,
    ):
        write(tmp_path)
        load(tmp_path)
        flip(tmp_path / WEIGHTS_NAME, -3)
        with pytest.raises(
            ValueError, match=r"safetensors: damaged: its SHA-256 is not the one in its head"
        ) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    save_file(
        model.state_dict(), tmp_path / WEIGHTS_NAME, metadata={"format": "pt"}
    )  # of somebody else: no checksum
    load(tmp_path)


def test_a_received_config_builds_no_more_than_its_weights_have(tmp_path):
    """Nor takes long to say so: 9,000 channels would be 20 GB."""
    tiny().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["decoder_config"]["params"]["channels"] = 9000
    (tmp_path / "config.json").write_text(json.dumps(content))
    for kind in (LiteVAE, AutoencoderLiteVAE):
        with pytest.raises(ConfigError, match=r"too large: [\d,]+ parameters$"):
            kind.from_pretrained(tmp_path)


def test_a_received_yaml_is_read_as_it_is(tmp_path):
    """Without what it includes, without variables of the environment, and without aliases, which may repeat."""
    model = tiny()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "other.yaml").write_text("model: {}\n")
    config = tmp_path / "model.yaml"
    save(training_config(model), config)
    assert same_weights(LiteVAE.from_pretrained(tmp_path / "model.safetensors"), model)
    text = config.read_text()
    config.write_text(text.replace("embed_dim: 4", "embed_dim: ${oc.env:HOME}"))
    with pytest.raises(ConfigError, match=r"embed_dim: expected int, got '\$\{oc.env:HOME\}'"):
        LiteVAE.from_pretrained(tmp_path / "model.safetensors")
    config.write_text("include: other.yaml\n")
    with pytest.raises(ConfigError, match="include: unknown key"):
        LiteVAE.from_pretrained(tmp_path / "model.safetensors")
    config.write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(ConfigError, match="YAML aliases, which may repeat without limit: refused"):
        LiteVAE.from_pretrained(tmp_path / "model.safetensors")
