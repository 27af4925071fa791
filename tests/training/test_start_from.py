"""Runs that start from an autoencoder that exists (--from), or learn from one (--teacher),
as the command trains."""

import copy
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from olvae import LiteVAE
from olvae.cli.main import main
from olvae.config import ConfigError, instantiate, save, validate
from olvae.data.picture_folder import FolderSource
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.data.places import load
from olvae.export.exporting import ExportSettings, export_target
from olvae.losses.objective import Objective
from olvae.models import linear_code
from olvae.models.linear_code import LinearDecoder, crops_and_means, fit_linear_paths
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.targets import find_target
from olvae.training import run as training
from olvae.training.start_from import start_from
from tests.conftest import tiny_config
from tests.export.latents import tiny_vae
from tests.models.autoencoder_kl import tiny_kl
from tests.models.loading.test_targets import latent_diffusion_names
from tests.models.steps import WITHOUT_KL
from tests.training.origins import checkpoint, one_line, small, without_networks

ANCHOR = "model.params.parts.anchor.target=olvae.models.parts.anchor.Anchor"
EQUIVARIANCE = "model.params.parts.equivariance.target=olvae.models.parts.equivariance.Equivariance"


@pytest.fixture
def starts(monkeypatch) -> list[LiteVAE]:
    """The autoencoder of every training before its first step."""
    seen, hook = [], LiteAutoencoderKL.on_train_start

    def look(self):
        seen.append(copy.deepcopy(self.autoencoder).eval())
        hook(self)

    monkeypatch.setattr(LiteAutoencoderKL, "on_train_start", look)
    return seen


def images(count: int = 2, size: int = 16) -> Tensor:
    torch.manual_seed(7)
    return torch.rand(count, 3, size, size) * 2 - 1


def photographs(folder: Path) -> Tensor:
    """A fixed batch of the training images, in [-1, 1]."""
    return from_uint8(
        next(iter(FolderSource(str(folder), 16, 8, val_fraction=0.2).train_loader()))["image"]
    )


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor) -> float:
    posterior = model.encode(x)
    return float(
        Objective(lpips_weight=0, kl_weight=0)(x, model.decode(posterior.mode()), posterior)[0]
    )


@torch.no_grad()
def assert_like(model: LiteVAE, theirs: diffusers.AutoencoderKL) -> None:
    x = images()
    posterior, expected = model.encode(x), theirs.encode(x).latent_dist
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.logvar, expected.logvar)
    assert torch.equal(model.decode(expected.mean), theirs.decode(expected.mean).sample)


def make_source(kind: str, folder: Path, theirs: diffusers.AutoencoderKL) -> str:
    """Save AutoencoderKL as diffusers do, or as latent-diffusion, with this before its names."""
    if kind == "diffusers":
        theirs.save_pretrained(folder / "source")
        return f"diffusers:{folder / 'source'}"
    state = {kind + name: tensor for name, tensor in latent_diffusion_names(theirs).items()}
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(2)
    save_file(state, folder / "source.safetensors")
    return str(folder / "source.safetensors")


def test_start_from_trains_the_decoder_alone(train_with, tmp_path, image_folder, starts):
    # latent-diffusion has 32 groups
    theirs = tiny_kl(block_out_channels=(32, 32, 64), norm_num_groups=32)
    target = make_source("vae.", tmp_path, theirs)
    run = train_with(
        "lightning.trainer.max_steps=8", "model.params.scaling_factor=0.18215", start_from=target
    )
    (start,) = starts
    assert_like(start, theirs)

    after = find_target(run.path).load()
    before = start.state_dict()
    for name, tensor in after.state_dict().items():
        frozen = name.startswith(("encoder.", "quantizer.quant_conv."))
        assert torch.equal(tensor, before[name]) == frozen, name
    x = photographs(image_folder)
    assert loss_of(after, x) < 0.95 * loss_of(start, x)


def test_start_from_completes_the_config_of_the_run(train_with, tmp_path):
    """Params without a target are added to what was found."""
    theirs = tiny_kl(scaling_factor=0.5, shift_factor=0.25, force_upcast=False, use_quant_conv=True)
    target = make_source("diffusers", tmp_path, theirs)
    padding = "model.params.decoder_config.params.padding=reflect"
    run = train_with("lightning.trainer.max_steps=1", padding, start_from=target)
    config = load([run.config])
    assert validate(config) == []
    assert "from" not in config["model"]
    params = config["model"]["params"]
    assert params["encoder_config"]["target"] == "olvae.modules.sdvae.SDEncoder"
    assert params["decoder_config"]["target"] == "olvae.modules.sdvae.SDDecoder"
    assert (params["embed_dim"], params["use_quant"], params["freeze_encoder"]) == (4, True, True)
    assert config["run"]["weights"] == target
    assert config["run"]["paths"][str(tmp_path / "source")] == str(tmp_path / "source")
    assert config["run"]["untrained"] is None
    shutil.rmtree(tmp_path / "source")
    factors = {
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "latents_mean": None,
        "latents_std": None,
    }
    factors["force_upcast"] = False
    assert {name: params[name] for name in factors} == factors
    assert LiteVAE.from_pretrained(run.path).for_diffusion == factors
    found = find_target(run.path).load()
    assert found.downscale == 4
    for half, mode in ((found.encoder, "zeros"), (found.decoder, "reflect")):
        assert {
            m.padding_mode for m in half.modules() if isinstance(m, nn.Conv2d) and any(m.padding)
        } == {mode}


def test_a_decoder_that_starts_fresh_starts_linearly(
    train_with, tmp_path, image_folder, starts, monkeypatch
):
    """Fitted to the latents of the encoder that is there.

    The encoder's own path keeps its weights.
    """
    monkeypatch.setattr(linear_code, "CROPS", (64, 64))
    config = tiny_config()["model"]["params"]
    for half in linear_code.HALVES:
        config[f"{half}_config"]["params"]["linear"] = True
    before = LiteAutoencoderKL(**config).autoencoder.eval()
    fit_linear_paths(before, to_uint8(images(64)))
    before.save_pretrained(tmp_path / "source")
    wider = "model.params.decoder_config.params.channels=16"
    with pytest.warns(UserWarning, match="starts fresh"):
        run = train_with(
            "lightning.trainer.max_steps=1", wider, start_from=str(tmp_path / "source")
        )
    (after,) = starts
    assert after.encoder.linear.weight.equal(before.encoder.linear.weight)
    config, expected = load([run.config]), LiteVAE(before.encoder, LinearDecoder(4))
    crops = crops_and_means(instantiate(config["data"]), config["run"]["seed"], 8)[0]
    fit_linear_paths(expected, crops, fresh=["decoder"])
    torch.testing.assert_close(
        after.decoder.linear.weight, expected.decoder.linear.weight, rtol=0, atol=1e-5
    )


def test_start_from_one_of_our_own_runs_and_its_export(train_with, tmp_path, image_folder, starts):
    """With its width and its factors; the objective is the new config's."""
    config = tiny_config(
        image_folder, lossconfig=WITHOUT_KL, scaling_factor=0.7, initial_logvar=-4.0
    )
    first = train_with("lightning.trainer.max_steps=1", config=config)
    LiteVAE.from_pretrained(first.path).save_pretrained(tmp_path / "export")
    expected = LiteVAE.from_pretrained(first.path)
    for source in (first.path, first.last_checkpoint, tmp_path / "export"):
        second = train_with("lightning.trainer.max_steps=1", start_from=str(source))
        start = starts[-1].state_dict()
        assert all(
            torch.equal(tensor, start[name]) for name, tensor in expected.state_dict().items()
        )
        params = load([second.config])["model"]["params"]
        assert params["encoder_config"]["params"]["extractor_channels"] == 8
        assert params["scaling_factor"] == 0.7
        assert "initial_logvar" not in params


def test_start_from_in_the_config_as_well_as_by_flag(train_with, tmp_path, image_folder, starts):
    """Networks of the config give way to those that are found, and the flag wins."""
    theirs = tiny_kl()
    target = make_source("diffusers", tmp_path, theirs)
    config = tiny_config(image_folder, lossconfig=WITHOUT_KL)
    for named, flag in ((target, None), ("nowhere", target)):
        config["model"]["from"] = named
        assert validate(config) == []
        run = train_with("lightning.trainer.max_steps=1", config=config, start_from=flag)
        assert_like(starts[-1], theirs)
        assert "from" not in load([run.config])["model"]


def test_a_network_that_is_replaced_by_another_class_is_a_warning(tmp_path):
    """But not one of another width, as where a recipe includes one that trains from scratch."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    config = tiny_config(lossconfig=WITHOUT_KL)
    config["model"]["from"] = str(tmp_path / "vae")
    config["model"]["params"]["encoder_config"]["params"]["extractor_channels"] = 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start_from(copy.deepcopy(config))
    config["model"]["params"]["decoder_config"] = {
        "target": "olvae.modules.others.tiny.TinyDecoder",
        "params": {"z_channels": 4, "enlarge": 2},
    }
    with pytest.warns(UserWarning, match="decoder_config: .*TinyDecoder .*LiteVAE_Decoder") as seen:
        start_from(config)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_scaling_factors_are_the_sources_and_the_recipes_where_a_file_has_none(
    tmp_path, image_folder
):
    """A scaling_factor of null is none, wherever the value comes from."""
    config = without_networks(image_folder)
    theirs = tiny_kl(block_out_channels=(32, 32, 64), norm_num_groups=32, scaling_factor=0.5)
    folder, file = (make_source(kind, tmp_path, theirs) for kind in ("diffusers", "vae."))
    for target, given, expected in ((folder, 0.25, 0.5), (folder, None, 0.5), (file, 0.25, 0.25)):
        begun = copy.deepcopy(config)
        begun["model"]["from"] = target
        begun["model"]["params"]["scaling_factor"] = given
        start_from(begun)
        assert begun["model"]["params"]["scaling_factor"] == expected, (target, given)
    config["model"]["from"] = file
    config["model"]["params"]["scaling_factor"] = None
    with pytest.raises(ConfigError, match=r"source\.safetensors: .*factors") as caught:
        start_from(config)
    one_line(caught)


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        (("model.params.freeze_encoder=false",), False),
        (("model.params.freeze_encoder=true",), True),
        pytest.param(
            (f"{ANCHOR}", "model.params.parts.anchor.params.weight=1"), True, marks=pytest.mark.slow
        ),
    ],
    ids=["trained", "frozen", "anchored"],
)
def test_factors_of_the_start_are_not_a_trained_encoders(train_with, tmp_path, settings, own):
    """The export and the next run leave them out; a number that is given replaces both."""
    target = make_source("diffusers", tmp_path, tiny_kl(scaling_factor=0.5, shift_factor=0.25))
    run = train_with("lightning.trainer.max_steps=1", *settings, start_from=target)
    found = find_target(run.path)
    assert found.load().scaling_factor == 0.5
    _, notes = export_target(found, tmp_path / "vae", ExportSettings())
    expected = (0.5, 0.25) if own else (1.0, 0.0)
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").config
    assert (back.scaling_factor, back.shift_factor) == expected
    assert any("olvae latents measures" in note for note in notes) != own
    card = (tmp_path / "vae" / "README.md").read_text()
    assert ("(not measured: `olvae latents` does)" in card) != own
    assert (f"(from {run.path.name})" in card) == own

    config = without_networks(tmp_path)
    config["model"]["from"] = str(run.path)
    start_from(config)
    params = config["model"]["params"]
    assert (params["scaling_factor"], params["shift_factor"]) == expected

    factor = "model.params.scaling_factor=0.75"
    shift = "model.params.shift_factor=${model.base_learning_rate}"  # of the whole config
    after = train_with("lightning.trainer.max_steps=1", factor, shift, start_from=str(run.path))
    assert find_target(after.path).load().scaling_factor == (0.5 if own else 0.75)

    _, notes = export_target(found, tmp_path / "given", ExportSettings(scaling_factor=2.0))
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "given").config
    assert (back.scaling_factor, back.shift_factor) == (2.0, expected[1])
    assert not notes


def test_start_from_trains_the_halves_that_are_not_frozen(train_with, tmp_path):
    """And an anchor is the source, also in a resumed run."""
    theirs = tiny_kl()
    target, runs = make_source("diffusers", tmp_path, theirs), []

    def moved(*overrides: str) -> set[str]:
        runs.append(train_with("lightning.trainer.max_steps=1", *overrides, start_from=target))
        before, after = theirs.state_dict(), find_target(runs[-1].path).load().state_dict()
        renamed = {
            name.replace("quantizer.", "").replace("coder.model.", "coder."): t
            for name, t in after.items()
        }
        assert renamed.keys() == before.keys()
        return {
            name.partition(".")[0]
            for name in before
            if not torch.equal(before[name], renamed[name])
        }

    old, new = {"encoder", "quant_conv"}, {"decoder", "post_quant_conv"}
    assert moved("model.params.freeze_decoder=true") == old
    assert moved(EQUIVARIANCE, "model.params.freeze_encoder=false") == old | new
    assert moved(ANCHOR) == old | new
    state = checkpoint(train_with("lightning.trainer.max_steps=2", resume=runs[-1].path))[
        "state_dict"
    ]
    for name, tensor in theirs.encoder.state_dict().items():
        assert torch.equal(state[f"parts.anchor.moments.0.model.{name}"], tensor), name
    assert torch.equal(state["parts.anchor.moments.1.weight"], theirs.quant_conv.weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.params.lossconfig.params.kl_weight=0.1",), "kl_weight: the encoder is frozen"),
        (
            ("model.params.encoder_config.params.channels=64",),
            ": only the decoder may be another one",
        ),
        (
            ("model.params.decoder_config.params.paddings=reflect",),
            "paddings: unknown key; did you mean padding?",
        ),
        (
            ("model.params.decoder_config.padding=reflect",),
            "model.params.decoder_config.padding: unknown key",
        ),
        (
            ("model.params.encoder_config.params.padding=reflect",),
            "encoder_config.params.padding: reflect, but ",
        ),
        (("data.params.size=18",), "18 is not a multiple of 4"),
        (("model.params.embed_dim=8",), "model.params.embed_dim: comes from "),
        (("model.params.encoder_config=null",), "model.params.encoder_config: comes from "),
        (
            ("model.params.decoder_config.target=olvae.modules.sdvae.SDDecoder",),
            "decoder_config: comes from ",
        ),
    ],
)
def test_start_from_refuses_settings_that_the_source_does_not_take(
    train_with, tmp_path, overrides, message
):
    target = make_source(
        "vae.", tmp_path, tiny_kl(block_out_channels=(32, 32, 64), norm_num_groups=32)
    )
    with pytest.raises((ConfigError, ValueError)) as caught:
        train_with("model.params.scaling_factor=0.5", *overrides, start_from=target)
    assert message in one_line(caught)
    assert not (tmp_path / "runs").exists()


def test_start_from_refuses_targets_that_are_no_source(train_with, tmp_path):
    """One line each, and no run folder."""
    weights = tmp_path / "weights"  # without a config beside them
    weights.mkdir()
    state = latent_diffusion_names(tiny_kl())
    save_file(
        {f"model.diffusion_model.{name}": t for name, t in state.items()},
        weights / "unet.safetensors",
    )
    torch.save(
        {"state_dict": {"main.0.weight": torch.zeros(4, 3, 4, 4)}}, weights / "discriminator.ckpt"
    )
    tiny_vae().fold().save_pretrained(tmp_path / "folded")
    for target, message in (
        (str(weights / "unet.safetensors"), "no config beside the weights"),
        (str(weights / "discriminator.ckpt"), "no config beside the weights"),
        (str(tmp_path / "folded"), "its convolutions are folded, for inference only"),
    ):
        with pytest.raises((ConfigError, FileNotFoundError, ValueError)) as caught:
            train_with(start_from=target)
        assert message in one_line(caught), target
        assert "`config`" not in one_line(caught), target  # which train has not
        assert not (tmp_path / "runs").exists()


def test_start_from_resume_and_actual_resume_exclude_each_other(train_with, tmp_path, image_folder):
    target = make_source("diffusers", tmp_path, tiny_kl())
    run = train_with("lightning.trainer.max_steps=1", start_from=target)
    before = run.config.read_bytes()
    named = without_networks(image_folder)
    named["model"]["from"] = target
    save(named, tmp_path / "named.yaml")
    for options in (
        {"resume": run.path, "start_from": target},
        {"actual_resume": run.path, "start_from": target},
        {"actual_resume": run.path, "base": [tmp_path / "named.yaml"]},
        {"resume": run.path, "base": [tmp_path / "named.yaml"]},
    ):
        with pytest.raises(ConfigError, match=r"(start_from|model\.from).*one of them$"):
            train_with("lightning.trainer.max_steps=2", **options)
    assert list((tmp_path / "runs").iterdir()) == [run.path]
    assert run.config.read_bytes() == before


# These start from a LiteVAE, and transparency has a test of its own.
NOT_OF_KL = ("sdxl_rgba", "photos", "one_step", "one_step_distil")
FINETUNE = sorted(p for p in Path("configs/finetune").glob("*.yaml") if p.stem not in NOT_OF_KL)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in ("sdxl", "flux") else pytest.mark.slow)
        for path in FINETUNE
    ],
    ids=lambda path: path.stem,
)
def test_the_shipped_finetune_recipes_train_the_decoder(train_with, tmp_path, image_folder, path):
    """On a small AutoencoderKL: the encoder keeps its bits, the decoder moves,
    the source's factors are kept."""
    theirs = tiny_kl(scaling_factor=0.5)
    target = make_source("diffusers", tmp_path, theirs)
    quick = ("model.params.warmup_steps=0", "model.params.ema_decay=0.5")
    run = train_with(*small(image_folder, 16), *quick, base=[path], start_from=target)
    model = LiteVAE.from_pretrained(run.path)
    with torch.no_grad():
        assert torch.equal(model.encode(images()).mean, theirs.encode(images()).latent_dist.mean)
        assert not torch.equal(model(images())[0], theirs(images()).sample)
    assert model.scaling_factor == 0.5


def test_finetune_photos_trains_on_both_halves_of_the_shipped_model(train_with, image_folder):
    """Both halves, from its weights, which the linear code does not replace."""
    settings = (
        *small(image_folder, 32),
        "model.params.warmup_steps=0",
        "model.params.ema_decay=0.5",
    )
    run = train_with(*settings, base=["finetune/photos"])
    model, shipped = (
        LiteVAE.from_pretrained(target) for target in (run.path, "olvae:photos-f8c12")
    )
    for half in ("encoder", "decoder"):
        after, before = (getattr(found, half).state_dict() for found in (model, shipped))
        changes = torch.stack(
            [(after[name] - tensor).abs().max() for name, tensor in before.items()]
        )
        assert 0 < changes.max() < 1e-2, half


def test_sdxl_learns_transparency(train_with, tmp_path):
    """Widened by zeros, so that it starts from the opaque reconstruction.

    Alpha is then seen, and goes back.
    """
    theirs = tiny_kl(scaling_factor=0.13025)
    (tmp_path / "rgba").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "rgba" / f"{number}.png")
    target = make_source("diffusers", tmp_path, theirs)
    quick = ("model.params.warmup_steps=0", "model.params.ema_decay=0.5")
    recipe = Path("configs/finetune/sdxl_rgba.yaml")
    run = train_with(*small(tmp_path / "rgba", 16), *quick, base=[recipe], start_from=target)
    export_target(find_target(run.path), tmp_path / "export", ExportSettings())
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "export")
    assert (back.config.in_channels, back.config.out_channels, back.config.scaling_factor) == (
        4,
        4,
        0.13025,
    )
    old, new = theirs.encoder.conv_in.weight, back.encoder.conv_in.weight
    assert (new[:, 3] != 0).any()
    torch.testing.assert_close(new[:, :3], old, atol=5e-5, rtol=0)  # a step of Adam away
    assert not torch.equal(new[:, :3], old)


def test_the_from_and_teacher_flags_reach_the_run(tmp_path, image_folder, capsys, monkeypatch):
    """--from and --teacher reach the run, whose encoder learns; factors are the teacher's.

    A mistake is one line.
    """
    monkeypatch.delenv(training.RUN_ENV, raising=False)
    config = without_networks(image_folder)
    config["lightning"]["trainer"]["max_steps"] = 1
    save(config, tmp_path / "cfg.yaml")
    target = make_source("diffusers", tmp_path, tiny_kl(scaling_factor=0.7))
    teacher = f"diffusers:{tmp_path}/teacher"
    tiny_kl(scaling_factor=0.5).save_pretrained(tmp_path / "teacher")
    flags = [
        "train",
        "--base",
        str(tmp_path / "cfg.yaml"),
        "--logdir",
        str(tmp_path / "runs"),
        "--gpus",
        "0",
    ]
    with pytest.raises(SystemExit) as done:
        main([*flags, "--from", target, "--teacher", teacher])
    assert done.value.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    found = load([run / "config.yaml"])
    assert found["run"]["weights"] == target
    assert found["model"]["params"]["parts"]["teacher"]["params"] == {"autoencoder": teacher}
    assert found["model"]["params"]["scaling_factor"] == 0.5
    assert not found["model"]["params"].get("freeze_encoder")
    assert found["run"]["untrained"] is None
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([*flags, "--from", target, "--actual_resume", str(run)])
    assert done.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --actual_resume starts one from weights, --from")
    assert printed.count("\n") == 1
