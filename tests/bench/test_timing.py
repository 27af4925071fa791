from itertools import count

import pytest

from olvae.bench.timing import Times, clocked, measure


def test_statistics():
    times = Times([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (times.best, times.median) == (1.0, 3.0)
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


def test_work_may_be_several_times():
    assert measure({"a": lambda: [1.0, 2.0]}, "cpu", rounds=2, warm_up=False)["a"].seconds == [1.0, 2.0, 1.0, 2.0]


def test_clocked_is_one_call():
    calls = []
    (seconds,) = clocked(lambda: calls.append(0), "cpu")()
    assert calls == [0]
    assert seconds >= 0
