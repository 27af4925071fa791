"""Base classes of encoders and decoders, and small helpers on modules."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint

HALVES = ("encoder", "decoder")  # of an autoencoder

# Times by which a decoder's image is larger than the encoded one, along each side.
Enlarge = Literal[1, 2, 3, 4]


class Stage(NamedTuple):
    """A step of a decoder with a finite receptive field.

    A window of the output depends on this window of the input: widen the output's window by
    ``reach`` positions on every side, then divide it by ``scale``.
    """

    run: Callable[[Tensor], Tensor]
    reach: int
    scale: int = 1


class Steps(nn.Module):
    """A network whose forward pass hands its steps to :meth:`step`."""

    # Whether to keep only each step's inputs, and compute the step again in the backward pass.
    checkpoint: bool = False

    def step(self, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """``run(*inputs)``; dropout draws the same numbers when it is computed again."""
        again = self.checkpoint and self.training and torch.is_grad_enabled()
        out: Tensor = checkpoint(run, *inputs, use_reentrant=False) if again else run(*inputs)
        return out

    def checkpoint_steps(self, on: bool = True) -> None:
        """Turn :attr:`checkpoint` on or off, in the networks inside as well."""
        for network in self.modules():
            if isinstance(network, Steps):
                network.checkpoint = on


def copy_plain(value: Any) -> Any:
    """Copy lists and dicts at any depth; share modules and everything else in them."""
    if isinstance(value, list):
        return [copy_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {key: copy_plain(inner) for key, inner in value.items()}
    return value


class _Network(Steps):
    """One half of an autoencoder: records its arguments, and may have a linear path."""

    # ``target`` and ``params`` that build this network again, for the config of a saved model.
    node: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        _self, *arguments = bound.arguments.items()
        network.node = {
            "target": f"{cls.__module__}.{cls.__qualname__}",
            "params": copy_plain(dict(arguments)),
        }
        return network

    def __init__(self) -> None:
        super().__init__()
        # A linear path beside the network: see :func:`olvae.models.linear_code.fit_linear_paths`.
        self.linear: nn.Conv2d | None = None

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        """Take the latents' mean and deviation per channel, (n_z) each, from a part with them."""

    def _set_linear_path(self, path: nn.Conv2d) -> None:
        """Add the path, and zero the network's last convolution: at first the path is alone."""
        last = last_convolution(self)
        if last is not None:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.linear = path


class Encoder(_Network):
    """Images (B, in_channels, H, W) to (B, latent_dim, H/downscale, W/downscale).

    ``image_size`` is the intended size in pixels, at which summaries count operations.
    """

    # Whether the latents have no distribution, so that the log-variances mean nothing.
    deterministic: bool = False
    # The side of its images in pixels, if it takes no other.
    side: int | None = None

    def __init__(self, latent_dim: int, in_channels: int, downscale: int, image_size: int) -> None:
        super().__init__()
        check_counts(1, latent_dim=latent_dim, in_channels=in_channels, downscale=downscale)
        if image_size % downscale:
            raise ValueError(f"image_size {image_size} is not a multiple of {downscale}")
        self.latent_dim = latent_dim
        self.in_channels = in_channels
        self.downscale = downscale
        self.image_size = image_size

    def add_linear_path(self) -> None:
        """Add a linear path from patches to the means.

        Patches are twice as wide as their distance: the fit uses their centres, and training learns
        to overlap them. Where the factor is odd, or above 16 (the covariances of larger patches
        would need gigabytes), patches just touch.
        """
        f = self.downscale
        margin = f // 2 if f % 2 == 0 and f <= 16 else 0
        size = f + 2 * margin
        means = self.latent_dim // 2
        self._set_linear_path(
            nn.Conv2d(self.in_channels, means, size, f, padding=margin, padding_mode="replicate")
        )

    def with_linear_path(self, moments: Tensor, x: Tensor) -> Tensor:
        """Add the linear path from the images x to the means in moments (B, latent_dim, h, w)."""
        if self.linear is None:
            return moments
        mean = self.linear(x)  # (B, latent_dim / 2, H/f, W/f)
        n_z = mean.shape[1]
        return torch.cat((moments[:, :n_z] + mean, moments[:, n_z:]), dim=1)


class Decoder(_Network):
    """Latents (B, z_channels, h, w) to images (B, out_channels, upscale h, upscale w).

    With ``enlarge_by`` above 1 these images are as many times larger, along each side, than the
    ones that were encoded, and ``upscale`` is as many times the encoder's factor.
    """

    def __init__(
        self, z_channels: int, out_channels: int, upscale: int, enlarge: Enlarge = 1
    ) -> None:
        """Note the shapes; ``upscale`` is of images that are not enlarged."""
        super().__init__()
        check_counts(1, z_channels=z_channels, out_channels=out_channels, upscale=upscale)
        given: object = enlarge
        if type(given) is not int or given not in get_args(Enlarge):  # True equals 1
            raise ValueError(f"enlarge must be 1, 2, 3 or 4, got {given!r}")
        self.z_channels = z_channels
        self.out_channels = out_channels
        self.upscale = upscale * enlarge
        self.enlarge_by: int = enlarge
        self.output_patch = 1  # see widen_output

    @property
    def widths(self) -> list[int]:
        """Channels of each level, for diffusers, whose pipelines count them to know the factor."""
        params = self.node["params"]
        factor = self.upscale // self.enlarge_by
        multiples = params.get("channel_mult") or [1] * factor.bit_length()
        return [params.get("channels", 1) * multiple for multiple in multiples]

    def widen_output(self, patch: int = 1) -> None:
        """Widen the last convolution for :meth:`shuffle`: each output becomes enlarge_by^2.

        So the image is at first the nearest-neighbour enlargement of the one without. ``patch``:
        the side of the patches that the convolution's outputs, in the order (channel, row, column),
        are rearranged to before.
        """
        self.output_patch = patch
        last = last_convolution(self)
        if self.enlarge_by == 1 or last is None or isinstance(last, nn.Linear):
            return
        widen(last, self.enlarge_by**2, patch**2)

    def enlarged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make of the weights of this decoder with ``enlarge`` 1 its own, by nearest neighbours.

        ``weights`` have its names, without a prefix.
        """
        own = dict(weights)
        for name, parameter in self.state_dict().items():
            tensor = weights[name]
            if tensor.shape == parameter.shape:
                continue
            if not name.startswith("linear."):
                own[name] = repeat_outputs(tensor, self.enlarge_by**2, self.output_patch**2)
                continue
            # The linear path gives patches of enlarged images.
            side = self.upscale // self.enlarge_by
            rows = tensor.unflatten(0, (-1, side, side)).repeat_interleave(self.enlarge_by, 1)
            own[name] = rows.repeat_interleave(self.enlarge_by, 2).flatten(0, 2)
        return own

    def shuffle(self, image: Tensor) -> Tensor:
        """(B, e^2 C, H, W) to (B, C, e H, e W) for e = ``enlarge_by``."""
        return F.pixel_shuffle(image, self.enlarge_by)  # the tensor itself for 1

    def and_shuffle(self, stages: list[Stage]) -> list[Stage]:
        """Add :meth:`shuffle` to stages, if the images are enlarged."""
        if self.enlarge_by == 1:
            return stages
        return [*stages, Stage(self.shuffle, 0, self.enlarge_by)]

    def add_linear_path(self) -> None:
        """Add a linear path from 3x3 latent positions to patches."""
        values = self.out_channels * self.upscale**2
        self._set_linear_path(
            nn.Conv2d(self.z_channels, values, 3, padding=1, padding_mode="replicate")
        )

    def linear_path(self, z: Tensor) -> Tensor:
        """Compute the linear path's image (B, out_channels, upscale h, upscale w) from a latent."""
        assert self.linear is not None
        return F.pixel_shuffle(self.linear(z), self.upscale)

    def stages(self) -> list[Stage] | None:
        """List the network's steps, to run it in tiles; None if one depends on the whole image."""
        return None

    def windows(self, z: Any) -> Any:
        """Return what :meth:`paths` start from, whose windows are read as ``[..., rows, columns]``.

        ``z`` is a latent that is read so: a tensor, or a file's. A decoder that adds something to
        it by its place, such as noise, gives each window what belongs there.
        """
        return z

    def paths(self) -> list[list[Stage]] | None:
        """List the chains of steps that start at the latent; ``forward`` adds up their images.

        None if a step needs the whole image. See :meth:`windows`.
        """
        network = self.stages()
        if network is None:
            return None
        if self.linear is None:
            return [network]
        return [network, [Stage(self.linear_path, 1, self.upscale)]]


class GeneratingDecoder(Decoder, ABC):
    """A decoder that generates: it takes a noised picture and its time beside the latent.

    On the line from an image x to noise, x_t = (1 - t) x + t x_1, the time t is 0 at the image and
    1 at its :meth:`start` x_1. The network estimates x from x_t. ``decode(z)`` is its estimate at
    t = 1, from noise that depends on the place in the image alone. Losses of its own are parts: see
    ``olvae/models/parts/flow/``.
    """

    # Standard deviation of the noise in x_1, in the image's units.
    noise_std: float

    @property
    def sees_noise(self) -> bool:
        """Whether noise changes what it decodes, unlike at the start of its training."""
        return True

    @abstractmethod
    def start(self, z: Tensor, noise: Tensor) -> Tensor:
        """Return x_1 for noise (B, out_channels, f h, f w) of deviation 1."""

    @abstractmethod
    def forward(self, z: Tensor, noised: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Estimate the image, (B, out_channels, f h, f w), from x_t and times (B,).

        Without them decode, in one step.
        """

    def velocity(self, z: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """Return dx_t / dt at x_t, which is x_1 - x, by the network's estimate of x."""
        estimate: Tensor = self(z, noised, t)
        return (noised - estimate) / t[:, None, None, None]

    def sample(self, z: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Go from x_1 to an image in Euler steps of equal length; one step is the estimate."""
        x = self.start(z, noise)
        for step in range(steps, 0, -1):
            t = torch.full((len(z),), step / steps, device=z.device)
            x = x - self.velocity(z, x, t) / steps
        return x


def last_convolution(network: nn.Module) -> nn.Conv2d | nn.Conv3d | nn.Linear | None:
    """Find the last convolution: the network's ``output_layer``, or the last one defined.

    The linear path counts only where there is no other.
    """
    named: nn.Conv2d | nn.Conv3d | nn.Linear | None = getattr(network, "output_layer", None)
    if named is not None:
        return named
    path = getattr(network, "linear", None)
    found = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m is not path]
    return found[-1] if found else path


def widen(conv: nn.Conv2d | nn.Conv3d, times: int, together: int = 1) -> None:
    """Repeat each output of a convolution in place, or each ``together`` outputs in a row."""
    conv.out_channels *= times
    for name, parameter in list(conv.named_parameters()):
        setattr(conv, name, nn.Parameter(repeat_outputs(parameter.detach(), times, together)))


def repeat_outputs(tensor: Tensor, times: int, together: int = 1) -> Tensor:
    """Repeat along the first axis, ``together`` entries in a row: 0 0 1 1, or 0 1 0 1 with two."""
    groups: Tensor = tensor.unflatten(0, (-1, together))
    return groups.repeat_interleave(times, 0).flatten(0, 1)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first parameter; float32 if it has none."""
    first = next(module.parameters(), None)
    return torch.float32 if first is None else first.dtype


def mean_over_processes(x: Tensor) -> Tensor:
    """Average a tensor over all processes; gradients of any order flow; no barrier, no wait.

    In a single process return ``x`` itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    total: Tensor = all_reduce(x)
    return total / dist.get_world_size()


def check_counts(least: int, **counts: int | Sequence[int]) -> None:
    """Check numbers of channels, blocks or multiples, one or several each: ``least`` or more."""
    for name, value in counts.items():
        several = [value] if isinstance(value, int) else list(value)
        if not several or min(several) < least:
            got = value if isinstance(value, int) else several
            raise ValueError(f"{name} must be at least {least}, got {got}")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError for a number below 0, or nan."""
    for name, number in numbers.items():
        # Not ``number < 0``, which is False for nan.
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Check the betas of Adam or Muon: two numbers from 0 to below 1."""
    if len(betas) != 2 or not 0 <= min(betas) <= max(betas) < 1:
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {list(betas)}")
    return betas[0], betas[1]


def check_choice(choices: Iterable[str], **settings: str) -> None:
    """Raise ValueError for a setting that is not among the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
