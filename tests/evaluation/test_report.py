import csv
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from olvae.data.pixels.size_and_range import PixelRange
from olvae.evaluation.cells import Cell
from olvae.evaluation.observers.cross import Cross
from olvae.evaluation.observers.half_precision import HalfPrecision
from olvae.evaluation.observers.observer import Evaluated, Observation
from olvae.evaluation.observers.pixels.colour import Colour
from olvae.evaluation.observers.pixels.not_rgb import RealValues
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.report import (
    print_grid,
    print_results,
    write_csv,
    write_files,
    write_markdown,
)
from olvae.evaluation.results import Results, Row
from olvae.evaluation.round_trip import Cost
from olvae.files import write_json
from olvae.pretrained_networks import INCEPTION, VGG16
from tests.evaluation.test_results import NAME, read_back, results_of, row

COUNTED = Cost(1, 2, 3, None, None, None, 4, "a GPU")
COST = Cost(1_500_000, 2_000_000_000, 3_000_000_000, 12.34, 5.678, 3 * 2**20, 4, "CPU, 1 thread")


def test_report_numbers_stay_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_results([Evaluated(results_of(row()))])
    shown = capsys.readouterr().err
    for text in (
        "25.704 ±0.75",
        " 0.721 ",
        " 0.961 ",
        " 0.0312 ",
        " 0.138 ",
        " 0.079 ",
        " 1234 ",
        " 0.00042 ",
    ):
        assert text in shown, shown
    table = shown[: shown.index("misses a pixel's values")].rpartition("\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert ", 90 images" in " ".join(shown.split())


def test_more_columns_than_fit_take_several_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cells = {f"metric {i}": Cell(f"{i}{i}.{i}{i}{i} ±{i}.00") for i in range(10)}
    print_grid(
        Console(stderr=True),
        "title",
        {"runs/2026-11-27T12-34-56_a_long_name_bf16": cells, "b": cells},
    )
    shown = capsys.readouterr().err
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("title") == 1
    assert all(shown.count(cell.text) == 2 for cell in cells.values())
    print_grid(Console(stderr=True, width=16), "", {"a": cells})
    assert capsys.readouterr().err.count("target") == len(cells)  # no table of names alone


def test_markdown_has_quality_and_cost_in_one_row(tmp_path):
    protocol = Protocol(size=64, n=2)
    intervals = {"psnr": (25.0, 26.0)}
    good = Row("runs/a_b|c", 2, {"psnr": 25.704}, {"lpips": "no weights"}, intervals, cost=COST)
    equal = Row("same", 2, {"psnr": math.inf})
    results = results_of(good, equal, protocol=protocol, source="my_photos", n=2, unreadable=1)
    write_markdown(Evaluated(results), tmp_path / "m.md")
    assert (tmp_path / "m.md").read_text() == (
        f"Protocol open-litevae {protocol.hash()}, 64x64, of my_photos.\n"
        "\n"
        "| target | images | PSNR, dB | M params | GMACs encode | GMACs decode | img/s encode "
        "| img/s decode | MiB peak |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| runs/a_b\\|c | 2 | 25.704 ±0.50 | 1.50 | 2.00 | 3.00 | 12.3 | 5.68 | 3.00 |\n"
        "| same | 2 | ∞ | - | - | - | - | - | - |\n"
        "\n"
        "Cost of one image; speed and memory: CPU, 1 thread, batches of 4; memory beyond weights "
        "and images.\n"
        "\n"
        "- runs/a_b\\|c misses a pixel's values by about 13.2 of 255 (PSNR 25.70 dB).\n"
        "- skipped LPIPS: no weights\n"
        "- warning: few images, 2: other ones give other numbers\n"
        "- warning: unreadable images, which are not in these numbers: 1\n"
    )


def test_missing_networks_take_one_line_on_the_terminal_and_their_own_in_the_files(
    tmp_path, capsys
):
    missing = {
        "lpips": f"{VGG16.name} is not in x",
        "rfid": f"{INCEPTION.name} is not in y",
        "lpips_alex": "LPIPS needs images of at least 31 pixels",
    }
    evaluated = Evaluated(results_of(Row("a", 2, {"psnr": 25.0}, missing)))
    print_results([evaluated])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(lines) == 2
    assert lines[0].startswith("skipped LPIPS, rFID: ")
    assert lines[1] == "skipped LPIPS Alex: LPIPS needs images of at least 31 pixels"
    write_markdown(evaluated, tmp_path / "m.md")
    assert (tmp_path / "m.md").read_text().count("- skipped ") == 3


@pytest.mark.parametrize("command", [None, "olvae evaluate"])
def test_a_page_that_fails_leaves_earlier_results(tmp_path, command):
    write_files(Evaluated(results_of(row()), []), tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()
    broken = Evaluated(results_of(row("b", observed={"colour": {"shift": [0.1]}})), [Colour()])
    with pytest.raises(KeyError, match="saturation"):
        write_files(broken, tmp_path, command=command)
    assert (tmp_path / "metrics.json").read_bytes() == before
    write_json(broken.results.as_dict(), tmp_path / "old.json")
    with pytest.raises(ValueError, match=r"old\.json: .*'saturation'"):
        Results.read(tmp_path / "old.json", [Colour()])


def test_observers_add_lines_below_the_markdown_table(tmp_path):
    def found(
        dtype: str, value: float, limit: float, lost: float | None = 0.0, broken: int = 0
    ) -> dict:
        largest = {
            "largest": {},
            "largest_name": "decoder.conv_out",
            "largest_value": value,
            "limit": limit,
        }
        non_finite = {"images": broken, "values": broken, "first": "decoder.up.0"}
        return {
            "precision": {
                "dtype": dtype,
                **largest,
                "non_finite": non_finite,
                "psnr_lost": lost,
                "safe": not broken,
            }
        }

    latents = {"teacher": "a", "rmse": 0.18, "per_channel": [0.18, None], "teacher_std": [1.0, 0.0]}
    rows = (
        Row("a", 50, {"psnr": 20.0}, observed=found("32", 71234.4, 3.4e38)),
        Row("a, fp16", 50, {"psnr": 5.0}, observed=found("fp16", 9.0, 65504.0, 15.0, broken=3)),
        Row("a, bf16", 50, {"psnr": 20.0}, observed=found("bf16", 3.14159, 3.4e38, lost=-0.0625)),
        Row("b", 50, {"psnr": 20.0}, cost=COUNTED, observed={"latents": latents}),
    )
    write_markdown(Evaluated(results_of(*rows), [HalfPrecision(), Cross()]), tmp_path / "m.md")
    lines = (tmp_path / "m.md").read_text().splitlines()
    assert lines[-4:] == [
        "- a: largest activation 71,234 at decoder.conv_out; fp16 ends at 65,504",
        "- a, fp16: largest activation 71,234 at decoder.conv_out in float32, beyond 65,504; 3 of "
        "50 images non-finite, first at decoder.up.0; PSNR -15.000 dB: not safe",
        "- a, bf16: largest activation 3.14 at decoder.conv_out; PSNR +0.062 dB: safe",
        "- latents of b: RMS error 0.180 in standard deviations of a; per channel 0.180, -",
    ]
    assert lines[2] == "| target | images | PSNR, dB | M params | GMACs encode | GMACs decode |"


def test_costs_of_earlier_results_stand_in_their_rows(tmp_path):
    earlier = {tmp_path: read_back(results_of(row(cost=COST)), tmp_path)}
    write_markdown(Evaluated(results_of(row("new")).beside(earlier)), tmp_path / "m.md")
    text = (tmp_path / "m.md").read_text()
    new, old = [line for line in text.splitlines() if line.startswith(("| new", "| 2026"))]
    assert new.endswith(" | - | - | - | - | - | - |")
    assert old.endswith(" | 1.50 | 2.00 | 3.00 | 12.3 | 5.68 | 3.00 |")
    assert "CPU, 1 thread, batches of 4; memory" in text

    other = replace(COST, device="a GPU", batch_size=64)
    write_markdown(Evaluated(results_of(row("new", cost=other)).beside(earlier)), tmp_path / "m.md")
    machines = f"a GPU, batches of 64 (new); CPU, 1 thread, batches of 4 ({NAME})"
    where = f"{machines}; memory beyond weights and images."
    assert where in (tmp_path / "m.md").read_text()


def test_per_image_csv_is_read_again(tmp_path):
    first = "ünï\ncode.png"
    second = "not utf-8 \udcff.png"
    rows = [
        Row(
            'a, quoted "name"',
            1,
            {},
            per_image={"psnr": {"x/1.png": 1 / 3}, "ssim": {"x/1.png": 0.5}},
        ),
        Row(
            "b", 2, {}, per_image={"psnr": {first: math.inf}, "lpips": {first: 1e-7, second: 0.25}}
        ),
    ]
    path = tmp_path / "per_image.csv"
    write_csv(results_of(*rows), path)
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        heading, *lines = csv.reader(file)
    assert heading == ["target", "key", "psnr", "ssim", "lpips"]
    assert [line[:2] for line in lines] == [
        ['a, quoted "name"', "x/1.png"],
        ["b", second],
        ["b", first],
    ]
    assert [line[2:] for line in lines] == [
        [repr(1 / 3), "0.5", ""],
        ["", "", "0.25"],
        ["inf", "", "1e-07"],
    ]
    assert float(lines[0][2]) == 1 / 3
    assert [file.name for file in tmp_path.iterdir()] == ["per_image.csv"]


def test_per_volume_csv_has_means_and_real_units_of_each_volume(tmp_path):
    keys = [f"p1/ct.nii.gz/{n:04d}" for n in range(3)] + ["p2/1.2.826.7/0000"]
    x = torch.zeros(4, 1, 2, 2)
    y = torch.tensor([1.0, 2.0, 3.0, 5.0])[:, None, None, None].expand(4, 1, 2, 2)
    stated = PixelRange.from_node([0, 255])
    observer = RealValues()
    observer.update(Observation("vae", 0, keys, x, y, torch.zeros(1), {}, stated))
    psnr = dict(zip(keys, [10.0, 20.0, 60.0, math.inf], strict=True))
    results = results_of(Row("vae", 4, {}, per_image={"psnr": psnr}))
    written = write_files(Evaluated(results, [observer]), tmp_path)
    with written["volumes"].open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert [first[name] for name in ("target", "volume", "slices")] == ["vae", "p1/ct.nii.gz", "3"]
    assert float(first["psnr"]) == 30
    assert float(first["rmse"]) == pytest.approx(math.sqrt(14 / 3))
    assert float(first["mae"]) == pytest.approx(2)
    assert (second["volume"], second["psnr"]) == ("p2/1.2.826.7", "inf")

    photos = results_of(Row("vae", 1, {}, per_image={"psnr": {"000000/00000001": 1.0}}))
    assert "volumes" not in write_files(Evaluated(photos), tmp_path)


def test_a_carriage_return_in_a_name_ends_no_line(tmp_path):
    names = ["a\rb.png", "c\r\nd.png", "\r.png"]
    row = Row("t\r", len(names), {}, per_image={"psnr": dict.fromkeys(names, 1.5)})
    write_csv(results_of(row), tmp_path / "per_image.csv")
    with (tmp_path / "per_image.csv").open(newline="", encoding="utf-8") as file:
        _, *lines = csv.reader(file)
    assert sorted(key.removeprefix("'") for _, key, _ in lines) == sorted(
        [r"a\rb.png", "c\\r\nd.png", r"\r.png"]
    )
    assert {(target, value) for target, _, value in lines} == {(r"t\r", "1.5")}


def test_names_that_spreadsheets_would_run(tmp_path):
    """Each gets one apostrophe, which a reader takes away; negative numbers stay numbers."""
    names = ["=1+1.png", "+1.png", "-1.png", "@a.png", "\t=1.png", "'=1.png"]
    names += ["a=1.png", " =1.png"]
    row = Row("=cmd", len(names), {}, per_image={"psnr": dict.fromkeys(names, -1.5)})
    write_csv(results_of(row), tmp_path / "per_image.csv")
    with (tmp_path / "per_image.csv").open(newline="", encoding="utf-8") as file:
        _, *lines = csv.reader(file)
    assert {(target, value) for target, _, value in lines} == {("'=cmd", "-1.5")}
    keys = [key for _, key, _ in lines]
    assert not [key for key in keys if key[0] in "=+-@\t"]
    assert sorted(key.removeprefix("'") for key in keys) == sorted(names)
