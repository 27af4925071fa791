"""A training on many ranks without a GPU: messages against counts by hand, ranks that differ,
what follows."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olvae import config as cfg
from olvae.config import ConfigError
from olvae.models.adversary import Adversary
from olvae.models.footprint import without_weights
from olvae.modules.counting import count_parameters
from olvae.training.dry_run import RankStep, check_data, dry_run, kinds_of_steps, record_steps
from olvae.training.run import quieten
from tests.conftest import tiny_config
from tests.data.images import write_shards
from tests.models.steps import PATCHGAN, against


def config(adversary: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Of four convolutions: a fake operation takes half a millisecond."""
    half = {"target": "olvae.modules.others.tiny.Tiny", "params": {"blocks": [0, 0], "channels": 4}}
    nodes = {
        f"{name.lower()}_config": {**half, "target": half["target"] + name}
        for name in ("Encoder", "Decoder")
    }
    none = dict.fromkeys(("lpips_weight", "kl_weight", "wavelet_weight", "gaussian_weight"), 0)
    nodes["lossconfig"] = {"target": "olvae.losses.objective.Objective", "params": none}
    return tiny_config(adversary_config=adversary, **nodes, **model)


def record(
    config: dict[str, Any], precision: str, strategy: str = "auto"
) -> tuple[Any, dict[str, RankStep]]:
    quieten()
    model = without_weights(config["model"])
    return model, record_steps(model, 2, 16, precision, strategy, rank=0, ranks=4)


@pytest.fixture
def one_step(monkeypatch) -> None:
    monkeypatch.setattr("olvae.training.dry_run.FIRST_STEPS", ())
    monkeypatch.setattr("olvae.training.dry_run.kinds_of_steps", lambda _: {"a step": 0})


def test_each_player_sends_its_gradients_and_patchgan_its_statistics():
    """BatchNorm sends mean and variance in each pass of the discriminator, forward and backward,
    in float32."""
    model, steps = record(
        config(against(PATCHGAN, start_step=3, warmup_updates=2, r1_weight=1.0, r1_every=4)), "fp16"
    )
    kinds = ["autoencoder alone", "discriminator alone", "both", "both, R1", "both, logged"]
    assert list(steps) == ["first step", "second step", *kinds]
    one, other = (4 * count_parameters(player) for player in model.players.values())
    sent = {kind: step.nbytes for kind, step in steps.items()}
    statistics = 4 * 8  # of the layer's channels
    assert sent["autoencoder alone"] == one
    assert sent["discriminator alone"] == other + 2 * 4 * statistics  # real and fake images
    assert sent["both"] == sent["first step"] == one + other + 3 * 4 * statistics < sent["both, R1"]
    assert {message.split()[0] for message in steps["both"].messages} == {"allreduce"}
    # the values, at once
    assert re.fullmatch(r"allreduce of \d+ float32", steps["both, logged"].messages[-1])
    # of DDP's buckets
    assert "broadcast" in {message.split()[0] for message in steps["second step"].messages}
    assert (
        steps["first step"].launches
        > steps["both"].launches
        > steps["autoencoder alone"].launches
        > 30
    )
    assert (dist.is_initialized(), model.adversary.start_step, model.adversary.updates) == (
        False,
        3,
        0,
    )
    model.adversary.r1_every, model.adversary.start_step, model.adversary.warmup_updates = 1, 0, 0
    assert kinds_of_steps(model.adversary) == {"both, R1": 0, "both, R1, logged": 0}


def test_accumulated_micro_batches_send_once_and_a_bf16_hook_half_as_much(one_step):
    one, two = (record(config(accumulate_grad_batches=n), "bf16")[1]["a step"] for n in (1, 2))
    assert (
        (one.messages, one.launches)
        < (two.messages, two.launches)
        < (one.messages, 2 * one.launches)
    )
    half = record(config(), "32", "ddp_bf16")[1]["a step"]
    assert [message.replace("bfloat16", "float32") for message in half.messages] == one.messages
    assert 2 * half.nbytes == one.nbytes


@pytest.mark.parametrize(
    ("rank", "alone"), [(0, lambda: dist.all_reduce(torch.zeros(3))), (63, dist.barrier)]
)
def test_dry_run_finds_a_rank_that_sends_alone(one_step, monkeypatch, rank, alone):
    monkeypatch.setattr(
        Adversary, "updated", lambda self: alone() if dist.get_rank() == rank else None
    )
    sent = ["allreduce of 3 float32", "none"] if rank == 0 else ["none", "barrier of 1"]
    with pytest.raises(
        ConfigError,
        match=rf"message 15 is {sent[0]} .*0, and {sent[1]}.*63: ",
    ):
        dry_run(config(against(PATCHGAN)), 64, "32")


def test_dry_run_notes_too_few_images_and_data_that_are_elsewhere(one_step, tmp_path):
    """Too few images for the loader processes of all ranks, or for validation;
    data that is elsewhere."""
    write_shards(tmp_path / "shards", (5, 3))
    node = config(warmup_steps=7)
    params = {"shards": str(tmp_path / "shards"), "size": 16, "batch_size": 2}
    node["data"] = {"target": "olvae.data.shards.webdataset.WebDatasetSource", "params": params}
    notes = check_data(cfg.instantiate(node["data"]), 4)
    assert notes[1].startswith("data: 8 images of all ranks are more than an epoch's 5")
    assert notes[2].startswith("data: 3 validation images: 1 ranks have none")
    params["num_workers"] = 2
    with pytest.raises(ValueError, match=r"5 .*images for 8"):
        dry_run(node, 4)
    params["shards"] = "nowhere"
    notes = "\n".join(dry_run(node, 4, "16")[1])
    assert notes.startswith("data: not checked: nowhere")
    assert "images: 8 a step = 2 x 1 accumulated x 4 ranks, 16x16 pixels\n" in notes
    assert "0 ms on an H100" in notes
