"""Shared low-pass: the same high frequencies are taken from the latent and from the target."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.losses.cosine_transform import low_pass
from olvae.models.parts.part import Model, Part, Step, nothing_decoded
from olvae.modules.base import check_counts
from olvae.modules.mixed_precision import upcast, without_tf32


class SharedLowPass(Part):
    """Decode a latent without its high frequencies to an image without the same ones.

    Ning et al. 2026 (arXiv 2603.14645), decoding spectrum matching: a latent's frequencies then
    mean the image's. Latent and target are cut into blocks of 8 x 8 positions and pixels, and lose
    the coefficients of the cosine transform at u + v >= 15 - cut. A cut is drawn for each update,
    the same in all processes; 0 keeps all of them. The paper uses it in place of KL.

    Args:
        cuts: drawn with equal chance [D]; the paper's are 0, 8, 10 and 12.
        block: side of a block; with another than 8, those at u + v >= 2 block - 1 - cut are lost.
        adversary: whether the adversary plays on steps with a cut, where the target's blocks have
            edges that no image has [D].
    """

    def __init__(
        self, cuts: Sequence[int] = (0, 8, 10, 12), block: int = 8, adversary: bool = False
    ) -> None:
        super().__init__()
        check_counts(2, block=block)
        check_counts(0, cuts=cuts)
        most = 2 * block - 2
        if max(cuts) > most or not any(cuts):
            raise ValueError(f"cuts must be from 0 to {most}, and not all 0, got {list(cuts)}")
        self.cuts = list(cuts)
        self.block = block
        self.adversary = adversary

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        yield from nothing_decoded(self, model)
        if model.adversary is not None and not self.adversary and 0 not in self.cuts:
            yield (
                f"{here}.params.cuts: every step has a cut, so the adversary never plays: add 0, "
                "or set adversary to true"
            )
        for part in model.each_part:
            if part.moves_latents:
                yield (
                    f"{here}: parts.{part.name} makes latents of other sides, which are no "
                    "blocks: leave one of them out"
                )

    def check(self, model: Model, source: Source) -> None:
        """Raise ConfigError unless latents are divided into blocks; then images are as well."""
        positions = source.size // model.autoencoder.upscale
        if not positions.fits(self.block):
            raise ConfigError(
                f"model.params.parts.{self.name}.params.block: {self.block} does not divide "
                f"{positions.short} latent positions: change it, or data.params.size"
            )

    def on_latent(self, model: Model, step: Step) -> None:
        cut = self.cuts[step.rng.integers(len(self.cuts))]
        if step.warming_up or cut == 0:
            return
        step.latent = self(step.latent, cut)
        step.target = self(step.target, cut)
        step.adversary_plays &= self.adversary

    def forward(self, x: Tensor, cut: int) -> Tensor:
        """Return latents or images (B, C, h, w) without what a cut removes, in float32."""
        x = upcast(x)
        keep = 2 * self.block - 1 - cut
        return low_pass(without_tf32(x), keep, self.block).to(x.dtype)

    def describe(self) -> str:
        return f"cuts {', '.join(map(str, self.cuts))} of blocks of {self.block}"
