"""The tables of the study's maps: what counts as a difference, and the document's."""

import json
from pathlib import Path

from study.latent_maps import MAPS
from study.maps_table import AUTOENCODERS, MEASURED, SEEDS, differs, read, table

ROOT = Path(__file__).parent.parent.parent


def test_a_difference_passes_two_deviations_and_the_controls_seeds():
    control = [10.0, 11.0, 12.0]
    assert not differs(control, [12.5, 12.9, 13.3])  # 1.9 apart, the seeds 2
    assert differs(control, [13.5, 13.9, 14.3])
    assert not differs(control, [11.0, 14.0, 17.0])  # 3 apart, twice the deviation is 4.5
    assert not differs(control, control)
    assert not differs(control, [50.0])  # one seed has no deviation


def test_a_table_marks_differences_and_ranks_predictors(tmp_path):
    (tmp_path / "f8c12.json").write_text(json.dumps({"other_crops": 50.0, "normal": 170.0}))
    for place, name in enumerate(("plain", "W", "X")):
        predictors = dict.fromkeys(MEASURED, 0.5) | {"ifid": 9.0 - place, "high_frequencies": place}
        (tmp_path / f"f8c12_{name}.json").write_text(json.dumps(predictors))
        for seed in SEEDS[: 3 - place]:  # an interrupted run
            found = {"frechet_lite0_to_decoded": 100.0 + 5 * place + seed, "loss_in_linear": 0.9}
            (tmp_path / f"f8c12_{name}_{seed}.json").write_text(json.dumps(found))
    lines = table(read(tmp_path)["f8c12"]).splitlines()
    same = "0.5 | 0.5 | 0.5"
    assert lines[2] == f"| none | 101.0 \u00b1 1.0 | 0.900 \u00b1 0.000 | 0 | {same} | 9 | 0.5 |"
    assert lines[3].startswith("| W: each channel to deviation 1 | 105.5 \u00b1 0.7 * | 0.900")
    assert lines[4].startswith("| X: random signs by position | 110.0 | 0.900 | 2 |")
    assert lines[5] == "| no model: latents of other crops | 50.0 |  |  |  |  |  |  |  |"
    assert lines[7] == "| rank correlation with samples |  |  | 1.00 |  |  |  | -1.00 |  |"


def test_the_results_in_the_repository_are_whole():
    found = read()
    for rows in found.values():
        assert rows.keys() == {"baselines", *MAPS}
        assert all(len(rows[name]["seeds"]) == len(SEEDS) for name in MAPS)
    # and in the document: tests/study/test_draw.py
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for autoencoder in AUTOENCODERS:
        assert f"<!-- table: maps_{autoencoder} -->" in document
