"""The study's rows: what is trained, and how each differs from study/recipe.yaml."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["NETWORKS", "QUESTIONS", "RECIPE", "SEEDS", "Diffusion", "Row", "diffusions", "rows"]

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
        rate_of: the network whose grid decides the learning rate; None takes the overrides'.
        time_of: train for as long as this network would take for these steps.
        after: the row from whose weights it starts.
        sizes: pixels at which it is evaluated.
        frechet: whether its Fréchet distance is measured, which takes longer than the rest of the evaluation.
        precision: of the training; evaluations are in float32.
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
    precision: str = "32"


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

SD = f"{ENCODER}.params={{channels: 48, norm_groups: 16, latent_dim: 24, image_size: 64}}"
LITE = f"{ENCODER}.params={{scale: S, image_size: 64}}"
LINEAR = (f"{ENCODER}.params.linear=true", f"{DECODER}.params.linear=true")

NETWORKS = {
    "litevae": (),
    "sd": (f"{ENCODER}.target=olvae.modules.sdvae.SDEncoder", SD),
}
"""The two encoders, each with a grid of learning rates."""

VARIANTS = {
    "sd_free": ("sd", (f"{ENCODER}.target=study.encoders.UnnormalizedSDEncoder", SD)),
    "litevae_norm": ("litevae", (f"{ENCODER}.target=study.encoders.NormalizedLiteVAE", LITE)),
    "litevae_shuffle": ("litevae", (f"{ENCODER}.target=study.encoders.ShuffledLiteVAE", LITE)),
    "sd_linear": ("sd", (*NETWORKS["sd"], *LINEAR)),
    "litevae_linear": ("litevae", LINEAR),
}
"""What sets the two apart, one at a time: the network with whose rate each trains, and how it differs.

Two seeds each, because what is found is several times what they differ by; one of the linear starts, which begin alike.
"""

LONGER = ("litevae_linear", "sd_linear")
"""Trained for four times the steps too, in bf16, one seed."""

SEEDS = (0, 1, 2)

BASELINE = "litevae_linear_0"
"""The row beside which the linear code and the bicubic round trip are evaluated, at all sizes."""


def rows(quick: bool = False) -> list[Row]:
    """All rows, in an order in which each comes after those that it needs.

    Args:
        quick: an eighth of the steps, one seed, two rates.
    """
    factor, seeds = (8, SEEDS[:1]) if quick else (1, SEEDS)
    found = [*_grid(quick), *_encoders(seeds), *_objectives(seeds), *_latents(), *_scales()]
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
    variants = [
        _variant(name, seed, *VARIANTS[name]) for name in VARIANTS for seed in seeds[: 1 if "linear" in name else 2]
    ]
    equal_time = [
        Row(f"litevae_time_{seed}", "encoder", NETWORKS["litevae"], seed=seed, time_of="sd") for seed in seeds
    ]
    longer = [
        _variant(f"{name}_longer", seeds[0], *VARIANTS[name])._replace(steps=6000, precision="bf16") for name in LONGER
    ]
    return equal_steps + variants + equal_time + longer


def _variant(name: str, seed: int, network: str, overrides: tuple[str, ...]) -> Row:
    row = Row(f"{name}_{seed}", "encoder", overrides, seed=seed, rate_of=network)
    return row._replace(sizes=ALL_SIZES) if row.name == BASELINE else row


def _objectives(seeds: Sequence[int]) -> list[Row]:
    return [Row(f"no_wavelet_{seed}", "objective", (f"{LOSS}.wavelet_weight=0",), seed=seed) for seed in seeds]


def _latents() -> list[Row]:
    equivariance = "model.params.parts.equivariance.target=olvae.models.parts.equivariance.Equivariance"
    return [
        Row("kl_x10", "diffusion", (f"{LOSS}.kl_weight=0.1",)),
        Row("equivariance", "diffusion", (equivariance,)),
    ]


def _scales() -> list[Row]:
    return [Row("group_norm", "scale", (f"{DECODER}.params.variant=group_norm",), sizes=ALL_SIZES)]
