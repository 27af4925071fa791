"""Weights that a training starts from: which half was never trained, and whose factors they are."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from olvae.config import ConfigError, save
from olvae.data.places import load
from olvae.models.linear_code import LinearEncoder
from olvae.modules.base import Encoder
from olvae.modules.litevae.encoder_model import WaveletEncoder
from olvae.runs import Run, Settings
from olvae.training.starting_weights import (
    _drop_outdated_factors,
    load_networks,
    load_other_run,
    load_resumed,
    untrained_half,
)
from tests.conftest import plain_config, tiny, tiny_config
from tests.models.parts.vision import node
from tests.models.steps import WITHOUT_KL, against


def test_the_half_that_a_source_never_trained_stays_untrained(train_with, image_folder):
    one = "lightning.trainer.max_steps=1"
    fresh = train_with(
        one, config=tiny_config(image_folder, lossconfig=WITHOUT_KL, freeze_decoder=True)
    )
    again = train_with(one, "model.params.freeze_decoder=true", start_from=str(fresh.path))
    assert load([again.config])["run"]["untrained"] == "decoder"


@pytest.mark.parametrize(
    ("frozen", "before", "expected"),
    [
        ("decoder", None, "decoder"),
        ("encoder", None, "encoder"),
        (None, None, None),
        ("decoder", "decoder", "decoder"),
        ("encoder", "decoder", None),
        ("decoder", {}, None),  # weights without a config
    ],
)
def test_untrained_half_is_the_frozen_one_with_fresh_weights(frozen, before, expected):
    model = freezing(frozen, tiny().encoder)
    config = {"run": {"untrained": before}} if isinstance(before, str) else before
    assert untrained_half(model, config) == expected


@pytest.mark.parametrize("place", ["parts.alignment", "adversary_config"])
def test_a_resumed_run_keeps_the_weights_of_its_frozen_vision_encoder(
    train_with, image_folder, tmp_path, vit, place
):
    """Which its checkpoints do not have: here another file has the name of the old one."""
    weights = tmp_path / "weights.pt"
    shutil.copy(vit, weights)
    alignment = node(str(weights), distance_margin=None)
    judge = {
        "target": "olvae.modules.dino_discriminator.DinoDiscriminator",
        "params": {"encoder": "test_vit", "weights": str(weights), "image_size": 64, "heads": 1},
    }
    if place == "adversary_config":
        config = plain_config(image_folder, adversary_config=against(judge))
    else:
        config = plain_config(image_folder, parts={"alignment": alignment})
    quick = ("lightning.trainer.max_steps=1", "lightning.trainer.limit_val_batches=0")
    run = train_with(*quick, config=config)
    train_with("lightning.trainer.max_steps=2", resume=run.path)

    tensors = torch.load(weights)
    tensors["cls_token"] += 1
    torch.save(tensors, weights)
    with pytest.raises(ConfigError, match=rf"^model\.params\.{place}: "):
        train_with("lightning.trainer.max_steps=3", resume=run.path)


def freezing(frozen: str | None, encoder: Encoder, stand_in: object = None) -> SimpleNamespace:
    halves = {
        "encoder": encoder,
        "decoder": tiny().decoder,
        "frozen_halves": [frozen] if frozen else [],
    }
    return SimpleNamespace(quantizer=None, stand_in=stand_in, **halves)


def test_untrained_half_is_none_for_an_encoder_without_weights_or_of_the_linear_code():
    """But not beside a teacher, whose latents are learned from the trained half alone."""
    for encoder in (WaveletEncoder(), LinearEncoder()):
        assert untrained_half(freezing("encoder", encoder), None) is None
    assert (
        untrained_half(freezing("encoder", LinearEncoder(), stand_in=object()), None) == "encoder"
    )


class Model(nn.Module):
    """What the loading of weights asks of a LiteAutoencoderKL."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, 1), nn.Linear(1, 1)
        self.use_ema, self.optimizer, self.checksums = False, "adam", {}
        self.stand_in, self.frozen_halves = None, []
        self.for_diffusion: dict = {}
        self.told: list = []
        # Not a module of its own here, which would double its names.
        vars(self)["autoencoder"] = SimpleNamespace(set_for_diffusion=self.told.append)
        vars(self).update(changes)

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


def state(value: float, *names: str) -> dict[str, torch.Tensor]:
    shapes = {"weight": (1, 1), "bias": (1,)}
    halves = names or ("encoder", "decoder")
    return {
        f"{half}.{name}": torch.full(shape, value)
        for half in halves
        for name, shape in shapes.items()
    }


def values(model: nn.Module) -> list[float]:
    """Of the encoder's and the decoder's weights and biases."""
    return [float(p) for p in model.parameters()]


def test_halves_of_networks_to_start_from_are_not_fresh():
    for weights, fresh in (
        (state(5.0), ()),
        (state(5.0, "encoder"), ("decoder",)),
        (state(5.0, "decoder"), ("encoder",)),
    ):
        model = Model()
        before = values(model)
        assert load_networks(model, weights, Settings(weights="it")) == fresh
        expected = [5.0] * 4
        if "encoder" in fresh:
            expected[:2] = before[:2]
        if "decoder" in fresh:
            expected[2:] = before[2:]
        assert values(model) == expected
    assert load_networks(Model(), None, Settings()) == ("encoder", "decoder")
    assert load_networks(Model(), None, Settings(weights="a run")) == ()


def test_tensors_that_a_half_adds_to_the_loaded_ones_stay():
    model = Model()
    before = values(model)
    weights = state(5.0, "decoder")
    del weights["decoder.bias"]
    load_networks(model, weights, Settings(weights="it"))
    assert values(model) == [*before[:2], 5.0, before[3]]
    with pytest.raises(ValueError, match="1 unexpected"):
        load_networks(model, {**weights, "decoder.other": torch.zeros(1)}, Settings(weights="it"))


OUTDATED = {"run": {"weights": "other"}, "model": {"params": {"scaling_factor": 0.5}}}
"""A run that moved the latents after its factors were measured."""


@pytest.mark.parametrize(
    ("theirs", "own", "stand_in", "dropped"),
    [
        (OUTDATED, {"scaling_factor": 0.5}, None, True),
        (OUTDATED, {"scaling_factor": 0.25}, None, False),
        (OUTDATED, {"scaling_factor": 0.5, "shift_factor": 0.1}, None, False),
        (OUTDATED, {"scaling_factor": 0.5}, object(), False),
        ({**OUTDATED, "run": {}}, {"scaling_factor": 0.5}, None, False),
        ({}, {"scaling_factor": 0.5}, None, False),
    ],
)
def test_factors_that_the_other_runs_training_outdated_are_dropped(theirs, own, stand_in, dropped):
    model = Model(stand_in=stand_in)
    config = {"model": {"params": dict(own)}}
    _drop_outdated_factors(model, config, theirs)
    unmeasured = {
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "latents_mean": None,
        "latents_std": None,
    }
    assert config["model"]["params"] == (unmeasured if dropped else own)
    assert model.for_diffusion == (unmeasured if dropped else {})
    assert model.told == ([unmeasured] if dropped else [])


@pytest.fixture
def other(tmp_path) -> Run:
    """A run with such factors, which learned from a teacher."""
    run = Run(tmp_path / "other")
    run.checkpoints.mkdir(parents=True)
    torch.save({"state_dict": state(5.0)}, run.last_checkpoint)
    config = copy.deepcopy(OUTDATED)
    config["run"]["checksums"] = {"teacher": "one"}
    save(config, run.config)
    return run


def test_weights_of_another_run_come_with_its_config(other, tmp_path):
    model = Model()
    config = {"model": {"params": {"scaling_factor": 0.5}}}
    found = load_other_run(model, other.path, config)
    assert found["run"]["weights"] == "other"
    assert values(model) == [5.0] * 4
    assert config["model"]["params"]["scaling_factor"] == 1.0
    # A file that belongs to no run has no config.
    alone = other.last_checkpoint.rename(tmp_path / "alone.ckpt")
    config["model"]["params"]["scaling_factor"] = 0.5
    assert load_other_run(Model(), alone, config) == {}
    assert config["model"]["params"]["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    ("frozen", "name", "checksum", "stand_in", "warns"),
    [
        (["encoder"], "teacher", "two", object(), True),
        (["encoder"], "teacher", "two", None, False),
        (["encoder"], "teacher", "one", object(), False),
        (["encoder"], "new", "two", object(), False),
        ([], "teacher", "two", object(), False),
    ],
)
def test_a_frozen_half_that_learned_from_another_teacher_is_warned_of(
    other, caplog, frozen, name, checksum, stand_in, warns
):
    part = SimpleNamespace(name=name, stand_in=stand_in, checksum=lambda: checksum)
    model = Model(frozen_halves=frozen, each_part=[part])
    load_other_run(model, other.path, {"model": {"params": {}}})
    assert ("another model" in caplog.text) == warns


def resumable(run: Run, **changes: object) -> None:
    run.checkpoints.mkdir(exist_ok=True)
    content = {
        "state_dict": state(5.0),
        "optimizer_states": [{"param_groups": [{"params": [0, 1, 2, 3]}]}],
        "images_seen": 8,
        "global_step": 2,
    }
    content |= changes
    torch.save({k: v for k, v in content.items() if v is not None}, run.last_checkpoint)


TWO_GROUPS = [{"param_groups": [{"params": [0, 1]}, {"params": [2, 3]}]}]


@pytest.mark.parametrize(
    ("saved", "model", "checksums"),
    [
        ({}, {}, {}),
        ({"averaging_state": {"n": 1}}, {"use_ema": True}, {}),
        ({"optimizer_states": TWO_GROUPS}, {"optimizer": "muon"}, {}),
        ({}, {"checksums": {"teacher": "a"}}, {"teacher": "a"}),
    ],
)
def test_a_run_is_resumed_with_its_weights(tmp_path, capsys, saved, model, checksums):
    run, loaded = Run(tmp_path), Model(**model)
    resumable(run, **saved)
    checkpoint = load_resumed(loaded, run, Settings(checksums=checksums))
    assert values(loaded) == [5.0] * 4
    assert checkpoint["images_seen"] == 8
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("saved", "model", "checksums", "wrong"),
    [
        ({"optimizer_states": None}, {}, {}, "weights only"),
        ({"optimizer_states": []}, {}, {}, "weights only"),
        ({"images_seen": None}, {}, {}, "weights only"),
        ({"averaging_state": {"n": 1}}, {}, {}, "use_ema: False, but the run has True"),
        ({}, {"use_ema": True}, {}, "use_ema: True, but the run has False"),
        ({}, {"checksums": {"teacher": "a"}}, {}, r"parts\.teacher"),
        ({}, {}, {"teacher": "a"}, r"parts\.teacher"),
        ({}, {"checksums": {"teacher": "a"}}, {"teacher": "b"}, r"parts\.teacher"),
        ({}, {"optimizer": "muon"}, {}, "optimizer: muon"),
        ({"optimizer_states": TWO_GROUPS}, {}, {}, "optimizer: adam"),
        (
            {"optimizer_states": [{"param_groups": [{"params": [0, 1]}]}]},
            {},
            {},
            "train other weights",
        ),
        ({"state_dict": state(5.0, "encoder")}, {}, {}, "2 missing"),
    ],
)
def test_a_run_that_cannot_continue_so_is_refused(tmp_path, saved, model, checksums, wrong):
    run, loaded = Run(tmp_path), Model(**model)
    resumable(run, **saved)
    before = values(loaded)
    with pytest.raises((ConfigError, ValueError), match=wrong):
        load_resumed(loaded, run, Settings(checksums=checksums))
    assert values(loaded) == before


def test_a_run_without_its_last_checkpoint_continues_from_the_best(tmp_path, capsys):
    run, loaded = Run(tmp_path), Model()
    resumable(run)
    run.last_checkpoint.rename(run.checkpoints / "best.ckpt")
    load_resumed(loaded, run, Settings())
    assert values(loaded) == [5.0] * 4
    printed = " ".join(capsys.readouterr().err.split())
    assert "best.ckpt, at step 2" in printed
