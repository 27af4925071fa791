"""The study's tables from its rows' files."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from study.draw import TABLES, fill, main, read_rows
from study.measure import AXES
from study.rows import ALL_SIZES, rows

ROOT = Path(__file__).parent.parent.parent

BANDS = {
    f"{kind}{level}": {"mse": 4.0 * level}
    for level in (1, 2, 3)
    for kind in ("LL", "LH", "HL", "HH")
}


def row(psnr: float, **others: Any) -> dict[str, Any]:
    """What a row's file has, in the least."""
    size = {
        "psnr": psnr,
        "ssim": 0.7,
        "intervals": {"psnr": [psnr - 1, psnr + 1]},
        "bands": BANDS,
        "encode_macs": 5.5e9,
        "colour": {"shift_of_images": [1.0, 1.0, 13**0.5]},
    }
    sizes = {"64": size, "256": size}
    axes = dict.fromkeys(AXES, 0.25)
    found = {
        "sizes": sizes,
        "frechet_lite0": 3.0,
        "unexplained": axes,
        "steps": 10,
        "processor_seconds": 90.0,
    }
    return found | others


def worse(found: dict[str, Any]) -> dict[str, Any]:
    """The same row with twice the error in every band."""
    bands = {name: {"mse": 2 * band["mse"]} for name, band in BANDS.items()}
    return found | {
        "sizes": {size: of_size | {"bands": bands} for size, of_size in found["sizes"].items()}
    }


def everywhere(found: dict[str, Any]) -> dict[str, Any]:
    """The same row at all sizes."""
    return found | {"sizes": dict.fromkeys(map(str, ALL_SIZES), found["sizes"]["256"])}


ROWS = {
    "litevae_5e-4_0": worse(row(29.0)),  # by its details not the best
    "litevae_1e-3_0": row(24.0),
    "litevae_1e-3_1": row(26.0),
    "sd_5e-4_0": row(23.0),
    "litevae_linear_1e-3_0": row(
        27.0, bicubic={"64": {"psnr": 19.0}, "256": {"psnr": 22.0, "ssim": 0.6}}
    ),
    "sd_linear_longer_0": row(28.0) | {"steps": 40, "curve": [[0, 40], [25.0, 28.0]]},
    "sd_linear_long_0": everywhere(row(28.0)) | {"curve": [[0, 10], [25.0, 28.0]]},
    "no_wavelet_0": row(25.0),
    "no_wavelet_1": row(29.0) | {"frechet_lite0": 5.0},
    "sd_adversary_0": row(22.0),
}


def test_tables_of_the_study_have_means_and_spreads():
    encoders = TABLES["encoders"](ROWS).splitlines()
    assert (
        encoders[2]
        == "| LiteVAE-S | 5.5 | 10 | 5e-4 | 1 | 29.00 | 29.00 | 24 | 144 | 0.700 | 3.0 |"
    )
    assert encoders[3].startswith(
        "| LiteVAE-S | 5.5 | 10 | 1e-3 * | 2 | 25.00 ± 1.41 | 25.00 ± 1.41 |"
    )
    # the error in details is that of three bands: 4, 8 and 12, times 3
    assert encoders[3].endswith("| 12 ± 0 | 72 ± 0 | 0.700 ± 0.000 | 3.0 ± 0.0 |")
    assert encoders[4].startswith(
        "| LiteVAE-S, linear start | 5.5 | 10 | 1e-3 * | 1 | 27.00 | 27.00 |"
    )
    longer = TABLES["longer"](ROWS).splitlines()
    assert longer[2:] == [
        "| SD, linear start | 5e-4 | 1 | 2 | 28.00 | 28.00 | 5.0 | 7.0 | 72 | 25.0 | 25.0 | 25.0 "
        "| 0.700 | 3.0 |"
    ]
    long = TABLES["long"](ROWS).splitlines()
    assert long[2:] == [
        "| SD, linear start | 10 | 2 | 28.00 | 28.00 | 28.00 | 28.00 | 0.700 | 12.0 | 12.0 | 8.0 "
        "| 4.0 | 3.0 |"
    ]
    assert encoders[-1] == "| bicubic |  |  |  |  | 19.00 | 22.00 |  |  | 0.600 |  |"
    assert len(encoders) == 7  # no other row yet, and no linear code beside the baselines' row
    objective = TABLES["objective"](ROWS).splitlines()
    assert objective[-1] == (
        "| without the wavelet term | 25.00 ± 1.00 | 0.700 | 12.0 | 12.0 | 8.0 | 4.0 | 4.0 ± 1.4 |"
    )
    assert len(objective) == 4
    perceptual = TABLES["perceptual"](ROWS).splitlines()
    assert perceptual[2].startswith("| LiteVAE-S, the recipe's | 24.00 ± 1.00 |")
    assert perceptual[3].startswith("| SD, Lite0's features and an adversary | 22.00 ± 1.00 |")
    assert len(perceptual) == 4


def test_a_documents_tables_are_replaced_and_nothing_else(tmp_path):
    text = "before\n\n<!-- table: objective -->\nold\n<!-- end -->\n\nafter\n"
    filled = fill(text, ROWS, TABLES)
    assert filled.startswith(
        "before\n\n<!-- table: objective -->\n\n| objective | dB at 256 | SSIM |"
    )
    assert filled.endswith("<!-- end -->\n\nafter\n")
    assert "old" not in filled
    assert fill(filled, ROWS, TABLES) == filled
    with pytest.raises(ValueError, match=r"costs: .*encoders"):
        fill("<!-- table: costs -->\n<!-- end -->", ROWS, TABLES)


def test_draw_fills_a_document_and_draws(tmp_path):
    (tmp_path / "rows").mkdir()
    for name, found in ROWS.items():
        (tmp_path / "rows" / f"{name}.json").write_text(json.dumps(found))
    document = tmp_path / "results.md"
    document.write_text("<!-- table: objective -->\n<!-- end -->\n")
    main(["--rows", str(tmp_path / "rows"), "--document", str(document)])
    assert "| the recipe's | 24.00 ± 1.00 |" in document.read_text()
    for name in ("study_curves", "study_long"):
        with Image.open(tmp_path / "images" / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 20


def test_the_documents_tables_are_those_of_the_rows_in_the_repository():
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows_there = read_rows(ROOT / "study" / "results")
    assert fill(results, rows_there, TABLES) == results
    assert rows_there.keys() == {row.name for row in rows()}
