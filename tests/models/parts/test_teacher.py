"""A student that learns a teacher's latents, a teacher's images, or both."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from olvae.config import ConfigError, save
from olvae.data.picture_folder import FolderSource
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, from_uint8, to_uint8
from olvae.metrics.metric import psnr
from olvae.models import linear_code
from olvae.models.autoencoder import LiteVAE
from olvae.models.linear_code import crops_and_means
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.targets import find_without_options
from olvae.models.parts.teacher import Teacher
from olvae.modules.distributions import Deterministic
from tests.conftest import parts, tiny_config
from tests.models.autoencoder_kl import tiny_kl
from tests.models.loading.test_targets import taesd
from tests.models.steps import (
    WITHOUT_KL,
    against,
    assert_same,
    build,
    fit,
    metrics,
    moved,
    objective,
    snapshot,
    source,
    trainer,
)
from tests.training.origins import EIGHT

HALVES = ("encoder_config", "decoder_config")

DTYPES = {"float32": 0.0, "bfloat16": 0.05, "float16": 0.01}


AT_2X = tiny_config()["model"]["params"]["decoder_config"]
AT_2X["params"]["enlarge"] = 2


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Iterator[str]:
    """A teacher with the factor and channels of the tiny student: f8, 4 channels.

    It is read once, and copied for each student.
    """
    folder = tmp_path_factory.mktemp("teacher")
    tiny_kl(**EIGHT).save_pretrained(folder)
    text = f"diffusers:{folder}"
    found = find_without_options(text)
    model = found.load()
    copies = replace(found, load=lambda: copy.deepcopy(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "olvae.models.parts.teacher.find_without_options",
            lambda wanted: copies if wanted == text else find_without_options(wanted),
        )
        yield text


def student(
    target: str, adversary: dict | None = None, teacher: dict | None = None, **model
) -> LiteAutoencoderKL:
    nodes = parts(teacher={"autoencoder": target, **(teacher or {})}) | model.pop("parts", {})
    settings = {
        "lossconfig": WITHOUT_KL,
        "learning_rate": 1e-3,
        "initial_logvar": -4.0,
        "parts": nodes,
    }
    return build(adversary, **{**settings, **model})


def teacher_of(model: LiteAutoencoderKL) -> Teacher:
    teacher = model.parts["teacher"]
    assert isinstance(teacher, Teacher)
    return teacher


def bits(teacher: Teacher) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}


MODES = {
    "encoder": {"freeze_decoder": True, "parts": parts(activation_bound={"bound": 0.1})},
    "decoder, adversary": {"freeze_encoder": True, "adversary": against(weight=0.1)},
    "encoder, through the teacher's decoder": {
        "freeze_decoder": True,
        "teacher": {"decoder_weight": 0.5},
    },
    "both, adversary": {"adversary": against(weight=0.1, warmup_updates=2)},
    "both, quantizer, bfloat16": {
        "use_quant": True,
        "teacher": {"dtype": "bfloat16", "decoder_weight": 0.5},
    },
    "both, other parts": {
        "parts": parts(
            latent_noise={"std": 0.5, "relative_to": "data"}, equivariance={"probability": 1.0}
        )
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_distillation_step_changes_the_students_trained_half_alone(target, image_folder, mode):
    """The student's trained half, and nothing of the teacher or of the other half."""
    model = student(target, use_ema=True, ema_decay=0.5, **MODES[mode])
    teacher, start, before = teacher_of(model), snapshot(model.autoencoder), bits(teacher_of(model))
    fit(model, image_folder, 2)
    assert model.trainer.global_step == 2
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert_same(bits(teacher), before)
    assert not teacher.model.training
    changed = moved(start, snapshot(model.autoencoder))
    halves = {
        "encoder": [n for n in start if n.startswith(("encoder.", "quantizer.quant_conv."))],
        "decoder": [n for n in start if n.startswith(("decoder.", "quantizer.post_quant_conv."))],
    }
    for half, names in halves.items():
        share = len(changed & set(names)) / len(names)
        assert share == 0 if MODES[mode].get(f"freeze_{half}") else share > 0.9, half
    assert math.isfinite(metrics(model)["train/loss"])


def test_teachers_tensors_are_not_in_the_model_nor_its_checkpoint(target, image_folder, tmp_path):
    """Not by name, nor by value: in the module, the averaged copy, the checkpoint,
    the optimizers.
    """
    model = student(target, use_ema=True, teacher={"decoder_weight": 0.5})
    fit(model, image_folder, 2)
    model.trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    # Fewer could be equal by chance.
    theirs = [t for t in bits(teacher_of(model)).values() if t.numel() > 8]
    found = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
    assert {"state_dict", "current_model_state"} <= checkpoint.keys()
    assert len(found) > 200
    for tensor in found:
        assert not any(
            tensor.shape == other.shape and torch.equal(tensor, other) for other in theirs
        )
    assert [name for name in model.state_dict() if "teacher" in name] == ["parts.teacher.std"]
    assert not {id(p) for p in model.parameters()} & {
        id(p) for p in teacher_of(model).model.parameters()
    }


def test_copy_of_the_student_shares_the_teacher_and_starts_alike(target, image_folder):
    """A run's untrained baseline is built without it."""
    torch.manual_seed(0)
    model, without = student(target, against()), build(against(), initial_logvar=-4.0)
    assert_same(snapshot(model), snapshot(without))
    again = copy.deepcopy(model)
    assert teacher_of(again).model is teacher_of(model).model
    assert again.encoder is not model.encoder
    fit(model, image_folder, 1)
    copy.deepcopy(model.parts)


def test_gradient_goes_through_the_teachers_decoder_to_the_students_encoder(
    target, image_folder, updates
):
    """Against the objective of what it decodes, written down."""
    weights = {"latent_weight": 0.0, "logvar_weight": 0.0, "decoder_weight": 2.0}
    model = student(target, teacher=weights, freeze_decoder=True, sample_posterior=False)
    plain = copy.deepcopy(model)
    fit(model, image_folder, 1)
    x = plain.images(next(iter(source(image_folder).train_loader())))
    loss, _ = plain.objective(x, teacher_of(plain).model.decode(plain.encode(x).mean), None)
    expected = torch.autograd.grad(2.0 * loss, list(plain.encoder.parameters()))
    (update,) = updates
    assert len(update.gradients) == len(expected)
    for gradient, by_hand in zip(update.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, by_hand)
    assert max(float(gradient.abs().max()) for gradient in update.gradients) > 0
    assert metrics(model)["train/loss"] == pytest.approx(2.0 * loss.item(), rel=1e-5)


def test_teacher_losses_by_hand(target, image_folder):
    """The sum that is logged, from torch's own divergence and plain arithmetic."""
    model = student(
        target, teacher={"latent_weight": 3.0, "logvar_weight": 0.7}, freeze_decoder=True
    )
    teacher_of(model).std.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    plain = copy.deepcopy(model)
    fit(model, image_folder, 1)
    x = plain.images(next(iter(source(image_folder).train_loader())))
    with torch.no_grad():
        ours, theirs = plain.encode(x), teacher_of(plain).model.encode(x)
    units = (ours.mean - theirs.mean).double() / torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(
        normal(torch.zeros_like(theirs.mean).double(), theirs.std.double()),
        normal(torch.zeros_like(theirs.mean).double(), ours.std.double()),
    )
    values = metrics(model)
    assert values["train/latent"] == pytest.approx(float((units**2).mean()), rel=1e-5)
    assert values["train/logvar"] == pytest.approx(float(divergence.mean()), rel=1e-5)
    expected = 3.0 * values["train/latent"] + 0.7 * values["train/logvar"]
    assert values["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert not {"train/rec", "train/teacher_decoder"} & set(values)


@pytest.mark.parametrize("mode", [{"freeze_encoder": True}, {}], ids=str)
def test_the_decoder_learns_from_the_teachers_latents(target, image_folder, updates, mode):
    """Not from the student's, in both modes that train it."""
    model = student(target, sample_posterior=False, **mode)
    plain = copy.deepcopy(model)
    fit(model, image_folder, 1)
    x = plain.images(next(iter(source(image_folder).train_loader())))
    with torch.no_grad():
        z = teacher_of(plain).model.encode(x).mean
    loss, _ = plain.objective(x, plain.decode(z), None)
    expected = torch.autograd.grad(loss, list(plain.decoder.parameters()))
    gradients = dict(zip(map(id, updates[0].parameters), updates[0].gradients, strict=True))
    for p, by_hand in zip(model.decoder.parameters(), expected, strict=True):
        torch.testing.assert_close(gradients[id(p)], by_hand)


@torch.no_grad()
def validated(model, data) -> float:
    """Mean PSNR of a module's reconstructions of the validation images."""
    batches = [batch["image"] for batch in data.val_loader()]
    return float(
        np.mean([float(psnr(x, to_uint8(model(from_uint8(x))[0])).mean()) for x in batches])
    )


def test_a_student_with_linear_paths_starts_from_the_teachers_latents(
    target, image_folder, monkeypatch
):
    """Least squares from patches to its means, and from its means to patches,
    by NumPy on the same crops.
    """
    monkeypatch.setattr(linear_code, "CROPS", (256, 256))
    config = tiny_config()["model"]["params"]
    nodes = {
        half: {**config[half], "params": {**config[half]["params"], "linear": True}}
        for half in HALVES
    }
    model, data = student(target, **nodes), source(image_folder)
    (line,) = model.prepare(data, 0, torch.device("cpu"), fresh=linear_code.HALVES)
    assert line.startswith("linear code: ")
    x = from_uint8(crops_and_means(data, 0, 8)[0])
    with torch.no_grad():
        means = teacher_of(model).posterior(x).mean
        found = model.encode(x).mean
    around = nn.functional.pad(x, (4, 4, 4, 4), "replicate")  # patches of 16x16 pixels, 8 apart
    patches = (
        nn.functional.unfold(around, 16, stride=8).movedim(1, 2).reshape(-1, 768).double().numpy()
    )
    design = np.column_stack([patches, np.ones(len(patches))])
    solution, *_ = np.linalg.lstsq(
        design, means.movedim(1, 3).reshape(-1, 4).double().numpy(), rcond=1e-10
    )
    np.testing.assert_allclose(
        found.movedim(1, 3).reshape(-1, 4).numpy(), design @ solution, atol=1e-3
    )
    assert float(teacher_of(model).std.min()) > 0  # the part was prepared as well
    # Of both halves, as validation has it.
    assert model.linear_psnr == pytest.approx(validated(model, data), abs=1e-4)
    frozen = student(target, **nodes, freeze_encoder=True)
    list(frozen.prepare(data, 0, torch.device("cpu"), fresh=linear_code.HALVES))
    assert frozen.linear_psnr == pytest.approx(validated(frozen, data), abs=1e-4)
    assert frozen.linear_psnr != model.linear_psnr
    other = student(target, **nodes, freeze_decoder=True)
    (line,) = other.prepare(data, 0, torch.device("cpu"), fresh=linear_code.HALVES)
    assert other.linear_psnr is None
    assert " dB" not in line


# Moments, measuring, precision


@pytest.mark.parametrize("batches", [[12], [1, 2, 3, 6]])
def test_teachers_latent_deviation_is_torchs_whatever_the_batches(target, batches):
    teacher = teacher_of(student(target))
    x = torch.rand(12, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        means = teacher.model.encode(x).mean
    expected = means.double().transpose(0, 1).flatten(1).std(1, unbiased=False)
    torch.testing.assert_close(
        teacher.measure(x.split(batches)).double(), expected, rtol=1e-6, atol=0
    )


def source_of(images: Tensor) -> SimpleNamespace:
    """What a teacher asks of a source of images."""
    return SimpleNamespace(
        first_images=lambda seed, count: iter(images), pixel_range=EIGHT_BITS, means_std=None
    )


def test_teacher_with_a_channel_without_deviation_is_refused(target):
    model = student(target)
    teacher = teacher_of(model)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    data = source_of(images)
    with torch.no_grad():
        teacher.model.model.quant_conv.weight[2] = 0
    with pytest.raises(ValueError, match="channel 2"):
        teacher.prepare(model, data, 0, torch.device("cpu"))
    with torch.no_grad():
        teacher.model.model.quant_conv.weight[1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        teacher.prepare(model, data, 0, torch.device("cpu"))


def test_a_teacher_of_other_pixel_values_or_latents_is_refused(target):
    model = student(target)
    teacher = teacher_of(model)
    own = PixelRange((0.0,), (100.0,))
    deep = PixelRange((0.0,), (1000.0,))
    stats = {"weights": teacher.checksum(), "target": "it"}

    def check(pixel_range: PixelRange, *latent_stats: dict) -> None:
        teacher.check(model, SimpleNamespace(pixel_range=pixel_range, latent_stats=[*latent_stats]))

    # One of 8 bits sees any range as its own.
    check(EIGHT_BITS, stats)
    check(deep, stats)
    with pytest.raises(ConfigError, match="of other, "):
        check(EIGHT_BITS, stats, {"weights": "0", "target": "other"})
    teacher.model.pixel_range = own
    check(own)
    for found in (deep, EIGHT_BITS):
        with pytest.raises(ConfigError, match="0 to 100"):
            check(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_computes_in_its_own_precision(target, dtype):
    """Whatever precision the student trains in; the moments that are known are taken instead."""
    torch.manual_seed(2)  # half of all draws have a pixel that is rounded by more
    x, z = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 2, 2)
    teacher, exact = (teacher_of(student(target, teacher={"dtype": d})) for d in (dtype, "float32"))
    assert {p.dtype for p in teacher.model.parameters()} == {getattr(torch, dtype)}
    assert teacher.checksum() == exact.checksum()
    with torch.autocast("cpu", torch.bfloat16):
        posterior, image = teacher.posterior(x), teacher.decode(z)
    reference, expected = exact.posterior(x), exact.decode(z)
    pairs = (
        (posterior.mean, reference.mean),
        (posterior.logvar, reference.logvar),
        (image, expected),
    )
    for tensor, other in pairs:
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, other, rtol=0, atol=DTYPES[dtype])
        assert torch.equal(tensor, other) == (dtype == "float32")
    moments = torch.randn(2, 8, 2, 2).half()
    known = teacher.posterior(x, moments)
    assert torch.equal(torch.cat((known.mean, known.logvar), 1), moments.float())


def test_a_teacher_without_a_distribution(tmp_path, image_folder):
    taesd().save_pretrained(tmp_path / "taesd")
    target = f"diffusers:{tmp_path / 'taesd'}"
    model = student(target, teacher={"logvar_weight": 0.0, "decoder_weight": 0.1})
    fit(model, image_folder, 2)
    assert math.isfinite(metrics(model)["train/loss"])
    assert isinstance(teacher_of(model).posterior(torch.rand(1, 3, 16, 16)), Deterministic)
    with pytest.raises(
        ConfigError,
        match=r"params.logvar_weight: .* no distribution",
    ):
        student(target)
    student(
        target, freeze_encoder=True, parts=parts(latent_noise={"std": 0.1, "relative_to": "data"})
    )
    with pytest.raises(ConfigError, match=r"relative_to: .* no distribution"):
        student(target, freeze_encoder=True, parts=parts(latent_noise={"std": 0.1}))


# Validation


@pytest.mark.parametrize(
    "mode",
    [{"freeze_decoder": True}, {"use_ema": True, "ema_decay": 0.5}, {"freeze_encoder": True}],
)
def test_teacher_latents_error_in_validation_by_hand(target, image_folder, mode):
    """A decoder alone has none."""
    # A batch of four, and one of one.
    data = FolderSource(str(image_folder), 16, 4, val_fraction=0.4)
    model, squares = student(target, **mode), []
    teacher_of(model).std.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    trainer(2, val_check_interval=2, check_val_every_n_epoch=None).fit(
        model, data.train_loader(), data.val_loader()
    )
    with torch.no_grad():
        for batch in data.val_loader():
            x = from_uint8(batch["image"])
            distance = model.encode(x).mean - teacher_of(model).model.encode(x).mean
            units = distance / teacher_of(model).std.view(1, 4, 1, 1)
            squares += units.double().square().mean((1, 2, 3)).tolist()
    expected = math.sqrt(sum(squares) / len(squares))
    found = model.validation_values.get("val/latent_rmse")
    assert found == (None if "freeze_encoder" in mode else pytest.approx(expected, rel=1e-5))
    assert "val_raw/latent_rmse" not in model.validation_values


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_teachers_half_takes_the_place_of_the_one_that_is_not_trained(target, half):
    model = student(
        target, **{f"freeze_{'decoder' if half == 'encoder' else 'encoder'}": True}
    ).eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    theirs = teacher_of(model).model
    with torch.no_grad():
        image, posterior = model(x)
        latent = model.encode(x).mean if half == "encoder" else theirs.encode(x).mean
        expected = theirs.decode(latent) if half == "encoder" else model.decode(latent)
        assert torch.equal(posterior.mode(), latent)
        assert torch.equal(image, expected)
        assert torch.equal(model.decode_trained(latent), expected)
        both = student(target).eval()
        assert torch.equal(both(x)[0], both.decode(both.encode(x).mean))


# Factors and refusals


def test_student_has_the_teachers_factors(tmp_path, caplog):
    factors = {
        "scaling_factor": 0.5,
        "latents_mean": [0.0, 1.0, 2.0, 3.0],
        "latents_std": [1.0, 2.0, 3.0, 4.0],
    }
    tiny_kl(**EIGHT, force_upcast=False, **factors).save_pretrained(tmp_path)
    model = student(f"diffusers:{tmp_path}")
    assert model.for_diffusion == {"shift_factor": 0.0, "force_upcast": False, **factors}
    assert model.autoencoder.for_diffusion == model.for_diffusion
    assert (
        student(f"diffusers:{tmp_path}", **model.for_diffusion).for_diffusion == model.for_diffusion
    )
    assert not caplog.text
    # The config of another student.
    changed = {
        "scaling_factor": 0.25,
        "latents_std": None,
        "shift_factor": 0.5,
    }
    assert student(f"diffusers:{tmp_path}", **changed).for_diffusion == model.for_diffusion
    assert f"model.params: scaling_factor, shift_factor: not diffusers:{tmp_path}'s" in caplog.text


def test_a_teachers_outdated_factors_are_not_the_students(tmp_path, monkeypatch):
    """A run whose encoder was trained has factors of its start; those of the config count."""
    config = tiny_config(scaling_factor=0.5, shift_factor=0.25)
    model = LiteAutoencoderKL(**config["model"]["params"])
    (tmp_path / "checkpoints").mkdir()
    state = {"state_dict": model.state_dict()}
    torch.save(state, tmp_path / "checkpoints" / "last.ckpt")
    save({**config, "run": {"weights": "diffusers:start"}}, tmp_path / "config.yaml")
    learner = student(str(tmp_path))
    assert (learner.for_diffusion["scaling_factor"], teacher_of(learner).model.shift_factor) == (
        1.0,
        0.0,
    )

    def factor(**given: float) -> float:
        return student(str(tmp_path), **given).for_diffusion["scaling_factor"]

    assert factor(scaling_factor=0.75) == 0.75
    # Those of a run from fresh weights are its own; where they are a guess the config has them.
    save({**config, "run": {}}, tmp_path / "config.yaml")
    assert factor(scaling_factor=0.75) == 0.5
    monkeypatch.setattr(LiteVAE, "factors_known", False)
    guessed = student(str(tmp_path), scaling_factor=0.75).for_diffusion
    assert (guessed["scaling_factor"], guessed["shift_factor"]) == (0.75, 0.25)
    with pytest.raises(ConfigError, match=r"scaling_factor: .* no factors"):
        factor()


def test_a_tiny_student_takes_its_units_when_other_weights_are_loaded(tmp_path):
    """A diffusion model's of the latents: TAESD's own weights, which it may start from, are in
    units of theirs.
    """
    factors = {"latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    tiny_kl(**EIGHT, **factors, scaling_factor=1.0).save_pretrained(tmp_path)
    shape = {"channels": 8, "blocks": [0, 0, 0, 0]}
    nodes = {
        f"{half}_config": {
            "target": f"olvae.modules.others.tiny.Tiny{half.title()}",
            "params": {**shape, **counts},
        }
        for half, counts in (
            ("encoder", {"latent_dim": 8, "image_size": 16}),
            ("decoder", {"z_channels": 4}),
        )
    }
    model = student(
        f"diffusers:{tmp_path}", teacher={"logvar_weight": 0.0}, initial_logvar=0.0, **nodes
    )
    for half in (model.encoder, model.decoder):
        # As a loaded state dict does.
        half.use_latents(torch.full((4,), 5.0), torch.full((4,), 7.0))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    data = source_of(images)
    teacher_of(model).prepare(model, data, 0, torch.device("cpu"))
    for half in (model.encoder, model.decoder):
        assert half.latents_mean.flatten().tolist() == factors["latents_mean"]
        assert half.latents_std.flatten().tolist() == factors["latents_std"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {**EIGHT, "latent_channels": 6, "latents_mean": [0.1] * 6, "latents_std": [1.0] * 6},
            r"^model.params.parts.teacher: .*has f8, 6 channels, .* set model.params.embed_dim=6",
        ),
        ({**EIGHT, "latent_channels": 6}, r"f8, 6 channels, .*, but the student f8, 4 .*blocks\)$"),
        (
            {**EIGHT, "in_channels": 1, "out_channels": 1},
            r"images of 1 channel, but the student .* of 3 .*\); in_channels of .*\.channels=1$",
        ),
        (
            {**EIGHT, "latents_mean": [0.1] * 3, "latents_std": [1.0] * 4},
            "latents_mean: expected 4",
        ),
        (
            {},
            r"has f4, 4 .* the student f8, 4 .*dct_levels",
        ),
    ],
)
def test_student_of_another_shape_than_the_teachers_is_refused(tmp_path, teacher, message):
    tiny_kl(**teacher).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        student(f"diffusers:{tmp_path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lossconfig": objective()}, "kl_weight: the latents have to be the teacher's"),
        ({"parts": parts(anchor={})}, "parts.anchor: the latents have to be the teacher's"),
        (
            {"teacher": {"latent_weight": 0, "logvar_weight": 0}},
            "every weight is 0: .* the encoder",
        ),
        (
            {"freeze_encoder": True, "teacher": {"decoder_weight": 1.0}},
            "decoder_weight: the encoder is frozen",
        ),
        (
            {"freeze_decoder": True, "parts": parts(equivariance={})},
            "parts.equivariance: the decoder is frozen",
        ),
        (
            {"freeze_decoder": True, "parts": parts(latent_noise={"std": 0.5})},
            "parts.latent_noise: the decoder is frozen",
        ),
        (
            {"freeze_decoder": True, "decoder_config": AT_2X},
            "decoder_config.params.enlarge: the decoder is frozen",
        ),
        ({"teacher": {"latent_weight": -1.0}}, "latent_weight must not be negative, got -1"),
        (
            {"teacher": {"dtype": "float16", "decoder_weight": 0.1}},
            "decoder_weight: .* are 0 in float16: use bfloat16",
        ),
    ],
)
def test_teacher_settings_that_contradict_each_other_are_refused(target, settings, message):
    with pytest.raises((ConfigError, ValueError), match=message) as caught:
        student(target, **settings)
    assert "\n" not in str(caught.value)


def test_a_teacher_for_float32_alone_has_a_student_for_any_precision(tmp_path):
    tiny_kl(**EIGHT, force_upcast=True).save_pretrained(tmp_path)
    assert student(f"diffusers:{tmp_path}").for_diffusion["force_upcast"] is False


@pytest.mark.parametrize(
    ("teachers", "students", "frozen", "weight", "whose"),
    [
        (True, False, False, 0.1, "teacher"),
        (False, True, False, 0.1, "encoder"),
        (True, True, False, 0.1, "teacher"),
        (False, False, False, 0.1, None),
        (True, False, True, 0.1, None),
        (True, False, False, 0.0, None),
    ],
)
def test_log_variances_are_of_distributions_on_both_sides(
    target, monkeypatch, teachers, students, frozen, weight, whose
):
    model = student(target)
    teacher = teacher_of(model)
    monkeypatch.setattr(Teacher, "deterministic", teachers)
    model.encoder.deterministic = students
    model.freeze_encoder = frozen
    teacher.weights["logvar"] = weight
    lines = list(teacher.conflicts(model))
    assert len(lines) == (whose is not None)
    for line in lines:
        assert "params.logvar_weight" in line
        assert f"the {whose}'s latents" in line
