"""Find settings of a LiteAutoencoderKL that are out of range or contradict each other."""

from collections.abc import Iterator

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.files import counted
from olvae.models.parts.part import Model
from olvae.models.spec import check_factors
from olvae.models.updates.optimizers import OPTIMIZERS


def find_conflicts(model: Model) -> Iterator[str]:
    """One line for each setting that is out of range, or contradicts another one or a part."""
    yield from _out_of_range(model)

    # Halves: something must be left to train.
    parameters = [p for p in model.encoder.parameters() if p.requires_grad]
    if model.quantizer is None and not model.freeze_encoder and not parameters:
        yield f"freeze_encoder: {type(model.encoder).__name__} has nothing to train: set it to true"
    if model.checkpoint in model.frozen_halves:
        yield (
            f"checkpoint: the {model.checkpoint} is frozen, so it needs nothing for a backward "
            "pass: leave it out"
        )
    if model.freeze_encoder and model.freeze_decoder:
        yield "freeze_encoder, freeze_decoder: nothing is left to train"

    # KL trains the encoder's distribution.
    if "kl" in model.loss_weights and model.encoder.deterministic:
        yield (
            "lossconfig.params.kl_weight: the encoder's latents have no distribution: set it to 0"
        )
    elif "kl" in model.loss_weights and model.freeze_encoder:
        yield (
            "lossconfig.params.kl_weight: the encoder is frozen (freeze_encoder, the default of "
            "`start_from`), so KL has nothing to train: set it to 0, or freeze_encoder to false to "
            "train both halves"
        )

    # Factors for a diffusion model, the adversary, and the parts.
    if model.given_factors or model.parts:
        yield from check_factors(model.for_diffusion, model.autoencoder.latent_channels)
    if model.adversary is not None and model.freeze_decoder:
        yield (
            "adversary_config: the decoder is frozen (freeze_decoder), so an adversary has nothing "
            "to train"
        )
    for part in model.each_part:
        yield from part.conflicts(model)


def _out_of_range(model: Model) -> Iterator[str]:
    """One line for each setting with an impossible value."""
    if model.accumulate_grad_batches < 1:
        yield f"accumulate_grad_batches must be at least 1, got {model.accumulate_grad_batches}"
    possible = {"scheduler": ("constant", "cosine"), "optimizer": tuple(OPTIMIZERS)}
    for name, choices in possible.items():
        value = getattr(model, name)
        if value not in choices:
            yield f"{name} must be {' or '.join(choices)}, got {value!r}"
    for name in ("min_lr_factor", "ema_decay"):
        value = getattr(model, name)
        if not 0 <= value <= 1:
            yield f"{name} must be between 0 and 1, got {value}"
    decay_steps = model.decay_steps
    if model.scheduler != "cosine" or decay_steps is None:
        return
    if decay_steps <= model.warmup_steps:
        yield (
            f"decay_steps must be more than warmup_steps, {model.warmup_steps}, got {decay_steps}"
        )


def check_source(model: Model, source: Source) -> None:
    """Raise ConfigError if a source's images do not fit the model in size or channels."""
    vae = model.autoencoder
    factor = vae.upscale
    if not source.size.fits(factor):
        sizes = " or ".join(str(size.node) for size in source.size.multiples(factor))
        times = "" if vae.enlarge == 1 else f" times {vae.enlarge} for its larger images"
        raise ConfigError(
            f"data.params.size: {source.size.node} is not a multiple of {factor}, the model's "
            f"downscaling factor{times}: use {sizes}"
        )
    if vae.side is not None and source.size != (vae.side, vae.side):
        raise ConfigError(
            f"data.params.size: {source.size.node}, but the encoder takes images of {vae.side} "
            "pixels a side only: set it to that"
        )
    channels = model.encoder.in_channels
    if source.channels != channels:
        raise ConfigError(
            f"the images have {counted(source.channels, 'channel')}, the model takes {channels}: "
            "set data.params.channels, or in_channels of encoder_config.params and out_channels of "
            "decoder_config.params"
        )
    if model.stand_in is None and source.latent_stats:
        raise ConfigError("data: it has the latents of a teacher, but there is none: set `teacher`")
    if vae.enlarge > 1 and source.latent_stats:
        raise ConfigError(
            "data: its latents are of these images, and this decoder needs latents of images "
            f"{vae.enlarge} times smaller (decoder_config.params.enlarge): train on the images "
            "alone, as with data.target olvae.data.picture_folder.FolderSource"
        )
