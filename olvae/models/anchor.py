"""What keeps a full fine-tune from moving the latents: the encoder that it started from."""

import copy

import torch
from torch import Tensor, nn

from olvae.models.autoencoder import Quantizer
from olvae.modules.distributions import DiagonalGaussian
from olvae.modules.halves import Encoder
from olvae.modules.precision import island

__all__ = ["Anchor"]


class Anchor(nn.Module):
    """A frozen copy of an encoder, and of the 1x1 convolution after it where there is one.

    The copy is part of the module's state, so that a resumed run keeps the latents that it started from.
    """

    def __init__(self, encoder: Encoder, quantizer: Quantizer | None) -> None:
        super().__init__()
        self.moments = nn.Sequential(copy.deepcopy(encoder))
        if quantizer is not None:
            self.moments.append(copy.deepcopy(quantizer.quant_conv))
        self.requires_grad_(False).eval()

    def set(self, encoder: Encoder, quantizer: Quantizer | None) -> None:
        """Take over the weights of an encoder of the same shape."""
        parts: list[nn.Module] = [encoder] if quantizer is None else [encoder, quantizer.quant_conv]
        for mine, theirs in zip(self.moments, parts, strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor, posterior: DiagonalGaussian) -> Tensor:
        """Mean squared distance of the posterior's means from the old ones, for the same images; a scalar."""
        with torch.no_grad():
            old = DiagonalGaussian(self.moments(x))
        return (island(posterior.mean) - island(old.mean)).square().mean()
