"""Arguments of a training that contradict each other: what is frozen, what is learned from whom."""

from collections.abc import Collection, Iterator

from olvae.losses.objective import IMAGE_TERMS
from olvae.models.alignment import Alignment
from olvae.models.teacher import Teacher

__all__ = ["contradictions"]


def contradictions(
    terms: Collection[str],
    teacher: Teacher | None,
    freeze_encoder: bool = False,
    freeze_decoder: bool = False,
    anchored: bool = False,
    adversarial: bool = False,
    equivariance: float = 0.0,
    latent_noise: float = 0.0,
    latent_noise_of: str = "posterior",
    checkpoint: bool | str = False,
    bounded: bool = False,
    compiled: bool = False,
    alignment: Alignment | None = None,
    in_channels: int = 3,
) -> Iterator[str]:
    """One line for each contradiction among the arguments of LiteAutoencoderKL.

    Args:
        terms: of the objective, those whose weight is above 0.
        anchored, adversarial, bounded: whether there is an anchor, an adversary, a bound on activations.
        compiled: whether the networks are compiled.
        in_channels: of the images.
    """
    if latent_noise < 0:
        yield f"latent_noise must not be negative, got {latent_noise}"
    if latent_noise_of not in ("posterior", "data"):
        yield f"latent_noise_of must be posterior or data, got {latent_noise_of!r}"
    if checkpoint not in (True, False, "encoder", "decoder"):
        yield f"checkpoint must be true, false, encoder or decoder, got {checkpoint!r}"
    elif checkpoint and bounded:
        yield "checkpoint, activation_bound: a bound needs the activations that checkpointing drops: leave one out"
    elif (checkpoint == "encoder" and freeze_encoder) or (checkpoint == "decoder" and freeze_decoder):
        yield f"checkpoint: the {checkpoint} is frozen, so nothing of it is kept for a backward pass: leave it out"
    if freeze_encoder and freeze_decoder:
        yield "freeze_encoder, freeze_decoder: nothing is left to train"
    if bounded and compiled:
        yield "compile: activation_bound looks at every activation, which compiled networks do not show: leave one out"

    # A frozen half has no losses.
    if freeze_encoder and "kl" in terms:
        yield "lossconfig.params.kl_weight: the encoder is frozen (freeze_encoder), KL is a loss of it: set it to 0"
    if freeze_encoder and anchored:
        yield "anchor_weight: the encoder is frozen (freeze_encoder), so its latents can't change: leave it out"
    if freeze_decoder and adversarial:
        yield "adversary_config: the decoder is frozen (freeze_decoder), so an adversary has nothing to train"
    if freeze_decoder and ((teacher is not None and equivariance > 0) or latent_noise > 0):
        yield "equivariance, latent_noise: the decoder is frozen (freeze_decoder): leave them out"

    # A vision encoder takes colour images; it shapes the latent, which must be free to follow.
    if alignment is not None:
        if in_channels != 3:
            yield f"alignment_config: a vision encoder takes images of 3 channels, not {in_channels}: leave it out"
        if freeze_encoder or anchored or teacher is not None:
            yield (
                "alignment_config: the latents can't change (freeze_encoder, anchor_weight, teacher_config): leave it "
                "out"
            )
        if alignment.adaptive_weight and not set(IMAGE_TERMS) & set(terms):
            yield (
                "alignment_config.params.adaptive_weight: it needs one of the losses that compare images: set it to "
                "false"
            )

    # The latents of a distillation are the teacher's.
    if teacher is None:
        return
    if "kl" in terms:
        yield "lossconfig.params.kl_weight: the latents have to be the teacher's, KL pulls them away: set it to 0"
    if anchored:
        yield "anchor_weight: the latents have to be the teacher's, not those of the initial weights: leave it out"
    if freeze_encoder and teacher.weights["teacher_decoder"]:
        yield "teacher_config.params.decoder_weight: the encoder is frozen (freeze_encoder): leave it out"
    if not freeze_encoder and not any(teacher.weights.values()):
        yield "teacher_config.params: every weight is 0: nothing teaches the encoder"
    if teacher.model.deterministic and not freeze_encoder and teacher.weights["logvar"]:
        yield "teacher_config.params.logvar_weight: the teacher's latents have no distribution: set it to 0"
    if teacher.model.deterministic and latent_noise > 0 and latent_noise_of == "posterior":
        yield "latent_noise_of: the teacher's latents have no distribution: set it to data"
