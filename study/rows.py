"""The study's rows: what is trained, and how each differs from study/recipe.yaml."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECIPE = Path(__file__).parent / "recipe.yaml"

QUESTIONS = ("encoder", "objective", "scale", "diffusion")
"""Of docs/results.md, in its order."""

SIZES = (64, 256)
"""Pixels at which every row is evaluated: the training crops' and the usual."""

ALL_SIZES = (64, 128, 256, 512)
"""Of the rows that the scale's question compares."""


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


class Diffusion(NamedTuple):
    """Small diffusion models on the latents of a row's autoencoder, a seed each."""

    name: str
    of: str
    seeds: tuple[int, ...]
    steps: int


ENCODER, DECODER = "model.params.encoder_config", "model.params.decoder_config"
LOSS, RATE = "model.params.lossconfig.params", "model.base_learning_rate"

SD = f"{ENCODER}.params={{channels: 48, norm_groups: 16, latent_dim: 24, image_size: 64}}"
LITE = f"{ENCODER}.params={{scale: S, image_size: 64}}"
TINY = f"{ENCODER}.params={{latent_dim: 24, image_size: 64}}"
LINEAR = (f"{ENCODER}.params.linear=true", f"{DECODER}.params.linear=true")
SD_ENCODER = (f"{ENCODER}.target=olvae.modules.sdvae.SDEncoder", SD)
TINY_ENCODER = (f"{ENCODER}.target=study.encoders.TinyMoments", TINY)
TINY_DECODER = f"{DECODER}.params={{z_channels: 12}}"

NETWORKS = {
    "litevae": (),
    "sd": SD_ENCODER,
    "litevae_norm": (f"{ENCODER}.target=study.encoders.NormalizedLiteVAE", LITE),
    "litevae_shuffle": (f"{ENCODER}.target=study.encoders.ShuffledLiteVAE", LITE),
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
}
"""The encoders: two published ones, TAESD's, and what sets the first two apart.

TAESD's with its own decoder too.
"""

ENCODERS = {
    "litevae": "LiteVAE-S",
    "litevae_norm": "LiteVAE-S, GroupNorm at its end",
    "litevae_shuffle": "LiteVAE-S on shuffled pixels",
    "litevae_linear": "LiteVAE-S, linear start",
    "sd": "SD, 48 channels",
    "sd_free": "SD without its last GroupNorm",
    "sd_short": "SD with a path from mean colours",
    "sd_linear": "SD, linear start",
    "tiny": "TAESD's, 64 channels",
    "tiny_whole": "TAESD's, and its decoder",
}
"""The networks' titles in tables."""

RUNS = {
    "litevae": {"5e-4": 1, "1e-3": 3, "2e-3": 3},
    "litevae_norm": {"1e-3": 2, "2e-3": 3},
    "litevae_shuffle": {"1e-3": 2, "2e-3": 3},
    "litevae_linear": {"5e-4": 1, "1e-3": 3, "2e-3": 1},
    "sd": {"5e-4": 3, "1e-3": 3, "2e-3": 1},
    "sd_free": {"5e-4": 2, "1e-3": 3, "2e-3": 1},
    "sd_short": {"5e-4": 1, "1e-3": 3, "2e-3": 1},
    "sd_linear": {"5e-4": 2, "1e-3": 3},
    "tiny": {"1e-3": 3, "2e-3": 1},
    "tiny_whole": {"1e-3": 3, "2e-3": 1},
}
"""How many seeds each network is trained with at each learning rate.

Above 2e-3 the two published ones diverge.
"""

LONGER = {
    "litevae": ("2e-3", 3),
    "litevae_norm": ("2e-3", 3),
    "litevae_shuffle": ("2e-3", 3),
    "litevae_linear": ("1e-3", 3),
    "sd": ("1e-3", 3),
    "sd_free": ("1e-3", 3),
    "sd_short": ("1e-3", 3),
    "sd_linear": ("5e-4", 3),
    "tiny": ("1e-3", 3),
    "tiny_whole": ("1e-3", 3),
}
"""Trained for four times the steps too, in bf16: the networks,
their learning rates and numbers of seeds."""

LONG = {"litevae_linear": ("1e-3", 36_000), "sd_linear": ("1e-3", 26_400)}
"""The long pair, in bf16: the networks, their learning rates and steps,
which take two hours of a thread each."""

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
    equivariance = (
        "model.params.parts.equivariance.target=olvae.models.parts.equivariance.Equivariance"
    )
    found = [
        *_encoders(seeds),
        *(
            Row(f"no_wavelet_{seed}", "objective", (f"{LOSS}.wavelet_weight=0",), seed=seed)
            for seed in seeds
        ),
        Row("kl_x10", "diffusion", (f"{LOSS}.kl_weight=0.1",)),
        Row("equivariance", "diffusion", (equivariance,)),
        Row("group_norm", "scale", (f"{DECODER}.params.variant=group_norm",), sizes=ALL_SIZES),
    ]
    return [row._replace(steps=max(8, row.steps // factor)) for row in found]


def diffusions(quick: bool = False) -> list[Diffusion]:
    """Diffusion models on the autoencoders of the encoder's question,
    and on two that regularize the latent more."""
    seeds, steps = (SEEDS[:1], 250) if quick else (SEEDS, 2000)
    return [
        Diffusion(f"diffusion_{name}", of, seeds, steps)
        for name, of in (
            ("litevae", f"{RECIPES}_0"),
            ("sd", "sd_5e-4_0"),
            ("equivariance", "equivariance"),
            ("kl_x10", "kl_x10"),
        )
    ]


def details(found: Mapping[str, Any]) -> float:
    """The mean squared error at 256 pixels in all bands but the coarsest.

    With that band's it is the pixels'.
    """
    bands = found["sizes"]["256"]["bands"]
    return float(sum(band["mse"] for name, band in bands.items() if not name.startswith("LL")))


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
