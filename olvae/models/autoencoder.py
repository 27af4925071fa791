"""LiteVAE as a plain module, without Lightning: images to a posterior, latents to images."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.checkpoint import load_weights, read_weights
from olvae.config import Config, ConfigError, instantiate
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.files import first_line
from olvae.models.large.streaming import Plane, encode_within
from olvae.models.large.tiling import decode_tiled
from olvae.models.spec import FOR_DIFFUSION, AutoencoderSpec
from olvae.models.weight_files import ONE_KIND, Located, is_export, locate, write_export
from olvae.modules.base import Decoder, Encoder, copy_plain, last_convolution
from olvae.modules.counting import count_parameters
from olvae.modules.distributions import Deterministic, DiagonalGaussian, Posterior
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.mixed_precision import autocast_enabled, keep_in_float32, upcast

if TYPE_CHECKING:
    from olvae.models.on_the_hub import HubExport

Progress = Callable[[float], None]  # called from time to time with the fraction that is done

# Of networks that are built from a file's config; the largest recipe has a tenth.
MAX_PARAMETERS = 10**9


class Autoencoder(nn.Module, ABC):
    """Interface of every autoencoder that the commands take; images are in [-1, 1]."""

    in_channels: int
    downscale: int  # f: pixels of the image per latent position, along each side
    enlarge: int = 1  # pixels of a decoded image per pixel of the encoded one, along each side
    latent_channels: int  # n_z
    deterministic: bool = False  # whether its latents have no distribution
    image_size: int = 256  # the intended side of images, in pixels
    side: int | None = None  # of its images in pixels, if it takes no other

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    """For a diffusion model, whose input is (z - shift_factor) * scaling_factor.

    Encode and decode use neither."""
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    """For a diffusion model whose input is (z - latents_mean) * scaling_factor / latents_std.

    One for each channel, or four, as in FLUX.2: for the positions of a 2x2 patch, row by row."""
    force_upcast: bool = False  # whether pipelines in fp16 should decode in float32
    pixel_range: PixelRange = EIGHT_BITS  # of its images: to [-1, 1] and back to real values
    # False if the file has none of these factors, so that they are a guess.
    factors_known: bool = True

    @property
    def upscale(self) -> int:
        """Pixels of a decoded image per latent position, along each side."""
        return self.downscale * self.enlarge

    def shrink(self, x: Tensor) -> Tensor:
        """Average blocks of pixels: from a decoded image's size to the size that was encoded.

        (B, C, enlarge H, enlarge W) -> (B, C, H, W), the tensor itself if ``enlarge`` is 1. Colours
        of RGBA weigh as much as they are opaque, as when Pillow makes a picture smaller.
        """
        if self.enlarge == 1:
            return x
        small = F.avg_pool2d(x, self.enlarge)
        if not (self.in_channels == 4 and self.pixel_range.eight_bits):
            return small

        # Where all pixels are clear, they weigh alike.
        opaque = ((x[:, 3:] + 1) / 2).clamp(0, 1) + 1e-6
        colours = F.avg_pool2d(x[:, :3] * opaque, self.enlarge)
        colours = colours / F.avg_pool2d(opaque, self.enlarge)
        return torch.cat((colours, small[:, 3:]), dim=1)

    @property
    def for_diffusion(self) -> dict[str, Any]:
        """The settings of :data:`FOR_DIFFUSION` by name."""
        return {name: getattr(self, name) for name in FOR_DIFFUSION}

    def from_diffusion(self, z: Tensor) -> Tensor:
        """Undo the scaling for a diffusion model: latents (B, n_z, h, w) to decode.

        ``z`` has a standard deviation of 1.
        """
        if self.latents_mean is None or self.latents_std is None:
            return z / self.scaling_factor + self.shift_factor

        # Repeat the numbers of a patch's positions, 1x1 or 2x2, over the latent: (n_z, h, w).
        side = 1 if len(self.latents_mean) == z.shape[1] else 2
        rows, columns = (torch.arange(size, device=z.device) % side for size in z.shape[-2:])
        mean, std = (
            z.new_tensor(numbers).view(-1, side, side)[:, rows[:, None], columns]
            for numbers in (self.latents_mean, self.latents_std)
        )
        return z * std / self.scaling_factor + mean

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        """Replace a diffusion model's units, as TAESD's, by latents of this mean and deviation.

        Per channel, (n_z) each. Other autoencoders do nothing.
        """

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents per channel, (n_z) each, by the factors.

        Means over a patch's positions, if these differ.
        """
        n_z = self.latent_channels
        mean = torch.tensor(self.latents_mean or [self.shift_factor] * n_z, dtype=torch.float64)
        std = torch.tensor(self.latents_std or [1.0] * n_z, dtype=torch.float64)
        std = std / self.scaling_factor
        return mean.view(n_z, -1).mean(1), std.view(n_z, -1).mean(1)

    @abstractmethod
    def encode(self, x: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> posterior over (B, n_z, H/f, W/f)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """(B, n_z, h, w) -> (B, C, f h, f w), f = ``upscale``; about [-1, 1], not clamped."""

    def as_litevae(self, name: str) -> "LiteVAE":
        """The same autoencoder as a LiteVAE, to train or export; ConfigError if it can't be one."""
        raise ConfigError(
            f"{name}: only LiteVAE and AutoencoderKL can be trained and exported here"
        )

    def fold(self) -> "Autoencoder":
        """Return a faster copy for inference, if there is one; by default the model itself."""
        return self

    def encode_within(
        self,
        x: Tensor,
        memory: int,  # noqa: ARG002
        progress: Progress | None = None,  # noqa: ARG002
    ) -> Posterior:
        """``encode(x)`` without gradients, in at most ``memory`` bytes; here whole nevertheless."""
        with torch.no_grad():
            return self.encode(x)

    def decode_tiled(
        self,
        z: Tensor,
        tile: int | None = None,
        memory: int | None = None,  # noqa: ARG002
        progress: Progress | None = None,  # noqa: ARG002
    ) -> Tensor:
        """``decode(z)`` without gradients, in tiles of this side or at most ``memory`` bytes.

        Here whole; ValueError for a ``tile``.
        """
        if tile is not None:
            raise ValueError(
                f"{type(self).__name__} decodes the whole latent at once: leave `tile` out"
            )
        with torch.no_grad():
            return self.decode(z)

    def forward(self, x: Tensor, sample_posterior: bool = False) -> tuple[Tensor, Posterior]:
        """Reconstruct from the posterior's mode or a sample; return image and posterior."""
        posterior = self.encode(x)
        latent = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(latent), posterior


class Quantizer(nn.Module):
    """The two 1x1 convolutions of latent-diffusion's autoencoders, with published names [M]."""

    def __init__(self, latent_dim: int, embed_dim: int, z_channels: int) -> None:
        super().__init__()
        self.quant_conv = nn.Conv2d(latent_dim, 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)

    def start_as_identity(self) -> None:
        """Initialise both as identities, so that linear paths on either side fit together."""
        for name, conv in self.named_children():
            assert isinstance(conv, nn.Conv2d)
            if conv.in_channels != conv.out_channels:
                raise ConfigError(
                    f"linear: {name} would change {conv.in_channels} channels to "
                    f"{conv.out_channels}: set latent_dim to 2 embed_dim and z_channels to "
                    "embed_dim, or leave use_quant out"
                )
            nn.init.dirac_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)


class LiteVAE(Autoencoder):
    """An autoencoder for latent diffusion: an encoder, a decoder and maybe a :class:`Quantizer`.

    Raises ValueError: encoder and decoder do not fit each other.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, quantizer: Quantizer | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.quantizer = encoder, decoder, quantizer
        self.in_channels = encoder.in_channels
        self.downscale = encoder.downscale
        self.enlarge = decoder.enlarge_by
        self.image_size = encoder.image_size
        self.side = encoder.side
        self.latent_channels = decoder.z_channels
        if quantizer is not None:
            self.latent_channels = quantizer.post_quant_conv.in_channels
        self.deterministic = encoder.deterministic
        self.folded = False  # whether the self-modulated convolutions are ordinary ones, see fold

        # Do the halves fit each other?
        wanted = {
            "latent_dim": ("twice the decoder's z_channels", 2 * decoder.z_channels),
            "downscale": (
                "the decoder's upscale (`enlarge` is what makes images larger)",
                decoder.upscale // decoder.enlarge_by,
            ),
            "in_channels": ("the decoder's out_channels", decoder.out_channels),
        }
        if quantizer is not None:
            del wanted["latent_dim"]  # its convolutions change the number of channels
        for name, (other_name, other) in wanted.items():
            value = getattr(encoder, name)
            if value != other:
                raise ValueError(f"the encoder's {name}, {value}, is not {other_name}, {other}")

    def as_litevae(self, name: str) -> "LiteVAE":  # noqa: ARG002  (for a message of the others)
        return self

    @classmethod
    def from_config(
        cls,
        encoder_config: Mapping[str, Any],
        decoder_config: Mapping[str, Any],
        embed_dim: int,
        use_quant: bool = False,
        initial_logvar: float = 0.0,
    ) -> "LiteVAE":
        """Build from the nodes of a config's ``model.params``, with fresh weights.

        Args:
            encoder_config, decoder_config: nodes of an Encoder and a Decoder.
            embed_dim: n_z, channels of the latent.
            use_quant: put a 1x1 convolution on either side of the latent; the encoder's
                ``latent_dim`` is its width before the convolution. Otherwise ``latent_dim`` may be
                left out, 2 ``embed_dim``, or ``embed_dim``, as in the published YAML.
            initial_logvar: added to the bias of the log-variances: at 0 the latent of fresh weights
                is mostly noise.

        Raises ConfigError: a node has mistakes, or ``latent_dim`` does not fit.
        """
        latent_dim = (encoder_config.get("params") or {}).get("latent_dim", 2 * embed_dim)
        if not use_quant and latent_dim not in (embed_dim, 2 * embed_dim):
            raise ConfigError(
                f"encoder_config.params.latent_dim is {latent_dim}, but without use_quant the "
                f"encoder computes the moments of embed_dim = {embed_dim} channels: leave "
                "latent_dim out, or set use_quant"
            )
        moments = {} if use_quant else {"latent_dim": 2 * embed_dim}
        encoder = instantiate(encoder_config, **moments)
        decoder = instantiate(decoder_config)
        quantizer = None
        if use_quant:
            quantizer = Quantizer(encoder.latent_dim, embed_dim, decoder.z_channels)
            if encoder.linear is not None or decoder.linear is not None:
                quantizer.start_as_identity()

        # The moments in float32: in bf16 means of 1 to 2 would be spaced by 2^-7, more than the
        # deviations that a small KL weight leaves.
        for conv in (last_convolution(encoder), encoder.linear):
            if conv is not None:
                keep_in_float32(conv)
        if quantizer is not None:
            keep_in_float32(quantizer.quant_conv)
        vae = cls(encoder, decoder, quantizer)

        # The bias of the log-variances, in the last convolution before the latent.
        if initial_logvar != 0:
            last = quantizer.quant_conv if quantizer else last_convolution(encoder)
            if last is None or last is encoder.linear:
                raise ConfigError(
                    f"initial_logvar: {type(encoder).__name__} learns no log-variances: leave it "
                    "out"
                )
            assert last.bias is not None
            with torch.no_grad():
                last.bias[vae.latent_channels :] += initial_logvar
        return vae

    @classmethod
    def from_spec(cls, spec: AutoencoderSpec, max_parameters: int = MAX_PARAMETERS) -> "LiteVAE":
        """Build with fresh weights; ConfigError as :meth:`from_config`, or if it is too large."""

        def build() -> "LiteVAE":
            halves = (spec.encoder_config, spec.decoder_config)
            model = cls.from_config(*halves, spec.embed_dim, spec.use_quant, spec.initial_logvar)
            if spec.folded:
                model = model.fold()
            return model

        # Count on the meta device before any memory is taken.
        if spec.ours:
            with torch.device("meta"):
                parameters = count_parameters(build())
            if parameters > max_parameters:
                raise ConfigError(
                    f"weights of another model, or too large: {parameters:,} parameters"
                )
        model = build().set_for_diffusion({name: getattr(spec, name) for name in FOR_DIFFUSION})
        model.pixel_range = PixelRange.from_node(spec.pixel_range, "pixel_range")
        model.pixel_range.check_channels(model.in_channels, "pixel_range")
        return model

    def set_for_diffusion(self, values: Mapping[str, Any]) -> "LiteVAE":
        """Set some or all of :attr:`Autoencoder.for_diffusion`."""
        for name, value in values.items():
            assert name in FOR_DIFFUSION
            if name.endswith("_factor"):
                value = float(value)
            elif isinstance(value, Sequence):
                value = [float(v) for v in value]
            setattr(self, name, value)
        return self

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        config: str | Path | Mapping[str, Any] | None = None,
        raw: bool = False,
        allow_mismatch: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> "LiteVAE":
        """Load a trained autoencoder, in evaluation mode.

        Args:
            path_or_id: a run folder, an export, a file of weights (.safetensors, .ckpt, .pt) with
                its config in it or beside it, a folder with one of each, ``olvae:NAME`` of a model
                that ships with this package, or an id of the Hugging Face hub, such as
                RGenDiff/olitevaeB_im_f8c12.
            revision, token, cache_dir, force_download, local_files_only: as in huggingface_hub.
            config: replaces the config beside the weights: a YAML file, a config.json, or its
                content.
            raw: the weights as trained, not the averaged ones (EMA).
            allow_mismatch: load the tensors that fit, and warn of the others.
            dtype: of the parameters.

        Raises:
            FileNotFoundError: it was not found, here or on the hub, or the hub can't be reached.
            ConfigError: the config is missing, has mistakes, or names code from outside this
                package.
            ValueError: the weights are not readable, non-finite, or of another model; the message
                lists the names.
        """
        found = locate(
            path_or_id,
            config,
            force_download=force_download,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if raw and found.weights.suffix == ".safetensors" and is_export(found.weights):
            warnings.warn(f"{path_or_id}: {ONE_KIND}", stacklevel=2)
        return load_located(found, read_weights(found.weights, raw), allow_mismatch, dtype)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write an export, which diffusers reads too, and a short README.md if there is none.

        ValueError if a network is not of this package, or weights are non-finite; then nothing is
        written.
        """
        return self._on_the_hub().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a repository of the Hugging Face hub, which is created if missing.

        Returns the commit's address. ``kwargs`` are huggingface_hub's: private, commit_message,
        token, branch, create_pr, ... OSError if the hub refuses, or can't be reached; ValueError as
        :meth:`save_pretrained`: no repository is made.
        """
        return self._on_the_hub().push_to_hub(repo_id, **kwargs)

    def _on_the_hub(self) -> "HubExport":
        """Make the export that is saved or uploaded; ValueError as :meth:`save_pretrained`."""
        from olvae.models.on_the_hub import HubExport  # slow to import

        config = self.export_config()
        # torch.compile puts "_orig_mod." into the names of a network's tensors.
        state = {name.replace("_orig_mod.", ""): t for name, t in self.state_dict().items()}
        broken = [name for name, t in state.items() if not t.isfinite().all()]
        if broken:
            raise ValueError(
                f"{len(broken)} of the model's tensors have non-finite values ({broken[0]}, ...)"
            )
        return HubExport(lambda folder: write_export(state, config, folder), config)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments for :meth:`from_config` that build this model again."""
        return {
            "encoder_config": copy_plain(self.encoder.node),
            "decoder_config": copy_plain(self.decoder.node),
            "embed_dim": self.latent_channels,
            "use_quant": self.quantizer is not None,
        }

    def export_config(self) -> Config:
        """The config.json of an export; ValueError as :meth:`AutoencoderSpec.to_export`."""
        spec = AutoencoderSpec(
            **self.config,
            folded=self.folded,
            pixel_range=self.pixel_range.as_node(),
            **self.for_diffusion,
        )
        return spec.to_export(
            block_out_channels=self.decoder.widths,
            in_channels=self.in_channels,
            latent_channels=self.latent_channels,
            out_channels=self.decoder.out_channels,
            sample_size=self.encoder.image_size,
            use_post_quant_conv=self.quantizer is not None,
            use_quant_conv=self.quantizer is not None,
        )

    def moments(self, x: Tensor, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> means, then log-variances, (B, 2 n_z, H/f, W/f).

        Under autocast they are float32, as are the encoder's last convolution, its linear path and
        ``quant_conv``. ``encode`` replaces the encoder's forward pass.
        """
        if not isinstance(x, Tensor):
            raise TypeError(
                f"images are a tensor (B, C, H, W) in [-1, 1], got {type(x).__name__}: "
                "torchvision's pil_to_tensor(image)[None] / 127.5 - 1 makes one"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"images are floats in [-1, 1], got {x.dtype}: convert 0..255 by x / 127.5 - 1"
            )
        moments: Tensor = (encode or self.encoder)(x)  # (B, latent_dim, H/f, W/f)
        if self.quantizer is not None:
            moments = self.quantizer.quant_conv(moments)  # (B, 2 n_z, H/f, W/f)
        if autocast_enabled(moments):
            moments = upcast(moments)
        return moments

    @torch.no_grad()
    def moments_within(self, x: Tensor, memory: int, progress: Progress | None = None) -> Tensor:
        """:meth:`moments` within ``memory`` bytes, equal up to rounding.

        See :mod:`olvae.models.large.streaming`.
        """
        return self.moments(x, lambda images: encode_within(self.encoder, images, memory, progress))

    def posterior(self, moments: Tensor) -> Posterior:
        """The posterior of these moments, (B, 2 n_z, h, w)."""
        if self.deterministic:
            return Deterministic(moments.chunk(2, dim=1)[0])
        return DiagonalGaussian(moments)

    def encode_within(self, x: Tensor, memory: int, progress: Progress | None = None) -> Posterior:
        """``encode(x)`` within ``memory`` bytes, equal up to rounding; large images in strips."""
        return self.posterior(self.moments_within(x, memory, progress))

    @torch.no_grad()
    def decode_tiled(
        self,
        z: Tensor,
        tile: int | None = None,
        memory: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """``decode(z)`` in tiles, equal up to rounding.

        See :func:`~olvae.models.large.tiling.decode_tiled`.
        """
        return decode_tiled(self.decoder, self.decoder_input(z), tile, memory, progress)

    def encode(self, x: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> posterior over (B, n_z, H/f, W/f); see :meth:`moments`."""
        return self.posterior(self.moments(x))

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self.decoder(self.decoder_input(z))
        return x

    def decoder_input(self, z: Tensor) -> Tensor:
        """(B, n_z, h, w) -> (B, z_channels, h, w): the quantizer's 1x1 convolution, if any."""
        if not isinstance(z, Tensor):
            raise TypeError(
                f"latents are a tensor, got {type(z).__name__}: a posterior has .mode() and "
                ".sample()"
            )
        if self.quantizer is not None:
            z = self.quantizer.post_quant_conv(z)
        return z

    def fold(self) -> "LiteVAE":
        """A faster copy for inference: self-modulated convolutions become ordinary ones."""
        folded = fold_smc(self)
        assert isinstance(folded, LiteVAE)
        folded.folded = True
        return folded


class DecoderInput:
    """Windows of what a decoder takes for the posterior's mode, of moments in a plane.

    See :class:`~olvae.models.large.tiling.Windows`.
    """

    def __init__(self, model: LiteVAE, encoded: Plane, device: torch.device) -> None:
        self.model = model
        self.encoded = encoded
        self.device = device
        self.shape = (1, model.decoder.z_channels, *encoded.shape[1:])

    def __getitem__(self, window: tuple[Any, slice, slice]) -> Tensor:
        # All that follows the encoder sees single positions.
        _, rows, columns = window
        encoded = self.encoded.read(rows.start, rows.stop)[..., columns].to(self.device)
        moments = self.model.moments(encoded, lambda part: part)
        return self.model.decoder_input(self.model.posterior(moments).mode())


def load_located(
    found: Located,
    weights: Mapping[str, Tensor],
    allow_mismatch: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LiteVAE:
    """Build a located autoencoder, and load the weights that were read; in evaluation mode.

    ConfigError if the networks can't be built, ValueError as :func:`load_weights`.
    """
    stored = sum(weight.nbytes for weight in weights.values())  # a parameter takes at least a byte
    # A fixed seed, so that tensors that allow_mismatch leaves fresh are the same every time.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = LiteVAE.from_spec(found.spec, stored)
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            # Which of them depends on the network.
            raise ConfigError(
                f"{found.origin}: no autoencoder can be built of this: {first_line(error)}"
            ) from error
    load_weights(model.to(dtype), weights, found.weights, allow_mismatch)
    return model.eval()
