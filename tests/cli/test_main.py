"""The commands as a user types them, in this process.

And once each through the README's scripts.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from olvae import __version__
from olvae.cli.main import main, print_error, repeat_flags
from olvae.files import counted

ROOT = Path(__file__).parent.parent.parent

COMMANDS = (
    "train",
    "evaluate",
    "reconstruct",
    "latents",
    "encode",
    "decode",
    "export",
    "validate",
    "tables",
    "app",
)
GROUPS = ("bench", "data-pack", "data-check", "recipes", "recipes-copy")


@pytest.mark.parametrize("command", COMMANDS + GROUPS)
def test_help_is_whole_at_80_columns(olvae, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = olvae(*command.split("-"), "--help")
    assert code == 0
    assert "Usage: " in out
    assert "Example: " in out
    assert "<bool>" not in out
    assert "docs/" not in out  # which a wheel does not have
    lines = out.splitlines()
    assert max(len(line) for line in lines if "Example: " not in line) <= 80
    assert not [line for line in lines if line.rstrip().endswith("…")]
    assert not re.search(r"\.\.\.[\]}]*\.\.\.", lines[0])  # {TARGET...}... says it twice


DEMO = ("train", "--base", "configs/demo.yaml")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["train"], 2, "--base names the config"),
        (["train", "--base"], 2, "--base"),
        (
            [*DEMO, "--precision", "64"],
            2,
            "error: --precision 64: choose from fp16, bf16, tf32, 32",
        ),
        ([*DEMO, "--gpus", "99"], 2, "0 is the CPU"),
        ([*DEMO, "--seed", "x"], 2, "--seed"),
        ([*DEMO, "--lgdir", "x"], 2, "--lgdir"),
        (
            [*DEMO, "--max_steps", "20"],
            2,
            "written without dashes: lightning.trainer.max_steps=...",
        ),
        (
            [*DEMO, "--data.params.batch-size=3"],
            2,
            "written without dashes: data.params.batch_size=...",
        ),
        (
            ["train", "--base", "none", "--steps", "20"],
            2,
            "KEY=VALUE, as in lightning.trainer.max_steps=20",
        ),
        ([*DEMO, "data.params.size=60"], 2, "use 56 or 64"),
        ([*DEMO, "model.base_learning_rate=.inf"], 2, "a positive number, got inf"),
        (
            [*DEMO, "model.params.encoder_config.params.extractor_mult=[1, -1]"],
            2,
            "must be at least",
        ),
        (
            [*DEMO, "data.params.batch_size=6000"],
            1,
            "data.params.batch_size 6000 is larger than the data",
        ),
        ([*DEMO, "--actual_resume", "x.ckpt"], 1, "x.ckpt: no such file or folder"),
        ([*DEMO, "--data", "a", "--data=b"], 2, "--data is given twice, a, b: give one; a .txt"),
        ([*DEMO, "--teacher", "a", "--teacher", "b"], 2, "--teacher is given twice, a, b: give"),
        (["evaluate", "x", "--data", "a", "--data", "b"], 2, "--data is given twice, a, b: give"),
        ([*DEMO, "--data", ""], 2, "--data is empty: give a value, or leave it out"),
        (["evaluate", "x", "--size="], 2, "--size is empty: give a value, or leave it out"),
        (["evaluate", "configs/demo.yaml"], 1, "not a file of weights"),
        (["evaluate", "configs"], 1, "neither a run folder"),
        (["trian"], 2, "No such command"),
    ],
)
def test_command_mistakes_are_one_line(refused, tmp_path, monkeypatch, arguments, code, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if arguments[0] == "train":
        arguments = [*arguments, f"--logdir={tmp_path / 'runs'}"]
    line = refused(code, *arguments)
    assert text in line
    assert line.startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_an_error_names_its_file_once(olvae, tmp_path, monkeypatch):
    """By its own message, and by the system's."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [\n  a: : b")
    code, _, err = olvae("train", "--base", bad)
    assert (code, err.count(str(tmp_path))) == (2, 1)
    assert err.startswith(f"error: {bad}: not readable as YAML: ")
    assert err.endswith(" at line 2, column 6\n")
    monkeypatch.setattr("omegaconf.OmegaConf.load", lambda _: tmp_path.read_bytes())
    assert olvae("validate", bad)[2].endswith(f"{bad}: not readable as YAML: Is a directory\n")
    monkeypatch.setattr("olvae.bench.cases.network_table", tmp_path.read_bytes)
    assert olvae("tables") == (1, "", f"error: {tmp_path}: Is a directory\n")


def test_a_failed_evaluation_leaves_no_folder(olvae, trained, tmp_path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    out = tmp_path / "new" / "out"
    for place, *command in (
        ("olvae.evaluation.report.write_csv", "evaluate", "--metrics", "l1", "--no-report"),
        ("olvae.cli.latents.write_json", "latents"),
    ):
        monkeypatch.setattr(place, full_disk)
        code, _, err = olvae(*command, trained, "--out", out)
        assert (code, err.splitlines()[-1]) == (1, "error: x: No space left on device")
        assert not out.parent.exists()


def test_ctrl_c_is_told_with_exit_code_130(olvae, trained, tmp_path, monkeypatch):
    """By the program where the command has no more to say.

    test_encode.py, test_data.py and training/test_run.py have others.
    """

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("olvae.bench.cases.network_table", interrupted)
    assert olvae("tables") == (130, "", "stopped\n")
    monkeypatch.setattr("olvae.training.run.print_summary", interrupted)
    command = (
        "train",
        "--base",
        trained.parent.parent / "tiny.yaml",
        "--gpus",
        0,
        "--logdir",
        tmp_path,
    )
    code, _, err = olvae(*command)
    assert code == 130
    assert err.endswith("_tiny_32: removed: nothing was saved yet\nstopped\n")


STAND_IN = """
import sys
from types import SimpleNamespace
from olvae.cli.main import main

def table(counted):
    sys.modules["olvae.bench.cases"] = SimpleNamespace(network_table=counted)

"""
"""Lets `olvae tables` call something else, without torch, whose import takes seconds."""


def test_ctrl_c_inside_code_made_of_text_has_the_same_exit_code(tmp_path):
    """As while a module with dataclasses is imported. Python then ends by SIGINT, under -m."""
    (tmp_path / "interrupted.py").write_text(
        f"{STAND_IN}table(lambda *_: exec('raise KeyboardInterrupt'))\nmain(['tables'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_a_warning_is_one_line(olvae, config, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back in the end
    assert olvae("validate", config)[0] == 0
    ours = str(ROOT / "olvae" / "cli" / "export.py")
    assert (
        warnings.formatwarning(UserWarning("ignored"), UserWarning, ours, 9) == "warning: ignored\n"
    )
    assert "torch.py:9: UserWarning: slow" in warnings.formatwarning(
        UserWarning("slow"), UserWarning, "/x/torch.py", 9
    )


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError, match="not found"):
        main(["evaluate", "missing", "--debug"])


@pytest.mark.parametrize(
    "command", [("train", "--base", "demo"), ("evaluate", "demo"), ("latents", "demo")]
)
def test_a_pattern_without_quotes_is_one_line(refused, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ten").mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "ten" / f"{i}.png")
    files = [f"ten/{i}.png" for i in range(10)]
    line = refused(2, *command, "--data", *files)
    assert "--data: 10 files" in line
    assert "quote it, --data 'ten/*.png'" in line


@pytest.mark.parametrize("kind", [".yaml", ".yml", ".txt"])
def test_configs_and_lists_after_data_are_no_pattern(refused, tmp_path, monkeypatch, kind):
    """One of them may be the command's own argument."""
    monkeypatch.chdir(tmp_path)
    names = [f"data{kind}", f"cfg{kind}"]
    for name in names:
        (tmp_path / name).touch()
    assert "--base names" in refused(2, "train", "--data", *names)


def test_a_name_that_is_too_long_for_a_file_is_no_pattern(refused):
    name = f"pipe:cat {'a' * 300}.tar"
    assert "--base names" in refused(2, "train", "--data", name)


def test_repeat_flags_takes_one_flag_with_several_values():
    one = ["train", "--base", "a", "--base", "b", "--name", "n", "x=1"]
    assert repeat_flags(["train", "--base", "a", "b", "--name", "n", "x=1"]) == one
    assert repeat_flags(["--base", "a", "model.x=1", "b"]) == ["--base", "a", "model.x=1", "b"]
    with pytest.raises(typer.BadParameter, match="one or"):
        repeat_flags(["--base", "--name", "n"])


def test_scripts_of_the_readme_have_help():
    for script in ("train.py", "scripts/compute_metrics.py"):
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "Example: " in done.stdout


WITHOUT_TORCH = """
import contextlib, io, json, sys
from olvae.cli.main import main
for arguments in json.load(sys.stdin):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main(arguments)
        except SystemExit as leaving:
            code = leaving.code or 0
    print(json.dumps([code, errors.getvalue(), 'torch' in sys.modules]))
"""

QUICK: list[tuple[tuple[str, ...], int, str]] = [
    ((), 2, "Usage: olvae [OPTIONS] COMMAND"),
    (("--help",), 0, ""),
    (("--version",), 0, ""),
    (("recipes",), 0, ""),
    (("recipes", "copy", "nothing"), 2, "nothing: no such recipe"),
    (("validate", "imagenet/A2"), 0, "imagenet/A2: no mistakes"),
    (("train", "--base", "demo", "--help"), 0, ""),
    (("train", "--base", "missing"), 2, "missing: no such config file"),
    (("train", "--base", "demo", "data.params.siez=3"), 2, "did you mean size?"),
    (("train", "--base", "demo", "--resume", "missing"), 1, "missing: no such run folder"),
    (
        ("train", "--base", "finetune/sdxl", "--from", "missing"),
        1,
        "missing: not found; a target is",
    ),
    (
        ("train", "--base", "distil/both", "--teacher", "diffusers:missing"),
        1,
        "diffusers:missing: no such folder",
    ),
    (("evaluate", "test"), 1, "test: not found; did you mean tests?"),
    (
        ("evaluate", "tests", "--data", "exmaples"),
        1,
        "exmaples: no such folder; did you mean examples?",
    ),
    (("evaluate", "tests", "olvae:missing"), 1, "olvae:missing: no model of this name"),
    (("evaluate", "tests", "--metrics", "fid"), 2, "--metrics fid: choose from all, psnr"),
    (("latents", "tests", "--device", "gpu"), 2, "--device gpu: choose cpu, cuda, cuda:N, or mps"),
    (
        ("encode", "tests", "--data", "missing.txt", "--out", "x"),
        1,
        "missing.txt: no such list of images",
    ),
    (("decode", "tests", "missing", "--out", "x"), 1, "missing: no such folder"),
    (("export", "missing", "--out", "x"), 1, "missing: not found"),
    (("reconstruct", "missing", "x.png", "--out", "x"), 1, "missing: not found"),
    (
        ("reconstruct", "tests", "x.png", "--out", "x", "--seed", "1"),
        2,
        "--seed applies to --sample",
    ),
    (("data", "pack", "missing", "--out", "x"), 1, "missing: no such folder"),
    (("data", "check", "missing"), 1, "missing: no such folder"),
]
"""What is missing or wrong: the command, its exit code, and what it says."""


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, ...], list[Any]]:
    """By command of :data:`QUICK`, all in one process: exit code, standard error,
    and whether torch is imported."""
    commands = [command for command, _, _ in QUICK]
    words = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(
        words, input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("command", "code", "text"), QUICK)
def test_what_is_missing_or_wrong_does_not_wait_for_torch(answers, command, code, text):
    ended, error, torch = answers[command]
    assert ended == code, error
    assert text in error
    assert not torch


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_loading(olvae, tmp_path):
    """Before what the command prints.

    training/test_run.py's signal to all processes shows that nothing else gets it.
    """
    (tmp_path / "empty").mkdir()
    code, _, err = olvae("latents", tmp_path / "empty")
    assert code == 1
    assert 0 <= err.index("loading") < err.index("neither a run folder")


COMPUTE = [
    [
        "evaluate",
        "WEIGHTS",
        "--data",
        "PHOTOS",
        "--size",
        "16",
        "--out",
        "OUT",
        "--metrics",
        "l1",
        "--no-report",
    ],
    ["latents", "WEIGHTS", "--data", "PHOTOS", "--out", "OUT"],
    ["reconstruct", "WEIGHTS", "PHOTOS", "--out", "OUT"],
    ["encode", "WEIGHTS", "--data", "PHOTOS", "--size", "16", "--out", "OUT"],
    ["decode", "WEIGHTS", "LATENTS", "--out", "OUT"],
    ["export", "WEIGHTS", "--out", "OUT"],
]


@pytest.fixture
def command(request, olvae, trained, tmp_path) -> list[object]:
    """A command on weights without one tensor."""
    weights = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    del weights["decoder.conv_out.bias"]
    torch.save(weights, tmp_path / "weights.pt")
    (tmp_path / "weights.yaml").write_bytes((trained / "config.yaml").read_bytes())
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "photos" / "red.png")
    if request.param[0] == "decode":
        olvae(
            "encode",
            trained,
            "--data",
            tmp_path / "photos",
            "--size",
            16,
            "--out",
            tmp_path / "latents",
        )
    names = {"WEIGHTS": "weights.pt", "LATENTS": "latents", "OUT": "out", "PHOTOS": "photos"}
    return [
        tmp_path / names[argument] if argument in names else argument for argument in request.param
    ]


@pytest.mark.parametrize(
    "command", [*COMPUTE[:-1], ["bench", "dwt"]], ids=lambda it: it[0], indirect=True
)
def test_a_device_that_is_not_there_is_refused(olvae, tmp_path, command):
    assert olvae(*command, "--device", "gpu") == (
        2,
        "",
        "error: --device gpu: choose cpu, cuda, cuda:N, or mps\n",
    )
    code, _, err = olvae(*command, "--device", "cuda:99")
    assert (code, err) == (
        2,
        f"error: --device cuda:99: this machine has {counted(torch.cuda.device_count(), 'GPU')}\n",
    )
    assert not (tmp_path / "out").exists()


def test_an_operator_that_a_mac_lacks_is_named_with_torchs_way_out(capsys):
    """torch's own message, which is long."""
    error = NotImplementedError(
        "The operator 'aten::col2im' is not currently implemented for the MPS device. If you want "
        "this op to be considered for addition please comment on ... As a temporary fix, you can "
        "set the environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback "
        "for this op. WARNING: this will be slower than running natively on MPS."
    )
    assert print_error(error) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("error: aten::col2im: torch can't compute it on a Mac's GPU: set ")
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in err


@pytest.mark.parametrize("command", COMPUTE, ids=lambda it: it[0], indirect=True)
def test_weights_that_fit_in_part_need_allow_mismatch(olvae, tmp_path, command):
    code, _, err = olvae(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert "1 missing (decoder.conv_out.bias)" in err
    assert not any(tmp_path.glob("out/*"))
    with pytest.warns(UserWarning, match=r"weights\.pt: \d+ of \d+ .* 1 missing"):
        code, _, err = olvae(*command, "--allow-mismatch")
    assert code == 0, err
    assert any(tmp_path.glob("out/*"))


def test_an_error_without_words_in_a_loaders_process_is_told(capsys):
    error = AssertionError(
        "Caught AssertionError in worker 0.\nOriginal Traceback (...):\n  File\nAssertionError"
    )
    assert print_error(error) == 1
    assert (
        capsys.readouterr().err == "error: AssertionError: AssertionError (--debug shows where)\n"
    )


def test_version_and_help(olvae):
    assert olvae("--version") == (0, f"olvae {__version__}\n", "")
    assert olvae("-h")[1] == olvae("--help")[1]
    assert olvae("recipes", "-h")[1].count("Example: olvae recipes") == 1
    assert olvae("recipes", "cpoy")[0] == 2
    done = subprocess.run(
        [sys.executable, "-m", "olvae", "-h"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Usage: olvae [OPTIONS] COMMAND" in done.stdout


SLOW_TO_END = f"""{STAND_IN}
import os, signal

class Ended:
    def __del__(self, kill=os.kill, own=os.getpid(), number=getattr(signal, sys.argv[1])):
        kill(own, number)  # as the interpreter ends

number = getattr(signal, sys.argv[1])
tidied = []

def stopped(*_):
    try:
        os.kill(os.getpid(), number)
    finally:
        os.kill(os.getpid(), number)
        tidied.append(Ended())
        print("tidied up", flush=True)

table(stopped)
main(["tables"])
"""


@pytest.mark.posix
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_echoes_of_a_signal_change_neither_the_tidying_up_nor_the_exit_code(number, code):
    done = subprocess.run(
        [sys.executable, "-c", SLOW_TO_END, number],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "tidied up\n", "stopped\n")
