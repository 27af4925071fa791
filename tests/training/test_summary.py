"""What is printed before the first step and after the last: figures by hand, warnings alone."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olvae.data.picture_folder import FolderSource
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run, Settings
from olvae.training import summary
from olvae.training.summary import (
    describe_gain,
    describe_new_rate,
    describe_rate,
    print_ending,
    print_summary,
)
from tests.models.steps import WITHOUT_KL, against, build


def a_trainer(world: int = 1, max_steps: int = 10) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(max_steps=max_steps, world_size=world, num_nodes=1, strategy=strategy)


@pytest.fixture
def shown(tmp_path, capsys, monkeypatch, image_folder):
    """Print a summary of a model; returns the lines, joined."""
    monkeypatch.setenv("COLUMNS", "200")
    source = FolderSource(str(image_folder), 16, 3, val_fraction=0.5)

    def show(model: LiteAutoencoderKL, done: int = 0, seen: int = 0, **trainer: int) -> str:
        settings = Settings(name="mine", precision="bf16", seed=4, weights="sdxl")
        print_summary(settings, Run(tmp_path), a_trainer(**trainer), model, source, done, seen)
        out, err = capsys.readouterr()
        assert not out
        return err

    return show


def test_figures_of_a_training_are_in_its_rows(shown, monkeypatch):
    monkeypatch.setattr(summary, "count_macs", lambda *_: 2_500_000_000)
    model = build(learning_rate=2e-4)
    model.accumulate_grad_batches = 2
    err = shown(model, world=4)
    millions = {
        half: sum(p.numel() for p in getattr(model, half).parameters()) / 1e6
        for half in ("encoder", "decoder")
    }
    for text in (
        "olvae train: mine",
        f"{millions['encoder']:.2f} M parameters, 2.50 GMACs per 16x16 image",
        f"{millions['decoder']:.2f} M parameters, 2.50 GMACs per 16x16 image",
        "f8, 4 channels: 16x16 -> 2x2",
        "24 = 3 x 2 accumulated x 4 processes",  # images of an update
        "10: 240 images, 48.0 times 5",  # of 12, without those that are held out
        "4 x CPU process of 1 thread, precision bf16",
        "no loader processes",
        "0.0002, constant",
        "sdxl",
    ):
        assert text in err, text
    assert "continued" not in err
    assert "adversary" not in err


def test_a_continued_run_counts_the_images_that_it_has_seen(shown, monkeypatch):
    monkeypatch.setattr(summary, "count_macs", lambda *_: 0)
    err = shown(build(), done=4, seen=100)
    assert "10: 118 images" in err  # and 6 steps of 3
    assert "after 4 steps" in err


def test_an_adversary_and_a_frozen_half_have_their_rows(shown, monkeypatch):
    monkeypatch.setattr(summary, "count_macs", lambda *_: 0)
    model = build(against(weight=0.25, start_step=7), freeze_encoder=True, lossconfig=WITHOUT_KL)
    millions = sum(p.numel() for p in model.adversary.discriminator.parameters()) / 1e6
    err = shown(model)
    assert f"PatchGAN, {millions:.2f} M parameters, " in err
    assert "0.25 from step 7" in err
    assert "decoder alone" in err
    assert "encoder alone" in shown(build(freeze_decoder=True))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"learning_rate": 1e-4}, "0.0001, constant"),
        ({"learning_rate": 1e-4, "warmup_steps": 1}, "0.0001, constant, warm-up 1 step"),
        ({"learning_rate": 3e-3, "scheduler": "cosine"}, "0.003, cosine to 0"),
        ({"learning_rate": 0.02, "optimizer": "muon"}, "0.02 with Muon, constant"),
    ],
)
def test_a_rate_is_described_with_its_schedule(settings, text):
    end = " to 0" if "scheduler" in settings else ""
    assert describe_rate(build(**settings), end) == text


def resumed(step: int, rate: float, factor: float = 1.0) -> dict[str, Any]:
    groups = [{"param_groups": [{"lr": rate}]}]
    return {"optimizer_states": groups, "global_step": step, "rate_factor": factor}


def test_a_rate_that_stays_is_not_described():
    model = build(learning_rate=1e-3)
    assert describe_new_rate(model, 10, resumed(5, 1e-3), {}) == ""
    assert describe_new_rate(model, 10, resumed(5, 0.25e-3, 0.25), {}) == ""  # after bad steps
    assert describe_new_rate(model, 10, resumed(5, 1.0005e-3), {}) == ""  # rounding


def test_a_rate_that_jumps_is_described_with_both():
    line = describe_new_rate(build(learning_rate=1e-3), 10, resumed(5, 2e-3), {})
    assert line == "the learning rate is 0.001 from this step on, and would have been 0.002"


def test_a_cosine_that_ends_elsewhere_says_how_to_keep_it():
    """By hand: after half of 10 steps a cosine is at half of its rate, after a quarter of 20 at
    .854."""
    model = build(learning_rate=1e-3, scheduler="cosine", min_lr_factor=0.0)
    before = {"lightning": {"trainer": {"max_steps": 10}}}
    rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * 5 / 20))
    line = describe_new_rate(model, 20, resumed(5, 0.5e-3), before)
    assert line.startswith(f"the learning rate is {rate:.3g} from this step on, and would have")
    assert "step 20 instead of 10" in line
    assert line.endswith("model.params.decay_steps=10 leaves it as it was")
    assert describe_new_rate(model, 10, resumed(5, 0.5e-3), before) == ""


@pytest.mark.parametrize(
    ("psnr", "start", "text"),
    [
        (None, 20.0, ""),
        (21.3, None, ": 21.30 dB in the last validation"),
        (21.3, 20.05, ": 21.30 dB in the last validation, 1.25 above the linear code"),
        (19.3, 20.05, ": 19.30 dB in the last validation, 0.75 below the linear code"),
    ],
)
def test_the_gain_is_over_the_linear_code(psnr, start, text):
    model = build()
    model.validation_values = {} if psnr is None else {"val/psnr": psnr}
    model.linear_psnr = start
    assert describe_gain(model) == text


def test_the_ending_names_the_places_that_are_there(tmp_path, capsys, monkeypatch):
    curves = {"val/psnr": ([1, 2], [20.0, 21.0])}
    plotted = []
    monkeypatch.setattr(summary, "read_curves", lambda _: curves)
    monkeypatch.setattr(summary, "plot_curves", lambda *args: plotted.append(args))
    run = Run(tmp_path)
    run.config.touch()
    print_ending(run, "done after 2 steps")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["done after 2 steps", f"  config    {run.config}"]
    assert not plotted  # without a folder of pictures
    run.images.mkdir()
    print_ending(run, "done")
    assert plotted == [(curves, run.images / "curves.png")]
    assert f"  pictures  {run.images}" in capsys.readouterr().err.splitlines()
