"""Flow matching: train a decoder that generates to undo noise at every time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.modules.base import GeneratingDecoder, check_not_negative
from olvae.modules.distributions import draws_by_image
from olvae.modules.mixed_precision import upcast

# The earliest time: towards 0 the velocity is a difference of nearly equal numbers.
FIRST_T = 0.01

# Times of each image in validation, spread evenly.
TIMES = 4


class FlowMatching(Part):
    """Teach a decoder that generates the velocity from image to noise, beside the image losses.

    Flow matching as in DiTo (Chen et al. 2025, arXiv 2501.18593) and SSDD (Vallaeys et al. 2025,
    arXiv 2510.04961): for a random time t, uniform in (0, 1], and random noise, the decoder sees
    x_t = (1 - t) x + t x_1 and the latent. The loss ``flow`` is the mean squared error of its
    velocity, whose target is x_1 - x, in units of ``noise_std``. The objective's terms see
    ``decode``, one step from the decoder's own noise. Validation logs ``val/flow``.

    Args:
        weight: of the loss, not negative.
    """

    def __init__(self, weight: float = 0.05) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        self.weight = weight

    def conflicts(self, model: Model) -> Iterable[str]:
        return cannot_generate(model, self.name)

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        z = model.autoencoder.decoder_input(step.latent)
        t = 1 - (1 - FIRST_T) * torch.rand(len(z), device=z.device)
        noise = torch.randn_like(step.target)
        error = flow_error(generating(model), z, step.target, noise, t)
        return {"flow": (error.mean(), self.weight)}

    def validate(self, model: Model, x: Tensor, moments: Tensor | None) -> Mapping[str, Tensor]:
        z = model.autoencoder.decoder_input(model.encode(x).mode())

        # Each image's noise is its own, the same in any batch and process.
        start, noise = draws_by_image(x, x.shape[1:])

        total = torch.zeros((), device=z.device)
        for time in range(TIMES):
            t = 1 - (1 - FIRST_T) * ((start + time / TIMES) % 1)
            total = total + flow_error(generating(model), z, x, noise, t).mean() / TIMES
        return {"flow": total}

    def describe(self) -> str:
        return f"weight {self.weight:g}"


def flow_error(
    decoder: GeneratingDecoder, z: Tensor, x: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Mean squared error of the decoder's velocity for each image, (B,), in units of noise_std.

    Images x and noise are (B, C, H, W), times t are (B,). The latent z gets gradients as the
    network's input alone: the line that is learned is a constant.
    """
    at = t[:, None, None, None]
    start = decoder.start(z, noise).detach()
    noised = (1 - at) * x + at * start
    difference = upcast(decoder.velocity(z, noised, t)) - (start - x)
    return (difference / decoder.noise_std).square().flatten(1).mean(1)


def generating(model: Model) -> GeneratingDecoder:
    """Return the model's decoder, which :func:`cannot_generate` has found to generate."""
    assert isinstance(model.decoder, GeneratingDecoder)
    return model.decoder


def cannot_generate(model: Model, name: str) -> Iterable[str]:
    """Yield a line for each reason why a part of this name can't train a decoder to generate."""
    if model.freeze_decoder:
        yield f"parts.{name}: the decoder is frozen (freeze_decoder): leave it out"
    if not isinstance(model.decoder, GeneratingDecoder):
        kind = type(model.decoder).__name__
        yield (
            f"parts.{name}: {kind} takes no noise; only LiteVAE_Decoder can be extended: set "
            "decoder_config.target to olvae.modules.litevae.one_step.OneStepDecoder"
        )
