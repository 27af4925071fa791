"""Mistakes of configs, all at once."""

import pytest
import yaml

from olvae.config import load, validate
from tests.conftest import parts, tiny_config


def test_a_valid_config_has_no_mistakes(image_folder):
    assert validate(tiny_config(image_folder)) == []


def test_every_mistake_at_once():
    config = tiny_config()
    params = config["model"]["params"]
    params["embed_dimm"] = params.pop("embed_dim")
    params["use_ema"] = "yes"
    params["encoder_config"]["params"]["extractor_chanels"] = 8
    params["decoder_config"]["target"] = "olvae.modules.litevae.decoder_model.LiteVAEDecoder"
    params["lossconfig"] = {"params": {}}
    config["data"]["params"]["batch_size"] = "four"
    config["lightning"]["trainer"]["max_step"] = 3
    config["lightning"]["trainer"]["logger"] = True
    config["lightning"]["callbacks"] = {"grids": {"target": "olvae.training.callbacks.ImageGrids", "params": {"n": 2}}}
    config["modle"] = {}
    mistakes = validate(config)
    expected = (
        "modle: unknown key; did you mean model?",
        "model.params.embed_dimm: unknown key; did you mean embed_dim?",
        "model.params.embed_dim: missing",
        "model.params.use_ema: expected bool, got 'yes'",
        "model.params.encoder_config.params.extractor_chanels: unknown key; did you mean extractor_channels?",
        "has no LiteVAEDecoder; did you mean LiteVAE_Decoder?",
        "model.params.lossconfig.target: missing",
        "data.params.batch_size: expected int, got 'four'",
        "lightning.trainer.max_step: unknown key; did you mean max_steps?",
        "lightning.trainer.logger: is set by lightning.logger",
        "lightning.callbacks.grids.params.n: unknown key",
    )
    for text in expected:
        assert any(text in mistake for mistake in mistakes), text
    assert len(mistakes) == len(expected)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("model.params.encoder_config.params.scale", "XL", "Literal['S', 'B', 'M', 'L']"),
        ("model.params.betas", [0.5, "x"], "betas: expected"),
        ("model.base_learning_rate", "fast", "expected a positive number"),
        ("model.base_learning_rate", -1.0, "expected a positive number"),
        ("model.base_learning_rate", float("inf"), "expected a positive number, got inf"),
        ("model.base_learning_rate", float("nan"), "expected a positive number, got nan"),
        ("model.params", [1], "expected a mapping of arguments"),
        ("model", "LiteVAE", "expected a node of target and params"),
        ("lightning", [1], "expected a mapping of trainer, callbacks"),
        ("lightning.callbacks", [1], "expected a mapping of names to nodes"),
        ("data.target", 3, "expected a dotted path"),
        ("model.params.lossconfig", 3, "expected a node of target and params"),
    ],
)
def test_one_mistake(path, value, text):
    config = tiny_config()
    *folders, key = path.split(".")
    node = config
    for folder in folders:
        node = node[folder]
    node[key] = value
    (mistake,) = validate(config)
    assert text in mistake
    assert mistake.startswith(path)


def test_numbers_of_yaml_are_what_they_look_like(tmp_path):
    """YAML 1.1 reads 1e-4 as text; OmegaConf does not, so an int passes for a float and 1e-4 for a number."""
    config = tiny_config()
    config["model"]["params"]["min_lr_factor"] = 1
    text = yaml.dump(config).replace("base_learning_rate: 0.001", "base_learning_rate: 1e-4")
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert validate(load([path])) == []


def test_no_model():
    assert validate({}) == ["model: missing"]


FROM = {"from": "diffusers:some/vae"}


def without(config: dict, *keys: str) -> dict:
    params = {key: value for key, value in config["model"]["params"].items() if key not in keys}
    return {**config, "model": {**config["model"], "params": params}}


def test_what_an_autoencoder_to_start_from_has_the_values_of(image_folder):
    """It is not loaded: networks may be missing, replaced, or be params alone."""
    config = without(tiny_config(image_folder), "encoder_config", "decoder_config", "embed_dim")
    assert sorted(validate(config)) == [
        f"model.params.{key}: missing" for key in ("decoder_config", "embed_dim", "encoder_config")
    ]
    config["model"] |= FROM
    assert validate(config) == []
    config["model"]["params"] |= {"encoder_config": {"params": {"padding": "reflect"}}, "use_quant": True}
    assert validate(config) == []
    config["model"]["params"] |= {"freeze_encodr": True}
    config["model"]["fron"] = "x"
    assert sorted(validate(config)) == [
        "model.fron: unknown key; did you mean from?",
        "model.params.freeze_encodr: unknown key; did you mean freeze_encoder?",
    ]


def test_an_autoencoder_to_start_from_is_named_by_a_text(image_folder):
    config = tiny_config(image_folder)
    config["model"]["from"] = {"target": "diffusers:some/vae"}
    (mistake,) = validate(config)
    assert mistake.startswith("model.from: expected an autoencoder to start from, got {'target'")
    config["model"]["from"] = None  # none, so networks are needed
    assert validate(config) == []
    (mistake,) = validate(without(config, "embed_dim"))
    assert mistake == "model.params.embed_dim: missing"
    del config["model"]["from"]
    config["data"]["from"] = "x"
    assert validate(config) == ["data.from: unknown key; known: target, params"]


def test_mistakes_in_parts(image_folder):
    """At any name of the mapping, all at once; null removes a part."""
    teacher = {"autoencoder": "x", "dtype": "float8", "latent_wieght": 1}
    nodes = parts(teacher=teacher, anchor=None, equivariance={}) | {"mine": {"target": "no.where.Part"}, "other": 3}
    config = tiny_config(image_folder, parts=nodes)
    key, dtype, *rest = sorted(validate(config), key=lambda line: "teacher" not in line)
    where = "model.params.parts"
    assert dtype == f"{where}.teacher.params.dtype: expected Literal['float32', 'bfloat16', 'float16'], got 'float8'"
    assert key == f"{where}.teacher.params.latent_wieght: unknown key; did you mean latent_weight?"
    assert rest[0].startswith(f"{where}.mine.target: target 'no.where.Part' does not import")
    assert rest[1:] == [f"{where}.other: expected a node of target and params, got 3"]
    (mistake,) = validate(tiny_config(image_folder, parts=parts(teacher={})))
    assert mistake == f"{where}.teacher.params.autoencoder: missing"
    (mistake,) = validate(tiny_config(image_folder, parts=[]))
    assert mistake.startswith(f"{where}: expected ")
