"""What the model reports, saves and restores, and who belongs to which player; without training."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.source import LoaderLayout
from olvae.models import liteautoencoder
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.part import Part, Step
from olvae.models.updates.averaging import WeightAverage
from olvae.models.updates.ddp import PlayersStrategy
from olvae.modules.base import HALVES
from tests.models.steps import WITHOUT_KL, against, build, objective


class Toy(Part):
    """A part with weights, and losses by name."""

    def __init__(self, checksum: str | None = None, trained: bool = True, **losses: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=trained)
        self.own = checksum
        self.given = losses
        self.seen: list = []

    def checksum(self) -> str | None:
        return self.own

    def losses(self, model, step):
        return {name: (torch.tensor(value), 2.0) for name, value in self.given.items()}

    def check(self, model, source) -> None:
        self.seen.append(("check", source))

    @contextmanager
    def watch(self, model):
        self.seen.append(("watch", model))
        yield
        self.seen.append("watched")

    def on_images(self, model, step) -> None:
        self.seen.append(("on_images", model, step))

    def on_latent(self, model, step) -> None:
        self.seen.append(("on_latent", model, step))

    def prepare(self, model, source, seed, device) -> None:
        self.seen.append(("prepare", source, seed, device))

    def start(self, model, resumed) -> None:
        self.seen.append(("start", resumed))


def with_parts(**parts: Toy) -> LiteAutoencoderKL:
    model = build()
    for name, part in parts.items():
        part.name = name
        model.parts[name] = part
    return model


def test_players_have_their_own_modules():
    """Parts that train belong to the autoencoder; frozen parameters are not updated."""
    model = build(against(), use_quant=True, freeze_encoder=True, lossconfig=WITHOUT_KL)
    model.parts["a"], model.parts["b"] = Toy(), Toy(trained=False)
    players = model.players
    assert list(players) == ["autoencoder", "discriminator"]
    assert players["discriminator"] is model.adversary.discriminator
    members = [model.encoder, model.decoder, model.quantizer, model.parts["a"]]
    assert list(players["autoencoder"]) == members
    updated = {id(p) for p in model.autoencoder_parameters()}
    trained = [model.decoder, model.quantizer.post_quant_conv, model.parts["a"]]
    assert updated == {id(p) for module in trained for p in module.parameters()}
    assert list(build().players) == ["autoencoder"]
    assert len(build().players["autoencoder"]) == 2


@pytest.mark.parametrize("frozen", [(), ("encoder",), ("decoder",)])
def test_frozen_halves_are_those_of_the_settings(frozen):
    freezes = {f"freeze_{half}": True for half in frozen}
    model = build(use_quant=True, lossconfig=WITHOUT_KL, **freezes)
    assert model.frozen_halves == list(frozen)
    assert model.trained_networks == [getattr(model, h) for h in HALVES if h not in frozen]
    for half, conv in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        for module in (getattr(model, half), getattr(model.quantizer, conv)):
            assert all(p.requires_grad == (half not in frozen) for p in module.parameters())
    model._iteration = 0
    model.train()
    model.on_train_start()
    assert [half for half in HALVES if not getattr(model, half).training] == list(frozen)


def test_checksums_are_those_of_parts_that_have_one():
    model = with_parts(one=Toy("abc"), other=Toy())
    assert model.checksums == {"one": "abc"}
    assert [part.name for part in model.each_part] == ["one", "other"]
    assert model.stand_in is None


def test_a_model_for_inference_has_no_objective():
    model = build(lossconfig={"target": "torch.nn.Identity"})
    assert model.loss_weights == {}
    with pytest.raises(ConfigError, match=r"lossconfig .*Identity"):
        _ = model.objective
    plain = build()
    assert plain.loss_weights is plain.objective.weights


def test_losses_of_a_name_that_is_taken_get_their_parts_name():
    model = with_parts(first=Toy(rec=1.0, new=2.0), second=Toy(), third=Toy(new=4.0, loss=8.0))
    x = torch.rand(2, 3, 16, 16)
    step = Step(x, None, None, warming_up=False, adversary_plays=False)
    torch.manual_seed(0)
    model.forward_pass(step)
    assert model.parts["first"].seen == [
        ("watch", model),
        ("on_images", model, step),
        ("on_latent", model, step),
        "watched",
    ]
    asked = []
    model.loss.register_forward_pre_hook(lambda _, given: asked.append(given))
    total = model.autoencoder_loss(step)
    own, terms = model.objective(step.target, step.reconstruction, step.encoded, step.images)
    for one, other in zip(*asked, strict=True):
        assert one is other
    named = {name: float(loss) for name, loss in step.losses.items() if name not in terms}
    assert named == {"first_rec": 1.0, "new": 2.0, "third_new": 4.0, "third_loss": 8.0}
    assert {name: step.losses[name] for name in terms} == terms
    assert float(total) == pytest.approx(float(own) + 2.0 * (1 + 2 + 4 + 8), rel=1e-6)


@pytest.mark.parametrize("samples", [True, False])
def test_a_latent_is_drawn_or_the_mode(samples):
    model = build(sample_posterior=samples)
    posterior = model.encode(torch.rand(1, 3, 16, 16))
    torch.manual_seed(1)
    drawn = model.draw(posterior)
    torch.manual_seed(1)
    assert torch.equal(drawn, posterior.sample() if samples else posterior.mode())
    x = torch.rand(1, 3, 16, 16)
    torch.manual_seed(1)
    image, posterior = model(x, sample_posterior=samples)
    torch.manual_seed(1)
    latent = posterior.sample() if samples else posterior.mode()
    assert torch.equal(image, model.decode(latent))
    assert torch.equal(posterior.mode(), model.encode(x).mode())


@pytest.mark.parametrize("freezes", [{}, {"freeze_encoder": True}, {"freeze_decoder": True}])
def test_a_stand_in_gives_the_latents_and_decodes_in_place_of_frozen_halves(monkeypatch, freezes):
    """In a step the decoder always learns its latents; without one it replaces an encoder alone."""
    model = build(sample_posterior=False, lossconfig=WITHOUT_KL, **freezes)
    x, z, given = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 2, 2), []

    def posterior(images, moments=None):
        given.append((images, moments))
        return SimpleNamespace(mode=lambda: z)

    stand_in = SimpleNamespace(posterior=posterior, decode=lambda latent: latent[..., :1])
    monkeypatch.setattr(LiteAutoencoderKL, "stand_in", stand_in)
    moments = torch.randn(1, 8, 2, 2)
    step = Step(x, moments, None, warming_up=False, adversary_plays=False)
    model.forward_pass(step)
    assert given == [(x, moments)]
    assert step.latent is step.drawn is z
    if "freeze_encoder" in freezes:
        assert step.encoded is None
    else:
        assert torch.equal(step.encoded.mode(), model.encode(x).mode())
    if "freeze_decoder" in freezes:
        assert step.reconstruction is None
    else:
        assert torch.equal(step.reconstruction, model.decode(z))
    image, found = model(x, moments=moments)
    if "freeze_encoder" in freezes:
        assert given == [(x, moments)] * 2
        assert torch.equal(image, model.decode(z))
    else:
        assert torch.equal(image, model.decode_trained(found.mode()))
        assert torch.equal(found.mode(), model.encode(x).mode())


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_lie_in_memory_as_the_weights(channels_last):
    model = build(channels_last=channels_last)
    batch = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    images = model.images({"image": batch})
    torch.testing.assert_close(images, batch.float() / 127.5 - 1)
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    weight = model.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_values_are_reported_as_means_over_an_updates_micro_batches(monkeypatch):
    """At steps that do not log, rare ones alone, which are kept until one does."""
    model = build()
    logged: list[dict] = []
    model.__dict__["_trainer"] = SimpleNamespace(world_size=1, global_step=7)
    model.__dict__["log_dict"] = logged.append

    def update(logs: bool, *values: float, rare: float | None = None) -> None:
        model._logs = model.reports = logs
        model._in_update = set()
        for value in values:
            model.report({"a": torch.tensor(value, requires_grad=True), "b": value})
            if rare is not None:
                model.report({"rare": rare}, rare=True)
        model._log_reported()

    type(model).global_step, kept = property(lambda _: 7), type(model).global_step
    forgot: list = []
    monkeypatch.setattr(liteautoencoder, "forget_logged", forgot.append)
    try:
        update(False, 1.0, rare=3.0)
        assert logged == []
        update(True, 1.0, 2.0, 6.0)
        assert logged == [{"a": 3.0, "b": 3.0, "rare": 3.0, "step": 7.0}]
        assert model.logged == {"a": 3.0, "b": 3.0, "rare": 3.0}
        assert not model.logged["a"].requires_grad
        update(False, 9.0)
        update(True, 5.0)
        assert logged[1] == {"a": 5.0, "b": 5.0, "step": 7.0}
        # A later update of rare values replaces what was kept of an earlier one.
        update(False, 1.0, rare=3.0)
        update(False, 1.0, rare=4.0)
        update(True, 5.0)
        assert logged[2]["rare"] == 4.0
        assert forgot == [model.trainer] * 7
        # Of several processes in one message.
        monkeypatch.setattr(liteautoencoder, "mean_over_processes", lambda values: 2 * values)
        update(True, 5.0)
        assert type(logged[3]["b"]) is float
        model.trainer.world_size = 2
        update(True, 5.0, 6.0, rare=1.5)
        assert logged[4] == {"a": 11.0, "b": 11.0, "rare": 3.0, "step": 7.0}
    finally:
        type(model).global_step = kept


def state(**changes) -> dict:
    return {
        "images_seen": 24,
        "iteration": 3,
        "rate_factor": 0.5,
        "linear_psnr": 20.0,
        "val_set": "mine",
        "loops": {
            "fit_loop": {
                "epoch_loop.batch_progress": {
                    "total": {"ready": 9, "completed": 8},
                    "current": {"ready": 9},
                }
            }
        },
        "lr_schedulers": [{"base_lrs": [1], "last_epoch": 2}, {"last_epoch": 4}],
    } | changes


def test_a_checkpoint_has_the_models_state_and_gives_it_back():
    model = build(accumulate_grad_batches=2)
    model.images_seen, model._iteration, model.rate_factor = 24, 3, 0.5
    model.linear_psnr, model.val_set, model.order = 20.0, "mine", {"a": 1}
    model.layouts = [LoaderLayout(0, 1, 2, 4)]
    saved: dict = {}
    model.on_save_checkpoint(saved)
    assert saved == {
        "images_seen": 24,
        "layouts": [[0, 1, 2, 4]],
        "order": {"a": 1},
        "iteration": 3,
        "rate_factor": 0.5,
        "linear_psnr": 20.0,
        "val_set": "mine",
    }
    again, loaded = build(accumulate_grad_batches=2), state()
    again.on_load_checkpoint(loaded)
    assert (again.images_seen, again._iteration, again.rate_factor) == (24, 3, 0.5)
    # Lightning's counts are in batches, of the updates so far.
    counts = loaded["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert counts == {"total": {"ready": 6, "completed": 6}, "current": {"ready": 6}}
    assert loaded["lr_schedulers"] == [{"last_epoch": 2}, {"last_epoch": 4}]


@pytest.mark.parametrize(
    ("now", "before", "kept"),
    [
        (None, "mine", True),
        ("mine", "mine", True),
        ("other", "mine", False),
        ("mine", None, True),
        (None, None, True),
    ],
)
def test_the_linear_codes_psnr_is_of_the_same_validation_images(now, before, kept):
    model = build()
    model.val_set = now
    model.on_load_checkpoint(state(val_set=before))
    assert model.linear_psnr == (20.0 if kept else None)


@pytest.mark.parametrize("fresh", [(), ("encoder",), ("encoder", "decoder")])
@pytest.mark.parametrize("paths", [(), ("encoder",), ("decoder",)])
def test_fresh_linear_paths_are_fitted_before_parts_prepare(monkeypatch, fresh, paths):
    part = Toy()
    model = with_parts(part=part)
    for half in paths:
        getattr(model, half).linear = nn.Conv2d(1, 1, 1)
    given = []
    monkeypatch.setattr(
        liteautoencoder, "start_linearly", lambda *args: given.append(args) or (21.0, "a line")
    )
    device = torch.device("meta")
    lines = list(model.prepare("the source", 5, device, fresh))
    fits = bool(set(fresh) & set(paths))
    assert part.weight.is_meta == fits
    assert lines == ["a line"] * fits
    assert model.linear_psnr == (21.0 if fits else None)
    arguments = (model.autoencoder, "the source", 5, device, None, fresh, ())
    assert given == [arguments] * fits
    assert part.seen == [("prepare", "the source", 5, device)]


@pytest.mark.parametrize("iteration", [0, 1, 5])
def test_parts_start_with_the_training_and_know_of_a_resume(monkeypatch, iteration):
    part = Toy()
    model = with_parts(part=part)
    model._iteration = iteration
    followed = []
    monkeypatch.setattr(liteautoencoder, "follow", followed.append)
    model.__dict__["lr_schedulers"] = lambda: "schedule"
    model.on_train_start()
    assert part.seen == [("start", iteration > 0)]
    assert followed == [["schedule"]] * (iteration > 0)


def test_the_range_of_the_sources_images_is_the_models(monkeypatch):
    part, checked = Toy(), []
    model = with_parts(part=part)
    monkeypatch.setattr(liteautoencoder, "check_source", lambda *given: checked.append(given))
    assert model.pixel_range is EIGHT_BITS
    source = SimpleNamespace(pixel_range=PixelRange((0.0,), (10.0,)))
    model.check(source)
    assert model.pixel_range is model.autoencoder.pixel_range is source.pixel_range
    assert checked == [(model, source)]
    assert part.seen == [("check", source)]


@pytest.mark.parametrize("compiled", [True, False])
def test_validation_is_eager_and_a_trial_leaves_no_values(monkeypatch, compiled):
    model, stances, logged = build(), [], []
    model.compiled = compiled
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    model.on_validation_start()
    model.on_validation_end()
    assert stances == ["force_eager", "default"] * compiled
    monkeypatch.setattr(model.validation, "summarise", lambda _: {"val/psnr": 20.0})
    model.__dict__["log_dict"] = logged.append
    model.__dict__["log"] = lambda name, value: logged.append((name, value))
    for trial in (True, False):
        model.__dict__["_trainer"] = SimpleNamespace(sanity_checking=trial, global_step=3)
        monkeypatch.setattr(type(model), "global_step", 3)
        model.on_validation_epoch_end()
        assert model.validation_values == ({} if trial else {"val/psnr": 20.0})
    assert logged == [{"val/psnr": 20.0}, ("step", 3.0)] * 2


def test_averaging_is_a_callback_of_its_decay():
    assert build().configure_callbacks() == []
    model = build(use_ema=True, ema_decay=0.75)
    (average,) = model.configure_callbacks()
    assert isinstance(average, WeightAverage)
    assert (average.guard, average.decay) == (model.guard, 0.75)


def test_settings_that_are_negative_are_refused():
    for name, value in (("warmup_steps", -1), ("gradient_clip_val", -0.1)):
        with pytest.raises((ConfigError, ValueError), match=f"{name} must"):
            build(**{name: value})
    assert build(gradient_clip_val=0.0).gradient_clip_val == 0.0
    assert build(lossconfig=objective(rec_weight=2.0)).loss_weights["rec"] == 2.0


def test_a_replaced_network_makes_another_plain_module():
    """Over the same weights, with the factors for a diffusion model and the range."""
    model = build(scaling_factor=0.5)
    vae = model.autoencoder
    assert model.autoencoder is vae
    model.pixel_range = PixelRange((0.0,), (10.0,))
    model.decoder = build().decoder
    other = model.autoencoder
    assert other is not vae
    assert other.decoder is model.decoder
    assert other.encoder is vae.encoder
    assert (other.scaling_factor, other.pixel_range) == (0.5, model.pixel_range)
    assert model.autoencoder is other


@pytest.mark.parametrize("frozen", [(), ("encoder",)])
def test_a_stand_in_gives_the_latents_of_a_linear_start(monkeypatch, frozen):
    """Its means, in place of a frozen half's."""
    model = build(lossconfig=WITHOUT_KL, **{f"freeze_{half}": True for half in frozen})
    posterior = SimpleNamespace(mean="its means")
    stand_in = SimpleNamespace(posterior=lambda x, moments=None: posterior)
    monkeypatch.setattr(LiteAutoencoderKL, "stand_in", stand_in)
    model.decoder.linear = nn.Conv2d(1, 1, 1)
    given = []
    monkeypatch.setattr(
        liteautoencoder, "start_linearly", lambda *args: given.append(args) or (None, "a line")
    )
    assert list(model.prepare("source", 0, torch.device("cpu"), ["decoder"])) == ["a line"]
    ((*_, teacher, fresh, halves),) = given
    assert teacher("images") == "its means"
    assert fresh == ["decoder"]
    assert halves == list(frozen)


def test_an_adversary_is_one_of_ours():
    with pytest.raises(ConfigError, match="Identity is not a kind of"):
        build({"target": "torch.nn.Identity"})


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("teaches", [True, False])
def test_a_stand_in_decodes_in_place_of_a_frozen_decoder_alone(monkeypatch, frozen, teaches):
    model = build(freeze_decoder=frozen)
    stand_in = SimpleNamespace(decode=lambda z: "its image") if teaches else None
    monkeypatch.setattr(LiteAutoencoderKL, "stand_in", stand_in)
    z = torch.randn(1, 4, 2, 2)
    found = model.decode_trained(z)
    if frozen and teaches:
        assert found == "its image"
    else:
        assert torch.equal(found, model.decode(z))


class Scaled(Part):
    """Brings latents with a factor of their own."""

    def attach(self, model) -> None:
        model.for_diffusion = {**model.for_diffusion, "scaling_factor": 0.25}


def test_a_part_that_brings_latents_gives_their_factors():
    parts = {"scaled": {"target": f"{__name__}.Scaled"}}
    assert build(parts=parts).autoencoder.scaling_factor == 0.25
    assert build(val_metrics=("l1",), weights_dir="there").validation.names == ["l1"]


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_backward_pass_is_a_share_of_the_update_and_sends_the_last_ones_sum(several, last):
    model, sent, passed = build(accumulate_grad_batches=2), [], []
    strategy = PlayersStrategy() if several else SimpleNamespace()
    strategy.reduce_next = lambda *given: sent.append(given)
    model.__dict__["_trainer"] = SimpleNamespace(strategy=strategy)
    model.__dict__["manual_backward"] = passed.append
    model._backward("autoencoder", torch.tensor(3.0), last)
    assert passed == [1.5]
    assert sent == [("autoencoder", passed[0])] * (several and last)


def test_an_update_is_complete_between_its_micro_batches_alone():
    model = build(accumulate_grad_batches=3)
    for micro_batch in (0, 1, 2):
        model._micro_batch = micro_batch
        assert model.update_is_complete == (micro_batch == 0)


def test_validations_metrics_are_set_up_on_the_models_device(monkeypatch):
    model, devices = build(), []
    monkeypatch.setattr(model.validation, "set_up", devices.append)
    model.set_up_validation()
    assert devices == [model.device]
