"""What is printed before the first step and after the last: figures by hand, warnings alone."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olvae.data.picture_folder import FolderSource
from olvae.files import counted
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run, Settings
from olvae.training import summary
from olvae.training.summary import (
    _rows,
    describe_gain,
    describe_new_rate,
    describe_rate,
    print_ending,
    print_summary,
)
from tests.conftest import parts, tiny_config
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


def test_a_training_is_described_in_rows(tmp_path, monkeypatch, image_folder):
    """All of them, by their names; figures by hand."""
    asked = []
    monkeypatch.setattr(summary, "count_macs", lambda *given: asked.append(given) or 2_500_000_000)
    model = build(learning_rate=2e-4, scheduler="cosine", min_lr_factor=0.1, warmup_steps=2)
    model.accumulate_grad_batches = 2
    source = FolderSource(str(image_folder), [16, 24], 3, val_fraction=0.5)
    settings = Settings(name="mine", precision="bf16", seed=4, weights="sdxl")
    trainer = a_trainer(world=4)
    rows = _rows(settings, trainer, model, source, done=0, seen=0)
    shapes = [(half, *shape) for half, *shape in asked]
    assert shapes == [(model.encoder, 1, 3, 16, 24), (model.decoder, 1, 4, 2, 3)]
    millions = {
        half: sum(p.numel() for p in getattr(model, half).parameters()) / 1e6
        for half in ("encoder", "decoder")
    }
    counted_threads = counted(torch.get_num_threads(), "thread")
    assert rows == {
        **{
            half: f"{count:.2f} M parameters, 2.50 GMACs per 16x24 image"
            for half, count in millions.items()
        },
        "latent": "f8, 4 channels: 16x24 -> 2x3",
        "objective": ", ".join(f"{w:g} {name}" for name, w in model.objective.weights.items()),
        "data": f"{source.describe()}, 16x24; no loader processes",
        "batch": "24 = 3 x 2 accumulated x 4 processes",  # images of an update
        "learning rate": "0.0002, cosine to 2e-05 at step 10, warm-up 2 steps",
        # Of 12 images, five are not held out.
        "steps": "10: 240 images, 48.0 times 5; the time left is shown after 3 seconds",
        "device": f"4 x CPU process of {counted_threads}, precision bf16",
        "seed": "4",
        "weights from": "sdxl",
    }


def test_rows_of_other_trainings(monkeypatch, image_folder):
    """A GPU, loader processes, a stream, a resumed run, parts, an adversary, a frozen half."""
    monkeypatch.setattr(summary, "count_macs", lambda *_: 0)
    monkeypatch.setattr(summary, "device_name", lambda device: f"the {device.type}")
    adversary = against(weight=0.25, start_step=7, adaptive_weight=True)
    decoder = tiny_config()["model"]["params"]["decoder_config"]
    decoder["params"]["enlarge"] = 2
    nodes = parts(equivariance={"probability": 0.5}, activation_bound={"bound": 3.0})
    model = build(
        adversary,
        freeze_encoder=True,
        lossconfig=WITHOUT_KL,
        parts=nodes,
        decay_steps=9,
        scheduler="cosine",
        decoder_config=decoder,
    )
    source = FolderSource(str(image_folder), 32, 3, val_fraction=0.5, num_workers=2)
    monkeypatch.setattr(type(source), "samples_per_epoch", None)
    trainer = a_trainer()
    trainer.strategy.root_device = torch.device("cuda")
    rows = _rows(Settings(), trainer, model, source, done=4, seen=100)
    assert rows["steps"].startswith("10: 118 images; ")  # and 6 steps of 3
    assert rows["device"] == "1 x the cuda, precision 32"
    assert rows["data"].endswith("; 2 loader processes")
    assert rows["latent"] == "f8, 4 channels: 16x16 -> 2x2"
    assert rows["learning rate"].endswith("cosine to 0 at step 9")
    assert rows["trained"] == "the decoder alone"
    millions = sum(p.numel() for p in model.adversary.discriminator.parameters()) / 1e6
    assert rows["adversary"] == (
        f"PatchGAN, {millions:.2f} M parameters, hinge, adaptive weight 0.25 from step 7"
    )
    described = {part.name: part.describe() for part in model.each_part}
    assert any(described.values())
    for name, text in described.items():
        assert rows.get(name.replace("_", " "), "") == text
    assert "weights from" not in rows
    one_half = build(freeze_decoder=True)
    rows = _rows(Settings(), a_trainer(), one_half, source, done=0, seen=0)
    assert rows["trained"] == "the encoder alone"
    assert "adversary" not in rows
    playing = build(against(weight=0.25))
    rows = _rows(Settings(), a_trainer(), playing, source, done=0, seen=0)
    assert "trained" not in rows
    assert "hinge, weight 0.25 from step 0" in rows["adversary"]


def test_a_summary_is_a_panel_of_its_rows_and_the_runs_folder(shown, tmp_path, monkeypatch):
    """Names beside texts, which are printed as they are; warnings below."""
    texts = {"data": "[bold]of mine", "seed": "x" * 20}
    given = []
    monkeypatch.setattr(summary, "_rows", lambda *arguments: given.append(arguments) or texts)
    monkeypatch.setattr(summary, "_warnings", lambda *_: iter(["too few"]))
    model = build()
    lines = [line.strip() for line in shown(model, done=4, seen=9).splitlines()]
    ((settings, trainer, first, _, done, seen),) = given
    assert (settings.name, trainer.max_steps, first, done, seen) == ("mine", 10, model, 4, 9)
    assert " olvae train: mine " in lines[0]
    assert len(lines[0]) < 60  # as wide as its rows
    assert [line.strip("│ ").split() for line in lines[1:4]] == [
        ["data", "[bold]of", "mine"],
        ["seed", "x" * 20],
        ["continued", "after", "4", "steps"],
    ]
    # Two spaces between the columns, no line between the rows.
    assert f"seed       {'x' * 20}" in lines[2]
    assert lines[5:] == [f"run: {tmp_path}", "warning: too few"]
    assert "continued" not in shown(model)
    # A long text is folded, not cut.
    texts["seed"] = "x" * 60
    monkeypatch.setenv("COLUMNS", "40")
    assert shown(model).count("x") == 60


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"val_images": 19}, ["19 held-out images"]),
        ({"val_images": 1}, ["1 held-out image:"]),
        ({"val_images": 20}, []),
        ({"val_images": None}, []),
        ({"warmup_steps": 10}, ["until step 10"]),
        ({"warmup_steps": 9}, []),
        # Six of a machine's cores: two loader processes for each of three ranks.
        ({"num_workers": 2, "cores": 6}, []),
        ({"num_workers": 2, "cores": 5}, ["6 loader processes on 5 cores"]),
    ],
)
def test_settings_that_make_a_training_worse_are_warned_of(monkeypatch, changes, words):
    given = {"val_images": 50, "warmup_steps": 0, "num_workers": 0, "cores": 6, **changes}
    monkeypatch.setattr(summary, "cores", lambda: given["cores"])
    monkeypatch.setattr(summary, "sharing_cores", lambda ranks: ranks)
    trainer = a_trainer(world=6)
    trainer.num_nodes = 2
    source = SimpleNamespace(val_images=given["val_images"], num_workers=given["num_workers"])
    model = SimpleNamespace(warmup_steps=given["warmup_steps"])
    found = list(summary._warnings(trainer, model, source))
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


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
    own = build(learning_rate=1e-3, scheduler="cosine", min_lr_factor=0.0, decay_steps=20)
    configured = {"model": {"params": {"decay_steps": 10}}, **before}
    assert describe_new_rate(own, 30, resumed(5, 0.5e-3), configured) == line
    same = {"lightning": {"trainer": {"max_steps": 20}}}
    assert "cosine" not in describe_new_rate(model, 20, resumed(5, 0.5e-3), same)
    constant = build(learning_rate=1e-3)
    assert "cosine" not in describe_new_rate(constant, 20, resumed(5, 0.5e-3), before)
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
        (20.0, 20.004, ": 20.00 dB in the last validation, as the linear code"),
        (20.004, 20.0, ": 20.00 dB in the last validation, as the linear code"),
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
    curves.clear()  # before the first value is logged
    print_ending(run, "done")
    assert len(plotted) == 1
