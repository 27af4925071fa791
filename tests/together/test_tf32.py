"""Precisions of commands: who computes convolutions without TF32, by torch's settings in each."""

import pytest
import torch
import torch.nn.functional as F

from olvae.cli.options import PRECISION_NAMES
from tests.conftest import plain_config

DEFAULT = (True, False)  # torch's: convolutions in TF32, products in float32


@pytest.fixture
def seen(monkeypatch):
    """The settings of (convolutions, products) at each convolution with memory."""
    convolve, found = F.conv2d, set()

    def noted(x, *args, **kwargs):
        if not x.is_meta:
            settings = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            found.add((torch.is_grad_enabled(), *settings))
        return convolve(x, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", noted)
    yield found
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == DEFAULT


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [("32", False), ("tf32", True), pytest.param("bf16", False, marks=pytest.mark.slow)],
)
def test_encode_and_reconstruct_have_tf32_by_name_alone(
    seen, done, target, four_images, tmp_path, precision, allowed
):
    wanted = ["--precision", precision]
    latents = tmp_path / "latents"
    done("encode", target, "--data", four_images, "--size", 16, "--out", latents, *wanted)
    done("reconstruct", target, four_images, "--out", tmp_path / "images", *wanted)
    assert seen == {(False, allowed, allowed)}


def test_other_commands_compute_without_tf32(seen, done, target, four_images, tmp_path):
    given = (target, "--data", four_images, "--size", 16)
    done("encode", *given, "--out", tmp_path / "latents")
    done("decode", target, tmp_path / "latents", "--out", tmp_path / "images")
    done("latents", target, "--data", four_images, "--out", tmp_path / "report")
    done("evaluate", *given, "--metrics", "psnr", "--no-report", "--out", tmp_path / "scores")
    assert seen == {(False, False, False)}


def test_evaluate_adds_a_row_in_tf32(seen, done, target, four_images, tmp_path):
    err = done(
        *("evaluate", target, "--data", four_images, "--size", 16, "--metrics", "psnr"),
        *("--no-report", "--out", tmp_path, "--precision", "tf32"),
    )
    assert ", tf32" in err
    assert seen == {(False, False, False), (False, True, True)}


@pytest.mark.parametrize(
    ("precision", "training"), [("32", DEFAULT), ("bf16", DEFAULT), ("tf32", (True, True))]
)
def test_training_keeps_torchs_settings_and_validation_has_no_tf32(
    seen, train_with, image_folder, precision, training
):
    train_with(
        "lightning.trainer.max_steps=1", config=plain_config(image_folder), precision=precision
    )
    assert {settings[1:] for settings in seen if settings[0]} == {training}
    assert {settings[1:] for settings in seen if not settings[0]} == {(False, False)}


@pytest.mark.parametrize(
    "command",
    [
        "encode",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("reconstruct", "evaluate")),
    ],
)
def test_every_precision_of_the_help_is_accepted_on_a_cpu(
    done, target, four_images, tmp_path, command
):
    given = [four_images]
    if command != "reconstruct":
        given = ["--data", four_images, "--size", 16]
    if command == "evaluate":
        given += ["--metrics", "psnr", "--no-report"]
    for name in PRECISION_NAMES:
        out = tmp_path / name
        done(command, target, *given, "--out", out, "--device", "cpu", "--precision", name)
