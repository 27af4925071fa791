"""The run that fills docs/gpu.md: what is kept, what is tried again, the page.

The steps themselves in a slow test.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olvae.devices import PRECISIONS
from study import gpu
from study.gpu import CARD, PAGE, STEPS, TABLES, Bench
from study.tables import NOTHING, fill, table

ROOT = Path(__file__).parent.parent.parent


def test_the_page_of_the_gpu_study_has_every_table_and_what_matters_first():
    assert re.findall(r"<!-- table: (\S+) -->", PAGE.read_text(encoding="utf-8")) == list(TABLES)
    names = list(STEPS)
    assert names[:3] == ["machine", "tests", "step_A2_32"]
    assert names[-2:] == ["pair_litevae", "pair_sd"]
    assert names.index("trained_A2") > names.index("step_B5_bf16_compile")
    assert all(step.needs_s < 300 and step.needs_s < step.limit_s for step in STEPS.values())
    assert set(gpu.PRECISIONS) == set(PRECISIONS) - {"tf32"}
    assert sum(step.limit_s for step in STEPS.values()) < 90 * 60  # of steps that all hang


def test_a_page_without_rows_shows_no_empty_table():
    text = fill(PAGE.read_text(encoding="utf-8"), {}, TABLES)
    assert text.count(NOTHING) == len(TABLES)
    assert "| --- | --: |\n\n<!--" not in text
    assert table(["a", "b"], [["c", "1"]]) == "| a | b |\n| --- | --: |\n| c | 1 |"


def test_tables_of_the_gpu_study_are_made_from_rows():
    step = {
        "recipe": "B5",
        "precision": "bf16",
        "options": ["compile"],
        "size": 256,
        "images": 8,
        "ms": 50.0,
        "alone_ms": 55.0,
    }
    step |= {
        "images_per_s": 160.0,
        "tflops": 440.0,
        "peak": 989,
        "memory_gib": 12.34,
        "first_memory_gib": 15.0,
        "counted_gib": 11.0,
    }
    case = {"variant": "eager", "name": "S"}
    speeds = [
        {**case, "precision": p, "images_per_s": speed}
        for p, speed in (("32", 5.0), ("32", 7.0), ("bf16", 9.0))
    ]
    card = {"clocks.sm": "1980 MHz", "other_processes": ["7, 12 MiB"]}
    rows = {
        "machine": {"device": "H100", "memory_gib": 79.2, "rocm": None, "card": card},
        "tests": {"tests": 9, "skipped": 1, "failed": ["a.b"]},
        "step_A2_32": {"error": "out of memory"},
        "step_B5_bf16_compile": step,
        "trained_B5": {"recipe": "B5", "images": 4, "kernels": None},
        "networks_encoder": {
            "half": "encoder",
            "rows": [*speeds, {"variant": "limit", "name": "product"}],
        },
        "pair_sd": {"unfinished": "90 s of training are done"},
    }
    tables = {name: table(rows).splitlines()[2:] for name, table in TABLES.items()}
    assert tables["gpu-run"] == [
        "| device | H100 |",
        "| memory_gib | 79.2 |",
        "| clocks.sm | 1980 MHz |",
        "| other_processes | 7, 12 MiB |",
        "| tests | 7 passed, 1 skipped; failed: a.b |",
        "| step_A2_32 | out of memory |",
        "| pair_sd | 90 s of training are done |",
    ]
    assert tables["gpu-steps"] == [
        "| B5, bf16, compile | 256 | 8 | 50.0 | 55.0 | 160.0 | 440.00 | 44% | 12.3 | 15.0 | 11.0 |"
    ]
    assert tables["gpu-launches"] == ["| B5 | 4 |  |"]
    assert tables["gpu-networks"] == ["| encoder, S |  | 9 | 7 |"]
    assert tables["gpu-pair"] == []


DONE = {"device": "Xeon", "tests": 1, "skipped": 0, "failed": []}
DONE |= {"network": "sd", "data": "photographs", "steps": 1}


@pytest.fixture
def tried(monkeypatch) -> list[tuple[str, float]]:
    """Steps of the study that ran, in place of them, and their limits; "tests" fails at first."""
    tried: list[tuple[str, float]] = []

    def command(self: Bench, name: str, *arguments: str, limit_s: float) -> str:
        first = name not in [earlier for earlier, _ in tried]
        tried.append((name, limit_s))
        assert arguments[-1] == "--quick"
        if name == "tests" and first:
            raise gpu.StepError("too bad", 1)
        self.keep(name, {"unfinished": "half"} if name == "pair_sd" and first else DONE)
        return ""

    monkeypatch.setattr(Bench, "command", command)
    return tried


def test_finished_steps_of_the_gpu_study_are_kept_and_others_tried_again(tmp_path, tried, capsys):
    page, bench = tmp_path / "page.md", Bench(tmp_path, "cpu", quick=True)
    page.write_text("<!-- table: gpu-run -->\n<!-- end -->\n")
    steps = ["machine", "tests", "pair_sd"]
    gpu.run(bench, steps, 10.0, page)
    text = page.read_text()
    assert "| device | Xeon |" in text
    assert "| tests | too bad |\n| pair_sd | half |" in text
    assert "2/3 tests: " in capsys.readouterr().out
    for _ in range(2):
        gpu.run(bench, steps, 10.0, page)
    names = [name for name, _ in tried]
    assert names == ["machine", "tests", "pair_sd", "tests", "pair_sd"]
    assert bench.rows() == dict.fromkeys(steps, DONE)
    # Rows that were copied elsewhere continue there, and fill the page where nothing runs.
    copied = tmp_path / "copied.json"
    copied.write_bytes((tmp_path / "rows.json").read_bytes())
    gpu.run(Bench(tmp_path / "new", "cpu", True, copied), steps, 10.0, page)
    gpu.main(["--out", str(tmp_path / "other"), "--quick", "--rows", str(copied), "--only"])
    assert names == [name for name, _ in tried]
    assert "| device | Xeon |" in (tmp_path / "other" / "gpu.md").read_text()


def test_a_step_of_the_gpu_study_begins_only_if_it_can_end(tmp_path, tried, capsys):
    page, bench = tmp_path / "page.md", Bench(tmp_path, "cuda", quick=True)
    page.touch()
    steps = ["trained_B5", "step_A2_32", "machine"]
    gpu.run(bench, steps, 100 / 60, page)
    assert [name for name, _ in tried] == ["step_A2_32", "machine"]
    assert 90 < tried[0][1] <= 100 < STEPS["step_A2_32"].limit_s
    assert tried[1][1] == 60
    assert "trained_B5 (270 s)" in (capsys.readouterr().out)


@pytest.mark.slow
def test_the_gpu_study_starts_where_hardly_anything_is_installed(tmp_path):
    """To begin, no step's packages are needed, nor site-packages (``-S``)."""
    blocked = ["olvae", "torch", "numpy", "lightning", "omegaconf", "pywt", "matplotlib"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); from study import gpu; "
    code += "gpu.main(['--only', 'machine', '--quick', '--out', sys.argv[1], '--device', 'cpu'])"
    python = [sys.executable, "-S", "-c", code, str(tmp_path)]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1/1 machine: done" in done.stdout
    assert json.loads((tmp_path / "rows.json").read_text())["machine"]["torch"]


def test_rows_of_the_gpu_study_have_the_card_and_other_processes(tmp_path, monkeypatch):
    """By a script in place of nvidia-smi, which answers as it does."""
    program = tmp_path / "nvidia-smi"
    values = ", ".join(f"{number} W" for number in range(len(CARD)))
    program.write_text(
        f"#!/bin/sh\ncase $2 in --query-gpu=*) echo '{values}';; "
        "*) printf '7, 12 MiB\\n9, 500 MiB\\n';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.card("uuid", 9) == {
        **{name: f"{number} W" for number, name in enumerate(CARD)},
        "other_processes": ["7, 12 MiB"],
    }
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu.card("uuid", 9) == {}


@pytest.mark.slow
def test_the_long_pair_is_trained_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "EVALUATION_S", 20)
    monkeypatch.setattr(gpu, "_steps_of_pair", lambda *_: 100)
    pieces = 0
    while True:
        bench = Bench(tmp_path, "cpu", quick=True, seconds=35 if pieces == 0 else 3600)
        row = STEPS["pair_litevae"].run(bench)
        bench.keep("pair_litevae", row)
        pieces += 1
        if "unfinished" not in row:
            break
    assert pieces == 2
    assert row["steps"] == 100
    assert row["psnr"] > 15
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_step_of_the_gpu_study_that_hangs_ends_with_what_it_started(tmp_path):
    started = tmp_path / "started"
    child = f"import pathlib, time; time.sleep(1); pathlib.Path({str(started)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(RuntimeError, match=r"after 0 s: .*slow\.txt"):
        Bench(tmp_path).command("slow", "-c", code, limit_s=0.3)
    time.sleep(1.2)
    assert not started.exists()
    with pytest.raises(RuntimeError, match=r"\(exit code 1\)"):
        Bench(tmp_path).command("bad", "-c", "raise SystemExit('too bad')")


@pytest.mark.slow
def test_the_gpu_study_runs_on_a_cpu(tmp_path):
    """But compiled steps, which take minutes there."""
    steps = [name for name in STEPS if "compile" not in name]
    gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", *steps])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert rows["tests"]["tests"] > 3
    assert rows["tests"]["failed"] == []
    text = (tmp_path / "gpu.md").read_text()
    assert len(re.findall(r"^\| (A2|B5), ", text, re.M)) == 8
    assert len(re.findall(r"^\| (litevae|sd), linear start", text, re.M)) == 2
    assert re.search(r"^\| encoder, AutoencoderTiny \|  \| [\d.]+ \| [\d.]+ \|$", text, re.M)
