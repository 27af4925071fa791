"""``olvae bench all``, tiny, in this process."""

import json

import pytest

from olvae.bench import cases, limits
from olvae.config import save
from tests.conftest import tiny_config
from tests.models.steps import against


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Little of each group; returns the arguments of the training steps."""
    monkeypatch.setattr(cases, "ENCODERS", {"S": cases.ENCODERS["S"]})
    monkeypatch.setattr(cases, "DECODERS", {})
    monkeypatch.setattr(cases, "PHOTOGRAPHS", cases.PHOTOGRAPHS[:2])
    monkeypatch.setattr(cases, "HELD_OUT", ())
    monkeypatch.setattr(cases, "DATA_SECONDS", 0.01)
    monkeypatch.setattr(cases, "WORKERS", (0,))
    monkeypatch.setitem(limits.SIDES, "cpu", 32)
    options = {name: cases.STEP_OPTIONS[name] for name in ("plain", "compiled", cases.EVERY)}
    monkeypatch.setattr(cases, "STEP_OPTIONS", options)
    save(tiny_config(), tmp_path / "a.yaml")
    save(tiny_config(adversary_config=against()), tmp_path / "b.yaml")
    return ["--phase-a", tmp_path / "a.yaml", "--phase-b", tmp_path / "b.yaml"]


def test_everything(olvae, tiny, tmp_path):
    command = ["bench", "all", "--size", 16, "-B", 2, "--rounds", 1, *tiny]
    code, out, err = olvae(*command, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert {"device", "threads", "torch", "date", "rounds", "rows"} == document.keys()
    assert list(dict.fromkeys(row["group"] for row in document["rows"])) == [*cases.GROUPS]
    measured = [row for row in document["rows"] if "limit" not in row["variant"]]
    assert all(row["median_ms"] > 0 and row["images_per_s"] > 0 for row in measured)
    shares = {(row["group"], key) for row in measured for key in row if key.startswith("of_")}
    assert shares == {
        ("wavelet", "of_copy"),
        ("encoders", "of_product"),
        ("encoders", "of_convolution"),
        ("train", "of_product"),
        ("data", "of_floor"),
        ("encode", "of_encoder"),
    }
    variants = {(row["variant"], row["precision"]) for row in measured if row["group"] == "encoders"}
    assert variants == {(layout, precision) for layout in ("eager", "channels-last") for precision in ("32", "bf16")}
    steps = {(row["name"][:7], row["variant"]) for row in measured if row["group"] == "train"}
    assert steps == {(phase, name) for phase in ("phase A", "phase B") for name in ("plain", cases.EVERY)}

    for row in document["rows"]:
        row["median_ms"], row["spread_ms"] = 1e9, 0.0
    (tmp_path / "before.json").write_text(json.dumps(document))
    code, out, err = olvae(*command, "--groups", "wavelet", "--against", tmp_path / "before.json")
    assert (code, out) == (0, "")
    assert "| with gradient | 32 " in err
    assert "moved since" in err

    (tmp_path / "before.json").write_text(json.dumps({**document, "device": "another"}))
    code, _, err = olvae(*command, "--against", tmp_path / "before.json")
    assert code == 2
    assert err.startswith("error: --against: device was another and is ")


def test_a_group_that_is_not_there(olvae):
    code, _, err = olvae("bench", "all", "--groups", "wavelet,networks")
    assert code == 2
    assert err.startswith("error: --groups networks: choose from wavelet, encoders, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.jpg"], "--out a.jpg: the plot is a PNG"),
        (["--out", "a.png", "--sizes", "100"], "--sizes 100: give multiples of 8"),
        (["--out", "a.png", "--batches", "0"], "--batches 0: give numbers of images"),
        (["--out", "a.png", "--sizes", "100000"], "--sizes, --batches: none of them fits the memory"),
    ],
)
def test_scaling_that_cannot_be(olvae, arguments, message):
    code, _, err = olvae("bench", "scaling", *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
