"""Two processes through the real command give the weights of one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import parts, tiny_config
from tests.data.images import write_shards
from tests.models.autoencoder_kl import tiny_kl
from tests.models.parts.vision import node
from tests.models.steps import against
from tests.training.events import scalars

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


def start(
    tmp_path: Path, config: str, name: str, *overrides: str, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("OLVAE_RUN", "LOCAL_RANK")}
    arguments = ["train.py", "--base", config, "--logdir", str(tmp_path), "--gpus", "0", "--name", name]
    return subprocess.run(
        [sys.executable, *launcher, *arguments, *SMALL, *overrides],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def command(tmp_path: Path, config: str, name: str, *overrides: str, launcher: tuple[str, ...] = ()) -> dict:
    done = start(tmp_path, config, name, *overrides, launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = tmp_path.glob(f"*_{name}_32")  # one folder, whatever the number of processes
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def read_scalars(run: Path, name: str) -> list[float]:
    return list(scalars(run)[name].values())


TWO = ("data.params.batch_size=4", "lightning.trainer.accelerator=cpu", "lightning.trainer.devices=2")


@pytest.mark.parametrize("config", [pytest.param("configs/demo.yaml", marks=pytest.mark.slow), "configs/demo_b.yaml"])
def test_two_processes_are_one(tmp_path, config):
    one = command(tmp_path, config, "one", "data.params.size=64", "data.params.batch_size=8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = command(tmp_path, config, "two", "data.params.size=64", *TWO, launcher=launcher if "_b" in config else ())
    assert one["images_seen"] == two["images_seen"] == 40
    for part in ("current_model_state", "state_dict"):
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            torch.testing.assert_close(tensor, two[part][name], rtol=0, atol=1e-5, msg=f"{part} {name}")
    if config.endswith("_b.yaml"):
        assert any(name.startswith("adversary.discriminator.") for name in one["state_dict"])


@pytest.mark.slow
def test_two_processes_align_a_latent_as_one(tmp_path, vit):
    """The projection's gradient is averaged, and the adaptive factor is that of the whole batch."""
    config = tiny_config(parts={"alignment": node(vit)})
    config["model"]["params"]["encoder_config"]["params"] |= {"extractor_channels": 16, "aggregate_channels": 16}
    (tmp_path / "aligned.yaml").write_text(yaml.safe_dump(config))
    one = command(tmp_path, str(tmp_path / "aligned.yaml"), "one", "data.params.batch_size=8")
    two = command(tmp_path, str(tmp_path / "aligned.yaml"), "two", *TWO)
    assert one["state_dict"].keys() == two["state_dict"].keys() > {"parts.alignment.projection.weight"}
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(tensor, two["state_dict"][name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher_as_one(tmp_path):
    """Both halves, through the teacher's decoder too."""
    tiny_kl(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(tmp_path / "teacher")
    teacher = {"autoencoder": f"diffusers:{tmp_path / 'teacher'}", "decoder_weight": 0.5}
    config = tiny_config(
        parts=parts(teacher=teacher, activation_bound={"bound": 0.5}),
        lossconfig={"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0, "kl_weight": 0}},
        use_quant=True,
        use_ema=True,
        ema_decay=0.5,
    )
    # A bias before a GroupNorm of one channel a group has a gradient of rounding alone, which Adam would enlarge.
    config["model"]["params"]["encoder_config"]["params"] |= {"extractor_channels": 16, "aggregate_channels": 16}
    (tmp_path / "distil.yaml").write_text(yaml.safe_dump(config))
    one = command(tmp_path, str(tmp_path / "distil.yaml"), "one", "data.params.batch_size=8")
    two = command(tmp_path, str(tmp_path / "distil.yaml"), "two", *TWO)
    for part in ("current_model_state", "state_dict"):
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            torch.testing.assert_close(tensor, two[part][name], rtol=0, atol=1e-5, msg=f"{part} {name}")
    assert torch.equal(one["state_dict"]["parts.teacher.std"], two["state_dict"]["parts.teacher.std"])
    (values,) = (read_scalars(path, "val/latent_rmse") for path in tmp_path.glob("*_two_32"))
    (expected,) = (read_scalars(path, "val/latent_rmse") for path in tmp_path.glob("*_one_32"))
    assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["folder", pytest.param("shards", marks=pytest.mark.slow)])
def test_a_process_without_a_validation_image_waits_for_the_one_that_has_one(tmp_path, image_folder, kind):
    if kind == "folder":
        (tmp_path / "val").mkdir()
        (image_folder / "class0" / "0.png").rename(tmp_path / "val" / "0.png")
        data = {"target": "olvae.data.mapped.picture_folder.FolderSource", "params": {"root": str(image_folder)}}
        data["params"]["val_root"] = str(tmp_path / "val")
    else:
        write_shards(tmp_path / "shards", (8, 8, 1))
        data = {
            "target": "olvae.data.shards.webdataset.WebDatasetSource",
            "params": {"shards": str(tmp_path / "shards")},
        }
    config = tiny_config(adversary_config=against())  # a discriminator, whose buffers all processes share
    config["data"] = {**data, "params": {**data["params"], "size": 16, "batch_size": 4}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    assert command(tmp_path, str(tmp_path / "one.yaml"), "one_image", *TWO)["global_step"] == 5
    (run,) = tmp_path.glob("*_one_image_32")
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (best["metric"], best["step"]) == ("val/psnr", 5)


@pytest.mark.slow
def test_too_many_unreadable_images_stop_all_processes_with_a_checkpoint(tmp_path, image_folder):
    (image_folder / "class2" / "empty.png").touch()  # which is for training, by its hash
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(image_folder)))
    done = start(tmp_path, str(config), "bad", *TWO, "data.params.batch_size=1", "lightning.trainer.max_steps=40")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert all("1 of 13 images can't be read" in line and "empty.png (the file is empty)" in line for line in errors)
    (run,) = tmp_path.glob("*_bad_32")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["images_seen"] == 6
