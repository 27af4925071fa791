import csv
import math

import pytest

from olvae.evaluation.per_image import ImageValues, write_csv


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
