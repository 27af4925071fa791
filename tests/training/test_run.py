"""Training as the command does it, in small: reproducible, resumable,
and strict before it starts."""

import json
import multiprocessing
import os
import re
import signal
import time
import warnings
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from olvae.cli.main import main
from olvae.config import ConfigError, save
from olvae.data.places import load
from olvae.figures import labelled_grid
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.targets import find_target
from olvae.runs import Run
from olvae.training import callbacks
from olvae.training.run import RUN_ENV, TrainingStopped, quieten
from tests.conftest import plain_config, plain_networks, tiny_config
from tests.data.images import write_shards
from tests.models.steps import PATCHGAN, UNETGAN, against
from tests.training.events import scalars
from tests.training.origins import checkpoint

ONE_STEP = ("lightning.trainer.max_steps=1", "lightning.trainer.limit_val_batches=0")


@pytest.fixture
def go(train_with, image_folder):
    """Train the tiny config, changed by overrides; returns the run."""
    averaged = {
        "use_ema": True,
        "ema_decay": 0.8,
        "scheduler": "cosine",
        "warmup_steps": 2,
        "decay_steps": 8,
    }
    return partial(train_with, config=plain_config(image_folder, **averaged))


def test_a_run_leaves_its_config_checkpoints_pictures_and_scalars(go, whole_training, monkeypatch):
    step, dtypes = LiteAutoencoderKL.training_step, set()

    def look(self, batch, batch_idx):
        dtypes.add(
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        )
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LiteAutoencoderKL, "training_step", look)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    run = go(name="my_name", precision="bf16", seed=5)
    assert dtypes == {torch.bfloat16}
    # deterministic algorithms, without its price
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert run.path.name.endswith("_my_name_bf16")
    files = {
        path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()
    }
    assert {
        "config.yaml",
        "checkpoints/last.ckpt",
        "images/step=00000004.png",
        "images/curves.png",
    } <= files
    assert not [name for name in files if "partial" in name]
    config = load([run.config])
    begun = datetime.fromisoformat(config["run"].pop("begun"))
    assert timedelta() < datetime.now(UTC) - begun < timedelta(minutes=10)
    assert config["run"] == {
        "name": "my_name",
        "precision": "bf16",
        "gpus": "0",
        "seed": 5,
        "initial_seed": 5,
        "weights": None,
        "untrained": None,
        "checksums": {},
        "paths": {},
    }
    assert checkpoint(run)["images_seen"] == 16

    logged = scalars(run.path)
    names = {f"train/{name}" for name in ("loss", "rec", "kl", "wavelet", "gaussian", "lr")} | {
        "val/psnr",
        "val/ssim",
    }
    assert names <= set(logged)
    assert list(logged["train/loss"]) == [1, 2, 3, 4]
    assert list(logged["val/psnr"]) == [2, 4]
    images = EventAccumulator(str(run.path / "tensorboard")).Reload().Images("val/images")
    assert sorted(event.step for event in images) == [2, 4]


def test_a_source_of_unknown_length_is_trained_on(go, tmp_path):
    (shard,) = write_shards(tmp_path / "shards", (9,))
    overrides = (
        "data.target=olvae.data.shards.webdataset.WebDatasetSource",
        f"data.params.shards=pipe:cat {shard}",
        f"data.params.val_shards={shard}",
        "data.params.size=16",
        "data.params.batch_size=4",
    )
    assert checkpoint(go("lightning.trainer.max_steps=3", *overrides))["global_step"] == 3
    with pytest.raises(ValueError, match=r"1 .*shard for 2"):
        go(*overrides, "data.params.num_workers=2")


@pytest.mark.parametrize("own", [0.5, 0.25])
def test_actual_resume_leaves_out_factors_that_training_has_outdated(go, own):
    """Equal ones are of the weights that the other run started from; other numbers are kept."""
    factor = "model.params.scaling_factor=0.5"
    start = go(*ONE_STEP)
    moved = go(*ONE_STEP, factor, actual_resume=start.path)
    assert find_target(moved.path).factors_outdated
    no_kl = "model.params.lossconfig.params.kl_weight=0"
    frozen = ("model.params.freeze_encoder=true", no_kl, f"model.params.scaling_factor={own}")
    run = go(*ONE_STEP, *frozen, actual_resume=moved.path)
    expected = 1.0 if own == 0.5 else own
    assert load([run.config])["model"]["params"]["scaling_factor"] == expected
    assert find_target(run.path).load().scaling_factor == expected


def test_actual_resume_takes_the_weights_alone(go):
    first = go("lightning.trainer.max_steps=2")
    second = go(
        *ONE_STEP,
        "model.base_learning_rate=1e-9",
        actual_resume=first.last_checkpoint,
    )
    assert second.path != first.path
    before, after = checkpoint(first)["state_dict"], checkpoint(second)
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after["state_dict"][name], atol=1e-6, rtol=0)
    assert after["global_step"] == 1
    assert load([second.config])["run"]["weights"] == str(first.last_checkpoint)


def test_a_picture_that_cannot_be_read_is_named_and_the_steps_before_it_are_kept(
    go, tmp_path, image_folder
):
    for path in sorted(image_folder.rglob("*.png"))[:3]:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"3 of 12 .*0\.png \("):
        go(
            "lightning.trainer.max_steps=40",
            "data.params.num_workers=1",
            "data.params.max_unreadable=0.17",
        )
    assert all(any(path.glob("checkpoints/*.ckpt")) for path in (tmp_path / "runs").glob("*"))


def test_a_failing_start_leaves_nothing_and_changes_nothing(go, tmp_path):
    with pytest.raises(ValueError, match="betas must"):
        go("model.params.betas=[0.9, 3.0]")
    assert not (tmp_path / "runs").exists()
    run = go(*ONE_STEP)
    before = run.config.read_text()
    with pytest.raises(ConfigError, match=r"foo: .*auto, ddp, ddp_bf16"):
        go("lightning.trainer.strategy=foo", "lightning.trainer.max_steps=8", resume=run.path)
    assert run.config.read_text() == before
    with pytest.raises(ConfigError, match="use_ema"):
        go("model.params.use_ema=false", resume=run.path)
    with pytest.raises(ConfigError, match="`name`: "):
        go(resume=run.path, name="other")


@pytest.mark.parametrize(
    ("signals", "pause_s", "code"),
    [
        ([signal.SIGINT] * 2, 0.02, 130),  # under torchrun, which forwards a second one
        ([signal.SIGTERM] * 5, 0.15, 75),
        ([signal.SIGHUP], 0.0, 75),  # of a terminal that is closed
    ],
)
def test_a_signal_to_all_processes_leaves_a_checkpoint_and_its_exit_code(
    tmp_path, image_folder, quick_training, capfd, monkeypatch, signals, pause_s, code
):
    """A terminal's Ctrl-C, or a scheduler's signal, reaches the process group, and so the loader's
    workers: one step more, a checkpoint, an exit code that tells them apart. An echo within a
    second changes nothing."""
    monkeypatch.delenv(RUN_ENV, raising=False)
    save(plain_config(image_folder), tmp_path / "c.yaml")
    arguments = (
        f"train --base {tmp_path}/c.yaml --logdir {tmp_path}/runs --gpus 0 "
        "data.params.num_workers=1"
    )

    def command() -> None:
        os.setsid()
        # Whoever runs the tests may ignore it, as nohup does.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        main([*arguments.split(), "lightning.trainer.max_steps=100000"])

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/images/step=*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in signals:
        os.killpg(process.pid, number)
        time.sleep(pause_s)
    process.join(120)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
    errors = capfd.readouterr().err
    assert process.exitcode == code, errors
    assert errors.count("stopped after") == errors.count("\nstopped") == 1, errors
    (run,) = (tmp_path / "runs").iterdir()
    assert f"--resume {run}\n" in errors
    assert checkpoint(Run(run))["global_step"] > 0


def test_callbacks_of_the_config_are_used(go):
    run = go(
        "lightning.callbacks.keep.target=olvae.training.saving.KeepCheckpoints",
        "lightning.callbacks.keep.params.keep_every_n_steps=2",
    )
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "best.ckpt",
        "best.json",
        "last.ckpt",
        "step=00000002.ckpt",
        "step=00000004.ckpt",
    ]


def test_the_demo_learns(train_with):
    """30 steps of its networks on smaller crops: 2 dB above the 11.5 dB that untrained weights, or
    grey, have. The linear start is left out, which has more."""
    plain = [f"model.params.{half}_config.params.linear=false" for half in ("encoder", "decoder")]
    small = ["model.params.use_ema=false", "model.params.warmup_steps=10", "data.params.size=32"]
    overrides = ["lightning.trainer.max_steps=30", *small, *plain]
    run = train_with(*overrides, base=["configs/demo.yaml"])
    assert [*scalars(run.path)["val/psnr"].values()][-1] > 13.5


@pytest.mark.parametrize("channels", [1, 6])
def test_training_on_one_and_six_channels(go, image_folder, channels):
    """Grey images, and arrays of six channels, with a discriminator.

    LPIPS's part is in test_perceptual.
    """
    if channels == 6:
        for path in sorted(image_folder.rglob("*.png")):
            rgb = np.asarray(Image.open(path))
            np.save(path.with_suffix(".npy"), np.concatenate((rgb, 255 - rgb), axis=2))
            path.unlink()
    discriminator = {**PATCHGAN, "params": {**PATCHGAN["params"], "in_channels": channels}}
    run = go(
        "lightning.trainer.max_steps=2",
        f"data.params.channels={channels}",
        f"model.params.encoder_config.params.in_channels={channels}",
        f"model.params.decoder_config.params.out_channels={channels}",
        f"model.params.adversary_config={json.dumps(against(discriminator))}",
        config=tiny_config(image_folder),
    )
    assert checkpoint(run)["state_dict"]["decoder.conv_out.weight"].shape[0] == 4 * channels
    assert (run.images / "step=00000002.png").is_file()


INFERENCE_ONLY = (
    "model.params.lossconfig.target=torch.nn.Identity",
    "model.params.lossconfig.params={}",
)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (("data.params.root=/nowhere",), {}, "no such folder"),
        ((), {"name": "a/b"}, "`name`"),
        (INFERENCE_ONLY, {}, "inference only"),
        (
            (*INFERENCE_ONLY, f"model.params.adversary_config={json.dumps(against())}"),
            {},
            "inference only",
        ),
        (("model.params.parts=[1]",), {"teacher": "olvae:photos-f8c4"}, "not an int"),
        (
            ("lightning.trainer.max_steps=0",),
            {},
            r"trainer\.max_steps: 0: expected a number of steps from 1 on$",
        ),
        (("lightning.trainer.max_steps=true",), {}, "max_steps: True: expected"),
        (
            ("lightning.trainer.val_check_interval=0",),
            {},
            "val_check_interval: 0: .*from 1 on; limit_val_batches=0",
        ),
        (("lightning.trainer.log_every_n_steps=-1",), {}, "log_every_n_steps: -1: .*from 0 on"),
        (
            ("model.params.min_lr_factor=-1", "model.params.ema_decay=2"),
            {},
            "min_lr_factor must be .*\n.*ema_decay",
        ),
        (
            ("model.params.decay_steps=3", "model.params.warmup_steps=3"),
            {},
            "more than warmup_steps, 3, got 3",
        ),
        (
            ("lightning.trainer.max_epochs=2",),
            {},
            "a stream of images has no epochs: set max_steps",
        ),
        (("lightning.trainer.val_check_interval=0.5",), {}, "expected a number of steps"),
        (("run.seed=5",), {}, "^run: .*: leave it out, and give `seed`, `precision`, `gpus` or"),
        (("model.target=torch.nn.Identity",), {}, "unknown key|is not a LiteAutoencoderKL"),
        (("data=null",), {}, "data: expected a node"),
        (("data.params.channels=1",), {}, "the images have 1 channel, the model takes 3"),
    ],
)
def test_training_mistakes_leave_no_run_folder(go, tmp_path, overrides, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go(*overrides, **options)
    assert not (tmp_path / "runs").exists()


def test_the_settings_of_a_run_are_options(go, tmp_path):
    """In a config file, as a run's own, or over a resumed run's."""
    run = go(*ONE_STEP, seed=3, precision="bf16")
    for settings in (
        {"base": [run.config]},
        {"resume": run.path, "overrides": ["run.seed=5"]},
        {"resume": run.path, "overrides": ["run.name=b"]},
    ):
        with pytest.raises(ConfigError, match=r"^run: training"):
            go(**settings)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    before = load([run.config])["run"]
    again = go("lightning.trainer.max_steps=2", resume=run.path, base=[run.config])
    assert load([again.config])["run"] == before


def test_configs_without_max_steps_or_a_source_are_refused(train_with, tmp_path, image_folder):
    config = plain_config(image_folder)
    with pytest.raises(ConfigError, match=r"lightning\.trainer\.max_steps: None: "):
        train_with(config={**config, "lightning": {"trainer": {}}})
    with pytest.raises(ConfigError, match=r"data\.target: fractions\.Fraction"):
        train_with(config={**config, "data": {"target": "fractions.Fraction"}})
    with pytest.raises(ConfigError, match="data: missing"):
        train_with(base=["configs/olitevaeB_im_f8c12.yaml"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"start_step": 4},
            r"^model\.params\.adversary_config\.params\.start_step: 4 is not below max_steps, 4",
        ),
        (
            {"discriminator_config": UNETGAN},
            "does not take images of 3x16x16: UNetGAN takes .* multiples of 64",
        ),
        ({"loss": "hinged"}, r"loss: expected Literal\['hinge'"),
        ({"discriminator_config": {"target": "torch.nn.Identity"}}, "num_outputs|does not take"),
    ],
)
def test_adversaries_that_do_not_fit_are_refused(
    train_with, tmp_path, image_folder, params, message
):
    adversary = against(lecam_weight=1.0)
    adversary["params"] |= params
    with pytest.raises(ConfigError, match=message):
        train_with(config=plain_config(image_folder, adversary_config=adversary))
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_model_are_refused(go, tmp_path):
    run = go(*ONE_STEP)
    with pytest.raises(ValueError, match="another model"):
        go("model.params.decoder_config.params.channels=16", actual_resume=run.last_checkpoint)
    with pytest.raises(ValueError, match="another model"):
        go("model.params.decoder_config.params.channels=16", resume=run.path, allow_changes=True)
    with pytest.raises(ConfigError, match=r"`resume`.*`actual_resume`"):
        go(resume=run.path, actual_resume=run.last_checkpoint)
    run.last_checkpoint.write_bytes(run.last_checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="readable checkpoint"):
        go(resume=run.path)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_best_weights_are_kept_by_a_named_metric(go):
    keep = "lightning.callbacks.keep.target=olvae.training.saving.KeepCheckpoints"
    run = go(keep, "lightning.callbacks.keep.params.best=val/l1", "model.params.val_metrics=[l1]")
    values = scalars(run.path)["val/l1"]
    best = min(values, key=values.__getitem__)
    kept = run.checkpoints / "best.ckpt"
    assert torch.load(kept, weights_only=True)["global_step"] == best
    note = run.checkpoints / "best.json"
    assert json.loads(note.read_text()) == {
        "metric": "val/l1",
        "value": pytest.approx(values[best]),
        "step": best,
        "val_set": checkpoint(run)["val_set"],
    }
    # as if it had been perfect, after last.ckpt
    note.write_text('{"metric": "val/l1", "value": 0.0, "step": 2}')
    go("lightning.trainer.max_steps=6", resume=run.path)
    assert torch.load(kept, weights_only=True)["global_step"] == best
    for wrong, others in (
        ("val/l1", ()),
        ("psnr", ()),
        ("val_raw/psnr", ("model.params.use_ema=false",)),
    ):
        with pytest.raises(
            ValueError,
            match=rf"best: {wrong} .*only val/psnr, val/ssim",
        ):
            go(
                keep,
                f"lightning.callbacks.keep.params.best={wrong}",
                "lightning.trainer.val_check_interval=2",
                *others,
            )
    assert len(list(run.path.parent.iterdir())) == 1  # each fails before the first step


def test_quieten_shows_the_warnings_that_concern_the_user():
    """Of Lightning's, those that are wrong here, or that the summary replaces, are not."""
    shown = "Early stopping conditioned on metric `val/x` which is not available"
    hidden = "The 'train_dataloader' does not have many workers which may be a bottleneck"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quieten()
        for message in (shown, hidden):
            warnings.warn_explicit(
                message, RuntimeWarning, "x.py", 1, module="lightning.pytorch.callbacks"
            )
    assert [str(warning.message) for warning in caught] == [shown]


def test_training_continues_where_no_validation_image_can_be_read(
    go, tmp_path, capfd, caplog, monkeypatch
):
    """From the second validation on: the first one's values and best weights are not repeated."""
    held_out = tmp_path / "val"
    held_out.mkdir()
    Image.new("RGB", (16, 16)).save(held_out / "0.png")
    before = LiteAutoencoderKL.on_validation_epoch_end

    def then_break(model: LiteAutoencoderKL) -> None:
        before(model)
        (held_out / "0.png").write_bytes(b"no picture")

    monkeypatch.setattr(LiteAutoencoderKL, "on_validation_epoch_end", then_break)
    trainer = ("lightning.trainer.num_sanity_val_steps=0", "lightning.trainer.max_steps=6")
    run = go(f"data.params.val_root={held_out}", "data.params.max_unreadable=1.0", *trainer)
    validations = [line for line in capfd.readouterr().err.splitlines() if ": validation " in line]
    assert [line.partition(":")[0] for line in validations] == ["step 2"]
    assert checkpoint(run)["global_step"] == 6
    assert json.loads((run.checkpoints / "best.json").read_text())["step"] == 2
    warnings = [message for message in caplog.messages if "no validation image" in message]
    assert warnings == ["no validation image could be read, so best.ckpt is not kept"]


def test_a_picture_shows_eight_images_however_small_the_batch(go, image_folder, monkeypatch):
    """The same picture, whatever the batch: its images are the first of validation."""
    monkeypatch.setattr(callbacks, "labelled_grid", labelled_grid)
    sizes = {}
    for batch in (1, 4):
        run = go(
            "lightning.trainer.max_steps=1",
            f"data.params.batch_size={batch}",
            f"data.params.val_root={image_folder}",
        )
        sizes[batch] = Image.open(run.images / "step=00000001.png").size
    assert sizes[1] == sizes[4]
    assert sizes[1][0] > 8 * 128  # enlarged


def test_a_metric_of_validation_whose_network_is_missing_is_told_before_training(go, tmp_path):
    with pytest.raises(FileNotFoundError, match="val_metrics: rfid: pt_inception"):
        go("model.params.val_metrics=[rfid]", f"model.params.weights_dir={tmp_path}")
    assert not (tmp_path / "runs").exists()


def test_linear_paths_are_fitted_for_fresh_weights_alone(
    go, image_folder, capfd, monkeypatch, at_step
):
    """Not when a run is resumed, nor when it starts from weights."""
    monkeypatch.setattr("olvae.models.linear_code.CROPS", (256, 256))
    config = tiny_config(image_folder, encoder_config=plain_networks()["encoder_config"])
    for half in ("encoder_config", "decoder_config"):
        config["model"]["params"][half]["params"]["linear"] = True
    run = go(config=config)
    printed = capfd.readouterr().err
    start = re.search(
        r"linear code: (\d+\.\d\d) dB on \d validation images, fitted on 256", printed
    )
    end = re.search(
        r"done after 4 steps: (\d+\.\d\d) dB in the last validation, (.*) (above|below) the",
        printed,
    )
    gain = float(end[1]) - float(start[1])
    assert float(end[2]) * (1 if end[3] == "above" else -1) == pytest.approx(gain, abs=0.011)
    curve = scalars(run.path)["val/psnr"]
    assert list(curve) == [0, 2, 4]
    assert curve[0] == pytest.approx(float(start[1]), abs=0.006)
    go("lightning.trainer.max_steps=5", resume=str(run.path))
    printed = capfd.readouterr().err
    assert "fitted on" not in printed
    assert re.search(r"done after 5 steps: .* the linear code", printed), (
        "the checkpoint has its value"
    )
    go(config=config, actual_resume=str(run.path))
    assert "linear code" not in capfd.readouterr().err

    at_step(0, partial(signal.raise_signal, signal.SIGINT))
    with pytest.raises(TrainingStopped):
        go("lightning.trainer.max_steps=9", config=config)
    assert "1 step\n" in capfd.readouterr().err, "its two batches of the start are no validation"
