"""``olvae bench``, tiny, in this process."""

import json
from pathlib import Path

import pytest

from olvae.bench import cases, measure
from olvae.config import save
from tests.conftest import tiny_config
from tests.models.steps import against

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Little of each group; returns the arguments of the training steps."""
    monkeypatch.setattr(cases, "ENCODERS", {"peer": cases.ENCODERS["S"], "S": cases.ENCODERS["S"]})
    monkeypatch.setattr(cases, "DECODERS", {})
    monkeypatch.setattr(cases, "SECONDS", 0.01)
    monkeypatch.setitem(measure.MATRIX_SIDE, "cpu", 32)
    options = {name: cases.STEP_OPTIONS[name] for name in ("plain", "compiled", cases.EVERY)}
    monkeypatch.setattr(cases, "STEP_OPTIONS", options)
    save(tiny_config(), tmp_path / "a.yaml")
    save(tiny_config(adversary_config=against()), tmp_path / "b.yaml")
    return ["--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml", "--workers", "0"]


@pytest.mark.slow
def test_bench_all_measures_every_group(olvae, tiny):
    options = ["--size", 16, "-B", 2, "--rounds", 1]
    code, out, err = olvae("bench", "all", *options, *tiny, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert {"device", "threads", "torch", "date", "rounds", "rows"} == document.keys()
    assert list(dict.fromkeys(row["group"] for row in document["rows"])) == [*cases.GROUPS]
    measured = [row for row in document["rows"] if "limit" not in row["variant"]]
    assert all(row["median_ms"] > 0 and row["images_per_s"] > 0 for row in measured)
    shares = {f"{row['group']} {key}" for row in measured for key in row if key.startswith("of_")}
    assert shares == {
        "dwt of_copy",
        "encoder of_product",
        "train of_product",
        "data of_floor",
        "encode of_reading",
    }
    variants = {(row["variant"], row["precision"]) for row in measured if row["group"] == "encoder"}
    assert variants == {
        (layout, precision) for layout in ("eager", "channels-last") for precision in ("32", "bf16")
    }
    steps = {(row["name"][-6:], row["variant"]) for row in measured if row["group"] == "train"}
    expected = {
        (config, name) for config in ("a.yaml", "b.yaml") for name in ("plain", cases.EVERY)
    }
    assert steps == expected | {("b.yaml", "two forward passes")}
    ratios = {f"{row['group']} {row['name'][-6:]}" for row in measured if "ratio" in row}
    assert ratios == {"dwt vedec2", "encoder peer", "encoder S", "train b.yaml"}


def test_bench_prints_a_table_of_80_columns(olvae, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = olvae("bench", "dwt", "--size", 16, "-B", 2, "--rounds", 1)
    assert (code, out) == (0, "")
    table = err.partition("\n")[2].partition("\n")[2]
    assert "size 16, batch size 2, precision 32" in " ".join(err.split())
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dwt,networks"], "GROUPS networks: choose from all, dwt, encoder, "),
        (["dwt", "photos"], "photos: only data and encode take sources"),
        (["encoder", "--size", 100], "--size 100: must be a multiple of 8, such as 96"),
        (["data", "--workers", "a"], "--workers a: give numbers of processes"),
        (["data", "--workers", "²"], "--workers ²: give numbers of processes"),
        (["data", "--workers", ""], "--workers is empty: give a value"),
        ([","], "GROUPS ,: choose from all, dwt"),
        (["dwt", "--workers", 0], "--workers applies to data or encode: give both, or neither"),
        (["dwt", "--config", "demo"], "--config applies to train: give both, or neither"),
    ],
)
def test_bench_refuses_wrong_arguments(olvae, arguments, message):
    code, _, err = olvae("bench", *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")


def test_bench_refuses_a_config_that_starts_from_an_autoencoder(olvae, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"include: {ROOT}/configs/demo.yaml\nmodel: {{from: diffusers:some/vae}}\n"
    )
    code, out, err = olvae("bench", "train", "--config", tmp_path / "a.yaml")
    assert (code, out) == (2, "")
    assert f"error: {tmp_path}/a.yaml: model.from " in err
