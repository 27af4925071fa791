"""Load autoencoders of diffusers (KL, Tiny, DC, Wan, ...) with the interface of our own."""

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.checkpoint import check_file, load_weights, mismatches
from olvae.config import ConfigError
from olvae.files import WEIGHT_SUFFIXES, first_line
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.families import FAMILIES
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import CLASS_NAME, FOR_DIFFUSION, class_in, oversized
from olvae.models.target_names import DIFFUSERS
from olvae.modules.counting import count_parameters
from olvae.modules.distributions import Deterministic, DiagonalGaussian, Posterior
from olvae.modules.others.wrapped import decode_image, encode_image, has_frames

# Where pipelines keep their autoencoder.
SUBFOLDER = "vae"
# Side in pixels of the image that measures an autoencoder's factor; the largest one is 128.
PROBE = 128
# Takes and gives [0, 1].
RAE = "AutoencoderRAE"
# Has its latents in a diffusion model's units.
TINY = "AutoencoderTiny"
# Its attention mask fits no batch [diffusers 0.42].
ONE_BY_ONE = "AutoencoderKLHunyuanVideo15"
PER_CHANNEL = ("latents_mean", "latents_std")
REFUSALS = (
    AttributeError,
    AssertionError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What classes raise for images of another shape than they take."""

NO_IMAGES = {
    "AutoencoderKLLTX2Audio": "is an autoencoder of sound, not of images",
    "ConsistencyDecoderVAE": (
        "decodes by a diffusion model, which draws noise: two decodings of a latent differ"
    ),
}
"""Classes that would pass for image autoencoders, and why they are none."""


class DiffusersAutoencoder(Autoencoder):
    """An image autoencoder of diffusers, or one of video for single images; images in [-1, 1].

    Its latents are the model's own: neither scaled nor shifted by the factors in its config.

    Raises ValueError: it does not take images to smaller latents and back.
    """

    # Whether it has a time axis.
    frames = False
    # What its latents are converted to: 0, with std 1, leaves them as they are.
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.kind = type(model).__name__
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("std", torch.ones(()), persistent=False)

        # What is known of some classes.
        why = NO_IMAGES.get(self.kind)
        if why:
            raise ValueError(f"{self.kind} {why}")
        if self.kind == ONE_BY_ONE:
            model.use_slicing = True
        self.zero_to_one = self.kind == RAE
        if self.zero_to_one:
            self.side = int(model.decoder_image_size)
            self.image_size = self.side

        # What a latent tells; encode takes any size until f is measured.
        self.downscale = 1
        latent = self._measure()
        self.downscale = (self.side or PROBE) // latent.mean.shape[-1]
        self.latent_channels = latent.mean.shape[1]
        self.deterministic = latent.deterministic
        for factor, value in self._factors().items():
            setattr(self, factor, value)

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        if self.kind == TINY:
            self.mean = mean.to(self.mean).view(-1, 1, 1)
            self.std = std.to(self.mean).view(-1, 1, 1)

    @torch.no_grad()
    def _measure(self) -> Posterior:
        """Encode and decode an image to find its channels and whether it needs a time axis.

        Each number of channels that the config suggests is tried until one is accepted.
        """
        config = self.model.config
        p = next(self.model.parameters())
        size = self.side or PROBE
        first = None
        channels = [
            getattr(config, key, None) for key in ("in_channels", "input_channels", "out_channels")
        ]
        for count in dict.fromkeys(filter(None, [*channels, 3])):
            for frames in has_frames(self.model):
                self.in_channels = count
                self.frames = frames
                x = torch.zeros(1, self.in_channels, size, size, dtype=p.dtype, device=p.device)
                try:
                    latent = self.encode(x)
                except REFUSALS as error:
                    first = first or error
                    continue
                shape = latent.mean.shape
                if latent.mean.ndim != 4 or size % shape[-1] or shape[-1] != shape[-2]:
                    made = tuple(shape[1:])
                    raise ValueError(
                        f"{self.kind} makes {made} of an image of {size}x{size}: no latent image"
                    )
                self._check_decoder(latent.mean, size // shape[-1])
                return latent
        assert first is not None
        raise ValueError(f"{self.kind} does not encode images: {first_line(first)}") from first

    def _check_decoder(self, z: Tensor, f: int) -> None:
        """Raise ValueError unless a latent, or a part of it, gives an image f times as large.

        Note by how much the decoder enlarges it beyond that.
        """
        if not self.side:
            z = z[..., :4, :4]
        try:
            made = tuple(self.decode(z).shape)
        except REFUSALS as error:
            raise ValueError(
                f"{self.kind} does not decode to an image: {first_line(error)}"
            ) from error
        expected = (1, self.in_channels, f * z.shape[-2], f * z.shape[-1])

        # Four times the channels are an image of twice the size, for a pixel shuffle.
        by = math.isqrt(made[1] // self.in_channels) if len(made) == 4 else 1
        if made != (1, by**2 * self.in_channels, *expected[2:]):
            raise ValueError(f"{self.kind} decodes to {made}, not to an image of {expected}")
        self.enlarge = by

    def _factors(self) -> dict[str, Any]:
        """Find factors for a diffusion model: in config, buffers, or FLUX.2's batch norm."""
        # encode and decode apply RAE's.
        if self.zero_to_one:
            return {}
        config = self.model.config
        found: dict[str, Any] = {}
        for name in FOR_DIFFUSION:
            value = getattr(config, name, None)
            if value is not None:
                found[name] = value

        # Per channel; of numbers for each frame of a channel, the first.
        buffers = dict(self.model.named_buffers())
        for name in PER_CHANNEL:
            value = found.get(name, buffers.get(name))
            if value is not None:
                values = value.tolist() if isinstance(value, Tensor) else list(value)
                found[name] = values[:: max(1, len(values) // self.latent_channels)]

        # FLUX.2's are of the 2x2 positions of each channel.
        if "bn.running_var" in buffers:
            variance = buffers["bn.running_var"].double() + config.batch_norm_eps
            found["latents_mean"] = buffers["bn.running_mean"].tolist()
            found["latents_std"] = variance.sqrt().tolist()
        return found

    @property
    def encoder(self) -> nn.Module | None:
        """The network that encodes, if the model keeps it apart."""
        return getattr(self.model, "encoder", None)

    def encode(self, x: Tensor) -> Posterior:
        """(B, C, H, W) in [-1, 1] -> posterior over (B, n_z, H/f, W/f), maybe deterministic."""
        if self.side is not None and x.shape[-2:] != (self.side, self.side):
            raise ValueError(
                f"{self.kind} takes images of {self.side}x{self.side} only, "
                f"not {x.shape[-2]}x{x.shape[-1]}"
            )
        if x.shape[-2] % self.downscale or x.shape[-1] % self.downscale:
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is not a multiple of {self.downscale}"
            )
        if self.zero_to_one:
            x = (x + 1) / 2
        latent, distributed = encode_image(self.model, x, self.frames)
        if distributed:
            return DiagonalGaussian(latent)
        return Deterministic(latent * self.std + self.mean)

    def decode(self, z: Tensor) -> Tensor:
        x = decode_image(self.model, (z - self.mean) / self.std, self.frames)
        x = F.pixel_shuffle(x, self.enlarge)  # x itself for 1
        return 2 * x - 1 if self.zero_to_one else x

    def as_litevae(self, name: str) -> LiteVAE:
        families = [family for family in FAMILIES if self.kind in family.kinds]
        if not families:
            known = ["LiteVAE"]
            for family in FAMILIES:
                known += family.kinds
            raise ConfigError(
                f"{name}: diffusers' {self.kind} can be a teacher; "
                f"those that can be trained or exported: {', '.join(known)}"
            )
        spec = families[0].spec(self, name)
        # Fresh weights, which are replaced, must not draw from the caller's generator.
        with torch.random.fork_rng(devices=[]):
            ours = LiteVAE.from_spec(spec)
        load_weights(ours, families[0].to_ours(self.model.state_dict()), name)
        return ours.train(self.training)


class DiffusersLoader(Loader):
    """``diffusers:ID_OR_FOLDER``, or the folder of an autoencoder or a pipeline of diffusers."""

    def accepts(self, text: str) -> bool:
        path = Path(text)
        own = class_in(path) not in (None, CLASS_NAME)
        return text.startswith(DIFFUSERS) or own or class_in(path / SUBFOLDER) is not None

    def find(self, text: str, options: LoadOptions) -> Target | Path:
        folder = find_diffusers_folder(text.removeprefix(DIFFUSERS))
        # An export of ours, in a pipeline, is for another loader.
        if class_in(folder) == CLASS_NAME:
            return folder
        if options.raw:
            warnings.warn(
                f"{text}: diffusers has one kind of weights: `raw` is ignored", stacklevel=2
            )
        return Target(
            partial(load_diffusers, folder),
            partial(load_diffusers, folder, trained=False),
            name=text,
        )


def find_diffusers_folder(text: str) -> Path:
    """Find the folder of an autoencoder, or download it.

    ``text`` is a folder or an id of the hub, of an autoencoder or of a pipeline, whose autoencoder
    is in ``vae`` or in the subfolder after ``::``.

    Raises FileNotFoundError: there is none, or the hub is away.
    """
    # From the hub come first the configs, then the weights beside the autoencoder's.
    name, _, subfolder = text.partition("::")
    prefixes = [f"{subfolder}/"] if subfolder else ["", f"{SUBFOLDER}/"]
    root = Path(name)
    on_hub = not root.is_dir()
    if on_hub:
        from olvae.models.on_the_hub import snapshot  # slow to import

        root = snapshot(name, [f"{prefix}config.json" for prefix in prefixes])

    # The first config that names a class or, for a better error, any.
    found = [prefix for prefix in prefixes if (root / prefix / "config.json").is_file()]
    if not found:
        places = "it" if subfolder else f"it or in its {SUBFOLDER}"
        raise FileNotFoundError(
            f"diffusers:{text}: config.json not found in {places}: name the subfolder of the "
            f"autoencoder, as in diffusers:{name}::SUBFOLDER"
        )
    prefix = next((prefix for prefix in found if class_in(root / prefix)), found[0])

    # Pickled weights only where there are no safe ones.
    if on_hub:
        for pattern in ("*.safetensors", "*.bin"):
            ignored = [f"{prefix}*/*", "*.fp16.*", "*.non_ema.*"]
            root = snapshot(name, [f"{prefix}config.json", f"{prefix}{pattern}"], ignored)
            if any((root / prefix).glob(pattern)):
                break
    return root / prefix


def load_diffusers(folder: Path, trained: bool = True) -> DiffusersAutoencoder:
    """Load the autoencoder in a folder, in evaluation mode and float32; or one with fresh weights.

    Raises ConfigError: its config names no class of diffusers. ValueError: the weights are
    unreadable, non-finite, or of another model.
    """
    import diffusers

    # The class in the config.
    name = class_in(folder)
    if name is None:
        raise ConfigError(f"{folder}/config.json: not a config of diffusers: it has no _class_name")
    kind: Any = getattr(diffusers, name, None)
    if not getattr(kind, "__module__", "").startswith("diffusers.models.autoencoders."):
        raise ConfigError(
            f"{folder}/config.json: {name} is not an autoencoder of diffusers "
            f"{diffusers.__version__}"
        )
    large = list(oversized(kind.load_config(folder)))
    if large:
        raise ConfigError(*(f"{folder}/config.json: {line}" for line in large))

    # Check sizes and files before anything is allocated or unpickled, then load.
    files: list[Path] = []
    for suffix in WEIGHT_SUFFIXES:
        files += sorted(folder.glob(f"*{suffix}"))
    try:
        with torch.device("meta"):
            check_parameters(
                kind.from_config(kind.load_config(folder)),
                sum(file.stat().st_size for file in files),
            )
        for file in files:
            check_file(file)
        if not trained:
            return DiffusersAutoencoder(kind.from_config(kind.load_config(folder))).eval()
        # Mismatched sizes are ignored, so that they are in the report.
        model, report = kind.from_pretrained(
            folder,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    except NameError as error:
        raise ValueError(
            f"{folder}: {name} needs a package that is not installed: {first_line(error)}"
        ) from error
    except Exception as error:  # of many kinds, by what is broken
        raise ValueError(f"{folder}: not a readable {name}: {first_line(error)}") from error

    # All weights must be there, and finite.
    misshapen = [
        f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in report["mismatched_keys"]
    ]
    wrong = mismatches([*report["missing_keys"]], [*report["unexpected_keys"]], misshapen)
    if wrong:
        raise ValueError(
            f"{folder}: these weights are of another model than its config.json: {wrong}"
        )
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{folder}: {len(broken)} of its tensors have non-finite values ({broken[0]}, ...)"
        )
    return DiffusersAutoencoder(model).eval()


def check_parameters(outline: nn.Module, stored: int) -> None:
    """Check that a network on the meta device has no more parameters than its file has bytes."""
    parameters = count_parameters(outline)
    if stored and parameters > stored:
        raise ValueError(
            f"weights of another model: its config has {parameters:,} parameters, "
            f"they {stored:,} bytes"
        )
