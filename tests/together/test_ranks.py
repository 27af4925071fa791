"""Two processes give the weights of one process with the whole batch,
and stop and validate together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from olvae.data.places import load
from olvae.models.updates.ddp import UNUSED
from olvae.runs import Run
from tests.conftest import parts, plain_config, tiny_config
from tests.data.images import write_shards
from tests.models.parts.vision import node
from tests.models.steps import WITHOUT_KL, against
from tests.training.events import scalars
from tests.training.origins import checkpoint, reduced_features, save_teacher

ROOT = Path(__file__).parent.parent.parent
SMALL = (
    "lightning.trainer.max_steps=5",
    "lightning.trainer.val_check_interval=5",
    "model.params.sample_posterior=false",
    "model.params.warmup_steps=0",
    "model.base_learning_rate=1e-4",
    "model.params.encoder_config.params.extractor_resblocks=1",
    "model.params.encoder_config.params.aggregate_resblocks=1",
)
WHOLE, HALF = "data.params.batch_size=8", "data.params.batch_size=4"


def assert_close(one: Run, two: Run, rounded: tuple[str, ...] = ()) -> None:
    """Weights are equal to 1e-5, but for a few with gradients near 0: Adam takes a whole step by a
    rounding's sign. Of names that end in ``rounded`` all may be such."""
    a, b = checkpoint(one), checkpoint(two)
    assert a["images_seen"] == b["images_seen"] == 8 * a["global_step"]
    for part in ("current_model_state", "state_dict"):
        assert a.get(part, {}).keys() == b.get(part, {}).keys()
        for name, tensor in a.get(part, {}).items():
            apart = (tensor.float() - b[part][name].float()).abs()
            assert name.endswith(rounded) or (apart > 1e-5).float().mean() < 1e-3, f"{part} {name}"
            assert apart.max() < 1e-3, f"{part} {name}"


def test_two_processes_train_as_one(train_with, train_two, monkeypatch):
    # Narrow, because these are three trainings; the demo needs 64 pixels for its discriminator.
    monkeypatch.setattr("olvae.models.linear_code.CROPS", (64, 64))
    two_steps = (
        "model.params.encoder_config.params.aggregate_channels=16",
        "model.params.adversary_config.params.discriminator_config.params.base_channels=2",
        "data.params.size=64",
        "lightning.trainer.limit_val_batches=1",
        "lightning.trainer.max_steps=2",
        "lightning.trainer.log_every_n_steps=1",
    )
    config = load(["configs/demo_b.yaml"], [*SMALL, *two_steps])
    one, two = train_with(WHOLE, config=config), train_two(HALF, config=config)
    assert_close(one, two)
    # what is logged is of both halves of the batch
    values, same = scalars(one.path), scalars(two.path)
    assert {
        "train/loss",
        "train/rec",
        "train/discriminator",
        "health/logits_fake",
        "train/grad_norm",
    } <= values.keys()
    for name in values:
        if name.startswith(("train/", "health/")):
            assert same[name] == pytest.approx(values[name], rel=1e-3, abs=1e-5), name
    assert any(
        name.startswith("adversary.discriminator.") for name in checkpoint(one)["state_dict"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")]
)
def test_two_processes_of_the_command_train_as_one(tmp_path, launcher):
    """Lightning starts the second one, or torchrun starts both."""

    def command(*overrides: str, launcher: tuple[str, ...] = ()) -> Run:
        name = overrides[0][-1]
        arguments = (
            f"--base configs/demo.yaml --logdir {tmp_path} --gpus 0 --name {name} "
            "data.params.size=64"
        ).split()
        environment = {k: v for k, v in os.environ.items() if k not in ("OLVAE_RUN", "LOCAL_RANK")}
        command = [sys.executable, *launcher, "train.py", *arguments, *SMALL, *overrides]
        subprocess.run(command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, check=True)
        (run,) = tmp_path.glob(f"*_{name}_32")  # one folder, whatever the number of processes
        return Run(run)

    two = ("lightning.trainer.accelerator=cpu", "lightning.trainer.devices=2")
    assert_close(command(WHOLE), command(HALF, *two, launcher=launcher))


@pytest.mark.slow
def test_two_processes_align_a_latent_as_one(train_with, train_two, vit):
    """The projection's gradient is averaged, and the adaptive factor is that of the whole batch."""
    config = tiny_config(parts={"alignment": node(vit)})
    config["model"]["params"]["encoder_config"]["params"] |= {
        "extractor_channels": 16,
        "aggregate_channels": 16,
    }
    one, two = train_with(*SMALL, WHOLE, config=config), train_two(*SMALL, HALF, config=config)
    assert_close(one, two)
    assert "parts.alignment.projection.weight" in checkpoint(one)["state_dict"]


@pytest.mark.slow
def test_two_processes_learn_a_prior_as_one(train_with, train_two, monkeypatch):
    """With the same noise for every image, where each process draws its own."""

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.linspace(-2, 2, x[0].numel()).view_as(x[0]).expand_as(x)

    monkeypatch.setattr(torch, "randn_like", noise)
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.tensor(0.7).expand(size))
    prior = parts(prior={"width": 32, "depth": 1, "weight": 0.5})
    config = tiny_config(parts=prior, lossconfig=WITHOUT_KL)
    config["model"]["params"]["encoder_config"]["params"] |= {
        "extractor_channels": 16,
        "aggregate_channels": 16,
    }
    one, two = train_with(*SMALL, WHOLE, config=config), train_two(*SMALL, HALF, config=config)
    assert_close(one, two)
    learned = "parts.prior.denoiser.network.proj_out_2.weight"
    assert checkpoint(one)["state_dict"][learned].any()
    values, same = scalars(one.path), scalars(two.path)
    for name in ("train/rate", "val/bits_per_image"):
        assert same[name] == pytest.approx(values[name], rel=1e-3), name


@pytest.mark.slow
def test_two_processes_shape_a_latents_statistics_as_one(train_with, train_two, monkeypatch):
    """Spectrum and correlation are the whole batch's; the token's gradient is averaged."""
    monkeypatch.setattr(
        torch, "rand", lambda *size, **_: torch.linspace(0, 1, size[-1]).expand(size)
    )
    statistics = parts(
        spectrum_matching={"weight": 1.0},
        local_correlation={"threshold": 1.0, "weight": 0.1},
        latent_masking={"ratios": [0.5], "probabilities": [1.0]},
    )
    config = tiny_config(parts=statistics)
    config["model"]["params"]["encoder_config"]["params"] |= {
        "extractor_channels": 16,
        "aggregate_channels": 16,
    }
    one, two = train_with(*SMALL, WHOLE, config=config), train_two(*SMALL, HALF, config=config)
    assert_close(one, two)
    assert "parts.latent_masking.token" in checkpoint(one)["state_dict"]
    values, same = scalars(one.path), scalars(two.path)
    for name in ("train/spectrum", "train/local_correlation", "health/local_correlation"):
        assert same[name] == pytest.approx(values[name], rel=1e-3), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*starts fresh")
def test_two_processes_reduce_a_vision_encoder_as_one(train_with, train_two, vit):
    """FAE's attention and transformer, and PAE's projection, get averaged gradients."""
    config = reduced_features(vit)
    settings = SMALL[:5]  # the others are of LiteVAE's encoder
    one, two = (
        train_with(*settings, WHOLE, config=config),
        train_two(*settings, HALF, config=config),
    )
    # A softmax does not see the keys' biases: their gradients are roundings.
    assert_close(one, two, rounded=("attention.qkv.bias",))
    learned = checkpoint(one)["state_dict"].keys()
    assert {"encoder.attention.qkv.weight", "parts.pae.projection.weight"} <= learned
    values, same = scalars(one.path), scalars(two.path)
    for name in ("train/features", "train/structure", "train/semantics"):
        assert same[name] == pytest.approx(values[name], rel=1e-3), name


@pytest.mark.slow
def test_two_processes_play_against_dino_as_one(train_with, train_two, vit, monkeypatch):
    """Heads with BatchNorm of the whole batch; without augmentations, which each draws its own."""
    monkeypatch.setattr("olvae.modules.dino_discriminator.diff_augment", lambda x, *_, **__: x)
    params = {"encoder": "test_vit", "weights": vit, "image_size": 64, "heads": 2}
    discriminator = {
        "target": "olvae.modules.dino_discriminator.DinoDiscriminator",
        "params": params,
    }
    config = tiny_config(adversary_config=against(discriminator, weight=0.1))
    config["model"]["params"]["encoder_config"]["params"] |= {
        "extractor_channels": 16,
        "aggregate_channels": 16,
    }
    one, two = train_with(*SMALL, WHOLE, config=config), train_two(*SMALL, HALF, config=config)
    assert_close(one, two, rounded=("norm2.bias",))  # one of 64
    values, same = scalars(one.path), scalars(two.path)
    assert same["train/discriminator"] == pytest.approx(values["train/discriminator"], rel=1e-3)


@pytest.mark.slow
def test_two_compiled_processes_train_as_two_uncompiled(train_two, vit, tmp_path, monkeypatch):
    """Steps of both players, a part with parameters, and validation: equal to the bit.

    The graphs are run by plain PyTorch. PatchGAN is in pieces: PyTorch 2.13 does not trace the
    exchange of its BatchNorm's statistics.
    """
    compiler, compiled_by = torch.compile, tmp_path / "compiled_by"

    def backend(graph, inputs):
        with compiled_by.open("a") as file:
            file.write(os.environ["RANK"])
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiler(f, **options, backend=backend)
    )
    config = tiny_config(parts={"alignment": node(vit)}, adversary_config=against())
    config["model"]["params"]["encoder_config"]["params"] |= {
        "extractor_channels": 16,
        "aggregate_channels": 16,
    }
    plain = train_two(*SMALL, HALF, config=config, name="plain")
    assert not compiled_by.exists()
    compiled = train_two(*SMALL, HALF, "model.params.compile=true", config=config)
    # At least a trial of the compiler, the encoder, the decoder and PatchGAN.
    ranks = compiled_by.read_text()
    assert ranks.count("0") == ranks.count("1") >= 4

    one, two = checkpoint(plain), checkpoint(compiled)
    names = one["state_dict"].keys()
    assert names == two["state_dict"].keys()
    assert {"parts.alignment.projection.weight"} < names
    assert any(name.startswith("adversary.discriminator.") for name in names)
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    values, same = scalars(plain.path), scalars(compiled.path)
    assert "val/psnr" in values
    for name in values:
        if name.startswith(("train/", "val/", "health/")):
            assert same[name] == values[name], name


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher_as_one(train_with, train_two, tmp_path):
    """Both halves, through the teacher's decoder too."""
    teacher = {"autoencoder": save_teacher(tmp_path / "teacher"), "decoder_weight": 0.5}
    both = parts(teacher=teacher, activation_bound={"bound": 0.5})
    config = tiny_config(
        parts=both, lossconfig=WITHOUT_KL, use_quant=True, use_ema=True, ema_decay=0.5
    )
    # A bias before a GroupNorm of one channel a group has a gradient of rounding alone, which Adam
    # would enlarge.
    config["model"]["params"]["encoder_config"]["params"] |= {
        "extractor_channels": 16,
        "aggregate_channels": 16,
    }
    one, two = train_with(*SMALL, WHOLE, config=config), train_two(*SMALL, HALF, config=config)
    assert_close(one, two)
    std = [checkpoint(run)["state_dict"]["parts.teacher.std"] for run in (one, two)]
    assert torch.equal(*std)
    values = [scalars(run.path)["val/latent_rmse"] for run in (one, two)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("folder", UNUSED), pytest.param("shards", "auto", marks=pytest.mark.slow)],
)
def test_a_process_without_a_validation_image_waits_for_the_one_that_has_one(
    train_two, tmp_path, image_folder, kind, strategy
):
    if kind == "folder":
        (tmp_path / "val").mkdir()
        (image_folder / "class0" / "0.png").rename(tmp_path / "val" / "0.png")
        data = {
            "target": "olvae.data.picture_folder.FolderSource",
            "params": {"root": str(image_folder)},
        }
        data["params"]["val_root"] = str(tmp_path / "val")
    else:
        write_shards(tmp_path / "shards", (8, 8, 1))
        params = {"shards": str(tmp_path / "shards")}
        data = {"target": "olvae.data.shards.webdataset.WebDatasetSource", "params": params}
    # a discriminator, whose buffers all processes share
    config = plain_config(adversary_config=against())
    config["data"] = {**data, "params": {**data["params"], "size": 16, "batch_size": 4}}
    two_steps = ("lightning.trainer.max_steps=2", "lightning.trainer.val_check_interval=2")
    run = train_two(*two_steps, f"lightning.trainer.strategy={strategy}", config=config)
    assert checkpoint(run)["global_step"] == 2
    best = json.loads((run.checkpoints / "best.json").read_text())
    assert (best["metric"], best["step"]) == ("val/psnr", 2)


def test_too_many_unreadable_images_stop_all_processes_with_a_checkpoint(
    train_two, tmp_path, image_folder
):
    (image_folder / "class2" / "empty.png").touch()  # which is for training, by its hash
    config = plain_config(image_folder)
    config["data"]["params"]["batch_size"] = 1
    stopped = {"raises": r"1 of 13 images can't be read, .*empty\.png \(the file is empty\)"}
    train_two("lightning.trainer.max_steps=40", config=config, **stopped)
    (path,) = (tmp_path / "runs").iterdir()
    assert checkpoint(Run(path))["images_seen"] == 6


@pytest.mark.slow
def test_two_processes_resume_as_one_in_another_layout(train_with, train_two, capfd):
    """Adam's moments take the weights' new strides, PatchGAN its R1.

    The lock is of a host that died.
    """
    config = tiny_config(adversary_config=against(r1_weight=1e-3, r1_every=1), use_ema=True)
    config["model"]["params"]["encoder_config"]["params"] |= {
        "extractor_channels": 16,
        "aggregate_channels": 16,
    }
    one, two = train_with(*SMALL, WHOLE, config=config), train_two(*SMALL, HALF, config=config)
    two.lock.write_text("process 1 on another host")
    again = ("lightning.trainer.max_steps=6", "model.params.channels_last=true")
    assert_close(train_with(*again, resume=one.path), train_two(*again, resume=two.path, name=None))
    (state, *_) = checkpoint(two)["optimizer_states"]
    assert any(
        s["exp_avg"].is_contiguous(memory_format=torch.channels_last)
        for s in state["state"].values()
    )
    # Lightning's advice at each validation, which would be wrong here
    assert "sync_dist" not in capfd.readouterr().err
