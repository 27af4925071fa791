"""Received configs: mistakes, code that they name, and sizes beyond their weights."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.config import ConfigError, save
from olvae.models.spec import (
    AutoencoderSpec,
    check_factors,
    class_in,
    oversized,
    read_config,
)
from tests.conftest import tiny
from tests.models.files import PER_CHANNEL, same_weights, training_config


@pytest.mark.parametrize("kind", [LiteVAE, AutoencoderLiteVAE])
@pytest.mark.parametrize("key", ["encoder_config", "decoder_config"])
def test_a_module_that_a_received_config_names_is_not_imported(tmp_path, monkeypatch, kind, key):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Another each time: a module is only run when it is imported first.
    module = f"came_along_{kind.__name__}_{key}"
    Path(f"{module}.py").write_text(
        "from pathlib import Path; Path('harmed').touch()\nclass Network: pass\n"
    )
    tiny().save_pretrained(tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    content = json.loads(file.read_text())
    content[key]["target"] = f"{module}.Network"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"{key}\.target: {module}\.Network "):
        kind.from_pretrained(tmp_path / "export")
    assert not Path("harmed").exists()


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
            "channels must be at least 1",
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
        ({"pixel_range": [[0, 9]] * 100_000}, "pixel_range: 100000 pairs for images of 3 channels"),
        (
            {"encoder_config.params.image_size": 30},
            "image_size 30 is not a mul",
        ),
        (
            {"_class_name": "AutoencoderKL"},
            "the config of diffusers' AutoencoderKL.* diffusers:FOLDER",
        ),
    ],
)
def test_received_configs_with_mistakes_are_refused(change, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        *path, last = key.split(".")
        node = content
        for part in path:
            node = node[part]
        node[last] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"config.json: .*{message}") as caught:
        LiteVAE.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_received_config_builds_no_more_than_its_weights_have(tmp_path):
    """Nor takes long to say so: 9,000 channels would be 20 GB."""
    tiny().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["decoder_config"]["params"]["channels"] = 9000
    (tmp_path / "config.json").write_text(json.dumps(content))
    for kind in (LiteVAE, AutoencoderLiteVAE):
        with pytest.raises(ConfigError, match=r"too large: [\d,]+ parameters$"):
            kind.from_pretrained(tmp_path)


def test_received_yaml_is_not_interpolated_and_includes_nothing(tmp_path):
    """Without what it includes, without variables of the environment, and without aliases,
    which may repeat.
    """
    model = tiny()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "other.yaml").write_text("model: {}\n")
    config = tmp_path / "model.yaml"
    save(training_config(model), config)
    assert same_weights(LiteVAE.from_pretrained(tmp_path / "model.safetensors"), model)
    text = config.read_text()
    config.write_text(text.replace("embed_dim: 4", "embed_dim: ${oc.env:HOME}"))
    with pytest.raises(ConfigError, match=r"embed_dim: .*int, got '\$\{oc\.env:HOME\}'"):
        LiteVAE.from_pretrained(tmp_path / "model.safetensors")
    config.write_text("include: other.yaml\n")
    with pytest.raises(ConfigError, match="include: unknown"):
        LiteVAE.from_pretrained(tmp_path / "model.safetensors")
    config.write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(ConfigError, match=r"YAML aliases.*: refused"):
        LiteVAE.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "mapping, not a list"),
        ("null", "mapping, not a NoneType"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("\x80", "not readable as JSON"),
        (None, "not readable as JSON: No such file"),
    ],
    ids=["list", "null", "cut", "deep", "not utf-8", "missing"],
)
def test_a_json_that_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        read_config(path)
    assert class_in(tmp_path) is None


def test_the_class_in_a_folder_is_the_one_that_its_config_names(tmp_path):
    for content, name in (({"_class_name": "A"}, "A"), ({}, None), ({"_class_name": 3}, None)):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert read_config(tmp_path / "config.json") == content
        assert class_in(tmp_path) == name


@pytest.mark.parametrize(
    ("most", "more", "line"),
    [
        ({"channels": 2**16}, {"channels": 2**16 + 1}, "channels: more than 65536"),
        ({"offset": -(2**16)}, {"offset": -(2**16) - 1}, "offset: more than 65536"),
        *(
            ({name: 24}, {name: 25}, f"{name}: more than 24")
            for name in ("num_res_blocks", "n_layers", "dct_levels", "layers_per_block")
        ),
        ({"blocks": [1, 24]}, {"blocks": (1, 25)}, "blocks: more than 24"),
        ({"widths": [1] * 10}, {"widths": [1] * 11}, "widths: more than 10 entries"),
        ({"a": {"b": {"size": 9}}}, {"a": {"b": {"size": 10**6}}}, "a.b.size: more than 65536"),
        ({"_names": [1] * 99, "latents_mean": [1] * 99}, {"names": [1] * 99}, "names: more"),
        ({"pixel_range": [10**9] * 99, "name": "x" * 99}, {"range": [10**9]}, "range: more"),
    ],
)
def test_the_largest_sizes_of_a_received_config(most, more, line):
    assert list(oversized(most)) == []
    (found,) = oversized(more)
    assert found.startswith(line)


FACTORS = {"scaling_factor": 0.5, "shift_factor": -1.0}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"latents_mean": [0, -1], "latents_std": [1, 2]}, []),
        ({"latents_mean": [0] * 8, "latents_std": [1] * 8}, []),
        ({"scaling_factor": 0}, ["scaling_factor"]),
        ({"scaling_factor": -0.5}, ["scaling_factor"]),
        ({"scaling_factor": float("inf"), "shift_factor": 0}, ["scaling_factor"]),
        ({"shift_factor": float("nan")}, ["shift_factor"]),
        ({"latents_mean": [0] * 4, "latents_std": [1] * 2}, ["latents_mean"]),
        ({"latents_mean": [0] * 2, "latents_std": [1] * 6}, ["latents_std"]),
        (
            {"latents_mean": [0, float("inf")], "latents_std": [1, 0]},
            ["latents_mean", "latents_std"],
        ),
        ({"latents_mean": [0, 1]}, ["latents_mean, latents_std"]),
        ({"latents_std": [1, 1]}, ["latents_mean, latents_std"]),
    ],
)
def test_factors_of_two_channels(changes, wrong):
    found = list(check_factors({**FACTORS, **changes}, 2))
    assert [line.partition(":")[0] for line in found] == wrong


def test_an_export_holds_networks_of_this_package_alone():
    """Either half may be another's; JSON has no sets."""
    ours = {"target": "olvae.modules.others.tiny.TinyEncoder", "params": {"blocks": (1, 2)}}
    theirs = {"target": "mine.Encoder", "params": {}}
    spec = AutoencoderSpec(ours, ours, 4)
    assert spec.ours
    content = spec.to_export(in_channels=3)
    assert content["encoder_config"]["params"] == {"blocks": [1, 2]}
    assert content["in_channels"] == 3
    assert "pixel_range" not in content
    ranged = AutoencoderSpec(ours, ours, 4, pixel_range=[0, 10])
    assert ranged.to_export()["pixel_range"] == [0, 10]
    for halves in ((ours, theirs), (theirs, ours)):
        assert not AutoencoderSpec(*halves, 4).ours
        with pytest.raises(ValueError, match=r"mine\.Encoder .*own"):
            AutoencoderSpec(*halves, 4).to_export()
    strange = {**ours, "params": {"blocks": {1}}}
    with pytest.raises(ValueError, match="JSON"):
        AutoencoderSpec(strange, ours, 4).to_export()


def test_a_config_beside_weights_gets_the_source_that_reads_its_data(tmp_path):
    """As `olvae train --base` does: here a folder's source, and a root that holds shards."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    node = {
        "target": "olvae.data.picture_folder.FolderSource",
        "params": {"root": str(tmp_path / "shards"), "size": 32, "batch_size": 1},
    }
    save({"model": {}, "data": node}, tmp_path / "config.yaml")
    data = read_config(tmp_path / "config.yaml")["data"]
    assert data["target"] == "olvae.data.shards.webdataset.WebDatasetSource"
    assert data["params"]["shards"] == str(tmp_path / "shards")
