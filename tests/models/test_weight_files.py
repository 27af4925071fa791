"""Where weights and configs are found, in every format; what is refused, and why."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.config import ConfigError, save
from olvae.data.places import load
from olvae.models.loading.targets import find_target
from olvae.models.spec import CLASS_NAME, WEIGHTS_NAME
from olvae.models.weight_files import (
    LOADER,
    LOADER_NAME,
    config_inside,
    is_export,
    locate,
    write_export,
)
from olvae.runs import Run
from tests.conftest import tiny
from tests.models.files import same_weights, training_config


@pytest.mark.parametrize(
    "form", ["lightning", "safetensors", "averaged", "model_ema", "run", "export"]
)
def test_same_weights_through_every_format(form, tmp_path):
    model = tiny()
    state = model.state_dict()
    noise = {name: torch.randn_like(t) for name, t in state.items()}
    beside = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(3, 3)}
    config = tmp_path / "config.yaml"
    save(training_config(model), config)
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
            model.save_pretrained(path)
    found = LiteVAE.from_pretrained(path)
    assert not found.training
    assert same_weights(found, model)
    if form in ("averaged", "model_ema"):
        raw = LiteVAE.from_pretrained(path, raw=True)
        assert all(torch.equal(t, noise[name]) for name, t in raw.state_dict().items())


def test_config_is_found_beside_weights_and_in_run_folders(tmp_path):
    model = tiny()
    files = {
        "checkpoints/step=2.ckpt": "config.yaml",
        "a/model.ckpt": "a/model.yaml",
        "b/model.pt": "b/published.yml",
    }
    for weights, config in files.items():
        (tmp_path / weights).parent.mkdir()
        torch.save(model.state_dict(), tmp_path / weights)
        with pytest.raises(ConfigError, match="no config"):
            LiteVAE.from_pretrained(tmp_path / weights)
        save(training_config(model), tmp_path / config)
        assert same_weights(LiteVAE.from_pretrained((tmp_path / weights).parent), model)
        # Beside a file that is named by itself, another YAML may be about something else.
        if config == "b/published.yml":
            with pytest.raises(ConfigError, match=r"no config .*model\.yaml\)"):
                find_target(tmp_path / weights)
            (tmp_path / config).rename(tmp_path / "b" / "model.yml")
        assert same_weights(find_target(tmp_path / weights).load(), model)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config\.json: not .*JSON"):
        LiteVAE.from_pretrained(tmp_path / "checkpoints" / "step=2.ckpt")


def test_a_run_with_its_best_checkpoint_alone_has_these_weights(tmp_path):
    """As after a full disk: the run is still one, with its config."""
    model = tiny()
    save(training_config(model), tmp_path / "config.yaml")
    best = tmp_path / "checkpoints" / "best.ckpt"
    best.parent.mkdir()
    torch.save({"state_dict": model.state_dict()}, best)
    found = locate(tmp_path)
    assert (found.weights, found.run) == (best, Run(tmp_path))
    assert found.config == load([tmp_path / "config.yaml"])
    torch.save({"state_dict": model.state_dict()}, best.with_name("last.ckpt"))
    assert locate(tmp_path).weights.name == "last.ckpt"
    assert same_weights(LiteVAE.from_pretrained(tmp_path), model)


def test_weights_of_another_model_are_refused_or_warned_of(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS_NAME)
    missing, misshapen, *_ = state
    del state[missing]
    state[misshapen] = torch.zeros(2, 2)
    state["decoder.extra"] = torch.zeros(1)
    save_file(state, tmp_path / WEIGHTS_NAME)
    listed = (
        rf"1 missing \({missing}\); 1 unexpected \(decoder.extra\); "
        rf"1 of another shape \({misshapen} 2x2 for"
    )
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
    with pytest.raises(ValueError, match="another model"):  # nothing fits: not even on request
        LiteVAE.from_pretrained(tmp_path, allow_mismatch=True)


def test_broken_weight_files_are_refused(tmp_path, monkeypatch):
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
        "nan.safetensors": r"non-finite values in float32 \(encoder.aggregator.conv_out.bias",
        "int8.safetensors": r"are int8, quantised perhaps \(encoder.aggregator.conv_out.bias",
        "other.ckpt": "no autoencoder in it",
        "three.ckpt": "its state_dict is a int",
        "list.ckpt": "but a list",
        "config.yaml": "not a file of weights",
    }.items():
        with pytest.raises(ValueError, match=rf"^{file}: .*{message}") as caught:
            LiteVAE.from_pretrained(file)
        assert "\n" not in str(caught.value)


def test_folders_with_no_or_several_weight_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoints/last\.ckpt"):
        LiteVAE.from_pretrained(tmp_path)
    model = tiny()
    model.save_pretrained(tmp_path)
    # Of a save that was killed.
    (tmp_path / f".partial-0123abcd-{WEIGHTS_NAME}").write_bytes(b"half of a file")
    # As diffusers' repositories keep it.
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert same_weights(LiteVAE.from_pretrained(tmp_path), model)
    (tmp_path / "second.safetensors").touch()
    several = (
        r"several files of weights \(diffusion_pytorch_model.safetensors, second.safetensors\): "
    )
    with pytest.raises(FileNotFoundError, match=f"{several}name one"):
        LiteVAE.from_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").touch()
    with pytest.raises(FileNotFoundError, match=f"{several}save them"):
        LiteVAE.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\(empty\): "):
        LiteVAE.from_pretrained("")
    with pytest.raises(FileNotFoundError, match=r"missing: no such .*hub \(OWNER/NAME\)"):
        LiteVAE.from_pretrained(tmp_path / "missing")


def test_weights_too_large_for_a_dtype_are_refused(tmp_path):
    model = tiny()
    next(model.decoder.parameters()).data[0] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"non-finite values in float16 \(decoder\."):
        LiteVAE.from_pretrained(tmp_path, dtype=torch.float16)


def test_raw_weights_of_an_export_are_told_that_there_are_none(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="`raw` is ignored"):
        LiteVAE.from_pretrained(tmp_path, raw=True)


def test_only_a_config_of_ones_own_may_be_built(tmp_path):
    """A run's, or one that is named, if it is a training's; received ones build nothing."""
    model = tiny()
    weights, config = tmp_path / "model.ckpt", tmp_path / "model.yaml"
    torch.save(model.state_dict(), weights)
    save(training_config(model), config)
    found = locate(weights)
    assert (found.origin, found.config, found.run) == (str(config), {}, None)
    found = locate(weights, config)
    assert (found.origin, found.config) == (str(config), load([config]))
    content = training_config(model)
    found = locate(weights, content)
    assert (found.origin, found.config) == (str(weights), content)
    assert locate(weights, model.export_config()).config == {}
    single = tmp_path / "single.safetensors"
    save_file(model.state_dict(), single, {"config": json.dumps(model.export_config())})
    found = locate(single)
    assert (found.weights, found.origin, found.config) == (single, str(single), {})


def test_weights_of_the_hub_are_fetched_one_kind_after_the_other(tmp_path, monkeypatch):
    torch.save(tiny().state_dict(), tmp_path / "model.ckpt")
    save(training_config(tiny()), tmp_path / "any.yaml")
    asked = []
    monkeypatch.setattr(
        "olvae.models.on_the_hub.snapshot",
        lambda *given, **access: asked.append((*given, access)) or tmp_path,
    )
    found = locate("owner/name", revision="v1")
    assert (found.weights, found.config) == (tmp_path / "model.ckpt", {})
    patterns = ["*.json", "*.yaml", "*.yml"]
    assert asked == [
        ("owner/name", [*patterns, "*.safetensors"], ["*/*"], {"revision": "v1"}),
        ("owner/name", [*patterns, "*.ckpt"], ["*/*"], {"revision": "v1"}),
    ]


OURS = {"_class_name": CLASS_NAME}


@pytest.mark.parametrize(
    ("content", "kinds", "found"),
    [
        (OURS, [CLASS_NAME], True),
        ({"_class_name": "Other"}, [CLASS_NAME], False),
        ({"_class_name": "Other"}, ["Other", None], True),
        ({}, [CLASS_NAME], False),
        ({}, [None], True),
        ({**OURS, "model": 1}, [CLASS_NAME], False),
        ([1], [None], False),
        (None, [None], False),
    ],
)
def test_a_config_in_a_files_header_is_of_a_kind(tmp_path, content, kinds, found):
    header = {} if content is None else {"config": json.dumps(content)}
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"format": "pt", **header})
    assert config_inside(file, kinds) == (content if found else None)
    assert is_export(file) == (content == OURS)
    # Or beside it.
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    assert is_export(file) == (content == OURS)
    (tmp_path / "config.json").write_text(json.dumps(OURS))
    assert is_export(file)


def test_an_export_takes_the_place_of_weights_in_parts(tmp_path):
    """With the file for diffusers' AutoModel, if the config names one."""
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / f"diffusion_pytorch_{name}").touch()
    (tmp_path / "notes.txt").touch()
    write_export({"a": torch.ones(2)}, {"auto_map": {}}, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {WEIGHTS_NAME, "config.json", LOADER_NAME, "notes.txt"}
    assert (tmp_path / LOADER_NAME).read_text() == LOADER
    assert json.loads((tmp_path / "config.json").read_text()) == {"auto_map": {}}
    (tmp_path / "plain").mkdir()
    write_export({"a": torch.ones(2)}, {}, tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {WEIGHTS_NAME, "config.json"}


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
        with pytest.raises(ValueError, match="damaged: its SHA-256") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    # Of somebody else: no checksum.
    save_file(model.state_dict(), tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    load(tmp_path)
