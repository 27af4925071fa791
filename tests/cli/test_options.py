"""What commands share: flags' values, settings in messages, the progress bar."""

import threading

import pytest
import typer

from olvae import devices
from olvae.cli import evaluate
from olvae.cli import options as module
from olvae.cli.main import app
from olvae.cli.options import PRECISION_NAMES, ProgressBar, in_flags, name_flags
from olvae.evaluation import protocol
from olvae.evaluation.runner import DEFAULT_METRICS
from olvae.evaluation.zoo import ZOO_METRICS
from olvae.metrics import METRICS


def test_names_of_flags_are_those_of_the_registries():
    """Which the command line does not import, as they import torch."""
    assert tuple(METRICS) == evaluate.METRIC_NAMES
    assert tuple(protocol.PROTOCOLS) == evaluate.PROTOCOL_NAMES
    assert tuple(devices.PRECISIONS) == PRECISION_NAMES[:4]
    assert {devices.precision_name(name) for name in PRECISION_NAMES} == {*devices.PRECISIONS}
    others = " and ".join(name for name in METRICS if name not in DEFAULT_METRICS)
    zoo = ", ".join(ZOO_METRICS)
    assert f"all = every metric except {others} (with --zoo: {zoo})." == evaluate.NOT_ALL


LATENTS = ("encode", "x", "--data", "y", "--out", "z")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("evaluate", "x", "--metrics", ","), "error: --metrics ,: choose from all, psnr, "),
        (
            ("evaluate", "x", "--protocol", "ours"),
            "error: --protocol ours: choose from open-litevae, latent-diffusion",
        ),
        (
            ("evaluate", "x", "--precision", "fp16,fp8"),
            "error: --precision fp16,fp8: choose from fp16, bf16, tf32, 32, ",
        ),
        (("evaluate", "x", "--posterior", "mean"), "'mean' is not one of 'mode"),
        ((*LATENTS, "--dtype", "half"), "'half' is not one of 'float16"),
        (
            (*LATENTS, "--precision", "8"),
            "error: --precision 8: choose from fp16, bf16, tf32, 32\n",
        ),
        (("decode", "x", "y", "--out", "z", "--format", "gif"), "'gif' is not one of 'p"),
    ],
)
def test_wrong_values_of_flags_are_refused(olvae, command, message):
    code, out, err = olvae(*command)
    assert code == 2
    assert message in err
    assert not out


@pytest.mark.parametrize(
    ("arguments", "text", "expected"),
    [
        (["train", "x=1"], "`precision` 64, `actual_resume`", "--precision 64, --actual_resume"),
        (["data", "pack", "x"], "lower `workers`", "lower --workers"),
        (["evaluate", "x"], "`batch_size`, `from` and `lr`", "--batch-size, `from` and `lr`"),
        (["train"], "`start_from`", "--from"),
        ([], "`size`", "`size`"),
    ],
)
def test_settings_are_written_as_flags_of_the_running_command(arguments, text, expected):
    name_flags(typer.main.get_command(app), arguments)
    assert in_flags(text) == expected


def test_the_progress_bar_is_a_line_now_and_then_without_a_terminal(capsys, monkeypatch):
    with ProgressBar("packing") as bar:
        bar.set(3, 10)
    assert capsys.readouterr().err == ""  # it was shorter than the first interval
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with ProgressBar("packing") as bar:
        bar.set(3)
        bar.set(4, 10)
        bar.advance()
        bar.print("a line")
    lines = ["packing: 3 images", "packing: 4 of 10 images", "packing: 5 of 10 images", "a line"]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.usefixtures("terminal")
def test_the_progress_bar_on_a_terminal(capsys):
    before = set(threading.enumerate())
    with ProgressBar("[bold]decoding", 10) as bar:
        assert not set(threading.enumerate()) - before  # processes may be forked here
        for _ in range(4):
            bar.advance(2)
        bar.print("above [bold]it")
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("[bold]decoding", "8/10", "images/s", "above [bold]it"):
        assert text in err


@pytest.mark.usefixtures("terminal")
def test_the_progress_bar_of_other_ranks_shows_nothing(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with ProgressBar("encoding", 10, enabled=False) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")
