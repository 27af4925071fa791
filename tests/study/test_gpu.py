"""The run that fills docs/gpu.md: what is kept, what is tried again, the page.

The steps themselves in a slow test.
"""

import json
import re
import time

import pytest

from study import gpu
from study.draw import fill
from study.gpu import PAGE, STEPS, TABLES, Bench


def test_the_page_of_the_gpu_study_has_every_table_and_what_matters_first():
    assert re.findall(r"<!-- table: (\S+) -->", PAGE.read_text(encoding="utf-8")) == list(TABLES)
    names = list(STEPS)
    assert names[:3] == ["machine", "tests", "step_A2_32"]
    assert names[-2:] == ["pair_litevae", "pair_sd"]
    assert sum(step.limit_s for step in STEPS.values()) < 90 * 60  # of steps that all hang


def test_tables_of_the_gpu_study_are_made_from_rows():
    step = {
        "recipe": "B5",
        "precision": "bf16",
        "options": ["compile"],
        "size": 256,
        "images": 8,
        "ms": 50.0,
    }
    step |= {
        "images_per_s": 160.0,
        "tflops": 440.0,
        "peak": 989,
        "memory_gib": 12.34,
        "counted_gib": 11.0,
    }
    case = {"variant": "eager", "name": "S"}
    speeds = [
        {**case, "precision": p, "images_per_s": speed}
        for p, speed in (("32", 5.0), ("32", 7.0), ("bf16", 9.0))
    ]
    rows = {
        "machine": {"device": "H100", "memory_gib": 79.2},
        "tests": {"tests": 9, "skipped": 1, "failed": ["a.b"]},
        "step_A2_32": {"error": "out of memory"},
        "step_B5_bf16_compile": step,
        "trained_B5": {"recipe": "B5", "images": 4, "kernels": None},
        "networks_encoder": {
            "half": "encoder",
            "rows": [*speeds, {"variant": "limit", "name": "product"}],
        },
    }
    tables = {name: table(rows).splitlines()[2:] for name, table in TABLES.items()}
    expected = [
        "| device | H100 |",
        "| memory_gib | 79.2 |",
        "| tests | 7 passed, 1 skipped; failed: a.b |",
    ]
    assert tables["gpu-run"] == [*expected, "| step_A2_32 | out of memory |"]
    assert tables["gpu-steps"] == [
        "| B5, bf16, compile | 256 | 8 | 50.0 | 160.0 | 440.00 | 44% | 12.3 | 11.0 |"
    ]
    assert tables["gpu-launches"] == ["| B5 | 4 |  |"]
    assert tables["gpu-networks"] == ["| encoder, S |  | 9 | 7 |"]
    assert tables["gpu-pair"] == []


def test_finished_steps_of_the_gpu_study_are_kept_and_failed_ones_tried_again(
    tmp_path, monkeypatch, capsys
):
    tried, fails = [], [True]

    def command(self: Bench, name: str, *arguments: str, limit_s: float) -> str:
        tried.append(name)
        assert arguments[-1] == "--quick"
        if name == "tests" and fails:
            raise RuntimeError("too bad")
        (self.out / "rows" / f"{name}.json").write_text(
            json.dumps({"device": "Xeon"} if name == "machine" else {})
        )
        return ""

    monkeypatch.setattr(Bench, "command", command)
    page, bench = tmp_path / "page.md", Bench(tmp_path, "cpu", quick=True)
    page.write_text("<!-- table: gpu-run -->\n<!-- end -->\n")
    gpu.run(bench, ["machine", "tests"], 1.0, page)
    assert "| device | Xeon |\n| tests | too bad |" in page.read_text()
    assert "2/2 tests: too bad" in capsys.readouterr().out
    gpu.run(bench, ["machine", "tests"], 0.0, page)
    assert "0 minutes are over: tests" in capsys.readouterr().out
    fails.clear()
    monkeypatch.setitem(TABLES, "gpu-run", lambda rows: ", ".join(sorted(rows)))
    gpu.run(bench, ["machine", "tests"], 1.0, page)
    assert tried == ["machine", "tests", "tests"]
    filled = page.read_text()
    assert fill(filled, {"machine": {}, "tests": {}}, TABLES) == filled
    page.write_text("<!-- table: gpu-run -->\n<!-- end -->\n")
    gpu.run(bench, ["machine", "tests"], 1.0, page)
    assert page.read_text() == filled  # though there was nothing left to run


def test_a_step_of_the_gpu_study_that_hangs_ends_with_what_it_started(tmp_path):
    started = tmp_path / "started"
    child = f"import pathlib, time; time.sleep(1); pathlib.Path({str(started)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(RuntimeError, match=r"not finished after 0 s: .*slow\.txt"):
        Bench(tmp_path).command("slow", "-c", code, limit_s=0.3)
    time.sleep(1.2)
    assert not started.exists()
    with pytest.raises(RuntimeError, match=r"too bad \(exit code 1\)"):
        Bench(tmp_path).command("bad", "-c", "raise SystemExit('too bad')")


@pytest.mark.slow
def test_the_gpu_study_runs_on_a_cpu(tmp_path):
    """But compiled steps, which take minutes there."""
    steps = [name for name in STEPS if "compile" not in name]
    gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", *steps])
    rows = {name: json.loads((tmp_path / "rows" / f"{name}.json").read_text()) for name in steps}
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert rows["tests"]["tests"] > 3
    assert rows["tests"]["failed"] == []
    text = (tmp_path / "gpu.md").read_text()
    assert len(re.findall(r"^\| (A2|B5), ", text, re.M)) == 8
    assert len(re.findall(r"^\| (litevae|sd), linear start", text, re.M)) == 2
    assert re.search(r"^\| encoder, AutoencoderTiny \|  \| [\d.]+ \| [\d.]+ \|$", text, re.M)
