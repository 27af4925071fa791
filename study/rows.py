"""The study's rows: what is trained, and how each differs from study/recipe.yaml."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["NETWORKS", "QUESTIONS", "RECIPE", "SEEDS", "Diffusion", "Row", "diffusions", "rows"]

RECIPE = Path(__file__).parent / "recipe.yaml"

QUESTIONS = ("encoder", "objective", "discriminator", "latent", "scale", "diffusion")
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
        rate_of: the network whose grid decides the learning rate; None takes the overrides'.
        time_of: train for as long as this network would take for these steps.
        after: the row from whose weights it starts.
        sizes: pixels at which it is evaluated.
        frechet: whether its Fréchet distance is measured, which takes longer than the rest of the evaluation.
    """

    name: str
    question: str
    overrides: tuple[str, ...] = ()
    steps: int = 1500
    seed: int = 0
    rate_of: str | None = "litevae"
    time_of: str | None = None
    after: str | None = None
    sizes: tuple[int, ...] = SIZES
    frechet: bool = True


class Diffusion(NamedTuple):
    """Small diffusion models on the latents of a row's autoencoder, a seed each."""

    name: str
    of: str
    seeds: tuple[int, ...]
    steps: int


RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3")
"""The grid of learning rates, the same for each network."""

ENCODER, DECODER = "model.params.encoder_config", "model.params.decoder_config"
LOSS = "model.params.lossconfig.params"

NETWORKS = {
    "litevae": (),
    "sd": (
        f"{ENCODER}.target=olvae.modules.sdvae.SDEncoder",
        f"{ENCODER}.params={{channels: 48, norm_groups: 16, latent_dim: 24, image_size: 64}}",
    ),
}

OBJECTIVES = {
    "no_wavelet": (f"{LOSS}.wavelet_weight=0",),
    "no_gaussian": (f"{LOSS}.gaussian_weight=0",),
    "kl_x10": (f"{LOSS}.kl_weight=0.1",),
    "l2": (f"{LOSS}.reconstruction=l2",),
}

SEEDS = (0, 1, 2)

CLOSE = "no_wavelet"
"""The objective whose Fréchet distance says something else than its PSNR: with all seeds."""

DISCRIMINATORS = {
    "none": "",
    "patchgan": "patchgan.PatchGAN, params: {base_channels: 32}",
    "gigagan": "gigagan.GigaGAN, params: {base: 2048, max_channels: 128, head_channels: 32, image_size: 128}",
    "unetgan_8": "unetgan.UNetGAN, params: {base_channels: 8, image_size: 128}",
    "unetgan_16": "unetgan.UNetGAN, params: {base_channels: 16, image_size: 128}",
    "unetgan_32": "unetgan.UNetGAN, params: {base_channels: 32, image_size: 128}",
}
"""Half as wide as the README's, and half of S's width besides."""

PHASE_B = ("model.base_learning_rate=2e-4", "data.params.size=128", "data.params.batch_size=2")


def rows(quick: bool = False) -> list[Row]:
    """All rows, in an order in which each comes after those that it needs.

    Args:
        quick: an eighth of the steps, one seed, two rates.
    """
    factor, seeds = (8, SEEDS[:1]) if quick else (1, SEEDS)
    found = [*_grid(quick), *_encoders(seeds), *_objectives(seeds), *_latents(), *_scales(), *_discriminators()]
    return [row._replace(steps=max(8, row.steps // factor)) for row in found]


def diffusions(quick: bool = False) -> list[Diffusion]:
    """Diffusion models on the autoencoders of the encoder's question, and on two that regularize the latent more."""
    seeds, steps = (SEEDS[:1], 250) if quick else (SEEDS, 2000)
    return [
        Diffusion(f"diffusion_{name}", of, seeds, steps)
        for name, of in (
            ("litevae", "litevae_0"),
            ("sd", "sd_0"),
            ("equivariance", "equivariance"),
            ("kl_x10", "kl_x10"),
        )
    ]


def _grid(quick: bool) -> list[Row]:
    rates = RATES[1:3] if quick else RATES
    return [
        Row(
            f"rate_{network}_{rate}",
            "encoder",
            (*overrides, f"model.base_learning_rate={rate}"),
            steps=500,
            rate_of=None,
            sizes=(256,),
            frechet=False,
        )
        for rate in rates
        for network, overrides in NETWORKS.items()
    ]


def _encoders(seeds: Sequence[int]) -> list[Row]:
    equal_steps = [
        Row(
            f"{network}_{seed}",
            "encoder",
            overrides,
            seed=seed,
            rate_of=network,
            sizes=SIZES if seed else ALL_SIZES,
        )
        for seed in seeds
        for network, overrides in NETWORKS.items()
    ]
    equal_time = [
        Row(f"litevae_time_{seed}", "encoder", NETWORKS["litevae"], seed=seed, time_of="sd") for seed in seeds
    ]
    return equal_steps + equal_time


def _objectives(seeds: Sequence[int]) -> list[Row]:
    rows = [Row(name, "objective", overrides) for name, overrides in OBJECTIVES.items()]
    return rows + [Row(f"{CLOSE}_{seed}", "objective", OBJECTIVES[CLOSE], seed=seed) for seed in seeds if seed]


def _latents() -> list[Row]:
    channels = [
        Row(f"channels_{n}", "latent", (f"model.params.embed_dim={n}", f"{DECODER}.params.z_channels={n}"))
        for n in (4, 8, 16)
    ]
    return [
        *channels,
        Row(
            "equivariance",
            "diffusion",
            ("model.params.parts.equivariance.target=olvae.models.parts.equivariance.Equivariance",),
        ),
    ]


def _scales() -> list[Row]:
    return [Row("group_norm", "scale", (f"{DECODER}.params.variant=group_norm",), sizes=ALL_SIZES)]


def _discriminators() -> list[Row]:
    adversary = "model.params.adversary_config={{target: olvae.models.adversary.Adversary, params: {params}}}"
    found = []
    for name, discriminator in DISCRIMINATORS.items():
        node = f"{{target: olvae.modules.{discriminator}}}"
        params = f"{{weight: 0.02, ramp_steps: 40, learning_rate_ratio: 2.0, discriminator_config: {node}}}"
        played = (adversary.format(params=params),) if discriminator else ()
        overrides = (*PHASE_B, *played)
        found.append(Row(f"b_{name}", "discriminator", overrides, 250, rate_of=None, after="litevae_0"))
    return found
