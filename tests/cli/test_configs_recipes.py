"""The recipes that come with the package: listed, copied,
and named where a config file is taken."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from olvae.config import ConfigError
from olvae.data.places import load

ROOT = Path(__file__).parent.parent.parent


def test_every_recipe_is_listed_with_a_sentence(olvae, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = olvae("recipes")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    listed = dict(line.split(maxsplit=1) for line in re.sub(r"\n +", " ", out).splitlines())
    in_checkout = {
        path.relative_to(ROOT / "olvae" / "recipes").as_posix()
        for path in (ROOT / "olvae" / "recipes").rglob("*.yaml")
    }
    assert {f"{name}.yaml" for name in listed} == in_checkout
    assert {"demo", "phase_a", "imagenet/A2", "finetune/sdxl"} <= listed.keys()
    for name, sentence in listed.items():
        assert re.fullmatch(r"[^\[\]]{20,120}\.", sentence), name
        assert sentence.count("`") % 2 == sentence.count("(") - sentence.count(")") == 0, name


def test_recipes_copy_includes_its_recipe_and_has_settings_of_its_own(olvae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "mine.yaml"
    assert olvae("recipes", "copy", "imagenet/A2", copy) == (
        0,
        "",
        f"train with: olvae train --base {copy}\n",
    )
    assert load([copy]) == load(["imagenet/A2"])
    assert yaml.safe_load(copy.read_text()) == {"include": "imagenet/A2"}
    assert copy.read_text().startswith("# ")
    settings = [
        "data.params.batch_size=3",
        "model.params.betas=[0.1, 0.2]",
        "data.params.root=${oc.env:PHOTOS}",
    ]
    olvae("recipes", "copy", "phase_a", tmp_path / "a.yaml", *settings)
    assert load([tmp_path / "a.yaml"], resolve=False) == load(["phase_a"], settings, resolve=False)
    olvae("recipes", "copy", "phase_a", "model.params.weights_dir=s3://a/b")
    assert load(["phase_a.yaml"])["model"]["params"]["weights_dir"] == "s3://a/b"


def test_recipes_copy_replaces_no_file(olvae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert olvae("recipes", "copy", "imagenet/A2")[0] == 0
    assert load(["A2.yaml"]) == load(["imagenet/A2"])
    Path("A2.yaml").write_text("mine: 1")
    assert olvae("recipes", "copy", "imagenet/A2") == (1, "", "error: A2.yaml: File exists\n")
    assert Path("A2.yaml").read_text() == "mine: 1"
    assert "nowhere/demo.yaml: " in olvae("recipes", "copy", "demo", "nowhere/demo.yaml")[2]
    assert olvae("recipes", "copy", "dmeo")[::2] == (
        2,
        "error: dmeo: no such recipe; did you mean demo?\n",
    )
    Path("demo.yaml").write_text("include: demo")
    _, _, err = olvae("recipes", "copy", "demo", "other.yaml")
    assert err == (
        "error: other.yaml: would include demo.yaml in place of the recipe: rename that, or "
        "copy elsewhere\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A2.yaml", "demo.yaml"]


def test_a_config_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    """A file of the working folder comes before a recipe, a recipe before a folder."""
    monkeypatch.chdir(tmp_path)
    packaged = load(["demo"])
    assert packaged["data"]["params"] == {"size": 64, "batch_size": 8}
    Path("demo").mkdir()
    assert load(["demo"]) == packaged
    Path("demo.yaml").write_text("include: demo\ndata: {params: {batch_size: 3}}")
    assert load(["demo"]) == load(["demo.yaml"])
    assert load(["demo"])["data"]["params"] == {"size": 64, "batch_size": 3}
    assert load(["demo_b"])["data"]["params"]["batch_size"] == 2  # a recipe includes recipes
    Path("demo").rmdir()
    Path("demo").write_text("x: 1")
    assert load(["demo"]) == {"x": 1}
    Path("sub").mkdir()
    Path("sub/mine.yaml").write_text("include: [imagenet/A2, other]")
    Path("sub/other.yaml").write_text("x: 2")
    assert load(["sub/mine.yaml"]) == {**load(["imagenet/A2"]), "x": 2}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("imagnet/A2", "did you mean imagenet/A2"),
        ("A2", "did you mean imagenet/A2?"),
        ("SDXL", "did you mean finetune/sdxl, finetune/sdxl_2x?"),
        ("phase-a.yaml", "did you mean phase_a"),
        ("configs/dmeo.yaml", "did you mean demo"),
        ("quite/another", "`olvae recipes` lists"),
        ("distil/teacher/config", "did you mean distil/teacher"),
    ],
)
def test_an_unknown_recipe_name_gives_a_hint(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(hint)) as error:
        load([name])
    assert str(error.value).startswith(f"{name}: no such config file; ")
    assert "\n" not in str(error.value)


def test_recipes_in_configs_are_found_where_that_is_no_link(tmp_path, monkeypatch):
    """Git on Windows writes the link as a file; a folder of that name is the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").write_text("olvae/recipes")
    for name in ("configs/imagenet/A2.yaml", "configs/imagenet/A2"):
        assert load([name]) == load(["imagenet/A2"])
    (tmp_path / "configs").unlink()
    (tmp_path / "configs").mkdir()
    with pytest.raises(ConfigError, match="no such config"):
        load(["configs/imagenet/A2.yaml"])


@pytest.mark.posix
def test_commands_take_names_of_recipes(olvae, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert olvae("validate", "imagenet/A2", "finetune/sdxl")[::2] == (
        0,
        "imagenet/A2: no mistakes\nfinetune/sdxl: no mistakes\n",
    )
    code, _, err = olvae(
        "train", "--base", "phase_a", "distil/both", "--gpus", 0, "--logdir", "runs", "data.size=8"
    )
    assert (code, err) == (2, "error: data.size: unknown key; did you mean data.params.size?\n")
    (tmp_path / "photos").symlink_to(trained.parent.parent / "photos")
    weights = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "a.ckpt")
    code, _, err = olvae(
        "evaluate", weights, "--config", "demo", "--data", "photos", "--metrics", "psnr"
    )
    assert code == 2
    assert "another model" in err  # the demo's networks are found, and are others
