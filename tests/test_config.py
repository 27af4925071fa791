from pathlib import Path

import pytest
import yaml

from olvae.config import ConfigError, instantiate, load, resolve_target, save, validate
from tests.conftest import tiny_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path):
    assert validate(load([path])) == []


def test_later_files_and_overrides_win(tmp_path):
    a = write(tmp_path / "a.yaml", "model: {x: 1, y: 1, z: 1}\nlist: [1, 2]")
    b = write(tmp_path / "b.yaml", "model: {y: 2, z: 2}\nlist: [3]")
    merged = load([a, b], ["model.z=3", "model.w=[1, 2]", "rate=1e-4", "name=a=b"])
    assert merged == {"model": {"x": 1, "y": 2, "z": 3, "w": [1, 2]}, "list": [3], "rate": 1e-4, "name": "a=b"}


def test_interpolations_are_resolved(tmp_path):
    assert load([write(tmp_path / "a.yaml", "size: 64\nother: ${size}")])["other"] == 64


@pytest.mark.parametrize(
    "target",
    [
        "olvae.data.folder.FolderSource",
        "olvae.data.huggingface.HuggingFaceSource",
        "olvae.data.latents.LatentSource",
        "olvae.data.samples.SamplePhotographs",
        "olvae.data.torchvision.TorchvisionSource",
        "olvae.data.webdataset.WebDatasetSource",
        "olvae.modules.basicgan.patchgan.PatchGAN",
        "olvae.modules.gigagan.gigagan.GigaGAN",
        "olvae.modules.unetgan.unetgan.UNetGAN",
        "olvae.training.health.Health",
    ],
)
def test_targets_in_configs_of_older_runs_are_found(target):
    assert resolve_target(target).__name__ == target.rpartition(".")[2]


def test_a_target_that_moved_is_the_same_target(tmp_path):
    old = write(tmp_path / "run.yaml", "data: {target: olvae.data.folder.FolderSource, params: {root: a, size: 8}}")
    new = write(tmp_path / "new.yaml", "data: {target: olvae.data.mapped.folder.FolderSource, params: {size: 16}}")
    assert load([old, new])["data"]["params"] == {"root": "a", "size": 16}


def test_another_target_has_params_of_its_own(tmp_path):
    a = write(tmp_path / "a.yaml", "data: {target: a.A, params: {x: 1, y: {target: b.B, params: {z: 1}}}}")
    b = write(tmp_path / "b.yaml", "data: {target: a.C, params: {w: 2}}")
    assert load([a, b]) == {"data": {"target": "a.C", "params": {"w": 2}}}
    same = write(tmp_path / "same.yaml", "data: {target: a.A, params: {w: 2}}")
    assert load([a, same])["data"]["params"].keys() == {"x", "y", "w"}
    inner = load([a], ["data.params.y.target=b.D", "data.params.y.params.v=3"])["data"]["params"]["y"]
    assert inner == {"target": "b.D", "params": {"v": 3}}


def test_includes(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "x: 1\ny: 1\nz: 1")
    write(tmp_path / "middle.yaml", "include: base.yaml\ny: 2\nz: 2")
    write(tmp_path / "other.yaml", "w: 9\ny: 9")
    top = write(tmp_path / "sub" / "top.yaml", "include: [../other.yaml, ../middle.yaml]\nz: 3")
    assert load([top]) == {"w": 9, "x": 1, "y": 2, "z": 3}
    write(tmp_path / "base.yaml", "include: sub/top.yaml")
    with pytest.raises(ConfigError, match="includes itself"):
        load([top])
    write(tmp_path / "base.yaml", "include: missing.yaml")
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such config file"):
        load([top])


@pytest.mark.parametrize(("include", "named"), [("5", "5"), ("[a.yaml, 5]", "5"), ("{a: 1}", "{'a': 1}"), ("", "None")])
def test_includes_that_are_no_paths(tmp_path, include, named):
    write(tmp_path / "a.yaml", "x: 1")
    top = write(tmp_path / "top.yaml", f"include: {include}\ny: 1")
    with pytest.raises(ConfigError) as caught:
        load([top])
    assert str(caught.value) == f"{top}: include: expected a path or a list of paths, got {named}"


def test_save_and_load(tmp_path):
    config = tiny_config()
    save(config, tmp_path / "config.yaml")
    assert load([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not readable as YAML"),
        ("- a\n- b", "is a mapping"),
        ("a: ${missing}", "missing"),
        ("\x00", "not readable"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load([write(tmp_path / "bad.yaml", text)])
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "demo.yaml", "{}")
    with pytest.raises(ConfigError, match=r"no such config file; did you mean demo\.yaml\?"):
        load([tmp_path / "dem.yaml"])


def test_a_folder_is_not_called_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"this is a folder: name a config file in it"):
        load([tmp_path])


def test_an_override_without_a_value(tmp_path):
    with pytest.raises(ConfigError, match="key=value"):
        load([], ["model.params"])


def test_instantiate():
    assert instantiate({"target": "fractions.Fraction", "params": {"numerator": 1, "denominator": 2}}) == 0.5
    assert instantiate({"target": "fractions.Fraction"}, numerator=3) == 3
    for node, message in (
        ({"params": {}}, "target and params"),
        ({"target": "Fraction"}, "not a dotted path"),
        ({"target": "no.such.module"}, "does not import"),
        ({"target": "fractions.Fractoin"}, "did you mean Fraction"),
        ({"target": "olvae.models.optimization.lr_factor", "params": {"stap": 1}}, "lr_factor: "),
    ):
        with pytest.raises(ConfigError, match=message):
            instantiate(node)


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
    assert validate(load([write(tmp_path / "a.yaml", text)])) == []


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
    config["model"]["params"] |= {"anchor_wieght": 1.0}
    config["model"]["fron"] = "x"
    assert sorted(validate(config)) == [
        "model.fron: unknown key; did you mean from?",
        "model.params.anchor_wieght: unknown key; did you mean anchor_weight?",
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


def test_mistakes_in_a_teacher(image_folder):
    node = {
        "target": "olvae.models.teacher.Teacher",
        "params": {"autoencoder": "x", "dtype": "float8", "latent_wieght": 1},
    }
    assert sorted(validate(tiny_config(image_folder, teacher_config=node))) == [
        "model.params.teacher_config.params.dtype: expected Literal['float32', 'bfloat16', 'float16'], got 'float8'",
        "model.params.teacher_config.params.latent_wieght: unknown key; did you mean latent_weight?",
    ]
    (mistake,) = validate(tiny_config(image_folder, teacher_config={"target": "olvae.models.teacher.Teacher"}))
    assert mistake == "model.params.teacher_config.params.autoencoder: missing"


def test_a_target_of_very_many_parts_is_no_dotted_path():
    """Importing the parts, one after the other, takes time by the square of their number."""
    with pytest.raises(ConfigError, match="is not a dotted path"):
        resolve_target("olvae" + ".olvae" * 3000)
