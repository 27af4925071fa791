"""LiteVAE as a plain module: images to a posterior, latents to images. No Lightning needed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from olvae.config import ConfigError, instantiate
from olvae.models.hub import CARD, HubAccess, is_hub_id, told_in_one_line
from olvae.modules.base import Decoder, Encoder
from olvae.modules.distributions import DiagonalGaussian, Posterior
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.precision import autocast_enabled, island

__all__ = ["Autoencoder", "LiteVAE", "Quantizer"]


class Autoencoder(nn.Module, ABC):
    """What evaluation, latents and reconstruction ask of any autoencoder; images are in [-1, 1]."""

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Channels of the image."""

    @property
    @abstractmethod
    def downscale(self) -> int:
        """f: how many pixels of the image, per side, one latent position stands for."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """n_z: channels of the latent."""

    @abstractmethod
    def encode(self, x: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> posterior over (B, n_z, H/f, W/f)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """(B, n_z, h, w) -> (B, C, f h, f w), nominally in [-1, 1], not clamped."""

    def forward(self, x: Tensor, sample_posterior: bool = False) -> tuple[Tensor, Posterior]:
        """Reconstruction, from the posterior's mode or from a sample, and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class Quantizer(nn.Module):
    """The two 1x1 convolutions of the latent-diffusion autoencoders, under their published names [M].

    Args:
        latent_dim: channels that the encoder gives.
        embed_dim: channels of the latent, n_z.
        z_channels: channels that the decoder takes.
    """

    def __init__(self, latent_dim: int, embed_dim: int, z_channels: int) -> None:
        super().__init__()
        self.quant_conv = nn.Conv2d(latent_dim, 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)


class LiteVAE(
    Autoencoder,
    ModelHubMixin,
    library_name="diffusers",
    pipeline_tag="image-to-image",
    tags=["autoencoder", "vae", "litevae"],
    model_card_template=CARD,
):
    """An autoencoder for latent diffusion.

    Args:
        encoder: images to 2 n_z moments, or to features if there is a quantizer.
        decoder: latents to images.
        quantizer: optional 1x1 convolutions on either side of the latent.

    Raises:
        ValueError: the two halves do not fit each other.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, quantizer: Quantizer | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.folded = False
        """Whether the self-modulated convolutions are ordinary ones, see :meth:`fold`."""
        self.scaling_factor, self.shift_factor = 1.0, 0.0
        """What a diffusion model on these latents takes: (z - shift_factor) * scaling_factor. Kept for it, not used
        by encode and decode."""
        if quantizer is None:
            _check(
                "encoder's latent_dim",
                encoder.latent_dim,
                "twice the decoder's z_channels",
                2 * decoder.z_channels,
            )
        _check("encoder's shrinking factor", encoder.downscale, "the decoder's growing factor", decoder.upscale)
        _check("encoder's in_channels", encoder.in_channels, "the decoder's out_channels", decoder.out_channels)

    @classmethod
    def from_config(
        cls,
        encoder_config: Mapping[str, Any],
        decoder_config: Mapping[str, Any],
        embed_dim: int,
        use_quant: bool = False,
        initial_logvar: float = 0.0,
    ) -> "LiteVAE":
        """Build from the nodes of a config's ``model.params``.

        Without ``use_quant`` the encoder gives the 2 ``embed_dim`` moments itself; its ``latent_dim`` may be
        left out, be that number, or be ``embed_dim``, as in the published YAML. With it, ``latent_dim`` is the
        encoder's width before the 1x1 convolution and is taken as it is.

        ``initial_logvar`` is added to the bias of the log-variances: at 0, where fresh weights start, the latent
        is mostly noise, which a short training spends its first steps on.
        """
        if use_quant:
            encoder = instantiate(encoder_config)
            decoder = instantiate(decoder_config)
            quantizer = Quantizer(encoder.latent_dim, embed_dim, decoder.z_channels)
            return cls(encoder, decoder, quantizer)._shift_logvar(initial_logvar)
        latent_dim = (encoder_config.get("params") or {}).get("latent_dim", 2 * embed_dim)
        if latent_dim not in (embed_dim, 2 * embed_dim):
            raise ConfigError(
                f"encoder_config.params.latent_dim is {latent_dim}, but without use_quant the encoder gives the "
                f"moments of embed_dim = {embed_dim} channels: leave latent_dim out, or set use_quant"
            )
        encoder = instantiate(encoder_config, latent_dim=2 * embed_dim)
        return cls(encoder, instantiate(decoder_config))._shift_logvar(initial_logvar)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's knows no runs, files of weights, nor YAML
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
        """A trained autoencoder, in evaluation mode.

        Args:
            path_or_id: a run folder, an export, a file of weights (.safetensors, .ckpt, .pt) with its config beside
                it, a folder with one of each, or an id of the Hugging Face hub, such as
                RGenDiff/olitevaeB_im_f8c12.
            revision: of the hub's repository: a branch, tag or commit.
            token, cache_dir, force_download, local_files_only: of the hub, as everywhere; by default what its
                environment says.
            config: the config instead of the one beside the weights: a YAML file, a config.json, or its content.
            raw: the weights as trained, where there are averaged ones (EMA) besides.
            allow_mismatch: load the tensors that fit, and warn of the others.
            dtype: of the parameters.

        Raises:
            FileNotFoundError: there is no such thing, here or on the hub, or the hub can't be reached.
            ConfigError: there is no config, or it has mistakes, or names code from outside this package.
            ValueError: the weights are not readable, not finite, or of another model; the message lists the names.
        """
        from olvae.models.pretrained import load_located, locate

        hub = HubAccess(revision, token, cache_dir, force_download, local_files_only)
        return load_located(locate(path_or_id, config, hub), raw, allow_mismatch, dtype)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors``, which :meth:`from_pretrained` and
        diffusers read, and a short README.md where there is none; ``olvae export`` makes a model card, and checks what
        it wrote.

        Args:
            kwargs: of huggingface_hub's mixin, such as push_to_hub.

        Raises:
            ValueError: a network is not of this package, or some weights are not finite; nothing is written.
        """
        from olvae.models.pretrained import check_saveable, config_kept

        check_saveable(self)
        with config_kept(Path(save_directory)):
            return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        from olvae.models.pretrained import write_export

        write_export(self, save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save it to a repository of the Hugging Face hub, which is made if need be; the address of the commit.

        Args:
            repo_id: OWNER/NAME, or NAME for one's own.
            kwargs: of huggingface_hub's mixin: private, commit_message, token, branch, create_pr, ...

        Raises:
            OSError: the hub refuses, or can't be reached.
            ValueError: as :meth:`save_pretrained`; no repository is made.
        """
        from olvae.models.pretrained import check_saveable

        check_saveable(self)
        # Without an owner it becomes the token's owner's, whose name is not known yet.
        place = {"repo_id": repo_id} if is_hub_id(repo_id) else {}
        kwargs["model_card_kwargs"] = {**place, **(kwargs.get("model_card_kwargs") or {})}
        with told_in_one_line(repo_id):
            return super().push_to_hub(repo_id, **kwargs)

    @torch.no_grad()
    def _shift_logvar(self, shift: float) -> "LiteVAE":
        last = list((self.quantizer.quant_conv if self.quantizer else self.encoder).modules())[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.bias[self.latent_channels :] += shift
        return self

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of :meth:`from_config` that build it again."""
        return {
            "encoder_config": self.encoder.node,
            "decoder_config": self.decoder.node,
            "embed_dim": self.latent_channels,
            "use_quant": self.quantizer is not None,
        }

    @property
    def in_channels(self) -> int:
        return self.encoder.in_channels

    @property
    def downscale(self) -> int:
        return self.encoder.downscale

    @property
    def latent_channels(self) -> int:
        if self.quantizer is not None:
            return self.quantizer.post_quant_conv.in_channels
        return self.decoder.z_channels

    def moments(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> means, then log-variances, (B, 2 n_z, H/f, W/f); float32 under autocast.

        Raises:
            ValueError: H or W is not a multiple of f, or the images are integers.
        """
        if not x.is_floating_point():
            raise ValueError(f"images are floats in [-1, 1], got {x.dtype}: x / 127.5 - 1 makes them of 0..255")
        moments: Tensor = self.encoder(x)  # (B, latent_dim, H/f, W/f)
        if self.quantizer is not None:
            moments = self.quantizer.quant_conv(moments)  # (B, 2 n_z, H/f, W/f)
        return island(moments) if autocast_enabled(moments) else moments

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """(B, C, H, W) in [-1, 1] -> posterior over (B, n_z, H/f, W/f); see :meth:`moments`."""
        return DiagonalGaussian(self.moments(x))

    def decode(self, z: Tensor) -> Tensor:
        """(B, n_z, h, w) -> (B, C, f h, f w), nominally in [-1, 1], not clamped."""
        if self.quantizer is not None:
            z = self.quantizer.post_quant_conv(z)
        x: Tensor = self.decoder(z)
        return x

    def forward(self, x: Tensor, sample_posterior: bool = False) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction, from the posterior's mode or from a sample, and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def fold(self) -> "LiteVAE":
        """A copy for inference whose self-modulated convolutions are ordinary ones: same function, faster."""
        folded = fold_smc(self)
        assert isinstance(folded, LiteVAE)
        folded.folded = True
        return folded


def _check(name: str, value: Any, other_name: str, other: Any) -> None:
    if value != other:
        raise ValueError(f"the {name}, {value}, is not {other_name}, {other}")
