"""The study's rows: what is trained, and how each differs from study/recipe.yaml."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECIPE = Path(__file__).parent / "recipe.yaml"

QUESTIONS = ("encoder", "objective")
"""Of docs/results.md, in its order."""

SIZES = (64, 256)
"""Pixels at which every row is evaluated: the training crops' and the usual."""

ALL_SIZES = (64, 128, 256, 512)
"""Of the rows that are measured by size."""


class Row(NamedTuple):
    """A training run and its evaluation.

    Args:
        name: of the run, and of the result's file.
        question: one of :data:`QUESTIONS`.
        overrides: of the recipe, as on the command line.
        steps: updates of the autoencoder, or of the network that ``time_of`` names.
        seed: of the run.
        time_of: train for as long as this network would take for these steps.
        sizes: pixels at which it is evaluated.
        precision: of the training; evaluations are in float32.
    """

    name: str
    question: str
    overrides: tuple[str, ...] = ()
    steps: int = 1500
    seed: int = 0
    time_of: str | None = None
    sizes: tuple[int, ...] = SIZES
    precision: str = "32"


ENCODER, DECODER = "model.params.encoder_config", "model.params.decoder_config"
LOSS, RATE = "model.params.lossconfig.params", "model.base_learning_rate"

SD = f"{ENCODER}.params={{channels: 48, norm_groups: 16, latent_dim: 24, image_size: 64}}"
LITE = f"{ENCODER}.params={{scale: S, image_size: 64}}"
TINY = f"{ENCODER}.params={{latent_dim: 24, image_size: 64}}"
LINEAR = (f"{ENCODER}.params.linear=true", f"{DECODER}.params.linear=true")
LINEAR_DECODER = f"{DECODER}.target=olvae.models.linear_code.LinearDecoder"
SD_ENCODER = (f"{ENCODER}.target=olvae.modules.sdvae.SDEncoder", SD)
TINY_ENCODER = (f"{ENCODER}.target=study.encoders.TinyMoments", TINY)
TINY_DECODER = f"{DECODER}.params={{z_channels: 12}}"

NETWORKS = {
    "litevae": (),
    "sd": SD_ENCODER,
    "litevae_norm": (f"{ENCODER}.target=study.encoders.NormalizedLiteVAE", LITE),
    "litevae_shuffle": (f"{ENCODER}.target=study.encoders.ShuffledLiteVAE", LITE),
    "litevae_packets": (f"{ENCODER}.target=study.encoders.PatchedLiteVAE", LITE),
    "litevae_linear": LINEAR,
    "sd_free": (f"{ENCODER}.target=study.encoders.UnnormalizedSDEncoder", SD),
    "sd_short": (f"{ENCODER}.target=study.encoders.ShortPathSDEncoder", SD),
    "sd_linear": (*SD_ENCODER, *LINEAR),
    "tiny": TINY_ENCODER,
    "tiny_whole": (
        *TINY_ENCODER,
        f"{DECODER}.target=olvae.modules.others.tiny.TinyDecoder",
        TINY_DECODER,
    ),
    "linear_alone": (
        f"{ENCODER}.target=study.encoders.LinearMoments",
        f"{ENCODER}.params={{image_size: 64}}",
        LINEAR_DECODER,
        f"{DECODER}.params={{z_channels: 12}}",
    ),
}
"""The encoders: two published ones, TAESD's, and what sets the first two apart.

TAESD's with its own decoder too, and linear layers without a network.
"""

ENCODERS = {
    "litevae": "LiteVAE-S",
    "litevae_norm": "LiteVAE-S, GroupNorm at its end",
    "litevae_shuffle": "LiteVAE-S on shuffled pixels",
    "litevae_packets": "LiteVAE-S on Haar packets of patches",
    "litevae_linear": "LiteVAE-S, linear start",
    "sd": "SD, 48 channels",
    "sd_free": "SD without its last GroupNorm",
    "sd_short": "SD with a path from mean colours",
    "sd_linear": "SD, linear start",
    "tiny": "TAESD's, 64 channels",
    "tiny_whole": "TAESD's, and its decoder",
    "linear_alone": "linear layers alone",
}
"""The networks' titles in tables."""

RUNS = {
    "litevae": {"5e-4": 1, "1e-3": 3, "2e-3": 3},
    "litevae_norm": {"1e-3": 2, "2e-3": 3},
    "litevae_shuffle": {"1e-3": 2, "2e-3": 3},
    "litevae_packets": {},
    "litevae_linear": {"5e-4": 1, "1e-3": 3, "2e-3": 1},
    "sd": {"5e-4": 3, "1e-3": 3, "2e-3": 1},
    "sd_free": {"5e-4": 2, "1e-3": 3, "2e-3": 1},
    "sd_short": {"5e-4": 1, "1e-3": 3, "2e-3": 1},
    "sd_linear": {"5e-4": 2, "1e-3": 3},
    "tiny": {"1e-3": 3, "2e-3": 1},
    "tiny_whole": {"1e-3": 3, "2e-3": 1},
    "linear_alone": {"1e-3": 3},
}
"""How many seeds each network is trained with at each learning rate.

Above 2e-3 the two published ones diverge.
"""

LONGER = {
    "litevae": ("2e-3", 3),
    "litevae_norm": ("2e-3", 3),
    "litevae_shuffle": ("2e-3", 3),
    "litevae_packets": ("2e-3", 3),
    "litevae_linear": ("1e-3", 3),
    "sd": ("1e-3", 3),
    "sd_free": ("1e-3", 3),
    "sd_short": ("1e-3", 3),
    "sd_linear": ("5e-4", 3),
    "tiny": ("1e-3", 3),
    "tiny_whole": ("1e-3", 3),
    "linear_alone": ("1e-3", 3),
}
"""Trained for four times the steps too, in bf16: the networks,
their learning rates and numbers of seeds."""

LONG = {
    "litevae_linear": ("1e-3", 36_000),
    "sd_linear": ("1e-3", 26_400),
    "linear_alone": ("1e-3", 36_000),
}
"""The long pair, in bf16: the networks, their learning rates and steps,
which take two hours of a thread each. Beside it linear layers alone."""

PERCEPTUAL = (f"{LOSS}.perceptual=lite0", f"{LOSS}.lpips_weight=0.3")
ADVERSARY = (
    "model.params.adversary_config={target: olvae.models.adversary.Adversary, params: {"
    "weight: 0.03, ramp_steps: 200, learning_rate_ratio: 1.0, discriminator_config: {"
    "target: olvae.modules.patchgan.PatchGAN, params: {base_channels: 32}}}}"
)
SHARP = (*PERCEPTUAL, ADVERSARY)
"""What people train with, once for each published encoder: a perceptual loss with an adversary,
as in study/photos_sharp.yaml."""

SHIPPED = {
    "packets": (
        f"{ENCODER}.params={{scale: S, image_size: 64, packets: true, aggregate_channels: 64, "
        "aggregate_mult: [1, 1], aggregate_resblocks: 2, linear: true}",
    ),
    "muon": ("model.params.optimizer=muon",),
    "decoder": (
        f"{DECODER}.params={{channels: 16, z_channels: 12, variant: paper_smc, "
        "channel_mult: [1, 2, 4, 4], num_res_blocks: 0, linear: true}",
    ),
    "objective": (
        f"{LOSS}={{reconstruction: l2, rec_weight: 5.0, lpips_weight: 0, kl_weight: 1.0e-6, "
        "wavelet_weight: 0.05, gaussian_weight: 0.1}",
        "model.params.initial_logvar=-8.0",
    ),
}
"""What sets the recipe of olvae:photos-f8c12 apart from LiteVAE-S with the linear start, besides
crops, batches and steps (study/photos.yaml)."""

SEEDS = (0, 1, 2)

RECIPES = "litevae_1e-3"
"""The recipe as it is, without its seed."""

BASELINE = "litevae_linear_1e-3_0"
"""The row beside which the linear code and the bicubic round trip are evaluated, at all sizes."""


def rows(quick: bool = False) -> list[Row]:
    """All rows.

    Args:
        quick: an eighth of the steps, one seed.
    """
    factor, seeds = (8, SEEDS[:1]) if quick else (1, SEEDS)
    found = [
        *_encoders(seeds),
        *(
            Row(f"no_wavelet_{seed}", "objective", (f"{LOSS}.wavelet_weight=0",), seed=seed)
            for seed in seeds
        ),
        *(
            Row(f"{network}_adversary_0", "objective", (*NETWORKS[network], f"{RATE}=1e-3", *SHARP))
            for network in ("litevae", "sd")
        ),
        *_shipped(),
    ]
    return [row._replace(steps=max(8, row.steps // factor)) for row in found]


def details(found: Mapping[str, Any]) -> float:
    """The mean squared error at 256 pixels in all bands but the coarsest.

    With that band's it is the pixels'.
    """
    bands = found["sizes"]["256"]["bands"]
    return float(sum(band["mse"] for name, band in bands.items() if not name.startswith("LL")))


def _shipped() -> list[Row]:
    """LiteVAE-S with the linear start after 6000 steps, with what the shipped recipe changes."""
    every = [override for overrides in SHIPPED.values() for override in overrides]
    return [
        Row(
            "shipped_all_0",
            "objective",
            (*LINEAR, f"{RATE}=1e-3", *every),
            6000,
            precision="bf16",
        )
    ]


def _encoders(seeds: Sequence[int]) -> list[Row]:
    equal_steps = [
        Row(
            f"{network}_{rate}_{seed}",
            "encoder",
            (*overrides, f"{RATE}={rate}"),
            seed=seed,
            sizes=ALL_SIZES if f"{network}_{rate}_{seed}" in (f"{RECIPES}_0", BASELINE) else SIZES,
        )
        for network, overrides in NETWORKS.items()
        for rate, count in RUNS[network].items()
        for seed in seeds[:count]
    ]
    equal_time = [Row(f"litevae_time_{seed}", "encoder", seed=seed, time_of="sd") for seed in seeds]
    longer = [
        Row(
            f"{name}_longer_{seed}",
            "encoder",
            (*NETWORKS[name], f"{RATE}={rate}"),
            6000,
            seed,
            precision="bf16",
        )
        for name, (rate, count) in LONGER.items()
        for seed in seeds[:count]
    ]
    long = [
        Row(
            f"{name}_long_0",
            "encoder",
            (*NETWORKS[name], f"{RATE}={rate}"),
            steps,
            sizes=ALL_SIZES,
            precision="bf16",
        )
        for name, (rate, steps) in LONG.items()
    ]
    return equal_steps + equal_time + longer + long
