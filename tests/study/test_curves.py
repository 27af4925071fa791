"""The curves of docs/troubleshooting.md: what the page says of them, and their picture."""

import json
from pathlib import Path

from PIL import Image

from olvae.data.places import load
from study.curves import CURVES, main

RESULTS = Path(__file__).parent.parent.parent / "study" / "results" / "curves"


def test_curves_show_what_the_page_says_and_are_drawn_without_training(tmp_path):
    main(
        [
            "--out",
            str(tmp_path),
            "--results",
            str(RESULTS),
            "--picture",
            str(tmp_path / "curves.png"),
        ]
    )
    assert Image.open(tmp_path / "curves.png").width == 720
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in CURVES}
    (start, *healthy), rate, kl = (found[name]["val/psnr"][1] for name in CURVES)
    assert healthy == sorted(healthy)
    assert start + 0.4 < healthy[-1] < start + 1  # rises by tenths
    assert (
        CURVES["rate"].override
        == f"model.base_learning_rate={10 * load(['demo'])['model']['base_learning_rate']}"
    )
    assert max(rate[1:]) < start
    assert sorted(found["rate"]["train/grad_norm"][1])[50] > 1  # clipped in half of the steps
    assert kl == sorted(kl, reverse=True)
    assert found["kl"]["train/kl"][1][-1] < 0.05 * found["kl"]["train/kl"][1][0]
