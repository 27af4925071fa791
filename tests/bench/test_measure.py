from itertools import count

import pytest

from olvae.bench.measure import Case, Times, measure_case, rows_of


def test_times_have_median_and_interquartile_spread():
    times = Times([4.0, 1.0, 3.0, 2.0, 10.0])
    assert times.median == 3.0
    assert times.spread == 4.0 - 2.0  # the second and the fourth of five
    assert Times([1.0, 2.0]).spread == 0.5  # quartiles at 1.25 and 1.75
    assert Times([7.0]).spread == 0.0


@pytest.mark.parametrize("warm_up", [True, False])
def test_measured_cases_take_turns_in_each_round(warm_up):
    order, number = [], count()

    def work(name):
        return lambda: order.append(name) or [float(next(number))]

    times = measure_case({name: work(name) for name in "ab"}, "cpu", rounds=2, warm_up=warm_up)
    assert "".join(order) == "ab" * (2 + warm_up)
    first = 2 if warm_up else 0
    assert times["a"].seconds == [first, first + 2]
    assert times["b"].seconds == [first + 1, first + 3]
    assert times["a"].peak_bytes is None
    assert measure_case({"a": lambda: [1.0, 2.0]}, "cpu", rounds=2, warm_up=False)["a"].seconds == [
        1.0,
        2.0,
        1.0,
        2.0,
    ]


def test_rates_shares_of_limits_and_ratios_to_peers():
    limit = Case("product", "limit", "32", lambda: [2.0], 0, work=4e9)
    copied = Case("copy", "limit", "32", lambda: [1.0], 0, work=6e9, unit="bytes")
    peer = Case("sd", "eager", "32", lambda: [2.0], 2, 16, 2, computed_bytes=7)
    network = Case(
        "S",
        "eager",
        "32",
        lambda: [1.0, 3.0, 5.0],
        8,
        16,
        4,
        3e9,
        limits={"of_product": limit},
        peer=peer,
    )
    first, second, third, fourth = rows_of(
        "made up", [limit, copied, peer, network], "cpu", 1, False
    )
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
