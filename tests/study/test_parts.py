"""The study's question of parts: its configs, and its table in the document."""

from pathlib import Path

import pytest

from olvae import config as cfg
from olvae.data.places import load
from study.parts import OTHER_SEEDS, PARTS, RECIPE, TO_CROPS, TO_DECODED, node, read, table

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_the_study_is_a_valid_config(name):
    assert cfg.validate(load([RECIPE], node(name))) == []


def test_the_table_of_parts_is_that_of_the_files_in_the_repository():
    assert table(read()) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def row(distances, ifid):
    """A part's file with these distances of its seeds, as study/parts.py writes it."""
    seeds = [{TO_CROPS: 2.0 * distance, TO_DECODED: distance} for distance in distances]
    return {
        "psnr": 30.0,
        "frechet_lite0": {"reconstructions": 1.0, "decoded_latents": 2.0},
        "seeds": seeds,
        "predictors": {"ifid": ifid, "precision": 0.5},
    }


def test_a_star_marks_what_is_beyond_two_deviations_and_the_predictors_are_ranked():
    found = {
        "none": row([10.0, 11.0, 12.0], 3.0),
        "noise": row([7.0, 7.5, 8.0], 1.0),
        "masking": row([10.5, 11.0, 11.5], 2.0),
    }
    lines = [line.split(" | ") for line in table(found).splitlines()]
    assert lines[2][5] == "11.0 ± 1.0"
    assert lines[3][5] == "7.5 ± 0.5 *"  # 3.5 apart, two pooled deviations are 1.6
    assert lines[4][5] == "11.0 ± 0.5"
    # Ranks 2.5, 1, 2.5 beside 3, 1, 2: Spearman's correlation is .87. All of precision is one rank.
    assert lines[-1][0] == "| rank correlation with samples to decoded latents"
    assert lines[-1][6].strip() == "0.87"
    assert lines[-1][7].strip(" |") == ""


def test_the_control_is_trained_by_other_seeds_too():
    assert {PARTS[name] for name in OTHER_SEEDS} == {""}
    assert sorted(OTHER_SEEDS.values()) == [1, 2]
