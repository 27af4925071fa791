"""A run that was stopped and resumed equals one that was not, bit for bit: weights, averages,
optimizers, counts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from olvae.runs import Run
from tests.conftest import parts, plain_config, tiny_config
from tests.data.images import write_shards
from tests.models.autoencoder_kl import tiny_kl
from tests.models.parts.flow.generating import generates, nodes, vary
from tests.models.parts.vision import node
from tests.models.steps import WITHOUT_KL, against
from tests.training.origins import (
    assert_same_checkpoint,
    checkpoint,
    phase_b,
    reduced_features,
    save_teacher,
    student,
    without_networks,
)

AVERAGED = {
    "use_ema": True,
    "ema_decay": 0.8,
    "scheduler": "cosine",
    "warmup_steps": 2,
    "decay_steps": 4,
}

THREE_STEPS = (
    "lightning.trainer.max_steps=3",
    "lightning.callbacks.keep.target=olvae.training.saving.KeepCheckpoints",
    "lightning.callbacks.keep.params.keep_every_n_steps=2",
)
FIVE_STEPS = (
    "lightning.trainer.max_steps=5",
    "lightning.callbacks.keep.params.keep_every_n_steps=3",
)

Case = tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]
"""A config, options, and overrides."""


def shards(tmp_path: Path, images: Path) -> Case:
    write_shards(tmp_path / "shards", (5, 9, 6))
    config = plain_config(images, **AVERAGED, optimizer="muon")
    train, held_out = f"{tmp_path}/shards/{{000..001}}.tar", f"{tmp_path}/shards/002.tar"
    params = {
        "shards": train,
        "val_shards": held_out,
        "size": 16,
        "batch_size": 4,
        "shuffle": 4,
        "num_workers": 2,
    }
    config["data"] = {"target": "olvae.data.shards.webdataset.WebDatasetSource", "params": params}
    return config, {}, FIVE_STEPS


def everything_of_phase_b(tmp_path: Path, images: Path) -> Case:
    """Two batches an update."""
    return phase_b(images), {}, FIVE_STEPS


def started_from_another(tmp_path: Path, images: Path) -> Case:
    """Whose folder is gone when the run is resumed."""
    tiny_kl().save_pretrained(tmp_path / "gone")
    config = without_networks(
        images, use_ema=True, ema_decay=0.5, parts=parts(latent_noise={"std": 0.1})
    )
    return config, {"start_from": f"diffusers:{tmp_path / 'gone'}"}, ()


def taught_both(tmp_path: Path, images: Path, **model: Any) -> Case:
    accumulated = ("lightning.trainer.accumulate_grad_batches=2",)
    return student(images, **model), {"teacher": save_teacher(tmp_path / "teacher")}, accumulated


def taught_decoder(tmp_path: Path, images: Path) -> Case:
    return taught_both(
        tmp_path, images, freeze_encoder=True, use_ema=True, adversary_config=against(weight=0.1)
    )


def limited_by_a_prior(tmp_path: Path, images: Path) -> Case:
    """A part with parameters, which learn too."""
    config = plain_config(
        images,
        use_ema=True,
        sample_posterior=False,
        lossconfig=WITHOUT_KL,
        parts=parts(prior={"width": 32, "depth": 1}),
    )
    return config, {}, ()


def distilled_to_one_step(tmp_path: Path, images: Path) -> Case:
    """A part with a frozen copy, beside one without weights; noise of random places."""
    model = vary(generates(nodes()), std=0.05)
    model.autoencoder.save_pretrained(tmp_path / "gone")
    config = without_networks(
        images,
        use_ema=True,
        ema_decay=0.5,
        parts=nodes(flow={}, distillation={"steps": 2}),
    )
    return config, {"start_from": str(tmp_path / "gone")}, ()


def masked_by_a_token(tmp_path: Path, images: Path) -> Case:
    """A part with a token that learns, and parts that draw what they do."""
    masking = {"ratios": [0.0, 0.5], "probabilities": [0.5, 0.5]}
    drawn = parts(
        latent_masking=masking,
        shared_low_pass={"cuts": [0, 2], "block": 2},
        channel_masking={"widths": [1, 2, 4], "at_once": 2},
    )
    config = plain_config(images, use_ema=True, ema_decay=0.5, parts=drawn)
    return config, {}, ()


def random_vit(tmp_path: Path) -> str:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pt")
    return str(tmp_path / "vit.pt")


def aligned_by_a_transformer(tmp_path: Path, images: Path) -> Case:
    """As Send-VAE: a mapper that learns, and random noise in what it sees."""
    given = {"mapper": "vit", "noise": 1.0, "distance_margin": None, "adaptive_weight": False}
    alignment = node(random_vit(tmp_path), **given)
    return plain_config(images, use_ema=True, parts={"alignment": alignment}), {}, ()


def against_dino(tmp_path: Path, images: Path) -> Case:
    """Heads with BatchNorm and spectral norm, and augmentations at random."""
    params = {"encoder": "test_vit", "weights": random_vit(tmp_path), "image_size": 64, "heads": 2}
    target = "olvae.modules.dino_discriminator.DinoDiscriminator"
    adversary = against({"target": target, "params": params}, weight=0.1)
    return plain_config(images, adversary_config=adversary), {}, ()


def reduced_by_attention(tmp_path: Path, images: Path) -> Case:
    """A vision encoder as tokenizer: FAE's attention and part, PAE's priors."""
    return reduced_features(random_vit(tmp_path), images), {}, ()


CASES = (
    shards,
    everything_of_phase_b,
    started_from_another,
    taught_both,
    taught_decoder,
    limited_by_a_prior,
    distilled_to_one_step,
    masked_by_a_token,
    aligned_by_a_transformer,
    against_dino,
    reduced_by_attention,
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case is taught_both else ()) for case in CASES],
    ids=lambda case: case.__name__,
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    train_with, tmp_path, image_folder, case: Callable[..., Case]
):
    config, options, overrides = case(tmp_path, image_folder)
    whole = train_with(*THREE_STEPS, *overrides, config=config, **options)
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    # The run as a kill after the step that was kept would have left it.
    stopped = Run(tmp_path / "stopped")
    stopped.checkpoints.mkdir(parents=True)
    shutil.copy(whole.config, stopped.config)
    (kept,) = whole.checkpoints.glob("step=*.ckpt")
    shutil.copy(kept, stopped.last_checkpoint)
    resumed = train_with(resume=stopped.path)
    assert resumed.path == stopped.path
    assert_same_checkpoint(whole, resumed)


def test_a_run_that_is_given_more_steps_equals_one_that_had_them(train_with, image_folder):
    config = tiny_config(image_folder, **AVERAGED)
    whole, half = (
        train_with(f"lightning.trainer.max_steps={steps}", config=config) for steps in (3, 2)
    )
    resumed = train_with("lightning.trainer.max_steps=3", resume=half.path)
    assert resumed.path == half.path
    assert_same_checkpoint(whole, resumed)


def test_another_seed_gives_other_weights(train_with, image_folder):
    one = ("lightning.trainer.max_steps=1", "lightning.trainer.limit_val_batches=0")
    first, other = (
        train_with(*one, config=plain_config(image_folder), seed=seed) for seed in (3, 4)
    )
    name = "encoder.aggregator.init_conv.weight"
    assert not torch.equal(
        checkpoint(first)["state_dict"][name], checkpoint(other)["state_dict"][name]
    )
