"""The contract of a part, with one from outside of the package, named by its path in a config."""

from types import SimpleNamespace

import pytest
import torch

from olvae.config import ConfigError, save, validate
from olvae.data.pixels.size_and_range import EIGHT_BITS
from olvae.models.autoencoder import LiteVAE
from olvae.models.parts.part import (
    adaptive_factor,
    first_images,
    fixed_latents,
    nothing_decoded,
)
from olvae.training.run import RUN_ENV, train
from olvae.training.settings import TrainOptions
from tests.conftest import parts, tiny_config
from tests.models.steps import build, fit, metrics, snapshot
from tests.training.origins import assert_same_checkpoint, checkpoint

TOY = '''
import torch
from olvae.models.parts.part import Part, first_images


class Gain(Part):
    """Multiply the latent by a learned gain per channel,
    which is drawn towards that of the first training images.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, model):
        self.gain = torch.nn.Parameter(torch.ones(model.autoencoder.latent_channels, 1, 1))
        self.register_buffer("goal", torch.zeros(model.autoencoder.latent_channels))

    def conflicts(self, model):
        if model.freeze_decoder:
            yield f"parts.{self.name}: the decoder is frozen: leave it out"

    @torch.no_grad()
    def prepare(self, model, source, seed, device):
        images = torch.cat(list(first_images(source, seed, 4, device)))
        self.goal.copy_(model.to(device).encode(images).mean.std((0, 2, 3)))

    def on_latent(self, model, step):
        step.latent = step.latent * self.gain

    def losses(self, model, step):
        return {"gain": ((self.gain.flatten() - self.goal).square().mean(), self.weight)}

    def validate(self, model, x, moments):
        return {"gain": self.gain.mean()}

    def describe(self):
        return f"weight {self.weight:g}"
'''

NODE = {"target": "toy_part.Gain", "params": {"weight": 0.5}}
GAIN, GOAL = "parts.mine.gain", "parts.mine.goal"


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_part.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def go(tmp_path, image_folder, monkeypatch, quick_training):
    """Train some steps with the toy part, and an average."""
    monkeypatch.delenv(RUN_ENV, raising=False)
    config = tiny_config(image_folder, use_ema=True, parts={"mine": NODE, "gone": None})
    save(config, tmp_path / "tiny.yaml")
    assert validate(config) == []

    def run(steps: int, logdir: str = "runs", **options):
        settings = {
            "base": [tmp_path / "tiny.yaml"],
            "logdir": tmp_path / logdir,
            "gpus": "0",
            **options,
        }
        return train(TrainOptions(overrides=[f"lightning.trainer.max_steps={steps}"], **settings))

    return run


def test_a_run_with_a_part_is_resumed_bit_for_bit_and_exported_without_it(go, capfd):
    whole, half = go(4, "whole"), go(2, "half")
    state = checkpoint(half)["state_dict"]
    assert not torch.equal(checkpoint(whole)["state_dict"][GAIN], state[GAIN])
    assert (state[GAIN] != 1).all()
    assert (state[GOAL] > 0).all()  # measured once: a resumed run keeps it
    assert "mine weight 0.5" in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert_same_checkpoint(whole, go(4, "half", base=[], resume=half.path))
    assert not checkpoint(whole)["current_model_state"].keys() & {GAIN, GOAL}  # it is not averaged
    assert not any("parts" in name for name in LiteVAE.from_pretrained(whole.path).state_dict())


def test_its_hooks_by_hand(image_folder):
    """The loss with its weight, under its name; the gradient by Adam's first step, which has the
    size of the rate.
    """
    model = build(parts={"mine": NODE}, learning_rate=1e-3)
    fit(model, image_folder, 1)
    values = metrics(model)
    terms = sum(
        weight * values[f"train/{name}"] for name, weight in model.objective.weights.items()
    )
    assert values["train/gain"] == pytest.approx(1.0)  # from 1 to a goal of 0
    assert values["train/loss"] == pytest.approx(terms + 0.5 * values["train/gain"], rel=1e-6)
    assert (model.parts["mine"].gain - 1).abs().flatten().tolist() == pytest.approx(
        [1e-3] * 4, rel=0.1
    )


def test_its_values_are_validated_over_all_images(go):
    run = go(2)
    lines = "".join(path.read_text(errors="ignore") for path in run.path.rglob("events*"))
    assert "val/gain" in lines


def test_parts_act_in_their_order(image_folder):
    """Noise before the gain, or after it: another latent, from the same draws."""
    noise, gain = parts(latent_noise={"std": 0.5}), {"mine": NODE}
    seen = []
    for nodes in ({**noise, **gain}, {**gain, **noise}):
        model = build(parts=nodes)
        with torch.no_grad():
            model.parts["mine"].gain.fill_(3.0)
        model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        fit(model, image_folder, 1)
    assert list(snapshot(model)) == list(snapshot(build(parts=nodes)))
    assert not torch.allclose(*seen)


NAME = "expected a name of letters, digits and underscores, and none of torch's, such as keys"


def test_two_losses_of_one_name_are_both_logged(image_folder):
    node = {"target": "olvae.models.parts.scale_equivariance.ScaleEquivariance"}
    model = fit(
        build(parts={"one": node, "two": node}), image_folder, 1, size=32, log_every_n_steps=1
    )
    terms = {"rec", "kl", "wavelet", "gaussian"} & model.objective.weights.keys()
    parts = ("scale_equivariance", "two_scale_equivariance")
    logged = {
        name.removeprefix("train/"): float(value)
        for name, value in model.logged.items()
        if "train" in name
    }
    weighted = [model.objective.weights[name] * logged[name] for name in terms]
    weighted += [
        model.parts[part].weight * logged[name]
        for part, name in zip(("one", "two"), parts, strict=True)
    ]
    assert logged["loss"] == pytest.approx(sum(weighted), rel=1e-5)


def test_its_mistakes_are_told_with_all_others(image_folder):
    config = tiny_config(
        image_folder, parts={"mine": {**NODE, "params": {"wait": 1, "weight": "much"}}}
    )
    where = "model.params.parts.mine.params"
    assert sorted(validate(config)) == [
        f"{where}.wait: unknown key; did you mean weight?",
        f"{where}.weight: expected float, got 'much'",
    ]
    nodes = {
        "mine": NODE,
        "other": {"target": "torch.nn.Identity"},
        "a.b": NODE,
        "keys": NODE,
        **parts(latent_noise={"std": -1.0}),
    }
    with pytest.raises(ConfigError) as caught:
        build(
            parts=nodes,
            freeze_decoder=True,
            accumulate_grad_batches=0,
            scheduler="cosin",
            optimizer="sgd",
        )
    assert str(caught.value).splitlines() == [
        "model.params.parts.other: torch.nn.Identity is not a kind of olvae.models.parts.part.Part",
        f"model.params.parts.a.b: {NAME}",
        f"model.params.parts.keys: {NAME}",
        "model.params.parts.latent_noise: std must not be negative, got -1.0",
        "model.params.accumulate_grad_batches must be at least 1, got 0",
        "model.params.scheduler must be constant or cosine, got 'cosin'",
        "model.params.optimizer must be adam or muon, got 'sgd'",
        "model.params.parts.mine: the decoder is frozen: leave it out",
    ]


@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize("latents", ["free", "kept", "given"])
def test_settings_by_which_latents_cannot_move_are_named(freeze_encoder, latents):
    parts = [SimpleNamespace(name="noise", latents="free")]
    parts.append(SimpleNamespace(name="other", latents=latents))
    model = SimpleNamespace(freeze_encoder=freeze_encoder, each_part=parts)
    named = ["freeze_encoder"] * freeze_encoder + ["parts.other"] * (latents != "free")
    expected = f"parts.noise: the latents can't change ({', '.join(named)}): leave it out"
    assert list(fixed_latents(parts[0], model)) == [expected] * bool(named)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stand_in", [None, object()])
def test_nothing_is_decoded_where_another_decoder_stands_in(frozen, stand_in):
    model = SimpleNamespace(freeze_decoder=frozen, stand_in=stand_in)
    lines = list(nothing_decoded(SimpleNamespace(name="mine"), model))
    assert [line.partition(":")[0] for line in lines] == ["parts.mine"] * (
        frozen and stand_in is not None
    )


@pytest.mark.parametrize("quantizer", [None, SimpleNamespace(quant_conv="quant_conv")])
def test_adaptive_factor_is_of_the_last_layer_before_the_latent_and_bounded(quantizer):
    """By 1e8 over the 96 values of an image."""
    asked = []
    step = SimpleNamespace(target=torch.zeros(1, 2, 6, 8))
    for ratio, expected in ((3.0, 3.0), (1e6, 1e6), (1e7, 1e8 / 96)):
        model = SimpleNamespace(
            encoder="encoder",
            quantizer=quantizer,
            ratio_of_gradients=lambda *given, r=ratio: asked.append(given) or torch.tensor(r),
        )
        assert float(adaptive_factor(model, step, "loss")) == pytest.approx(expected)
    assert asked == [(step, "loss", "encoder" if quantizer is None else "quant_conv")] * 3


def test_first_images_are_one_by_one_and_normalised():
    given = []
    images = [torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)] * 2
    source = SimpleNamespace(
        pixel_range=EIGHT_BITS, first_images=lambda *numbers: given.append(numbers) or images
    )
    found = list(first_images(source, 3, 2, torch.device("cpu")))
    assert given == [(3, 2)]
    torch.testing.assert_close(found, [torch.tensor([[[[-1.0, 1.0], [-0.6, -0.2]]]])] * 2)
