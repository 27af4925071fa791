"""What a TARGET's text names, without a look at the hub or into a file."""

from pathlib import Path

import pytest

from olvae.models import target_names as names
from olvae.models.target_names import check_target, is_hub_id, place_in, split_class


@pytest.mark.parametrize(
    ("target", "place"),
    [("diffusers:a/b::vae", "a/b"), ("diffusers:a/b", "a/b"), ("a/b::c", "a/b"), ("a", "a")],
)
def test_the_place_in_a_target_has_neither_prefix_nor_subfolder(target, place):
    assert place_in(target) == place


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("owner/name", True),
        ("RGenDiff/olitevaeB_im_f8c12", True),
        ("a.b-c/d.e", True),
        ("name", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./b", False),
        ("runs/last.ckpt", False),
        ("a/b.safetensors", False),
    ],
)
def test_an_id_of_the_hub_has_an_owner_and_a_name_that_is_no_file(text, known):
    assert is_hub_id(text) == known


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("package.module.Class:a:b", ("package.module.Class", "a:b")),
        ("module.Class:", ("module.Class", "")),
        ("Class:a", None),
        ("package.Class", None),
        ("1package.Class:a", None),
        ("diffusers:a.b", None),
    ],
)
def test_a_class_is_named_before_its_argument(text, parts):
    assert split_class(text) == parts


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a file, and two models of the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "SHIPPED_FOLDER", tmp_path / "pretrained")
    for name in ("one", "two"):
        (tmp_path / "pretrained" / name).mkdir(parents=True)
        (tmp_path / "pretrained" / name / "config.json").touch()
    (tmp_path / "weights.ckpt").touch()
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "weights.ckpt",
        "pretrained",
        "owner/name",
        "package.Class:a",
        "olvae:one",
        "timm:nowhere",
        "diffusers:owner/name::vae",
        "diffusers:pretrained",
    ],
)
def test_what_exists_or_may_exist_is_a_target(here, text):
    check_target(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight.ckpt", r"^weight\.ckpt: not found; did you mean weights\.ckpt\?$"),
        ("nothing", r"^nothing: not found; a target is "),
        ("one", r"^one: not found; did you mean olvae:one\?$"),
        ("olvae:three", r"^olvae:three: .* olvae:one, olvae:two$"),
        ("diffusers:no such", r"^diffusers:no such: .*id of the hub"),
        ("diffusers:pretraine", r"did you mean pretrained\?$"),
    ],
)
def test_what_is_no_target_is_told_with_what_is_like_it(here, text, message):
    with pytest.raises(FileNotFoundError, match=message):
        check_target(text)
