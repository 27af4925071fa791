import csv
import math
from dataclasses import replace

import pytest

from olvae.evaluation.protocol import Protocol
from olvae.evaluation.report.tables import ImageValues, print_evaluations, write_csv, write_markdown
from olvae.evaluation.results import EQUAL, Evaluation, Result, read_earlier, write_metrics
from olvae.evaluation.roundtrip import Cost
from tests.evaluation.test_results import evaluation

COST = Cost(1_500_000, 2_000_000_000, 3_000_000_000, 12.34, None, 3 * 2**20, 4, "CPU, 1 thread")


def test_numbers_stay_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_evaluations([evaluation()])
    shown = capsys.readouterr().err
    for text in ("25.704 ±0.75", " 0.721 ", " 0.961 ", " 0.0312 ", " 0.138 ", " 0.079 ", " 1234 ", " 0.00042 "):
        assert text in shown, shown
    assert max(map(len, shown.splitlines())) <= 80
    assert ", 9 images" in " ".join(shown.split())


def test_markdown_has_quality_and_cost_in_one_row(tmp_path):
    protocol = Protocol(size=64, n=2)
    images = {"source": "my_photos", "n": 2, "sha256": "00", "unreadable": 1, "unreadable_files": {}, "enlarged": 0}
    good = Result("runs/a_b|c", 2, {"psnr": 25.704}, {"lpips": "no weights"}, {})
    equal = Result("same", 2, {}, {"psnr": EQUAL}, {})
    intervals = {"runs/a_b|c": {"psnr": (25.0, 26.0)}}
    write_markdown(Evaluation(protocol, images, [good, equal], {"runs/a_b|c": COST}, intervals), tmp_path / "m.md")
    assert (tmp_path / "m.md").read_text() == (
        f"Protocol open-litevae {protocol.hash()}, 64x64, of my_photos.\n"
        "\n"
        "| target | images | PSNR, dB | M params | GMACs encode | GMACs decode | img/s encode | img/s decode "
        "| MiB peak |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| runs/a_b\\|c | 2 | 25.704 ±0.50 | 1.50 | 2.00 | 3.00 | 12.3 | - | 3 |\n"
        "| same | 2 | ∞ | - | - | - | - | - | - |\n"
        "\n"
        "Cost of one image; speed and memory: CPU, 1 thread, batches of 4; memory beyond weights and images.\n"
        "\n"
        "- skipped LPIPS: no weights\n"
        "- note: unreadable images, which are not in these numbers: 1\n"
    )


def test_costs_of_earlier_results_stand_in_their_rows(tmp_path):
    name = "2026-01-31T12-00-00_A2_bf16"
    write_metrics(replace(evaluation(), costs={name: COST}), tmp_path / "metrics.json")
    rows = read_earlier(tmp_path / "metrics.json").beside(evaluation("new"), mix=False)
    write_markdown(evaluation("new").with_rows(rows), tmp_path / "m.md")
    text = (tmp_path / "m.md").read_text()
    new, old = [line for line in text.splitlines() if line.startswith(("| new", "| 2026"))]
    assert new.endswith(" | - | - | - | - | - | - |")
    assert old.endswith(" | 1.50 | 2.00 | 3.00 | 12.3 | - | 3 |")
    assert "speed and memory: CPU, 1 thread, batches of 4; memory" in text

    other = replace(COST, device="a GPU", batch_size=64)
    write_markdown(replace(evaluation("new"), costs={"new": other}).with_rows(rows), tmp_path / "m.md")
    where = f"a GPU, batches of 64 (new); CPU, 1 thread, batches of 4 ({name}); memory beyond weights and images."
    assert where in (tmp_path / "m.md").read_text()


def test_what_is_written_is_read_again(tmp_path):
    rows = [
        ImageValues('a, quoted "name"', "x/1.png", {"psnr": 1 / 3, "ssim": 0.5}),
        ImageValues("b", "ünï\ncode.png", {"psnr": math.inf, "lpips": 1e-7}),
        ImageValues("b", "not utf-8 \udcff.png", {}),
    ]
    path = tmp_path / "per_image.csv"
    write_csv(path, rows)
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        heading, *lines = csv.reader(file)
    assert heading == ["target", "key", "psnr", "ssim", "lpips"]
    assert [line[:2] for line in lines] == [[row.target, row.key] for row in rows]
    assert [line[2:] for line in lines] == [[repr(1 / 3), "0.5", ""], ["inf", "", "1e-07"], ["", "", ""]]
    assert float(lines[0][2]) == 1 / 3
    assert [file.name for file in tmp_path.iterdir()] == ["per_image.csv"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "per_image.csv"
    path.write_text("old")

    def broken():
        yield ImageValues("a", "1", {"psnr": 1.0})
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        write_csv(path, broken())
    assert path.read_text() == "old"
