"""Encode within a memory limit: the same result, layer by layer over the whole image.

Tiles can't do it, because every GroupNorm of the encoder needs the mean and variance of the whole
image. So each layer runs over the image in strips of rows, and adds up the sums that the next norm
needs; layers' outputs are kept in memory up to the limit, then in temporary files.
"""

import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.models.large.tiling import GIB, peak_bytes
from olvae.modules.base import Encoder, dtype_of
from olvae.modules.litevae.encoder_model import (
    LiteVAE_Encoder,
    PostActivationBlock,
    PreActivationBlock,
    UNet,
)
from olvae.modules.mixed_precision import in_float64

Function = Callable[[Tensor], Tensor]

# Images' dtypes; layers' outputs are kept in float32.
STREAMED = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def encode_within(
    encoder: Encoder, x: Tensor, memory: int, progress: Callable[[float], None] | None = None
) -> Tensor:
    """Compute ``encoder(x)``, equal to rounding, in about ``memory`` bytes.

    Images and parameters come on top. As many images as fit are encoded at once. One that does not
    fit is streamed through the UNets: a quarter of the memory is for strips on x's device, the rest
    for layers' outputs on the CPU, and temporary files (in ``TMPDIR``) take the others.

    ValueError if the image does not fit, and the encoder is not LiteVAE's; OSError if the disk is
    too small.
    """
    # Peak bytes of encoding one image; remembered, because counting takes half a second.
    known: dict[tuple[object, ...], int] = encoder.__dict__.setdefault("_image_bytes", {})
    shape = tuple(x.shape[1:])
    key = (*shape, dtype_of(encoder))
    if key not in known:
        known[key] = peak_bytes(encoder, lambda e, images: e(images), (1, *shape))
    needs = known[key]

    # Whole images, as many as fit.
    together = memory // needs
    if together > 0 or not len(x):
        return torch.cat([encoder(part) for part in x.split(max(1, together))])
    if not isinstance(encoder, LiteVAE_Encoder):
        raise ValueError(
            f"{type(encoder).__name__} encodes whole images only: LiteVAE's encoder works in "
            f"strips. {x.shape[-1]}x{x.shape[-2]} pixels take {needs / GIB:.3g} GiB, more than "
            f"{memory / GIB:.3g}: allow more memory, or a smaller image"
        )
    if encoder.training or x.dtype not in STREAMED:
        raise ValueError(
            "streaming takes float32 or half precision, and evaluation mode: "
            "call model.eval() first"
        )

    # One image after the other.
    moments = []
    for number, image in enumerate(x.split(1)):

        def report(done: float, number: int = number) -> None:
            if progress is not None:
                progress((number + done) / len(x))

        def rows(start: int, stop: int, image: Tensor = image) -> Tensor:
            return image[:, :, start:stop]

        stream = Stream(memory, x.device, x.dtype)
        whole = encode_strips(encoder, Strips(shape, rows), stream, report)
        moments.append(whole.read(0, whole.shape[1]).to(x))
    return torch.cat(moments)


class Strips(NamedTuple):
    """An image that is read by strips of rows: (C, H, W), and a function of start and stop.

    It returns floats (1, C, rows, W) in [-1, 1]. H and W are multiples of the encoder's downscale.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]


@torch.no_grad()
def encode_strips(
    encoder: LiteVAE_Encoder,
    image: Strips,
    stream: "Stream",
    progress: Callable[[float], None] = lambda _: None,
) -> "Plane":
    """Compute ``encoder(x)`` of an image that need not be in memory; return a plane of moments.

    The image is read once from top to bottom, but for a few rows between two strips.
    """
    planes = stream.look(encoder, image)
    linear = planes.pop() if encoder.linear is not None else None

    # Each level's extractor takes its plane from the first place, and adds its features at the end.
    stages = encoder.stages()
    sizes = [plane.shape[1] * plane.shape[2] for plane in planes[: len(stages)]]
    sizes.append(image.shape[1] * image.shape[2] // encoder.downscale**2)
    for number, (extractor, factor, pool_conv) in enumerate(stages, start=1):
        h = stream.unet(extractor, [planes.pop(0)])
        if factor > 1:
            h = stream.sweep([h], h.shape[0], 0, partial(F.avg_pool2d, kernel_size=factor), factor)
        if isinstance(pool_conv, nn.Conv2d):
            h = stream.conv(pool_conv, [h])
        planes.append(h)
        del h
        progress(sum(sizes[:number]) / sum(sizes))

    # The aggregator, and the linear path beside it.
    moments = stream.unet(encoder.aggregator, planes)
    progress(1.0)
    if linear is None:
        return moments
    n_z = linear.shape[0]
    return stream.sweep(
        [moments, linear],
        moments.shape[0],
        0,
        lambda given, mean: torch.cat((given[:, :n_z] + mean, given[:, n_z:]), dim=1),
    )


# Of the planes, whatever torch's defaults are.
ON_CPU: Mapping[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class Plane:
    """A layer's output over the whole image, (1, C, H, W) in float32, and its channels' sums.

    It is stored as (H, C, W), in memory or in a temporary file, so that a strip of rows is one
    piece.
    """

    def __init__(self, channels: int, height: int, width: int, in_memory: bool) -> None:
        self.shape = channels, height, width
        # Each channel's sum of the values, and of their squares.
        self.sums = torch.zeros(2, channels, dtype=torch.float64, device="cpu")
        self.rows = torch.empty(height if in_memory else 0, channels, width, **ON_CPU)
        self.file = None if in_memory else tempfile.TemporaryFile(prefix="olvae-")  # noqa: SIM115

    def read(self, start: int, stop: int) -> Tensor:
        """Read a strip, (1, C, rows, W) on the CPU."""
        channels, _, width = self.shape
        if self.file is None:
            rows = self.rows[start:stop]
        else:
            rows = torch.empty(stop - start, channels, width, **ON_CPU)
            self.file.seek(4 * start * channels * width)
            self.file.readinto(rows.numpy().data.cast("B"))
        return rows.transpose(0, 1)[None]

    def write(self, start: int, values: Tensor) -> None:
        """Write a strip, (1, C, rows, W), and add it to the sums: each row must come once."""
        channels, _, width = self.shape
        wide = in_float64(values[0].flatten(1))
        self.sums += torch.stack((wide.sum(1), wide.square().sum(1))).cpu()
        rows = values[0].transpose(0, 1)
        if self.file is None:
            self.rows[start : start + rows.shape[0]] = rows
        else:
            self.file.seek(4 * start * channels * width)
            self.file.write(np.ascontiguousarray(rows.float().cpu().numpy()).data.cast("B"))


class Stream:
    """Run a UNet layer by layer over whole planes, with one strip of rows on the device at a time.

    Layers of methods:

    - ``look`` makes the first planes from the image;
    - ``unet`` walks through the UNet's blocks as its forward pass does, with planes for tensors;
      ``step``, ``post_activation`` and ``pre_activation`` do so for one block;
    - ``conv`` and ``norm_silu`` make one sweep's function. A norm costs no sweep of its own: its
      input's sums are known, so it is a scale and a shift that the next convolution applies to
      each strip;
    - ``sweep`` reads the input planes strip by strip, and writes one output plane.

    Example: a 3x3 convolution (reach 1) over 1000 rows, 300 at a time. For rows 300 to 600 of the
    output it reads rows 299 to 601 of the input and cuts the first and last row off the result,
    which the strip's zero padding spoiled. At the image's borders nothing more is read or cut, so
    the padding is the image's own.

    ``left`` is the memory for planes: each takes its bytes from it until it is garbage, and is a
    temporary file if they don't suffice. So no variable may hold a plane that is not needed any
    more.
    """

    def __init__(self, memory: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.strip = memory // 4
        self.left = memory - self.strip

    def plane(self, channels: int, height: int, width: int) -> Plane:
        """Make an empty plane, in memory if it fits."""
        size = 4 * channels * height * width
        plane = Plane(channels, height, width, in_memory=size <= self.left)
        if plane.file is None:
            self.left -= size
            weakref.finalize(plane, self._free, size)
        return plane

    def _free(self, size: int) -> None:
        self.left += size

    def look(self, encoder: LiteVAE_Encoder, image: Strips) -> list[Plane]:
        """Make planes of what the first UNets see, and a last one of the linear path, if any.

        Wavelets longer than Haar's need the whole image at once.
        """
        f = encoder.downscale
        channels, height, width = image.shape
        rows = height
        if encoder.wavelet == "haar":
            # A value of the image in float32, and copies of it and of its bands.
            rows = f * max(1, self.strip // (32 * channels * width * f))
        planes: list[Plane] = []
        for start in range(0, height, rows):
            # The patches of the linear path reach less than f rows beyond the strip.
            stop = min(start + rows, height)
            low = max(0, start - f)
            x = image.read(low, min(height, stop + f)).to(self.device, self.dtype)
            parts = encoder.seen(x[:, :, start - low : stop - low])
            if encoder.linear is not None:
                parts.append(encoder.linear(x)[:, :, (start - low) // f : (stop - low) // f])
            scales = [(stop - start) // part.shape[2] for part in parts]
            if not planes:
                for part, scale in zip(parts, scales, strict=True):
                    planes.append(self.plane(part.shape[1], height // scale, width // scale))
            for plane, part, scale in zip(planes, parts, scales, strict=True):
                plane.write(start // scale, part)
        return planes

    def sweep(
        self,
        inputs: Sequence[Plane],
        channels: int,
        reach: int,
        run: Callable[..., Tensor],
        shrink: int = 1,
    ) -> Plane:
        """Make a plane of ``channels`` by ``run``, strip by strip; it gets a strip of each input.

        The inputs' strips are ``reach`` rows wider than the output's, on both sides. The output is
        ``shrink`` times smaller.
        """
        height, width = (side // shrink for side in inputs[0].shape[1:])
        out = self.plane(channels, height, width)
        # A row of the inputs and the output in float32, four times: layers copy both.
        per_row = 4 * width * 4 * (channels + sum(plane.shape[0] for plane in inputs) * shrink**2)
        rows = max(1, self.strip // per_row - 2 * reach)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            low = max(0, start - reach)
            high = min(height, stop + reach)
            strips = (plane.read(shrink * low, shrink * high) for plane in inputs)
            values = run(*(strip.to(self.device, self.dtype) for strip in strips))
            out.write(start, values[:, :, start - low : stop - low])
        return out

    def conv(
        self, conv: nn.Module, inputs: Sequence[Plane], before: Function = lambda x: x
    ) -> Plane:
        """Apply a convolution to concatenated inputs, after a function of single positions."""
        assert isinstance(conv, nn.Conv2d)
        reach = conv.kernel_size[0] // 2
        return self.sweep(
            inputs, conv.out_channels, reach, lambda *strips: conv(before(torch.cat(strips, dim=1)))
        )

    def norm_silu(self, norm: nn.GroupNorm, inputs: Sequence[Plane]) -> Function:
        """Make a function of strips: GroupNorm with the whole image's statistics, then SiLU."""
        # Mean and 1 / standard deviation of each group, from the sums of its channels.
        _, height, width = inputs[0].shape
        sums = torch.cat([plane.sums for plane in inputs], dim=1)  # (2, C)
        grouped = sums.unflatten(1, (norm.num_groups, -1))  # (2, groups, C / groups)
        repeat = grouped.shape[2]
        mean, square = grouped.sum(2) / (repeat * height * width)
        rstd = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()

        # The same for each channel, (C, 1, 1), and the norm's own weight and bias.
        each = torch.stack((mean, rstd)).repeat_interleave(repeat, dim=1)  # (2, C)
        shift, scale = each.float().to(self.device)[:, :, None, None]
        weight = norm.weight.view(-1, 1, 1)
        bias = norm.bias.view(-1, 1, 1)
        return lambda x: F.silu((x.float() - shift) * scale * weight + bias).to(x.dtype)

    def post_activation(self, block: PostActivationBlock, inputs: Sequence[Plane]) -> Plane:
        h = self.conv(block.conv1, inputs)
        h = self.conv(block.conv2, [h], self.norm_silu(block.norm1, [h]))
        activate = self.norm_silu(block.norm2, [h])
        skip = block.residual_conv
        # The last norm and the skip connection in one sweep: both see single positions.
        return self.sweep(
            [h, *inputs], h.shape[0], 0, lambda last, *x: activate(last) + skip(torch.cat(x, dim=1))
        )

    def pre_activation(self, block: PreActivationBlock, inputs: Sequence[Plane]) -> Plane:
        h = self.conv(block.conv1, inputs, self.norm_silu(block.norm1, inputs))
        activate = self.norm_silu(block.norm2, [h])
        conv = block.conv2
        skip = block.shortcut
        # The second convolution and the skip connection in one sweep.
        return self.sweep(
            [h, *inputs],
            conv.out_channels,
            1,
            lambda last, *x: conv(activate(last)) + skip(torch.cat(x, dim=1)),
        )

    def step(self, step: nn.Module, inputs: Sequence[Plane]) -> Plane:
        """Run a block, or a convolution between levels, on concatenated inputs."""
        if isinstance(step, PostActivationBlock):
            return self.post_activation(step, inputs)
        if isinstance(step, PreActivationBlock):
            return self.pre_activation(step, inputs)
        return self.conv(step, inputs)

    def unet(self, unet: nn.Module, inputs: list[Plane]) -> Plane:
        """Run a UNet on concatenated inputs; the list is emptied, so that they can be freed."""
        assert isinstance(unet, UNet)
        h = self.conv(unet.init_conv, inputs)
        inputs.clear()

        # As in UNet.forward: blocks on the way down leave a skip, blocks on the way up take one.
        skips: list[Plane] = []
        down, middle, up = unet.steps()
        for step in down:
            h = self.step(step, [h])
            if not isinstance(step, nn.Conv2d):
                skips.append(h)
        for step in middle:
            h = self.step(step, [h])
        for step in up:
            if isinstance(step, nn.Conv2d):
                h = self.step(step, [h])
            else:
                h = self.step(step, [h, skips.pop()])
        return self.conv(unet.conv_out, [h])
