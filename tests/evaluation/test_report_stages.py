"""What a report prints, draws and writes, piece by piece; what is left where a piece fails."""

import io
import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from olvae.evaluation import report
from olvae.evaluation.cells import Cell
from olvae.evaluation.observers.observer import Evaluated, Observer
from olvae.evaluation.report import (
    notes,
    print_grid,
    print_results,
    quality,
    render_page,
    write_files,
)
from olvae.evaluation.results import Row
from tests.evaluation.test_report import COST
from tests.evaluation.test_results import results_of, row


def printed_grid(width: int) -> list[list[str]]:
    """The lines of a table of three columns of eight characters, without spaces at their ends."""
    file = io.StringIO()
    cells = {f"one {i}": Cell(f"1234567{i}") for i in range(3)}
    print_grid(Console(file=file, width=width), "a [title]", {"a": cells, "[b]": {}})
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_table_that_just_fits_is_one():
    """Beside twelve characters for names and their margin, each column with two of its own."""
    assert printed_grid(42) == [
        "               a [title]",
        "",
        "                one       one       one",
        " target           0         1         2",
        f" {'─' * 38}",
        " a         12345670  12345671  12345672",
        " [b]              -         -         -",
        "",
    ]
    assert sum("target" in line for line in printed_grid(41)) == 2


def test_a_name_is_folded_and_a_number_is_not():
    file = io.StringIO()
    name = "a long name of a target"
    print_grid(Console(file=file, width=26), "", {name: {"m": Cell("12345 67890")}})
    lines = [line.strip() for line in file.getvalue().splitlines()]
    assert any("12345 67890" in line for line in lines)
    assert not any(name in line for line in lines)


class Noting(Observer):
    """Has a column, a line, a section and a file."""

    name = "noting"

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def columns(self, entry: Any) -> dict[str, str]:
        return {"noted": str(entry)}

    def lines(self, rows: Any) -> Any:
        yield f"[bold]noted[/bold] 12 of {len(rows)}: {'a long line ' * 10}end"

    def section(self, page: Any) -> Any:
        return "a section"

    def write(self, folder: Any, suffix: str) -> Any:
        if self.fails:
            raise OSError("no space")
        return {"noting": folder / f"noting{suffix}.txt"}


def test_tables_and_remarks_are_printed_as_they_are(capsys, monkeypatch):
    """Remarks without a terminal's colours or marks, and on one line; those of several once."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    rows = (row("a", cost=COST, observed={"noting": 7}), replace(row("b"), n=91))
    evaluated = Evaluated(results_of(*rows), [Noting()])
    print_results([evaluated, evaluated], lambda line: line.upper())
    lines = capsys.readouterr().err.splitlines()
    line = next(Noting().lines(rows)).upper()
    assert lines.count(line) == 1
    text = "\n".join(lines)
    assert text.count("cost: ") == 1
    assert ", 90 images" not in text  # of both
    # Without costs.
    print_results([Evaluated(results_of(row("a")))])
    text = capsys.readouterr().err
    assert "cost: " not in text
    assert "90 images" in text


@pytest.mark.parametrize(
    ("numbers", "counts", "shown"),
    [((2, 2), False, False), ((2, 3), False, True), ((2, 2), True, True)],
)
def test_numbers_of_images_are_shown_where_they_differ(numbers, counts, shown):
    rows = [Row(str(i), n, {"psnr": 20.0}) for i, n in enumerate(numbers)]
    rows[0] = replace(rows[0], observed={"noting": 7})
    table = quality(Evaluated(results_of(*rows), [Noting()]), counts)
    for n, cells in zip(numbers, table.values(), strict=True):
        assert ("images" in cells) == shown
        assert not shown or cells["images"] == Cell(str(n))
    assert table["0"]["noted"] == Cell("7")
    assert "noted" not in table["1"]


def test_a_metric_of_no_kind_is_skipped_by_its_name():
    lines = list(notes(Evaluated(results_of(Row("a", 2, {}, {"mine": "why", "ssim": "why"})))))
    assert lines == ["skipped mine, SSIM: why"]


class Silent(Noting):
    """Has no section."""

    name = "silent"

    def section(self, page: Any) -> None:
        return None


def test_a_page_has_the_sections_that_observers_have_and_the_day(monkeypatch):
    given: list[dict] = []
    monkeypatch.setattr(report.Page, "render", lambda _, name, **values: given.append(values) or "")
    observers = [Noting(), Silent()]
    evaluated = Evaluated(results_of(row()), observers)
    when = datetime(2026, 11, 25, tzinfo=UTC)
    render_page(evaluated, "a command", when)
    render_page(evaluated)
    first, second = given
    assert (first["when"], first["command"]) == (when, "a command")
    assert abs((second["when"] - datetime.now(UTC)).total_seconds()) < 60
    assert first["sections"] == [(observers[0], "a section")]
    assert first["counts"] == {90}


def test_files_are_written_into_a_folder_that_is_made(tmp_path, monkeypatch):
    """Twice; what a killed process left is removed once it is a second old."""
    removed = []
    monkeypatch.setattr(
        report, "remove_partials", lambda found, idle_s: removed.append((list(found), idle_s))
    )
    folder = tmp_path / "a" / "b"
    evaluated = Evaluated(results_of(row()), [Noting()])
    for _ in range(2):
        written = write_files(evaluated, folder, "_x")
    assert written == {
        "noting": folder / "noting_x.txt",
        "table": folder / "metrics_x.md",
        "numbers": folder / "metrics_x.json",
    }
    assert removed == [([], 1.0)] * 2
    single = replace(row(), per_image={"psnr": {"a.png": 20.0}})
    written = write_files(Evaluated(results_of(single)), folder, command="olvae \udcff")
    assert set(written) == {"report", "images", "table", "numbers"}
    assert written["report"] == folder / "report.html"
    assert "olvae \\udcff" in written["report"].read_text(encoding="utf-8")
    assert all(path.is_file() for path in written.values())
    (folder / ".partial-1").touch()
    write_files(Evaluated(results_of(row())), folder)
    assert removed[-1] == ([folder / ".partial-1"], 1.0)


def test_numbers_that_are_none_leave_earlier_results(tmp_path):
    write_files(Evaluated(results_of(row())), tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()
    broken = Row("a", 2, {"psnr": 20.0}, observed={"noting": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        write_files(Evaluated(results_of(broken)), tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_a_file_that_fails_leaves_no_numbers_beside_it(tmp_path):
    """So where metrics.json is, all other files belong to it."""
    write_files(Evaluated(results_of(row())), tmp_path)
    with pytest.raises(OSError, match="no space"):
        write_files(Evaluated(results_of(row()), [Noting(fails=True)]), tmp_path)
    assert not (tmp_path / "metrics.json").exists()
