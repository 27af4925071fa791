"""Add baselines to an evaluation: linear code, bicubic resampling, the first target untrained."""

import logging
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from olvae.config.reading import is_local
from olvae.data.image import image_to_tensor, tensor_to_picture
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, from_uint8, to_uint8
from olvae.data.shards.shard_source import ShardSource
from olvae.evaluation.observers.observer import UNTRAINED, Observer, Subject
from olvae.evaluation.round_trip import open_images_for
from olvae.files import first_line
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.linear_code import (
    LARGEST_PATCH,
    LinearDecoder,
    LinearEncoder,
    crops_and_means,
    fit_linear_paths,
)
from olvae.models.loading.loader import Target
from olvae.modules.distributions import Deterministic
from olvae.runs import settings_of

log = logging.getLogger("olvae")


class Bicubic(Autoencoder):
    """Shrink images by a factor and enlarge them again, both with Pillow's antialiased bicubic."""

    def __init__(
        self, factor: int, channels: int = 3, pixel_range: PixelRange = EIGHT_BITS
    ) -> None:
        super().__init__()
        self.pixel_range = pixel_range
        self.downscale = factor
        self.in_channels = self.latent_channels = channels

    def encode(self, x: Tensor) -> Deterministic:
        f = self.downscale
        return Deterministic(self._resized(x, x.shape[-1] // f, x.shape[-2] // f))

    def decode(self, z: Tensor) -> Tensor:
        f = self.downscale
        return self._resized(z, z.shape[-1] * f, z.shape[-2] * f)

    def _resized(self, images: Tensor, width: int, height: int) -> Tensor:
        """Resize float images in [-1, 1] as Pillow's pictures, of 8 bits if the range is."""
        rounds = self.pixel_range.eight_bits
        if rounds:
            images = to_uint8(images)
        resized = []
        for image in images.cpu():
            picture = tensor_to_picture(image)
            resized.append(
                image_to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))
            )
        batch = torch.stack(resized).to(images.device)
        return from_uint8(batch) if rounds else batch


class Baselines(Observer):
    """Add rows for the linear code of the target's shape, bicubic resampling, and no training.

    Networks with linear paths have no row "untrained": before training they are the linear code.

    Args:
        target: the evaluation's first.
        fit: the SRC to fit the linear code on; by default the training images of the target's
            config.
    """

    def __init__(self, target: Target, fit: str | None = None) -> None:
        self._target = target
        self._fit = fit

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        untrained = self._target.untrained()
        f = untrained.upscale
        rows: dict[str, Autoencoder] = {}
        code = self._linear_code(untrained)
        if code is not None:
            rows[f"linear, {untrained.latent_channels} numbers for {f}x{f} pixels"] = code
        rows[f"bicubic, {f}x smaller and back"] = Bicubic(
            f, untrained.in_channels, untrained.pixel_range
        )
        if not (
            isinstance(untrained, LiteVAE)
            and (untrained.encoder.linear or untrained.decoder.linear)
        ):
            rows[UNTRAINED] = untrained
        baselines = {name: Subject(model, baseline=True) for name, model in rows.items()}
        return {**subjects, **baselines}

    def _linear_code(self, like: Autoencoder) -> LiteVAE | None:
        """Fit the linear code of a model's shape on training crops; None, with a warning, without.

        If the images were named by ``fit``, their errors are raised.
        """
        channels = like.in_channels
        n = like.latent_channels
        f = like.upscale
        if channels * f**2 > LARGEST_PATCH:
            log.warning(
                "the linear code has no row: covariances of patches of %dx%d pixels are too large",
                f,
                f,
            )
            return None

        # Crops of the training images. A source of any kind may fail in many ways.
        try:
            source = open_images_for({"the linear code": like}, self._target.config, self._fit)
            shards = source.train if isinstance(source, ShardSource) else ()
            remote = [shard.url for shard in shards if not is_local(shard.url)]
            if remote and self._fit is None:
                log.warning(
                    "the linear code is fitted on remote training shards (`fit` names others): "
                    "%s, ...",
                    remote[0],
                )
            crops, _ = crops_and_means(source, settings_of(self._target.config).seed, f)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if self._fit is not None:
                raise
            log.warning(
                "the linear code has no row, without the images of the training: %s",
                first_line(error),
            )
            return None

        code = LiteVAE(LinearEncoder(2 * n, channels, f), LinearDecoder(n, channels, f))
        fit_linear_paths(code, crops, pixel_range=source.pixel_range)
        return code.eval()
