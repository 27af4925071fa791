import pytest

from olvae.evaluation.tables import network_table


def test_rows_are_near_what_was_published():
    rows = network_table()
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
