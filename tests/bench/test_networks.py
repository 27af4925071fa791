import pytest

from olvae.bench.networks import DECODERS, ENCODERS, bench_networks
from olvae.modules.counting import count_parameters


def test_each_network_beside_the_peer():
    some = {name: ENCODERS[name] for name in ("sd", "S")}
    peer, small = bench_networks(some, (1, 3, 16, 16), "cpu", rounds=1)
    assert (peer["name"], small["name"]) == ("sd", "S")
    assert peer["ratio"] == 1.0
    assert small["ratio"] == pytest.approx(small["images_per_s"] / peer["images_per_s"])
    assert small["params"] == count_parameters(ENCODERS["S"]())
    assert 0 < small["peak_memory_bytes"] < peer["peak_memory_bytes"]


def test_the_decoders_are_the_published_sizes():
    counts = {name: count_parameters(build()) for name, build in DECODERS.items()}
    assert round(counts["open_litevae"] / 1e6, 2) == 53.33
    assert round(counts["paper_smc"] / 1e6, 2) == 48.46
    assert counts["open_litevae, folded"] < counts["open_litevae"]
