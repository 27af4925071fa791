import json

import pytest

from olvae.bench import document
from olvae.bench.cases import Case, Group
from olvae.bench.document import bench_all, check_machine, moved, read_document
from olvae.config import ConfigError

MADE_UP = {"device": "A", "threads": 2}


def row(name: str, median: float, spread: float, **more) -> dict:
    same = {"group": "encoders", "name": name, "variant": "eager", "precision": "32", "size": 64, "batch_size": 1}
    return {**same, "median_ms": median, "spread_ms": spread, **more}


def test_rates_and_shares_of_limits(monkeypatch):
    limit = Case("product", "limit", "32", lambda: [2.0], 0, work=4e9)
    copied = Case("copy", "limit", "32", lambda: [1.0], 0, work=6e9, unit="bytes")
    network = Case("S", "eager", "32", lambda: [1.0, 3.0, 5.0], 8, 16, 4, 3e9, limits={"of_product": limit})
    monkeypatch.setitem(document.GROUPS, "made up", Group(lambda _: [limit, copied, network], False, {}))
    built = []
    content = bench_all(["made up"], "cpu", 1, lambda *group: built.append(group))
    assert built == [("made up", 3)]
    assert content["threads"] == 1
    assert content["rounds"] == 1
    first, second, third = content["rows"]
    same = {"group": "made up", "variant": "limit", "precision": "32", "spread_ms": 0.0}
    assert first == {**same, "name": "product", "median_ms": 2000.0, "gflop_per_s": 4.0}
    assert second == {**same, "name": "copy", "median_ms": 1000.0, "gbyte_per_s": 6.0}
    assert (third["size"], third["batch_size"]) == (16, 4)
    assert (third["median_ms"], third["spread_ms"]) == (3000.0, 2000.0)
    assert third["images_per_s"] == pytest.approx(8 / 3)
    assert third["gflop_per_s"] == pytest.approx(2.0)
    assert third["of_product"] == pytest.approx(0.5)  # 1 G a second of 2
    assert "peak_memory_bytes" not in third


def test_what_moved_by_more_than_both_spreads():
    before = [row("still", 10, 1), row("edge", 10, 1), row("faster", 10, 1), row("slower", 10, 1), row("gone", 1, 0)]
    now = [row("new", 1, 0), row("still", 11, 1), row("edge", 12, 1), row("faster", 5, 1), row("slower", 12.5, 1)]
    faster, slower = moved(before, now)
    assert (faster["name"], faster["before_ms"], faster["now_ms"], faster["ratio"]) == ("faster", 10, 5, 0.5)
    assert (slower["name"], slower["ratio"]) == ("slower", 1.25)
    assert moved(before, [row("slower", 100, 1, size=128)]) == []  # another case


def test_a_document_of_another_machine_is_refused():
    check_machine(MADE_UP, MADE_UP)
    with pytest.raises(ConfigError, match="--against: device was A and is B now"):
        check_machine(MADE_UP, {**MADE_UP, "device": "B"})
    with pytest.raises(ConfigError, match="--against: threads was 2 and is 1 now"):
        check_machine(MADE_UP, {**MADE_UP, "threads": 1})


def test_what_is_no_document_is_told(tmp_path):
    path = tmp_path / "before.json"
    with pytest.raises(ConfigError, match=r"before.json: No such file"):
        read_document(path)
    for text in ("no json", "[]", '{"rows": []}', json.dumps({**MADE_UP, "rows": [{"name": "a"}]})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not what `olvae bench all --json` prints"):
            read_document(path)
    path.write_text(json.dumps({**MADE_UP, "rows": [row("a", 1, 0)]}))
    assert read_document(path)["rows"] == [row("a", 1, 0)]
