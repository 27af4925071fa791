"""The stored notebooks show what they do, and run from their first cell to their last,
without a network."""

import re

import nbformat
import pytest

from tests.examples.loading import load_script

script = load_script("run_notebooks")
NOTEBOOKS = sorted(script.NOTEBOOKS.glob("*.ipynb"))

# a path from the root of a disk, or of a home: /home/someone/..., C:\Users, file:///...
ABSOLUTE = re.compile(r"(?<![\w.:/~<-])/[\w.-]+/[\w.-]|\b[A-Za-z]:\\|file://|~/\w")


def texts(cell):
    """What a code cell printed and showed, without its pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield output.get("data", {}).get("text/plain", "")


def check(notebook):
    """Fail unless each code cell ran, in order and well, and shows nothing of a machine."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert "display_data" in kinds
    for cell in cells:
        shown = "\n".join(texts(cell))
        # what a command printed whose exit code a notebook ignores
        assert "error:" not in shown.lower(), shown
        assert not ABSOLUTE.search(shown), shown
        # a progress bar, or colours that GitHub shows as codes
        assert "\x1b" not in shown, shown


def pictures(notebook):
    """How many pictures each code cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        sum("image/jpeg" in output.get("data", {}) for output in cell.outputs) for cell in cells
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    check(notebook)
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("report: /home/someone/runs/report.html", True),
        ("model (/work/x)", True),
        (r"C:\Users\someone", True),
        ("report: runs/2026-11-30T16-40-29_tuned_32/report.html", False),
        ("84.4 images/s 0:00:19, 12/12, 1/8 of https://example.org/a/b", False),
    ],
)
def test_paths_of_a_machine_are_found(shown, found):
    assert bool(ABSOLUTE.search(shown)) == found


@pytest.mark.slow
@pytest.mark.timeout(3600)  # trainings of some minutes, more beside other jobs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = script.execute(path, tmp_path)
    check(notebook)
    # the stored outputs are these cells' own
    assert pictures(notebook) == pictures(nbformat.read(path, 4))
