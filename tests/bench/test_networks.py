import pytest

from olvae.bench.networks import DECODERS, ENCODERS, bench_dwt, bench_networks
from olvae.modules.base import count_parameters


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


@pytest.mark.parametrize(("wavelet", "count"), [("haar", 3), ("db2", 2)])
def test_all_compute_the_same(wavelet, count):
    rows = bench_dwt(2, 32, wavelet, "cpu", rounds=1)
    assert len(rows) == count
    assert all(row["max_difference"] < 1e-5 for row in rows)
    assert rows[0]["ratio"] == 1.0
    assert all(row["images_per_s"] > 0 for row in rows)


def test_rows_are_near_what_was_published(network_rows):
    rows = network_rows
    assert {row.name for row in rows if row.group == "encoder"} == {"S", "B", "M", "L", "sd"}
    assert {row.name for row in rows if row.group == "decoder"} == {"open_litevae", "paper_smc", "sd"}
    unets = {f"UNetGAN-{scale}" for scale in "SML"}
    assert {row.name for row in rows if row.group == "discriminator"} == {"PatchGAN", "GigaGAN", *unets}
    assert {row.variant for row in rows if row.group == "encoder"} == {"open_litevae", "paper", "sd"}
    for row in rows:
        if row.published_params is not None:
            assert row.params == pytest.approx(row.published_params, rel=0.01), row
        if row.published_macs is not None:
            assert row.macs == pytest.approx(row.published_macs, rel=0.02), row
