import zipfile
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
import yaml

from olvae import LiteVAE, checkpoint
from olvae.config import ConfigError, save, validate
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading import targets
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.loading.targets import (
    CheckpointLoader,
    PackageAndHubLoader,
    find_run_config,
    find_target,
    find_without_options,
    name_apart,
)
from olvae.models.weight_files import OR_CONFIG
from tests.conftest import tiny, tiny_config
from tests.models.autoencoder_kl import autoencoder_kl
from tests.models.loading.classes import make
from tests.models.loading.names import latent_diffusion_names

kl = partial(autoencoder_kl, (32, 32), layers_per_block=1)


def taesd() -> diffusers.AutoencoderTiny:
    return make("AutoencoderTiny")


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


def test_a_run_its_checkpoint_and_its_export_are_the_same_model(make_run, image, monkeypatch):
    run = make_run()
    target, export = find_target(run), run.parent / "export"
    assert target.name == run.name
    assert target.config["data"]["params"]["size"] == 16
    assert target.run.metrics == run / "metrics.json"
    target.load().save_pretrained(export)
    expected = target.load()(image)[0]
    # Neither is read to find it.
    monkeypatch.setattr(targets, "read_checkpoint", None)
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


def test_a_finished_run_may_have_settings_of_a_trainer_that_are_refused_today(make_run):
    run = make_run()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["lightning"] = {"trainer": {"check_val_every_n_epoch": 2, "plugins": []}}
    assert len(validate(config)) == 2
    save(config, run / "config.yaml")
    assert find_target(run).config["lightning"] == config["lightning"]


def test_raw_weights_of_a_target(make_run):
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
        with pytest.warns(UserWarning, match="`raw` "):
            found = find_target(place, raw=True)
        assert (found.name, found.given, found.raw) == (name or place, str(place), False)
    with pytest.warns(UserWarning, match="`raw` ") as warned:
        CheckpointLoader().find(str(run.parent / "export"), LoadOptions(raw=True))
    assert [warning.filename for warning in warned] == [__file__]


def test_config_is_found_by_the_runs_name(make_run, tmp_path):
    run = make_run()
    (run / "config.yaml").unlink()
    base = tmp_path / "configs"
    (base / "imagenet").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{run.name}\.yaml or tiny_test\.yaml"):
        find_target(run, config_base=base)
    save(tiny_config(), base / "imagenet" / "tiny_test.yaml")
    assert find_target(run, config_base=base).config == tiny_config()
    assert find_target(run / "checkpoints" / "last.ckpt", config_base=base).config == tiny_config()
    own = tiny_config(use_ema=True)
    save(own, base / f"{run.name}.yaml")
    assert find_target(run, config_base=base).config == own
    save(own, base / "imagenet" / f"{run.name}.yaml")
    with pytest.raises(ConfigError, match=rf"{run.name}.yaml, .*{run.name}.yaml: name it"):
        find_target(run, config_base=base)


def test_mistakes_of_a_runs_config_are_told(make_run):
    run = make_run()
    config = tiny_config()
    config["data"]["params"]["sise"] = 16
    save(config, run / "config.yaml")
    with pytest.raises(ConfigError, match=r"data\.params\.sise: .* size"):
        find_target(run)


def test_names_of_targets_are_told_apart(make_run, tmp_path):
    run = make_run()
    paths = [run, tmp_path / "a" / "export", tmp_path / "b" / "export", run, run]
    for path in paths[1:3]:
        find_target(run).load().save_pretrained(path)
    names = [target.name for target in name_apart([find_target(path) for path in paths])]
    assert names == [f"{run} (1)", str(paths[1]), str(paths[2]), f"{run} (2)", f"{run} (3)"]
    apart = name_apart([find_target(run), find_target(run, raw=True)])
    assert [target.name for target in apart] == [run.name, f"{run.name}, raw weights"]


def test_a_config_that_came_along_builds_no_data(make_run, tmp_path, image):
    """The config of a run or of --config is the user's own;
    one beside received weights builds our networks only.
    """
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


def test_targets_in_pipelines_and_subfolders(make_run, tmp_path, image, usual_probe, monkeypatch):
    monkeypatch.setattr("olvae.models.loading.from_diffusers.PROBE", usual_probe)
    model = kl()
    model.save_pretrained(tmp_path / "vae")
    taesd().save_pretrained(tmp_path / "taesd")
    assert find_target(f"diffusers:{tmp_path}::taesd").load().encode(image).deterministic
    # Without diffusers: before it, too.
    for place in (
        f"diffusers:{tmp_path}",
        tmp_path,
        tmp_path / "vae",
    ):
        assert torch.equal(find_target(place).load()(image)[0], model(image).sample)
        assert not torch.equal(find_target(place).untrained()(image)[0], model(image).sample)
    with pytest.raises(FileNotFoundError, match=r"config.json not found"):
        find_target(f"diffusers:{tmp_path}::missing")
    with pytest.raises(ValueError, match="diffusers autoencoder"):
        find_target(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    ours = find_target(make_run()).load()
    ours.save_pretrained(tmp_path / "pipeline" / "vae")
    found = find_target(f"diffusers:{tmp_path / 'pipeline'}")
    assert found.name == f"diffusers:{tmp_path / 'pipeline'}"
    assert torch.equal(found.load()(image)[0], ours(image)[0])


@pytest.mark.parametrize("kind", ["run", "export", "file", "latent-diffusion"])
def test_checksums_of_a_file_are_checked_once_for_each_load(
    make_run, tmp_path, monkeypatch, kind, image
):
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
    elif kind == "file":
        torch.save(LiteVAE.from_pretrained(run).state_dict(), path)
        save(tiny_config(), tmp_path / "model.yaml")
    passes.clear()
    target = find_target(path)
    target.untrained()
    assert passes == []
    first, again = target.load(), target.load()
    assert len(passes) == 2
    assert torch.equal(first(image)[0], again(image)[0])


def test_unknown_targets_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^missing: .* diffusers:"):
        find_target("missing")
    Path("notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: "):
        find_target("notes.txt")


def test_a_model_of_the_package_without_its_prefix():
    with pytest.raises(FileNotFoundError, match=r"^photos-f8c12: .*olvae:photos-f8c12\?$"):
        find_target("photos-f8c12")


def test_a_target_has_one_config_or_a_folder_of_them(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"`config`.*`config_base`"):
        find_target(make_run(), config=tmp_path / "a.yaml", config_base=tmp_path)


@pytest.mark.parametrize("half", ["encoder", "decoder", None])
def test_a_half_that_was_never_trained_is_warned_of(make_run, recwarn, half):
    run = make_run()
    save({**tiny_config(), "run": {"untrained": half}}, run / "config.yaml")
    CheckpointLoader().find(str(run), LoadOptions())
    messages = [(str(warning.message), warning.filename) for warning in recwarn]
    line = f"{run}: its {half} has never been trained"
    assert messages == [(line, __file__)] * (half is not None)


def test_a_runs_config_is_found_by_its_whole_name_or_the_middle_of_it(tmp_path):
    """Exactly one, in any folder, in YAML of either name."""
    name = "2026-01-31T12-00-00_a_b_bf16"
    with pytest.raises(ConfigError, match=rf"{name}\.yaml or a_b\.yaml, found none:"):
        find_run_config(tmp_path, name)
    (tmp_path / "deep").mkdir()
    (tmp_path / "a_b.txt").touch()
    middle = tmp_path / "deep" / "a_b.yml"
    middle.touch()
    assert find_run_config(tmp_path, name) == middle
    (tmp_path / "a_b.yaml").touch()
    with pytest.raises(ConfigError, match=r"found .*a_b\.yaml, .*a_b\.yml"):
        find_run_config(tmp_path, name)
    whole = tmp_path / f"{name}.yaml"
    whole.touch()
    assert find_run_config(tmp_path, name) == whole
    with pytest.raises(ConfigError, match=r"config alone\.yaml, found"):
        find_run_config(tmp_path, "alone")


class Numbers(Loader):
    """A user's loader: of numbers."""

    def accepts(self, text: str) -> bool:
        return text.isdigit()

    def find(self, text: str, options: LoadOptions) -> Target:
        return Target(lambda: tiny(), config={"number": int(text), "raw": options.raw})


def test_a_users_loader_is_named_before_its_argument():
    text = f"{__name__}.Numbers:4"
    found = find_target(text, raw=True)
    assert (found.config, found.given) == ({"number": 4, "raw": True}, text)
    with pytest.raises(FileNotFoundError, match=r"Numbers:four: not found"):
        find_target(f"{__name__}.Numbers:four")


def test_models_of_the_package_and_of_the_hub_are_fetched(tmp_path, monkeypatch):
    """Unless there is such a file here; a published one has its recipe for a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "it").touch()
    loader, options = PackageAndHubLoader(), LoadOptions()
    accepted = [text for text in ("olvae:a", "owner/name", "here/it", "it") if loader.accepts(text)]
    assert accepted == ["olvae:a", "owner/name"]
    monkeypatch.setattr(targets, "locate_weights", lambda text: Path(text))
    monkeypatch.setattr(CheckpointLoader, "find", lambda _, *given: given)
    assert loader.find("owner/name", options) == Path("owner/name")
    published = "RGenDiff/olitevaeB_im_f8c12"
    assert loader.find(published, options) == (published, options)


def test_a_target_in_a_config_has_no_options_to_name(monkeypatch):
    def missing(_: str) -> None:
        raise ConfigError(f"a: put one there{OR_CONFIG}", "b: wrong")

    monkeypatch.setattr(targets, "find_target", missing)
    with pytest.raises(ConfigError) as caught:
        find_without_options("a")
    assert list(caught.value.mistakes) == ["a: put one there", "b: wrong"]
