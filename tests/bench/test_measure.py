import json
from itertools import count

import pytest
import torch

from olvae.bench import measure as module
from olvae.bench.measure import (
    Case,
    Times,
    clocked,
    copy_of,
    machine,
    matrix_product,
    measure,
    moved,
    read_document,
    rows_of,
)
from olvae.config import ConfigError


def test_statistics():
    times = Times([4.0, 1.0, 3.0, 2.0, 10.0])
    assert times.median == 3.0
    assert times.spread == 4.0 - 2.0  # the second and the fourth of five
    assert Times([1.0, 2.0]).spread == 0.5  # quartiles at 1.25 and 1.75
    assert Times([7.0]).spread == 0.0


@pytest.mark.parametrize("warm_up", [True, False])
def test_each_has_a_turn_in_each_round(warm_up):
    order, number = [], count()

    def work(name):
        return lambda: order.append(name) or [float(next(number))]

    times = measure({name: work(name) for name in "ab"}, "cpu", rounds=2, warm_up=warm_up)
    assert "".join(order) == "ab" * (2 + warm_up)
    first = 2 if warm_up else 0
    assert times["a"].seconds == [first, first + 2]
    assert times["b"].seconds == [first + 1, first + 3]
    assert times["a"].peak_bytes is None
    assert measure({"a": lambda: [1.0, 2.0]}, "cpu", rounds=2, warm_up=False)["a"].seconds == [1.0, 2.0, 1.0, 2.0]


def test_plain_operations(monkeypatch):
    monkeypatch.setitem(module.MATRIX_SIDE, "cpu", 4)
    product, macs = matrix_product("cpu", torch.float32)
    assert (tuple(product().shape), macs) == ((4, 4), 64)
    x = torch.randn(5)
    copied, nbytes = copy_of(x)
    assert torch.equal(copied(), x)
    assert nbytes == 2 * 5 * 4
    calls = []
    (seconds,) = clocked(lambda: calls.append(0), "cpu")()
    assert calls == [0]
    assert seconds >= 0


def test_rates_shares_and_ratios():
    limit = Case("product", "limit", "32", lambda: [2.0], 0, work=4e9)
    copied = Case("copy", "limit", "32", lambda: [1.0], 0, work=6e9, unit="bytes")
    peer = Case("sd", "eager", "32", lambda: [2.0], 2, 16, 2, computed_bytes=7)
    network = Case("S", "eager", "32", lambda: [1.0, 3.0, 5.0], 8, 16, 4, 3e9, limits={"of_product": limit}, peer=peer)
    first, second, third, fourth = rows_of("made up", [limit, copied, peer, network], "cpu", 1, False)
    same = {"group": "made up", "variant": "limit", "precision": "32", "spread_ms": 0.0}
    assert first == {**same, "name": "product", "median_ms": 2000.0, "gflop_per_s": 4.0}
    assert second == {**same, "name": "copy", "median_ms": 1000.0, "gbyte_per_s": 6.0}
    assert (third["images_per_s"], third["peak_memory_bytes"]) == (1.0, 7)
    assert (fourth["size"], fourth["batch_size"]) == (16, 4)
    assert (fourth["median_ms"], fourth["spread_ms"]) == (3000.0, 2000.0)
    assert fourth["images_per_s"] == fourth["ratio"] == pytest.approx(8 / 3)
    assert fourth["gflop_per_s"] == pytest.approx(2.0)
    assert fourth["of_product"] == pytest.approx(0.5)  # 1 G a second of 2
    assert "peak_memory_bytes" not in fourth


def row(name: str, median: float, spread: float, **more) -> dict:
    same = {"group": "encoder", "name": name, "variant": "eager", "precision": "32", "size": 64, "batch_size": 1}
    return {**same, "median_ms": median, "spread_ms": spread, **more}


def test_what_moved_by_more_than_both_spreads():
    before = [row("still", 10, 1), row("edge", 10, 1), row("faster", 10, 1), row("slower", 10, 1), row("gone", 1, 0)]
    now = [row("new", 1, 0), row("still", 11, 1), row("edge", 12, 1), row("faster", 5, 1), row("slower", 12.5, 1)]
    faster, slower = moved(before, now)
    assert (faster["name"], faster["before_ms"], faster["now_ms"], faster["ratio"]) == ("faster", 10, 5, 0.5)
    assert (slower["name"], slower["ratio"]) == ("slower", 1.25)
    assert moved(before, [row("slower", 100, 1, size=128)]) == []  # another case


def test_a_document_of_before(tmp_path):
    path, here = tmp_path / "before.json", machine("cpu")
    with pytest.raises(ConfigError, match=r"before.json: No such file"):
        read_document(path, "cpu")
    for text in ("no json", "[]", '{"rows": []}', json.dumps({**here, "rows": [{"name": "a"}]})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not a JSON document of `olvae bench`"):
            read_document(path, "cpu")
    path.write_text(json.dumps({**here, "torch": "1.0", "rows": [row("a", 1, 0)]}))
    assert read_document(path, "cpu")["rows"] == [row("a", 1, 0)]
    for key, value in (("device", "another"), ("threads", 99)):
        path.write_text(json.dumps({**here, key: value, "rows": []}))
        with pytest.raises(ConfigError, match=f"before.json: {key} was {value} and is "):
            read_document(path, "cpu")
