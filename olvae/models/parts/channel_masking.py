"""Channel masking: one model whose first channels are a latent of their own, as in DC-AE 1.5."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from olvae.metrics.metric import psnr
from olvae.models.parts.part import Model, Part, Step
from olvae.modules.base import check_counts


class ChannelMasking(Part):
    """Keep a random number of the latent's first channels, and decode the others as zeros.

    DC-AE 1.5 (Chen et al. 2025, arXiv 2508.00413): the first channels learn the structure, the
    others details. A decoder then takes any of these widths. Validation logs the PSNR of each as
    ``val/psnr_WIDTH``.

    With ``at_once`` 2 or more each sample is decoded with as many widths in a step, always with the
    largest, as in DC-AE 1.5's trainer (DC-Gen, 562077c): so the whole latent learns in every step.
    Terms of the images, and the adversary's, are means over widths. Decoding costs as many times
    as much time and memory.

    Args:
        widths: numbers of channels to keep, drawn uniformly for each sample.
        at_once: how many different widths of a sample are decoded in a step.
    """

    def __init__(self, widths: Sequence[int], at_once: int = 1) -> None:
        super().__init__()
        check_counts(1, at_once=at_once)
        if not widths or min(widths) < 1 or len(set(widths)) < len(widths):
            raise ValueError(
                f"widths must be different numbers of channels, at least 1, got {list(widths)}"
            )
        if at_once > len(widths):
            raise ValueError(f"at_once must be at most the {len(widths)} widths, got {at_once}")
        self.widths = sorted(widths)
        self.at_once = at_once

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        channels = model.autoencoder.latent_channels
        if self.widths[-1] > channels:
            yield f"{here}.params.widths: the latent has {channels} channels, not {self.widths[-1]}"
        later = model.each_part[model.each_part.index(self) + 1 :]
        noise = [part.name for part in later if part.adds_noise]
        if noise:
            yield f"{here}: its channels have to stay zero: put it after parts.{noise[0]}"
        if model.freeze_decoder:
            yield f"{here}: the decoder is frozen (freeze_decoder): leave it out"
        if model.freeze_encoder or any(part.latents != "free" for part in model.each_part):
            yield (
                f"{here}: the latents can't change, so their first channels can't learn to "
                "suffice: leave it out"
            )

    def on_latent(self, model: Model, step: Step) -> None:
        z = step.latent
        # The widths of each sample by their indices, (B, at_once): the largest is the last.
        if self.at_once == 1:
            chosen = torch.randint(len(self.widths), (len(z), 1), device=z.device)
        else:
            smaller = torch.rand(len(z), len(self.widths) - 1, device=z.device).argsort(1)
            largest = smaller.new_full((len(z), 1), len(self.widths) - 1)
            chosen = torch.cat((largest, smaller[:, : self.at_once - 1]), dim=1)

        # From them masks, (at_once B, n_z, 1, 1): all samples with their first width, and so on.
        chosen = chosen.T.reshape(-1, 1, 1, 1)
        kept = torch.zeros(len(chosen), z.shape[1], 1, 1, dtype=torch.bool, device=z.device)
        for i, width in enumerate(self.widths):
            kept |= (chosen == i) & _first(width, z)
        if self.at_once > 1:
            z = z.repeat(self.at_once, 1, 1, 1)
            step.target = step.target.repeat(self.at_once, 1, 1, 1)
        step.latent = z * kept

    def validate(self, model: Model, x: Tensor, moments: Tensor | None) -> Mapping[str, Tensor]:
        z = model.encode(x).mode()
        levels = model.pixel_range.to_levels
        values = {}
        for width in self.widths:
            y = levels(model.autoencoder.shrink(model.decode(z * _first(width, z))))
            # Clamped, because the mean over images would be infinite for one equal image.
            values[f"psnr_{width}"] = psnr(levels(x), y).clamp(max=100.0).mean()
        return values

    def describe(self) -> str:
        widths = f"{', '.join(map(str, self.widths))} channels"
        return widths if self.at_once == 1 else f"{widths}, {self.at_once} at once"


def _first(width: int, z: Tensor) -> Tensor:
    """Return a mask of the first channels, (1, n_z, 1, 1)."""
    return torch.arange(z.shape[1], device=z.device).view(1, -1, 1, 1) < width
