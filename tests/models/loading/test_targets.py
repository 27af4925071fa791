import sys
import zipfile
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from olvae import LiteVAE, checkpoint
from olvae.config import ConfigError, save
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.targets import find_target, name_apart
from olvae.models.target_names import check_target
from tests.conftest import tiny, tiny_config
from tests.models.autoencoder_kl import autoencoder_kl
from tests.models.loading.classes import make
from tests.models.loading.names import hub_folder, latent_diffusion_names

kl = partial(autoencoder_kl, (32, 32, 64))


def taesd() -> diffusers.AutoencoderTiny:
    return make("AutoencoderTiny")


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 32, 40) * 2 - 1


@pytest.fixture
def make_run(tmp_path):
    def make(name: str = "2026-01-31T12-00-00_tiny_test_32") -> Path:
        config = tiny_config()
        model = LiteAutoencoderKL(**config["model"]["params"])
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        raw = {key: t + 1 for key, t in model.state_dict().items()}
        torch.save(
            {"state_dict": model.state_dict(), "current_model_state": raw},
            run / "checkpoints" / "last.ckpt",
        )
        save({**config, "run": {"seed": 3}}, run / "config.yaml")
        return run

    return make


def test_a_run_its_checkpoint_and_its_export_are_the_same_model(make_run, image):
    run = make_run()
    target, export = find_target(run), run.parent / "export"
    assert target.name == run.name
    assert target.config["data"]["params"]["size"] == 16
    assert target.run.metrics == run / "metrics.json"
    target.load().save_pretrained(export)
    expected = target.load()(image)[0]
    for other in (run / "checkpoints" / "last.ckpt", export):
        found = find_target(other)
        assert found.run is None
        assert torch.equal(found.load()(image)[0], expected)
    assert (find_target(export).name, find_target(export).config) == ("export", {})
    untrained = target.untrained()
    assert not untrained.training
    torch.manual_seed(3)  # the run's
    expected = tiny().state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in untrained.state_dict().items())


def test_raw_weights(make_run):
    run = make_run()
    averaged, raw = find_target(run), find_target(run, raw=True)
    assert (raw.name, raw.raw) == (f"{run.name}, raw weights", True)
    weights = raw.load().state_dict()
    assert all(
        torch.equal(weights[name], tensor + 1)
        for name, tensor in averaged.load().state_dict().items()
    )
    averaged.load().save_pretrained(run.parent / "export")
    kl().save_pretrained(run.parent / "kl")
    for place, name in (
        (run.parent / "export", "export"),
        (f"diffusers:{run.parent / 'kl'}", None),
    ):
        with pytest.warns(UserWarning, match=r"one kind of weights: `raw` is ignored"):
            found = find_target(place, raw=True)
        assert (found.name, found.given, found.raw) == (name or place, str(place), False)


def test_the_config_by_the_runs_name(make_run, tmp_path):
    run = make_run()
    (run / "config.yaml").unlink()
    base = tmp_path / "configs"
    (base / "imagenet").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=f"one config {run.name}.yaml or tiny_test.yaml, found none"
    ):
        find_target(run, config_base=base)
    save(tiny_config(), base / "imagenet" / "tiny_test.yaml")
    assert find_target(run, config_base=base).config == tiny_config()
    assert find_target(run / "checkpoints" / "last.ckpt", config_base=base).config == tiny_config()
    own = tiny_config(use_ema=True)
    save(own, base / f"{run.name}.yaml")
    assert find_target(run, config_base=base).config == own
    save(own, base / "imagenet" / f"{run.name}.yaml")
    with pytest.raises(ConfigError, match=f"{run.name}.yaml, .*{run.name}.yaml: name it"):
        find_target(run, config_base=base)


def test_mistakes_of_a_runs_config_are_told(make_run):
    run = make_run()
    config = tiny_config()
    config["data"]["params"]["sise"] = 16
    save(config, run / "config.yaml")
    with pytest.raises(ConfigError, match=r"data.params.sise: unknown key; did you mean size"):
        find_target(run)


def test_names_are_told_apart(make_run, tmp_path):
    run = make_run()
    paths = [run, tmp_path / "a" / "export", tmp_path / "b" / "export", run, run]
    for path in paths[1:3]:
        find_target(run).load().save_pretrained(path)
    names = [target.name for target in name_apart([find_target(path) for path in paths])]
    assert names == [f"{run} (1)", str(paths[1]), str(paths[2]), f"{run} (2)", f"{run} (3)"]
    apart = name_apart([find_target(run), find_target(run, raw=True)])
    assert [target.name for target in apart] == [run.name, f"{run.name}, raw weights"]


def test_a_config_that_came_along_builds_no_data(make_run, tmp_path, image):
    """The config of a run or of --config is the user's own; one beside received weights builds our networks only."""
    run = make_run()
    received = tmp_path / "received"
    (run / "checkpoints" / "last.ckpt").rename(tmp_path / "model.ckpt")
    received.mkdir()
    (tmp_path / "model.ckpt").rename(received / "model.ckpt")
    config = tiny_config()
    config["data"] = {"target": "os.system", "params": {"command": "touch harmed"}}
    save(config, received / "model.yaml")
    assert find_target(received / "model.ckpt").config == {}
    assert find_target(received).config == {}
    named = find_target(received / "model.ckpt", config=run / "config.yaml")
    assert named.config["data"] == tiny_config()["data"]
    assert torch.equal(named.load()(image)[0], find_target(received).load()(image)[0])
    (tmp_path / "mistaken.yaml").write_text(
        (received / "model.yaml").read_text().replace("command", "comand")
    )
    with pytest.raises(ConfigError, match=r"data.params.comand"):
        find_target(received / "model.ckpt", config=tmp_path / "mistaken.yaml")


def test_pipelines_and_subfolders(make_run, tmp_path, image, usual_probe, monkeypatch):
    monkeypatch.setattr("olvae.models.loading.from_diffusers.PROBE", usual_probe)
    model = kl()
    model.save_pretrained(tmp_path / "vae")
    taesd().save_pretrained(tmp_path / "taesd")
    assert find_target(f"diffusers:{tmp_path}::taesd").load().encode(image).deterministic
    for place in (
        f"diffusers:{tmp_path}",
        tmp_path,
        tmp_path / "vae",
    ):  # without diffusers: before it, too
        assert torch.equal(find_target(place).load()(image)[0], model(image).sample)
        assert not torch.equal(find_target(place).untrained()(image)[0], model(image).sample)
    with pytest.raises(FileNotFoundError, match=r"config.json not found in it: name the subfolder"):
        find_target(f"diffusers:{tmp_path}::missing")
    with pytest.raises(ValueError, match=r"weights of a diffusers autoencoder"):
        find_target(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    ours = find_target(make_run()).load()
    ours.save_pretrained(tmp_path / "pipeline" / "vae")
    found = find_target(f"diffusers:{tmp_path / 'pipeline'}")
    assert found.name == f"diffusers:{tmp_path / 'pipeline'}"
    assert torch.equal(found.load()(image)[0], ours(image)[0])


def test_diffusers_of_the_hub(tmp_path, monkeypatch, image):
    model = kl()
    model.save_pretrained(hub_folder(tmp_path, monkeypatch, "some/pipeline") / "vae")
    assert torch.equal(find_target("diffusers:some/pipeline").load()(image)[0], model(image).sample)
    with pytest.raises(
        FileNotFoundError, match=r"pipeline::unet: config.json not found in it: name the subfolder"
    ):
        find_target("diffusers:some/pipeline::unet")
    with pytest.raises(FileNotFoundError, match=r"some/other: .*hub can't be reached"):
        find_target("diffusers:some/other")


def test_what_is_no_autoencoder_of_diffusers(tmp_path):
    for content, message in (
        ('{"_class_name": "UNet2DModel"}', "UNet2DModel is not an autoencoder"),
        (
            '{"_class_name": "AutoencoderNovel"}',
            "AutoencoderNovel is not an autoencoder of diffusers",
        ),
        ("{", "has no _class_name"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            find_target(f"diffusers:{tmp_path}").load()
    kl().save_pretrained(tmp_path / "vae")  # beside a config.json of something else
    assert find_target(f"diffusers:{tmp_path}").load().downscale == 2 ** (
        len(kl().config.block_out_channels) - 1
    )
    with pytest.raises(FileNotFoundError, match=r"diffusers:nothing here: no such folder"):
        find_target("diffusers:nothing here")


def test_weights_of_diffusers_that_do_not_fit(tmp_path):
    kl().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    first, second, *_ = state
    save_file({name: t for name, t in state.items() if name != first}, file)
    with pytest.raises(
        ValueError, match=rf"of another model than its config.json: 1 missing \({first}"
    ):
        find_target(f"diffusers:{tmp_path}").load()
    save_file({**state, second: torch.zeros(3), "more": torch.zeros(1)}, file)
    listed = rf"1 unexpected \(more\); 1 of another shape \({second} \(3,\) for \("
    with pytest.raises(
        ValueError, match=rf"of another model than its config.json: {listed}"
    ) as caught:
        find_target(f"diffusers:{tmp_path}").load()
    assert "\n" not in str(caught.value)
    save_file({**state, second: torch.full_like(state[second], torch.nan)}, file)
    with pytest.raises(ValueError, match=rf"non-finite values \({second}"):
        find_target(f"diffusers:{tmp_path}").load()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"not a readable AutoencoderKL") as caught:
        find_target(f"diffusers:{tmp_path}").load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "prefix", "changes"),
    [
        ("kl.ckpt", "first_stage_model.", {}),
        ("checkpoints/kl.safetensors", "", {}),  # as ComfyUI's folder, which is no run's
        (
            "ae.safetensors",
            "",
            {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
        ),  # FLUX's
    ],
)
def test_latent_diffusion(file, prefix, changes, tmp_path, image):
    model, path = kl(**changes), tmp_path / file
    state = {prefix + name: tensor for name, tensor in latent_diffusion_names(model).items()}
    assert f"{prefix}encoder.down.1.block.0.conv1.weight" in state
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(2)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 3}, path)
    else:
        save_file(state, path)
    target = find_target(path)
    assert target.name == str(path)
    found = target.load()
    assert (found.downscale, found.latent_channels) == (4, model.config.latent_channels)
    with torch.no_grad():
        assert torch.equal(found(image)[0], model(image).sample)
    assert not torch.equal(target.untrained()(image)[0], model(image).sample)


def test_latent_diffusion_that_does_not_fit(tmp_path):
    state = latent_diffusion_names(kl())
    for change, message in (
        ({"quantize.embedding.weight": torch.zeros(3, 4)}, "vector-quantised"),
        ({"encoder.down.2.attn.0.norm.weight": torch.zeros(64)}, "attention outside the middle"),
        (
            {"post_quant_conv.weight": torch.zeros(4, 3, 1, 1)},
            "its latent has 3 channels, the decoder takes 4",
        ),
        (
            {"encoder.extra.weight": torch.zeros(1)},
            "1 of its tensors have no place in AutoencoderKL",
        ),
        ({"encoder.mid.block_1.conv1.weight": torch.zeros(1)}, "1 of another shape"),
        ({"encoder.conv_out.bias": torch.full((8,), torch.nan)}, "non-finite"),
        ({"encoder.conv_out.weight": None}, "without encoder.conv_out.weight"),
        ({"encoder.conv_out.bias": None}, r"1 missing \(encoder.conv_out.bias\)"),
    ):
        changed = {
            name: tensor for name, tensor in {**state, **change}.items() if tensor is not None
        }
        save_file(changed, tmp_path / "kl.safetensors")
        with pytest.raises(ValueError, match=message) as caught:
            find_target(tmp_path / "kl.safetensors").load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["run", "export", "latent-diffusion"])
def test_a_file_is_checked_once_for_each_load(make_run, tmp_path, monkeypatch, kind, image):
    run, passes = make_run(), []
    for module, name in ((zipfile.ZipFile, "testzip"), (checkpoint, "tensors_sum")):
        check = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, check=check: passes.append(args) or check(*args)
        )
    path = {"run": run, "export": tmp_path / "export"}.get(kind, tmp_path / "model.ckpt")
    if kind == "export":
        LiteVAE.from_pretrained(run).save_pretrained(path)
    elif kind == "latent-diffusion":
        torch.save({"state_dict": latent_diffusion_names(kl())}, path)
    passes.clear()
    target = find_target(path)
    target.untrained()
    assert passes == []
    first, again = target.load(), target.load()
    assert len(passes) == 2
    assert torch.equal(first(image)[0], again(image)[0])


TOY = """
import torch
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.loader import Loader, Target
from olvae.modules.distributions import Deterministic

class Mean(Autoencoder):
    in_channels, latent_channels = 3, 3

    def __init__(self, f):
        super().__init__()
        self.downscale, self.weight = f, torch.nn.Parameter(torch.ones(()))

    def encode(self, x):
        return Deterministic(self.weight * torch.nn.functional.avg_pool2d(x, self.downscale))

    def decode(self, z):
        return torch.nn.functional.interpolate(z, scale_factor=self.downscale)

class MeanLoader(Loader):
    def accepts(self, text):
        return text.isdigit()

    def find(self, text, options):
        return Target(lambda: Mean(int(text)))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch) -> str:
    (tmp_path / "toy_loader.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_loader", raising=False)
    return "toy_loader.MeanLoader"


def test_a_loader_from_outside(toy, image):
    target = find_target(f"{toy}:4")
    assert target.name == target.given == f"{toy}:4"
    check_target(
        f"{toy}:4"
    )  # before torch is imported, a command asks whether there is such a target
    assert target.load().encode(image).mean.shape == (1, 3, 8, 10)
    assert target.load().image_size == 256
    with pytest.raises(ConfigError, match=r"MeanLoader:4: can't be built without its weights"):
        target.untrained()
    with pytest.raises(FileNotFoundError, match=r"MeanLoader:four: not found; a target is"):
        find_target(f"{toy}:four")
    with pytest.raises(
        ConfigError, match=r"toy_loader.Mean is not a kind of olvae.models.loading.loader.Loader"
    ):
        find_target("toy_loader.Mean:4")
    with pytest.raises(ConfigError, match=r"toy_loader.MeanLoder"):
        find_target("toy_loader.MeanLoder:4")


def test_what_is_no_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"^missing: not found; a target is a run folder, .* diffusers:"
    ):
        find_target("missing")
    Path("notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt: not a file of weights"):
        find_target("notes.txt")
