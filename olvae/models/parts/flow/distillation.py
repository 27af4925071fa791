"""Distillation of a decoder that generates: several steps of a frozen copy become one."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.models.parts.flow.flow_matching import cannot_generate, generating
from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.modules.base import GeneratingDecoder, check_counts, check_not_negative
from olvae.modules.mixed_precision import upcast


class Distillation(Part):
    """Teach a decoder that generates to reach in one step what its copy reaches in several.

    As in SSDD (Vallaeys et al. 2025, arXiv 2510.04961). The copy is frozen: the decoder as it is
    before the first step, with averaged weights if it starts from a run that has them. For random
    noise the copy takes ``steps`` Euler steps from noise to image. The loss ``distil`` is the mean
    squared difference of the decoder's own picture, one step from the same noise, in units of
    ``noise_std``.

    Args:
        steps: of the copy, 2 or more.
        weight: of the loss, not negative.
    """

    def __init__(self, steps: int = 4, weight: float = 0.2) -> None:
        super().__init__()
        check_counts(2, steps=steps)
        check_not_negative(weight=weight)
        self.steps = steps
        self.weight = weight

    def attach(self, model: Model) -> None:
        """Copy the decoder, so that checkpoints hold the copy; `prepare` fills it in."""
        if isinstance(model.decoder, GeneratingDecoder):
            self.teacher = copy.deepcopy(model.decoder).requires_grad_(False)

    def conflicts(self, model: Model) -> Iterable[str]:
        return cannot_generate(model, self.name)

    def prepare(self, model: Model, source: Source, seed: int, device: torch.device) -> None:
        """Copy the weights that the run starts from; ConfigError if noise means nothing to them."""
        if not generating(model).sees_noise:
            raise ConfigError(
                f"model.params.parts.{self.name}: the decoder has not learned to undo noise: start "
                "from a run with FlowMatching, as finetune/one_step has (`start_from`)"
            )
        self.teacher.load_state_dict(model.decoder.state_dict())

    def train(self, mode: bool = True) -> "Distillation":
        """Keep the copy in evaluation mode, without dropout."""
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        decoder = generating(model)
        z = model.autoencoder.decoder_input(step.latent)
        noise = torch.randn_like(step.target)
        with torch.no_grad():
            wanted = self.teacher.sample(z, noise, self.steps)
        picture = self.picture(decoder, z, noise)
        error = ((picture - wanted) / decoder.noise_std).square().mean()
        return {"distil": (error, self.weight)}

    def picture(self, decoder: GeneratingDecoder, z: Tensor, noise: Tensor) -> Tensor:
        """Return the decoder's picture, one step from this noise: (B, C, H, W) in float32."""
        start = decoder.start(z, noise).detach()
        ones = torch.ones(len(z), device=z.device)
        return upcast(decoder(z, start, ones))

    def describe(self) -> str:
        return f"{self.steps} steps of a frozen copy to one, weight {self.weight:g}"
