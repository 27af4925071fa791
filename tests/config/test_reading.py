"""Config files over each other, what they include, and back.

The source of the data that they name.
"""

import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from olvae.config import ConfigError, merge_files, read_received, reading, save
from olvae.config.reading import (
    ABSENT,
    CONFIG_BYTES,
    MAX_EVENTS,
    changed_keys,
    expand_braces,
    find_config,
    nearest_recipes,
    recipes,
)
from olvae.data.places import load


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_files_and_overrides_win(tmp_path):
    a = write(tmp_path / "a.yaml", "model: {x: 1, y: 1, z: 1}\nlist: [1, 2]")
    b = write(tmp_path / "b.yaml", "model: {y: 2, z: 2}\nlist: [3]")
    merged = load([a, b], ["model.z=3", "model.w=[1, 2]", "rate=1e-4", "name=a=b"])
    assert merged == {
        "model": {"x": 1, "y": 2, "z": 3, "w": [1, 2]},
        "list": [3],
        "rate": 1e-4,
        "name": "a=b",
    }
    assert load([write(tmp_path / "c.yaml", "size: 64\nother: ${size}")])["other"] == 64
    for override in ("model.params", "=5"):
        with pytest.raises(ConfigError, match="key=value"):
            load([], [override])


def test_a_config_is_found_by_a_path_or_as_a_recipe(tmp_path, monkeypatch):
    """With or without its ending; a file may include the recipe of its own name."""
    own = write(tmp_path / "demo.yaml", "a: 1")
    recipe = recipes()["demo"]
    assert find_config("demo", tmp_path, ()) == find_config("demo.yaml", tmp_path, ()) == own
    assert find_config("demo", tmp_path, (own.resolve(),)) == recipe
    (tmp_path / "sub").mkdir()
    assert find_config("demo", tmp_path / "sub", ()) == recipe
    assert find_config("configs/demo.yaml", tmp_path / "sub", ()) == recipe
    for name in ("demo.yaml", "nothing"):
        assert find_config(name, tmp_path / "sub", ()) == tmp_path / "sub" / name
    (tmp_path / "sub" / "configs").mkdir()
    gone = tmp_path / "sub" / "configs" / "demo.yaml"
    assert find_config("configs/demo.yaml", tmp_path / "sub", ()) == gone
    monkeypatch.chdir(tmp_path / "sub")
    assert find_config("", Path(), ()) == Path()


def test_recipes_of_a_similar_name_are_suggested():
    for name in ("imagenet/a2", "configs/imagenet/A2.yaml"):
        assert nearest_recipes(name).startswith("; did you mean imagenet/A2")
    assert "imagenet/A2" in nearest_recipes("a2")
    assert nearest_recipes("nothing of it") == "; `olvae recipes` lists all of them"


def test_another_target_has_params_of_its_own(tmp_path):
    a = write(
        tmp_path / "a.yaml", "data: {target: a.A, params: {x: 1, y: {target: b.B, params: {z: 1}}}}"
    )
    b = write(tmp_path / "b.yaml", "data: {target: a.C, params: {w: 2}}")
    assert load([a, b]) == {"data": {"target": "a.C", "params": {"w": 2}}}
    same = write(tmp_path / "same.yaml", "data: {target: a.A, params: {w: 2}}")
    assert load([a, same])["data"]["params"].keys() == {"x", "y", "w"}
    inner = load([a], ["data.params.y.target=b.D", "data.params.y.params.v=3"])["data"]["params"][
        "y"
    ]
    assert inner == {"target": "b.D", "params": {"v": 3}}


def test_a_list_takes_the_place_of_a_mapping(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {params: {range: {pairs: [0, 9]}, more: [1]}}")
    (tmp_path / "b.yaml").write_text("data: {params: {range: [0, 5], more: {of: 1}}}")
    merged = load([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert merged["data"]["params"] == {"range": [0, 5], "more": {"of": 1}}


def test_keys_keep_the_places_that_the_first_file_gives_them(tmp_path):
    """Also where the kind of value changes; a mapping that becomes a list comes last."""
    a = write(tmp_path / "a.yaml", "m: {a: 1, b: [1], c: {x: 1}, d: 4, e: {y: 1}}")
    b = write(tmp_path / "b.yaml", "m: {f: 6, c: null, b: [2, 3], a: text, e: [1]}")
    merged = load([a, b])["m"]
    assert merged == {"a": "text", "b": [2, 3], "c": None, "d": 4, "f": 6, "e": [1]}
    assert list(merged) == ["a", "b", "c", "d", "f", "e"]


@pytest.mark.parametrize(
    ("on_windows", "expected"),
    [
        (False, {r"d\0.tar": ["d0.tar"], r"pipe:a\b": ["pipe:ab"]}),
        (True, {r"d\{0..1}.tar": ["d/0.tar", "d/1.tar"], r"pipe:a\b": ["pipe:ab"]}),
    ],
)
def test_a_backslash_separates_folders_on_windows_alone(on_windows, expected, monkeypatch):
    monkeypatch.setattr(reading, "ON_WINDOWS", on_windows)
    assert {text: expand_braces(text) for text in expected} == expected
    assert expand_braces("s3://b/{00..02}.tar") == [f"s3://b/0{i}.tar" for i in range(3)]


def test_includes_are_merged_in_order(tmp_path):
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
    with pytest.raises(ConfigError, match=r"missing\.yaml: "):
        load([top])


@pytest.mark.parametrize(
    ("include", "named"), [("5", "5"), ("[a.yaml, 5]", "5"), ("{a: 1}", "{'a': 1}"), ("", "None")]
)
def test_includes_that_are_no_paths_are_refused(tmp_path, include, named):
    write(tmp_path / "a.yaml", "x: 1")
    top = write(tmp_path / "top.yaml", f"include: {include}\ny: 1")
    with pytest.raises(ConfigError) as caught:
        load([top])
    assert str(caught.value) == f"{top}: include: expected a path or a list of paths, got {named}"


def test_a_part_is_changed_or_removed_by_a_later_file(tmp_path):
    a = write(
        tmp_path / "a.yaml", "parts: {x: {target: a.A, params: {k: 1, l: 1}}, y: {target: a.B}}"
    )
    b = write(tmp_path / "b.yaml", "parts: {x: {params: {k: 2}}, y: null, z: {target: a.C}}")
    assert load([a, b])["parts"] == {
        "x": {"target": "a.A", "params": {"k": 2, "l": 1}},
        "y": None,
        "z": {"target": "a.C"},
    }


def test_changed_keys_of_two_configs():
    before = {"a": {"x": 1, "y": [1]}, "b": {}, "c": 1}
    after = {"a": {"x": 2, "y": [1]}, "b": {"z": None}, "c": 1}
    assert changed_keys(before, after) == {"a.x": (1, 2), "b": ({}, ABSENT), "b.z": (ABSENT, None)}
    assert changed_keys(before, before) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not readable as YAML"),
        ("- a\n- b", "is a mapping"),
        ("a: ${missing}", "missing"),
        ("\x00", "not readable"),
    ],
)
def test_unreadable_config_files_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load([write(tmp_path / "bad.yaml", text)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["a: [1, 2", "- a\n- b", "a: &a [*a, *a]", "a: {target: x.Y}\na: {b: [\x00]}"]
)
def test_read_received_refuses_unreadable_files(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        read_received(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(error.value)
    assert ' in "' not in str(error.value)  # a place is a line, without the file's name again
    assert ("aliases" in str(error.value)) == ("*a" in text)
    assert str(error.value).count(str(tmp_path)) == 1


def test_a_received_config_is_as_long_and_deep_as_it_may_be(tmp_path, monkeypatch):
    """Interpolations in it are texts."""

    def received(text: str) -> object:
        return read_received(write(tmp_path / "a.yaml", text))

    assert received("a: ${b}") == {"a": "${b}"}
    # With its own mapping 50 levels; lists beside each other are no deeper.
    received("a: " + "[" * 49 + "]" * 49)
    received("a: [" + "[]," * 60 + "]")
    for text in ("a: " + "[" * 50 + "]" * 50, "a: [" + "[]," * 60 + "[" * 49 + "]" * 50):
        with pytest.raises(ConfigError, match="50 deep"):
            received(text)

    # Events: of the stream, the document, the mapping, a key and a value, and their ends.
    for most, fits in ((7, True), (6, False)):
        monkeypatch.setattr(reading, "MAX_EVENTS", most)
        with nullcontext() if fits else pytest.raises(ConfigError, match="keys and values"):
            assert received("a: 1") == {"a": 1}
    for most, fits in ((4, True), (3, False)):
        monkeypatch.setattr(reading, "CONFIG_BYTES", most)
        with nullcontext() if fits else pytest.raises(ConfigError, match="MiB"):
            load([write(tmp_path / "a.yaml", "a: 1")])


@pytest.mark.parametrize("text", ["a: " + "[" * 10_000, "{a: " * 10_000, "- " * 10_000])
def test_a_deep_file_of_others_is_refused_at_once(tmp_path, text):
    """YAML's parser looks through all open brackets at each: 10 kB would take 17 seconds."""
    path = write(tmp_path / "deep.yaml", text)
    start = time.process_time()
    with pytest.raises(ConfigError, match="more than 50"):
        read_received(path)
    assert time.process_time() - start < 2
    assert read_received(write(tmp_path / "a.yaml", "a: " + "[" * 40 + "]" * 40))["a"]


@pytest.mark.parametrize(
    "text", ["a: [" + "[]," * 690_000 + "]", "a:\n" + "- 1\n" * 500_000, "--- \n" * 400_000]
)
def test_a_long_file_of_others_is_refused_at_once(tmp_path, text):
    """Flat lists of 2 MiB would take ten seconds and more."""
    path = write(tmp_path / "long.yaml", text)
    start = time.process_time()
    with pytest.raises(ConfigError, match="more than 20,000"):
        read_received(path)
    assert time.process_time() - start < 2
    names = "".join(f"- s3://bucket/{n:06}.tar\n" for n in range(2000))
    assert len(read_received(write(tmp_path / "a.yaml", f"a:\n{names}"))["a"]) == 2000


def test_no_recipe_comes_near_the_limits_of_a_received_config():
    for path in recipes().values():
        text = path.read_text("utf-8")
        assert len(list(yaml.parse(text))) < MAX_EVENTS / 20
        assert len(text) < CONFIG_BYTES / 20


def test_a_missing_config_file_names_the_nearest(tmp_path):
    write(tmp_path / "demo.yaml", "{}")
    with pytest.raises(ConfigError, match=r"mean demo\.yaml\?"):
        load([tmp_path / "dem.yaml"])
    with pytest.raises(ConfigError, match=r"not readable as YAML: Is a directory$"):
        load([tmp_path])


def test_a_saved_config_is_read_back_unchanged(tmp_path):
    """With the dollar signs of a shell, or of a folder's name:
    they were escaped in the user's file."""
    texts = [
        "${TOKEN}",
        r"\${x}",
        r"a\\${x}b",
        "a ${b} \\${c}",
        "$5",
        {"nested": ["${a", "${oc.env:HOME}"]},
    ]
    save({"data": {"params": texts}}, tmp_path / "c.yaml")
    assert load([tmp_path / "c.yaml"])["data"]["params"] == texts


@pytest.mark.parametrize(("below", "above"), [({2: [1]}, {2: {"a": 1}}), ({2: {"a": 1}}, {2: [1]})])
def test_merge_replaces_a_list_by_a_mapping_under_a_key_that_is_a_number(tmp_path, below, above):
    for name, content in (("below", below), ("above", above)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": content}))
    merged = merge_files([tmp_path / "below.yaml", tmp_path / "above.yaml"])
    assert merged["model"] == above
