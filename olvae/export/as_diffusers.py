"""LiteVAE as a model of diffusers, for its pipelines in place of AutoencoderKL."""

import logging
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    DecoderOutput,
    DiagonalGaussianDistribution,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from olvae.checkpoint import add_sums, check_file
from olvae.data.pixels.size_and_range import PixelRange
from olvae.library_internals import is_hooked_by_diffusers
from olvae.models.autoencoder import LiteVAE
from olvae.models.large.tiling import crop_to, default_memory, pad_to_multiple
from olvae.models.spec import (
    DERIVED,
    FOR_DIFFUSION,
    IN_EXPORT,
    WEIGHTS_NAME,
    AutoencoderSpec,
    class_in,
)
from olvae.models.target_names import SHIPPED, shipped_folder
from olvae.models.weight_files import LOADER, LOADER_NAME, WEIGHTS_INDEX
from olvae.runs import Run, find_run


def _of_something(record: logging.LogRecord) -> bool:
    # diffusers 0.42 warns whenever a model is cast, also of an empty list.
    return "should be kept in float32: []" not in record.getMessage()


class AutoencoderLiteVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A LiteVAE with the interface of diffusers' ``AutoencoderKL``.

    ``from_pretrained`` and ``save_pretrained`` are diffusers' own, for the folders that ``olvae
    export`` writes. As in AutoencoderKL, ``encode`` and ``decode`` work on the model's own latents;
    pipelines and trainers apply ``config.scaling_factor`` and ``config.shift_factor``:
    (z - shift_factor) * scaling_factor. ``enable_slicing`` lets a batch take the memory of one
    image, with the same result.

    Arguments up to ``force_upcast`` are fields of :class:`AutoencoderSpec`, with networks of this
    package only, because a config may come from the hub. The others are for pipelines, and follow
    from these: ValueError if they do not.
    """

    _supports_gradient_checkpointing = True
    # Blocks whose output is added to their input: device_map="auto" keeps each on one device.
    _no_split_modules = ("PostActivationBlock", "PreActivationBlock", "SMCBlock", "ResnetBlock2D")

    @register_to_config  # type: ignore[misc, unused-ignore]
    def __init__(
        self,
        encoder_config: dict[str, Any],
        decoder_config: dict[str, Any],
        embed_dim: int,
        use_quant: bool = False,
        folded: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        force_upcast: bool = False,
        block_out_channels: list[int] | None = None,
        in_channels: int | None = None,
        latent_channels: int | None = None,
        out_channels: int | None = None,
        sample_size: int | None = None,
        use_post_quant_conv: bool | None = None,
        use_quant_conv: bool | None = None,
        pixel_range: dict[str, Any] | None = None,
        auto_map: dict[str, str] | None = None,
    ) -> None:
        super().__init__()

        # The networks, from the arguments as diffusers has registered them.
        given = {name: self.config[name] for name in (*IN_EXPORT, *DERIVED) if name in self.config}
        spec = AutoencoderSpec.from_content(given, type(self).__name__, only_ours=True)
        built = LiteVAE.from_spec(spec)
        self.encoder = built.encoder
        self.decoder = built.decoder
        self.quantizer = built.quantizer
        self.use_slicing = False
        self.use_tiling = False
        self.tiling_memory: int | None = None

        # What pipelines read: it may be left out, but must not contradict the networks.
        follows = {name: value for name, value in built.export_config().items() if name in DERIVED}
        for name, expected in follows.items():
            value = given[name]
            if isinstance(value, tuple):
                value = list(value)
            if value is not None and value != expected:
                raise ValueError(
                    f"{name} is {value}, but for these networks it is {expected}: leave it out"
                )
        self.register_to_config(**follows)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> "AutoencoderLiteVAE":
        """Load an export as diffusers does: a folder, ``olvae:NAME``, or an id of the hub."""
        # A run or a checkpoint has no config.json: say what to name in place of it.
        given = str(pretrained_model_name_or_path)
        run = Run(Path(given if Path(given).is_dir() else find_run(given)))
        if Path(given).is_file() or run.newest_checkpoint.is_file():
            raise ValueError(
                f"{given}: diffusers loads exports: name the folder that olvae export writes of it"
            )

        # An export may be for another class, and its weights may be damaged.
        folder = pretrained_model_name_or_path
        if given.startswith(SHIPPED):
            folder = shipped_folder(given)
        inside = Path(folder, kwargs.get("subfolder") or "")
        name = class_in(inside)
        if name not in (None, AutoencoderLiteVAE.__name__, cls.__name__):
            raise ValueError(
                f"{given}: an export for diffusers' {name}: load it with "
                f"diffusers.{name}.from_pretrained"
            )
        for file in inside.glob("*.safetensors"):
            check_file(file)
        return super().from_pretrained(folder, **kwargs)  # type: ignore[no-any-return]

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: object = None) -> None:
        """Compute activations again in backward, in training mode, which saves memory.

        ValueError for a function: the networks take torch's own.
        """
        if gradient_checkpointing_func is not None:
            raise ValueError("gradient_checkpointing_func: the networks take torch's own: leave it")
        for network in (self.encoder, self.decoder):
            network.checkpoint_steps(True)

    def disable_gradient_checkpointing(self) -> None:
        for network in (self.encoder, self.decoder):
            network.checkpoint_steps(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "checkpoint", False) for module in self.modules())

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save as diffusers does, with checksums in the weights, and the file for AutoModel."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if Path(save_directory, WEIGHTS_NAME).is_file():
            # The index of weights that were saved here before in several files.
            Path(save_directory, WEIGHTS_INDEX).unlink(missing_ok=True)
        add_sums(Path(save_directory))
        (Path(save_directory) / LOADER_NAME).write_text(LOADER, encoding="utf-8")

    def to(self, *args: Any, **kwargs: Any) -> "AutoencoderLiteVAE":
        """Move and cast, without diffusers' warning of modules in float32: there are none."""
        logger = logging.getLogger(ModelMixin.__module__)
        logger.addFilter(_of_something)
        try:
            return super().to(*args, **kwargs)  # type: ignore[misc, no-any-return]
        finally:
            logger.removeFilter(_of_something)

    @classmethod
    def from_autoencoder(cls, autoencoder: LiteVAE) -> "AutoencoderLiteVAE":
        """Wrap an autoencoder; the two share the weights."""
        config = autoencoder.export_config()
        model = cls(**{name: value for name, value in config.items() if not name.startswith("_")})
        model.encoder = autoencoder.encoder
        model.decoder = autoencoder.decoder
        model.quantizer = autoencoder.quantizer
        model.training = autoencoder.training
        return model  # type: ignore[no-any-return]

    @property
    def autoencoder(self) -> LiteVAE:
        """Return the plain module over the same weights."""
        plain = LiteVAE(self.encoder, self.decoder, self.quantizer)
        plain.folded = self.config["folded"]
        plain.pixel_range = PixelRange.from_node(self.config.get("pixel_range"), "pixel_range")
        plain.pixel_range.check_channels(plain.in_channels, "pixel_range")
        plain.set_for_diffusion({name: self.config[name] for name in FOR_DIFFUSION})
        plain.training = self.training  # its halves, which are this module's own, keep theirs
        return plain

    @property
    def post_quant_conv(self) -> nn.Module:
        """The module that latents enter; with ``force_upcast``, pipelines read its dtype."""
        return self.decoder if self.quantizer is None else self.quantizer.post_quant_conv

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode (B, C, H, W) in [-1, 1] to ``latent_dist``, over (B, n_z, ceil(H/f), ceil(W/f)).

        Images are padded to multiples of f by :func:`pad_to_multiple`; decoding returns the padded
        size.
        """
        model = self.autoencoder
        padded = pad_to_multiple(x, model.downscale)
        moments = self._run(model.moments, model.moments_within, padded)
        posterior = DiagonalGaussianDistribution(moments)
        if return_dict:
            return AutoencoderKLOutput(latent_dist=posterior)
        return (posterior,)

    @apply_forward_hook
    def decode(  # pipelines pass a generator; nothing here is random
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode (B, n_z, h, w) to ``sample``, (B, C, f h, f w), around [-1, 1], not clamped.

        With a decoder at 2x, f is twice the encoder's.
        """
        model = self.autoencoder
        x = self._run(model.decode, lambda z, memory: model.decode_tiled(z, memory=memory), z)
        if return_dict:
            return DecoderOutput(sample=x)
        return (x,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        run: Callable[[Tensor], Tensor] | None = None,
    ) -> DecoderOutput | tuple[Tensor] | Tensor:
        """Reconstruct (B, C, H, W) from the posterior's mode or from a sample.

        The result has its size, or a decoder's at 2x twice that. With ``run``, return its result:
        so hooks around this method are around ``encode`` and ``decode`` too.
        """
        if run is not None:
            return run(sample)
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        by = self.decoder.enlarge_by
        size = (by * sample.shape[-2], by * sample.shape[-1])
        x = crop_to(self.decode(z, return_dict=False)[0], size)
        if return_dict:
            return DecoderOutput(sample=x)
        return (x,)

    def enable_tiling(self, memory: int | None = None) -> None:
        """Encode and decode large images within a memory limit; the result is the same to rounding.

        See :meth:`LiteVAE.decode_tiled` and :meth:`LiteVAE.moments_within`. With gradients, of the
        input or in training mode, everything is computed whole. ``memory`` is in bytes beside
        images and weights; by default half of a GPU's free memory, on the CPU 1 GiB. Encoding and
        decoding raise ValueError if it is too small, or a network can't be tiled, such as Stable
        Diffusion's.
        """
        if memory is not None and memory <= 0:
            raise ValueError(f"memory is a number of bytes, at least 1, got {memory}")
        self.use_tiling = True
        self.tiling_memory = memory

    def _run(
        self, whole: Callable[[Tensor], Tensor], within: Callable[[Tensor, int], Tensor], x: Tensor
    ) -> Tensor:
        """Compute ``whole(x)``, image by image and within the memory, if that is enabled."""
        # diffusers' offloading in groups brings the weights for ``forward``.
        model: Any = self
        if is_hooked_by_diffusers(model):
            out: Tensor = model(x, run=partial(self._within, whole, within))
            return out
        return self._within(whole, within, x)

    def _within(
        self, whole: Callable[[Tensor], Tensor], within: Callable[[Tensor, int], Tensor], x: Tensor
    ) -> Tensor:
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._within(whole, within, one) for one in x.split(1)])
        trains = self.training or self.encoder.training or self.decoder.training
        gradients = torch.is_grad_enabled() and (trains or x.requires_grad)
        if not self.use_tiling or gradients:
            return whole(x)
        memory = self.tiling_memory
        if memory is None:
            memory = default_memory(x.device)
        return within(x, memory)
