"""Masking of the latent: blocks of it are replaced by a token that learns, as in SSVAE."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.models.parts.part import Model, Part, Step
from olvae.modules.base import check_counts
from olvae.modules.mixed_precision import upcast


class LatentMasking(Part):
    """Replace blocks of the latent by a learned token, and decode the whole image.

    Liu et al. 2025 (SSVAE, arXiv 2512.05394), latent masked reconstruction: the decoder learns to
    guess what is missing, so that few directions of the channels suffice, and errors of a diffusion
    model are forgiven. The share of blocks is drawn for each update, the same in all processes;
    which blocks, for each image. In the published code (93851d3), whose defaults these are, a batch
    shares its blocks [D].

    The token has a number for each channel, is trained with the autoencoder, and starts as a sample
    of N(0, I). Checkpoints have it, exports do not.

    Args:
        ratios: shares of blocks, from 0 to 1.
        probabilities: of each ratio; they sum to 1.
        block: side of a block, in positions; the code has 1 at 256 pixels and 2 at 512.
    """

    # The token is put into every channel, as noise is.
    adds_noise = True

    def __init__(
        self,
        ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
        probabilities: Sequence[float] = (0.7, 0.1, 0.1, 0.1),
        block: int = 1,
    ) -> None:
        super().__init__()
        check_counts(1, block=block)
        if not ratios or not 0 <= min(ratios) <= max(ratios) <= 1 or not any(ratios):
            raise ValueError(f"ratios must be from 0 to 1, and not all 0, got {list(ratios)}")
        if len(probabilities) != len(ratios):
            raise ValueError(
                f"probabilities must be as many as ratios, {len(ratios)}, got {len(probabilities)}"
            )
        if min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
            raise ValueError(f"probabilities must sum to 1, got {list(probabilities)}")
        self.ratios = list(ratios)
        self.probabilities = [p / sum(probabilities) for p in probabilities]
        self.block = block

    def attach(self, model: Model) -> None:
        self.token = nn.Parameter(torch.randn(1, model.autoencoder.latent_channels, 1, 1))

    def conflicts(self, model: Model) -> Iterable[str]:
        if model.freeze_decoder:
            yield f"parts.{self.name}: the decoder is frozen (freeze_decoder): leave it out"

    def check(self, model: Model, source: Source) -> None:
        positions = source.size // model.autoencoder.upscale
        if min(positions) < self.block:
            raise ConfigError(
                f"model.params.parts.{self.name}.params.block: {positions.short} latent positions "
                f"are less than a block of {self.block}: change it, or data.params.size"
            )

    def on_latent(self, model: Model, step: Step) -> None:
        ratio = float(step.rng.choice(self.ratios, p=self.probabilities))
        if not step.warming_up:
            step.latent = self(step.latent, ratio)

    def forward(self, z: Tensor, ratio: float) -> Tensor:
        """Replace a share of the blocks of each latent, (B, n_z, h, w) -> the same, in float32.

        The token has a gradient, of 0, even if nothing is replaced: so each process has one in each
        step. Positions beyond the last whole block stay.
        """
        height, width = z.shape[-2:]
        rows = height // self.block
        columns = width // self.block

        # The blocks with the smallest random numbers.
        order = torch.rand(len(z), rows * columns, device=z.device).argsort(1).argsort(1)
        chosen = order < round(ratio * rows * columns)
        mask = chosen.view(len(z), 1, rows, columns)
        mask = mask.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)
        mask = F.pad(mask, (0, width - mask.shape[3], 0, height - mask.shape[2]))  # (B, 1, h, w)
        return torch.where(mask, self.token, upcast(z))

    def describe(self) -> str:
        shares = ", ".join(f"{ratio:.0%}" for ratio in self.ratios)
        return f"{shares} of blocks of {self.block}"
