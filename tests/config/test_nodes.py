"""Nodes: every mistake of a config at once, and targets imported and built."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from olvae.config import ConfigError, instantiate, resolve_target, validate, with_paths
from olvae.config.nodes import (
    Node,
    _dotted,
    check,
    check_arguments,
    import_extra,
    map_nodes,
    missing_package,
    resolve_class,
)
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.places import load
from olvae.models.spec import AutoencoderSpec
from tests.config.recipe_targets import read_targets
from tests.conftest import parts, tiny_config

ROOT = Path(__file__).parent.parent.parent
ENLARGE = "model.params.decoder_config.params.enlarge"
WHOLE = "Literal[1, 2, 3, 4]"


def test_instantiate_builds_targets_and_names_what_is_wrong():
    assert (
        instantiate({"target": "fractions.Fraction", "params": {"numerator": 1, "denominator": 2}})
        == 0.5
    )
    assert instantiate({"target": "fractions.Fraction"}, numerator=3) == 3
    for node, message in (
        ({"params": {}}, "target and params"),
        (3, "target and params"),
        ({"target": "olvae.data.datset.Any"}, "did you mean dataset"),
        ({"target": "math.pi"}, "is a float"),
        ({"target": "Fraction"}, "not a dotted path"),
        ({"target": "no.such.module"}, "does not import"),
        ({"target": "fractions.Fractoin"}, "did you mean Fraction"),
        ({"target": "olvae.config.nodes.check", "params": {"confg": 1}}, "nodes.check: "),
    ):
        with pytest.raises(ConfigError, match=message):
            instantiate(node)


def test_a_target_of_very_many_parts_is_no_dotted_path():
    """Importing the parts, one after the other, takes time by the square of their number."""
    with pytest.raises(ConfigError, match="dotted path"):
        resolve_target("olvae" + ".olvae" * 3000)
    longest = "a" + ".a" * 30
    assert _dotted(f"{longest}.B") == (longest, "B")
    with pytest.raises(ConfigError, match="dotted path"):
        _dotted(f"{longest}.a.B")


def test_a_class_is_of_the_kind_that_is_wanted():
    assert resolve_class("builtins.bool", int) is bool
    for target in ("fractions.Fraction", "builtins.len"):
        with pytest.raises(ConfigError, match=r"kind of builtins\.int"):
            resolve_class(target, int)


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    """Where training alone needs it, also as the cause of another error."""
    missing = ModuleNotFoundError("no", name="torchvision.ops")
    other = RuntimeError("on top")
    other.__cause__ = missing
    for error in (missing, other):
        assert missing_package(error).startswith("needs torchvision: pip install ")
    for error in (None, ModuleNotFoundError("no"), ModuleNotFoundError("no", name="mine"), other):
        other.__cause__ = None
        assert missing_package(error) is None

    def fails(_: str) -> None:
        raise missing

    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(ModuleNotFoundError):
        resolve_target("some.Thing")
    with pytest.raises(ConfigError, match="reading needs a_library: pip install x y"):
        import_extra("a_library", "x y", "reading")


def test_arguments_of_a_class_are_checked_by_name():
    mistakes = list(check_arguments(takes, {"path": 3, "nme": "x"}))
    assert mistakes == [
        "nme: unknown key; did you mean name?",
        "name: missing",
        "path: expected str | pathlib.Path, got 3",
    ]


@pytest.mark.parametrize(
    ("value", "hint", "places"),
    [
        ({"target": "a.A"}, Node, [""]),
        (None, Node | None, []),
        ([{"target": "a.A"}, 3], list[Node], [".0", ".1"]),
        ({"target": "a.A"}, Node | list[Node], [""]),
        ({"x": {"target": "a.A"}, "y": None, "z": 3}, dict[str, Node | None] | None, [".x", ".z"]),
    ],
)
def test_map_nodes_visits_the_nodes_in_values(value, hint, places):
    visited = []
    assert map_nodes(value, hint, lambda node, place: (visited.append(place), node)[1]) == value
    assert visited == places


def test_with_paths_changes_paths_at_any_depth():
    params = {"root": "a", "size": 8, "batch_size": 1}
    folder = {"target": "olvae.data.picture_folder.FolderSource", "params": params}
    mix = {
        "target": "olvae.data.mix.MixSource",
        "params": {"sources": [folder, folder], "weights": [1, 2]},
    }
    changed = with_paths(mix, lambda path: f"/{path}")
    assert [node["params"]["root"] for node in changed["params"]["sources"]] == ["/a", "/a"]
    assert params["root"] == "a"
    for other in (3, {"params": {}}, {"target": 5}):
        assert with_paths(other, lambda path: f"/{path}") is other


def takes(
    path: str | Path, name: str, files: str | Path | list[str | Path] | None = None
) -> object:
    """A source in files."""


@pytest.mark.parametrize(
    ("path", "files", "changed"),
    [
        ("owner/name", "a", ("owner/name", "a")),  # on the hub
        ("there/name", "a", ("/there/name", "/a")),
        ("a/b/c", ["a", "b"], ("/a/b/c", ["/a", "/b"])),
        ("a", None, ("/a", None)),
    ],
)
def test_paths_are_arguments_that_take_one_but_for_those_of_the_hub(
    tmp_path, monkeypatch, path, files, changed
):
    monkeypatch.chdir(tmp_path)
    Path("there/name").mkdir(parents=True)
    node = {
        "target": f"{__name__}.takes",
        "params": {"path": path, "name": "a/b/c", "files": files},
    }
    found = with_paths(node, lambda text: f"/{text}")["params"]
    assert (found["path"], found["files"]) == changed
    assert found["name"] == "a/b/c"


MISTAKES = """
include: imagenet/B5
model:
  params:
    {use_ema: 3, embed_dimm: 1, encoder_config: {params: {scale: XL, wavelet: 1}}, betas: [a, 1]}
data: {params: {batch_size: four}}
lightning:
  trainer: {max_step: 1, precision: 7}
  callbacks: {a: {target: olvae.training.callbacks.ImageGrids}}
"""

WITHOUT_IMPORTS = """
import sys
from olvae.config import recipes, validate
from olvae.data.places import load
published = "olitevaeB_im_f8c12"  # names torch.nn.Identity
assert not any(validate(load([name])) for name in recipes() if name != published)
print(validate(load([sys.argv[1]])))
heavy = {"torch", "lightning", "torchvision", "torchmetrics", "diffusers", "scipy"}
print(sorted(heavy & set(sys.modules)))
"""


def test_validating_recipes_imports_neither_torch_nor_lightning(tmp_path):
    """And finds the same mistakes as with everything imported."""
    path = tmp_path / "mistakes.yaml"
    path.write_text(MISTAKES)
    command = [sys.executable, "-c", WITHOUT_IMPORTS, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    mistakes, imported = done.stdout.splitlines()
    assert imported == "[]"
    for target in read_targets():
        resolve_target(target)
    expected = validate(load([path]))
    assert len(expected) == 8
    assert mistakes == str(expected)
    assert not validate(load(["olitevaeB_im_f8c12"]))


def test_a_path_is_no_target(tmp_path):
    """A received config must not have a file beside it read,
    whose annotations would be evaluated."""
    (tmp_path / "evil.py").write_text("def Name(x: open('evaluated', 'w')): ...")
    target = f"olvae.{tmp_path}/evil"
    spec = {"target": f"{target}.Name", "params": {}}
    content = {
        "model": {"params": {"encoder_config": spec, "decoder_config": spec, "embed_dim": 4}}
    }
    with pytest.raises(ConfigError, match="dotted path"):
        AutoencoderSpec.from_content(content, "received", only_ours=True)
    assert not Path("evaluated").exists()


def test_validate_lists_every_mistake_at_once():
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
    config["lightning"]["callbacks"] = {
        "grids": {"target": "olvae.training.callbacks.ImageGrids", "params": {"n": 2}}
    }
    config["lightning"]["trainer"] |= {"min_steps": 2, "max_time": "00:01:00:00"}
    config["modle"] = {}
    mistakes = validate(config)
    expected = (
        "modle: unknown key; did you mean model?",
        "model.params.embed_dimm: unknown key; did you mean embed_dim?",
        "model.params.embed_dim: missing",
        "model.params.use_ema: expected bool, got 'yes'",
        "encoder_config.params.extractor_chanels: unknown key; did you mean extractor_channels?",
        "has no LiteVAEDecoder; did you mean LiteVAE_Decoder?",
        "model.params.lossconfig.target: missing",
        "data.params.batch_size: expected int, got 'four'",
        "lightning.trainer.max_step: unknown key; did you mean max_steps?",
        "lightning.trainer.logger: is set by lightning.logger",
        "lightning.trainer.min_steps: is set by lightning.trainer.max_steps",
        "lightning.trainer.max_time: is set by the option time-limit of olvae train",
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
        ("model.base_learning_rate", 0, "expected a positive number"),
        ("model.base_learning_rate", float("inf"), "expected a positive number, got inf"),
        ("model.base_learning_rate", float("nan"), "expected a positive number, got nan"),
        ("model.params", [1], "expected a mapping of arguments"),
        ("model", "LiteVAE", "expected a node of target and params"),
        ("lightning", [1], "expected a mapping of trainer, callbacks"),
        ("lightning.trainer.check_val_every_n_epoch", 2, "2: a stream of images has no epochs"),
        ("lightning.trainer.check_val_every_n_epoch", 0, "0: a stream of images has no epochs"),
        ("lightning.trainer.plugins", [], "is set by olvae train; leave it out"),
        ("lightning.callbacks", [1], "expected a mapping of names to nodes"),
        ("data.target", 3, "expected a dotted path"),
        ("model.params.lossconfig", 3, "expected a node of target and params"),
        *[(ENLARGE, value, f"expected {WHOLE}, got {value}") for value in (0, -1, 100, True)],
    ],
)
def test_validate_names_the_key_of_one_mistake(path, value, text):
    config = tiny_config()
    *folders, key = path.split(".")
    node = config
    for folder in folders:
        node = node[folder]
    node[key] = value
    (mistake,) = validate(config)
    assert text in mistake
    assert mistake.startswith(path)


@pytest.mark.parametrize("value", [0, -1, 100, True, "two", 2.0, None])
def test_validate_checks_how_much_the_decoder_of_model_from_enlarges(value):
    """Also beside a decoder that it replaces."""
    config = tiny_config()
    config["model"]["from"] = "diffusers:some/vae"
    config["model"]["params"]["decoder_config"]["params"]["enlarge"] = value
    expected = [f"{ENLARGE}: expected {WHOLE}, got {value!r}"]
    assert validate(config) == expected
    del config["model"]["params"]["decoder_config"]["target"]
    assert validate(config) == expected
    config["model"]["params"]["decoder_config"]["params"] = {"enlarge": 4, "unheard_of": 1}
    assert validate(config) == []


def test_numbers_of_yaml_are_what_they_look_like(tmp_path):
    """YAML 1.1 reads 1e-4 as text.

    OmegaConf does not, so an int passes for a float and 1e-4 for a number.
    """
    config = tiny_config()
    config["model"]["params"]["min_lr_factor"] = 1
    text = yaml.dump(config).replace("base_learning_rate: 0.001", "base_learning_rate: 1e-4")
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert validate(load([path])) == []
    assert validate({}) == ["model: missing"]


def without(config: dict, *keys: str) -> dict:
    params = {key: value for key, value in config["model"]["params"].items() if key not in keys}
    return {**config, "model": {**config["model"], "params": params}}


def test_validate_lets_model_from_give_the_networks(image_folder):
    """It is named by a text and not loaded: networks may be missing, replaced,
    or be params alone."""
    config = without(tiny_config(image_folder), "encoder_config", "decoder_config", "embed_dim")
    assert sorted(validate(config)) == [
        f"model.params.{key}: missing" for key in ("decoder_config", "embed_dim", "encoder_config")
    ]
    config["model"]["from"] = "diffusers:some/vae"
    assert validate(config) == []
    config["model"]["params"] |= {
        "encoder_config": {"params": {"padding": "reflect"}},
        "use_quant": True,
    }
    assert validate(config) == []
    config["model"]["params"] |= {"freeze_encodr": True}
    config["model"]["fron"] = "x"
    assert sorted(validate(config)) == [
        "model.fron: unknown key; did you mean from?",
        "model.params.freeze_encodr: unknown key; did you mean freeze_encoder?",
    ]

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


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.params.kl_weigth", "model.params.lossconfig.params.kl_weight"),
        ("model.params.start_step", "model.params.adversary_config.params.start_step"),
        ("data.params.max_steps", "lightning.trainer.max_steps"),
        ("model.params.lossconfig.params.kl_weigth", "kl_weight"),
        ("model.params.decoder_config.params.upscale", "enlarge"),
    ],
)
def test_validate_finds_a_key_of_another_node(key, meant):
    assert validate(load(["demo_b"], [f"{key}=1"])) == [
        f"{key}: unknown key; did you mean {meant}?"
    ]


def test_validate_finds_mistakes_in_parts(image_folder):
    """At any name of the mapping, all at once; null removes a part."""
    teacher = {"autoencoder": "x", "dtype": "float8", "latent_wieght": 1}
    nodes = parts(teacher=teacher, anchor=None, equivariance={}) | {
        "mine": {"target": "no.where.Part"},
        "other": 3,
    }
    config = tiny_config(image_folder, parts=nodes)
    key, dtype, *rest = sorted(validate(config), key=lambda line: "teacher" not in line)
    where = "model.params.parts"
    assert dtype == (
        f"{where}.teacher.params.dtype: expected Literal['float32', 'bfloat16', 'float16'], "
        "got 'float8'"
    )
    assert key == f"{where}.teacher.params.latent_wieght: unknown key; did you mean latent_weight?"
    assert rest[0].startswith(f"{where}.mine.target: target 'no.where.Part' does not import")
    assert rest[1:] == [f"{where}.other: expected a node of target and params, got 3"]
    (mistake,) = validate(tiny_config(image_folder, parts=parts(teacher={})))
    assert mistake == f"{where}.teacher.params.autoencoder: missing"
    (mistake,) = validate(tiny_config(image_folder, parts=[]))
    assert mistake.startswith(f"{where}: expected ")


@pytest.mark.parametrize(
    ("channels", "loss", "message"),
    [
        (
            13,
            {},
            "lpips_weight: its network sees three channels of colour, the images have 13",
        ),
        (
            13,
            {"lpips_channels": [3, 2, 13]},
            r"lpips_channels: expected three of 13 channels, .* got \[3, 2, 13\]",
        ),
        (13, {"lpips_channels": [3, 2, 1]}, None),
        (13, {"lpips_channels": [12, 1, 0]}, None),
        (13, {"lpips_channels": [2, 1]}, r"lpips_channels: .* got \[2, 1\]"),
        (1, {"lpips_weight": 0}, None),
        (3, {}, None),
    ],
)
def test_validate_wants_three_channels_for_a_perceptual_loss(image_folder, channels, loss, message):
    config = tiny_config(image_folder)
    config["data"]["params"] |= {"channels": channels, "range": [0, 10_000]}
    config["model"]["params"]["lossconfig"]["params"] = loss
    mistakes = validate(config)
    assert len(mistakes) == (message is not None)
    assert message is None or re.search(message, mistakes[0])


def test_validate_checks_a_range_without_torch(image_folder):
    config = tiny_config(image_folder)
    for node in ({"pairs": [0, 1], "values": "lgo"}, {"pair": [0, 1]}, "0 to 1"):
        config["data"]["params"]["range"] = node
        (mistake,) = validate(config)
        assert mistake.startswith("data.params.range: expected ")


def test_null_undoes_the_nodata_and_shown_of_an_included_config(tmp_path):
    below = tiny_config(tmp_path)
    below["data"]["params"]["range"] = {"pairs": [0, 9], "nodata": -1, "shown": [0, 2, 1]}
    (tmp_path / "below.yaml").write_text(yaml.safe_dump(below))
    above = "include: below.yaml\ndata: {params: {range: {nodata: null, shown: null}}}\n"
    (tmp_path / "above.yaml").write_text(above)
    config = load([tmp_path / "above.yaml"])
    assert validate(config) == []
    assert PixelRange.from_node(config["data"]["params"]["range"]) == PixelRange((0.0,), (9.0,))


def test_a_loss_that_is_not_installed_does_not_end_validation():
    """As in the config of a model for inference, whose class takes any arguments."""
    node = {"target": "builtins.dict", "params": {"lossconfig": {"target": "no.such.Loss"}}}
    assert validate({"model": node}) == []


def test_a_config_without_data_is_refused_beside_its_other_mistakes():
    config = load(["demo"])
    check(config)
    del config["data"]
    config["model"]["params"]["embed_dims"] = 1
    with pytest.raises(ConfigError) as raised:
        check(config)
    assert raised.value.mistakes[-1] == "data: missing: the source of the training images"
    assert len(raised.value.mistakes) == 2
    assert str(raised.value) == "\n".join(raised.value.mistakes)
