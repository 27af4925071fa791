"""Runs that learn from a teacher (--teacher), as the command trains."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError, validate
from olvae.data.dataset import SamplePhotographs
from olvae.data.picture_folder import FolderSource
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.data.places import load
from olvae.data.shards.latent_files import LATENT, read_latent
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.source import LoaderProcess
from olvae.export.as_diffusers import AutoencoderLiteVAE
from olvae.figures import save_image
from olvae.metrics.metric import psnr
from olvae.models import linear_code
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from olvae.models.loading.targets import find_target
from olvae.models.parts.teacher import STD_IMAGES
from tests.conftest import parts
from tests.export.latents import encode
from tests.export.test_as_diffusers import dit
from tests.models.autoencoder_kl import tiny_kl
from tests.training.origins import (
    EIGHT,
    FACTORS,
    checkpoint,
    one_line,
    save_teacher,
    small,
    student,
)


@pytest.fixture
def target(tmp_path) -> str:
    return save_teacher(tmp_path / "teacher")


@pytest.fixture
def other_teacher(tmp_path) -> str:
    """Of the same shape, with another bias."""
    other = tiny_kl(**EIGHT)
    other.encoder.conv_in.bias.data.add_(1)
    other.save_pretrained(tmp_path / "other")
    return f"diffusers:{tmp_path / 'other'}"


def test_the_student_has_the_teachers_factors(train_with, tmp_path, image_folder, target):
    """Every format carries them."""
    run = train_with("lightning.trainer.max_steps=1", config=student(image_folder), teacher=target)
    params = load([run.config])["model"]["params"]
    assert validate(load([run.config])) == []
    assert {name: params[name] for name in FACTORS} == FACTORS
    assert params["parts"] == parts(teacher={"autoencoder": target})
    shutil.rmtree(tmp_path / "teacher")  # only training needs it
    assert LiteVAE.from_pretrained(run.path).for_diffusion == FACTORS
    assert find_target(run.path).load().for_diffusion == FACTORS


def test_the_student_stands_in_for_the_teacher_in_a_pipeline(
    train_with, tmp_path, image_folder, target, monkeypatch
):
    """From one seed both get the same latents.

    The images differ as what the two decoders make of these does.
    """
    run = train_with("lightning.trainer.max_steps=1", config=student(image_folder), teacher=target)
    LiteVAE.from_pretrained(run.path).save_pretrained(tmp_path / "export")
    teacher = diffusers.AutoencoderKL.from_pretrained(target.removeprefix("diffusers:")).eval()
    images, latents = [], []
    for vae in (teacher, AutoencoderLiteVAE.from_pretrained(tmp_path / "export").eval()):
        decode = vae.decode

        def seen(z, *args, decode=decode, **more):
            latents.append(z)
            return decode(z, *args, **more)

        monkeypatch.setattr(vae, "decode", seen)
        pipeline = diffusers.DiTPipeline(dit(), vae, diffusers.DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        images.append(
            pipeline([3, 7], num_inference_steps=3, generator=seed, output_type="pt").images
        )
    assert torch.equal(*latents)
    with torch.no_grad():
        crossed = teacher.decode(latents[0]).sample - LiteVAE.from_pretrained(run.path).decode(
            latents[0]
        )
    # images are in [0, 1], reconstructions in [-1, 1]
    difference = (images[0] - images[1]).abs().max()
    assert 0 < difference <= crossed.abs().max() / 2 + 1e-5


def test_the_teachers_deviation_is_measured_on_the_training_images(
    train_with, image_folder, target, monkeypatch
):
    """The first 64 of the stream, here each of the seven training images about nine times."""
    monkeypatch.setattr("olvae.models.parts.teacher.STD_IMAGES", STD_IMAGES)
    run = train_with(
        "lightning.trainer.max_steps=1", config=student(image_folder), teacher=target, seed=4
    )
    teacher = find_target(target).load()
    stream = iter(FolderSource(str(image_folder), 16, 4, val_fraction=0.4).train_loader(seed=4))
    images = torch.cat([next(stream)["image"] for _ in range(16)])
    with torch.no_grad():
        means = teacher.encode(from_uint8(images)).mean
    expected = means.double().std((0, 2, 3), unbiased=False).float()
    torch.testing.assert_close(
        checkpoint(run)["state_dict"]["parts.teacher.std"], expected, rtol=1e-5, atol=0
    )


def untrained(run) -> str | None:
    return load([run.config])["run"]["untrained"]


def test_a_students_decoder_is_trained_after_its_encoder(
    train_with, image_folder, target, other_teacher, caplog
):
    one_step = "lightning.trainer.max_steps=1"
    first = train_with(one_step, config=student(image_folder, freeze_decoder=True), teacher=target)
    assert untrained(first) == "decoder"
    decoder = student(image_folder, freeze_encoder=True)
    second = train_with(one_step, config=decoder, teacher=target, actual_resume=first.path)
    assert untrained(second) is None
    before, after = (checkpoint(run)["state_dict"] for run in (first, second))
    assert all(
        torch.equal(before[name], after[name]) for name in before if name.startswith("encoder.")
    )
    assert "learned from another" not in caplog.text
    train_with(one_step, config=decoder, teacher=other_teacher, actual_resume=first.path)
    assert f"the encoder of {first.path}, frozen" in caplog.text


def test_weights_without_a_run_count_as_trained(
    train_with, tmp_path, image_folder, target, monkeypatch
):
    """A config two folders up is not theirs."""
    first = train_with(
        "lightning.trainer.max_steps=1",
        config=student(image_folder, freeze_decoder=True),
        teacher=target,
    )
    alone = tmp_path / "else" / "where" / "last.ckpt"
    alone.parent.mkdir(parents=True)
    shutil.copy(first.last_checkpoint, alone)
    shutil.copy(first.config, tmp_path / "else" / "config.yaml")
    config = student(image_folder, freeze_decoder=True)
    run = train_with(
        "lightning.trainer.max_steps=1", config=config, teacher=target, actual_resume=alone
    )
    assert untrained(run) is None
    monkeypatch.chdir(first.checkpoints)
    config["data"]["params"]["root"] = str(image_folder)
    run = train_with(
        "lightning.trainer.max_steps=1", config=config, teacher=target, actual_resume="last.ckpt"
    )
    assert untrained(run) == "decoder"


@pytest.fixture
def pairs(tmp_path, image_folder, target) -> Path:
    """Moments of the teacher, of mirrored images too, and the pixels."""
    options = {"size": 16, "flip": True, "images": True, "dtype": "float32"}
    encode(image_folder, tmp_path / "pairs", find_target(target).load(), shard_size=4, **options)
    return tmp_path / "pairs"


def of_pairs(pairs: Path, **model: Any) -> dict[str, Any]:
    """A config that trains on these, two steps with validation."""
    config = student(pairs, **model)
    config["lightning"]["trainer"] |= {"max_steps": 2, "limit_val_batches": 1.0}
    config["data"] = {
        "target": "olvae.data.shards.latent_source.PairSource",
        "params": {"folder": str(pairs), "batch_size": 4, "shuffle": 4},
    }
    return config


@pytest.mark.parametrize("model", [{}, {"freeze_encoder": True}], ids=["both", "decoder"])
def test_the_teachers_encoder_does_not_run_where_its_latents_are_known(
    train_with, pairs, target, monkeypatch, model
):
    asked, encoded = [], DiffusersAutoencoder.encode

    def count(self, x):
        asked.append(len(x))
        return encoded(self, x)

    monkeypatch.setattr(DiffusersAutoencoder, "encode", count)
    run = train_with(config=of_pairs(pairs, **model), teacher=target)
    assert asked == [1]  # the image that measures its factor
    stats = json.loads((pairs / "stats.json").read_text())
    assert checkpoint(run)["state_dict"]["parts.teacher.std"].tolist() == pytest.approx(
        stats["means_std"], rel=1e-6
    )
    shards = [Shard(str(path)) for path in sorted(pairs.glob("*.tar"))]
    entries = [read_latent(entry) for shard in shards for entry in read_shard(shard, LATENT)]
    sides = [latent for one, mirrored, _ in entries for latent in (one, mirrored)]
    # (n_z, all positions)
    means = torch.cat([latent.mean.double().flatten(1) for latent in sides], dim=1)
    assert stats["means_std"] == pytest.approx(means.std(1, correction=0).tolist(), rel=1e-5)


def test_linear_paths_are_fitted_on_the_latents_of_the_data(train_with, pairs, target):
    """Which are of whole images, not of crops.

    The decoder trains alone: at a rate of nothing it stays the code.
    """
    config = of_pairs(pairs, freeze_encoder=True)
    config["data"]["params"]["size"] = 8
    config["model"]["base_learning_rate"] = 1e-12
    config["model"]["params"]["decoder_config"]["params"]["linear"] = True
    once = "lightning.trainer.max_steps=1", "lightning.trainer.val_check_interval=1"
    run = train_with(*once, config=config, teacher=target)
    best = json.loads((run.checkpoints / "best.json").read_text())
    assert checkpoint(run)["linear_psnr"] == pytest.approx(best["value"], abs=1e-3)


def test_a_teachers_latents_without_a_teacher_are_refused(train_with, pairs):
    with pytest.raises(ConfigError, match=r"^data: .*a teacher") as caught:
        train_with(config=of_pairs(pairs))
    one_line(caught)


def test_latents_of_another_teachers_weights_are_refused(
    train_with, tmp_path, pairs, target, other_teacher
):
    """Beside a teacher, at the start and where a run goes on."""
    run = train_with("lightning.trainer.max_steps=1", config=of_pairs(pairs), teacher=target)
    with pytest.raises(ConfigError, match=r"^data: .*of tiny") as e:
        train_with(config=of_pairs(pairs), teacher=other_teacher)
    one_line(e)
    mixed = of_pairs(pairs)
    params = {"sources": [mixed["data"]], "size": 16, "batch_size": 4}
    mixed["data"] = {"target": "olvae.data.mix.MixSource", "params": params}
    with pytest.raises(ConfigError, match=r"^data: .*of tiny"):
        train_with(config=mixed, teacher=other_teacher)
    encode(
        tmp_path / "photos",
        tmp_path / "others",
        find_target(other_teacher).load(),
        shard_size=4,
        size=16,
        images=True,
    )
    others = f"data.params.folder={tmp_path / 'others'}"
    with pytest.raises(ConfigError, match="weights are not"):
        train_with("lightning.trainer.max_steps=2", others, resume=run.path, allow_changes=True)
    assert list((tmp_path / "runs").iterdir()) == [run.path]
    mixed_run = train_with("lightning.trainer.max_steps=1", config=mixed, teacher=target)
    assert checkpoint(mixed_run)["global_step"] == 1


def test_a_resumed_run_keeps_its_teacher(train_with, tmp_path, image_folder, target, other_teacher):
    """Wherever that is by now; its deviation is in the checkpoint."""
    run = train_with("lightning.trainer.max_steps=1", config=student(image_folder), teacher=target)
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=rf"diffusers:{tmp_path}/teacher: no such"):
        train_with("lightning.trainer.max_steps=2", resume=run.path)
    resumed = train_with(
        "lightning.trainer.max_steps=2", resume=run.path, teacher=f"diffusers:{tmp_path / 'moved'}"
    )
    assert checkpoint(resumed)["global_step"] == 2
    assert load([run.config])["model"]["params"]["parts"]["teacher"]["params"][
        "autoencoder"
    ].endswith("moved")

    plain = train_with("lightning.trainer.max_steps=1", config=student(image_folder))
    for path, overrides, options in (
        (run.path, (), {"teacher": other_teacher}),
        (run.path, ("model.params.parts.teacher=null",), {}),
        (plain.path, (), {"teacher": f"diffusers:{tmp_path / 'moved'}"}),
    ):
        with pytest.raises(
            ConfigError, match=r"^model\.params\.parts\.teacher: .*resumed"
        ) as caught:
            train_with(
                "lightning.trainer.max_steps=3",
                *overrides,
                resume=path,
                allow_changes=True,
                **options,
            )
        one_line(caught)


def test_a_resumed_run_finds_its_teacher_from_another_folder(
    train_with, tmp_path, image_folder, target, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = train_with(
        "lightning.trainer.max_steps=1", config=student(image_folder), teacher="diffusers:teacher"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (
        checkpoint(train_with("lightning.trainer.max_steps=2", resume=run.path))["global_step"] == 2
    )


def test_a_teacher_or_start_with_another_range_of_values_is_refused(train_with, tmp_path):
    (root := tmp_path / "deep").mkdir()
    for n in range(8):
        np.save(
            root / f"{n}.npy",
            np.random.default_rng(n).integers(0, 65536, (20, 20, 3), dtype=np.uint16),
        )
    config = student(root)
    config["data"]["params"]["range"] = [0, 65535]
    deep = train_with("lightning.trainer.max_steps=1", config=config)
    others = f"data.params.root={root}", "data.params.range={pairs: [0, 30000], outside: clip}"
    for place in ({"teacher": str(deep.path)}, {"start_from": str(deep.path)}):
        with pytest.raises(ConfigError, match=r"0 to 30000.*0 to 65535"):
            train_with(*others, config=config, **place)


@pytest.mark.parametrize(
    "name", ["encoder", "decoder", pytest.param("both", marks=pytest.mark.slow)]
)
def test_the_shipped_distil_recipes_train_their_halves(train_with, image_folder, target, name):
    """On a small teacher and small images; the half that is not trained keeps its fresh weights."""
    encoder = "model.params.encoder_config.params"
    sizes = [*small(image_folder, 64), f"{encoder}.scale=S", f"{encoder}.extractor_resblocks=1"]
    sizes += [f"{encoder}.aggregate_resblocks=1", "model.params.decoder_config.params.channels=16"]
    if name == "decoder":
        adversary = "model.params.adversary_config.params"
        sizes += [
            f"{adversary}.start_step=0",
            f"{adversary}.discriminator_config.params.image_size=64",
        ]
    run = train_with(*sizes, base=[f"configs/distil/{name}.yaml"], teacher=target)
    assert untrained(run) == {"encoder": "decoder", "decoder": "encoder", "both": None}[name]
    assert LiteVAE.from_pretrained(run.path).for_diffusion == FACTORS


DEMO = "configs/distil/demo.yaml"


def test_the_distil_demo_encodes_what_its_recipe_trains_on():
    """Crops, pairs and windows have one size: a teacher with GroupNorm sees the whole crop,
    and so do both halves."""
    (target,) = re.findall(
        r"^distil-demo:.*\n((?:\t.*\n)+)", Path("Makefile").read_text(), re.MULTILINE
    )
    (pairs,) = re.findall(r"^PAIRS = .*--size (\d+)", Path("Makefile").read_text(), re.MULTILINE)
    data = load([DEMO])["data"]["params"]
    (crops,) = set(re.findall(r"random_crops.py (\S+)", target))
    assert [int(size) for size in (pairs, *re.findall(r"random_crops.* --size (\d+)", target))] == [
        data["size"]
    ] * 2
    # of its validation tiles, which are encoded, too
    assert load([crops])["data"]["params"]["size"] == data["size"]
    assert target.count(f"--data {crops} $(PAIRS)") == 1


@pytest.mark.slow
def test_a_short_distil_demo_is_ahead_of_the_linear_start(train_with, tmp_path, monkeypatch):
    """With 48 crops and 80 steps: on photographs that neither has seen,
    both halves are ahead of the linear start."""
    monkeypatch.setattr(linear_code, "CROPS", (48, 48))
    teacher = find_target(
        load([DEMO])["model"]["params"]["parts"]["teacher"]["params"]["autoencoder"]
    ).load()
    (tmp_path / "crops").mkdir()
    for number, crop in enumerate(SamplePhotographs(128).first_images(0, 48)):
        save_image(crop, tmp_path / "crops" / f"{number:02d}.png")
    encode(
        tmp_path / "crops", tmp_path / "pairs", teacher, 48, size=128, images=True, dtype="float32"
    )
    data = [f"data.params.{name}={tmp_path / 'pairs'}" for name in ("folder", "val_folder")]
    x = from_uint8(
        torch.stack([sample.image for sample in SamplePhotographs(256).once(LoaderProcess())])
    )
    with torch.no_grad():
        z = torch.cat([teacher.encode(image[None]).mean for image in x])
    latents, decoded = [], []
    for steps in (1, 80):
        run = train_with(*data, f"lightning.trainer.max_steps={steps}", base=[DEMO])
        model = LiteVAE.from_pretrained(run.path).eval()
        with torch.no_grad():
            latents.append(
                float(
                    ((model.encode(x).mean - z) / z.std((0, 2, 3), keepdim=True))
                    .square()
                    .mean()
                    .sqrt()
                )
            )
            decoded.append(float(psnr(to_uint8(x), to_uint8(model.decode(z))).mean()))
    assert latents[1] < latents[0] < 0.23, latents
    assert decoded[1] - 0.3 > decoded[0] > 24.5, decoded


def test_a_decoder_at_2x_refuses_latents_of_images_of_its_own_size(train_with, pairs, target):
    config = of_pairs(pairs, freeze_encoder=True)
    config["model"]["params"]["decoder_config"]["params"]["enlarge"] = 2
    with pytest.raises(ConfigError, match=r"2 times smaller .*FolderSource"):
        train_with(config=config, teacher=target)
