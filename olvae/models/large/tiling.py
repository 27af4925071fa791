"""Decode in tiles, each from exactly the latent positions that it depends on; pad and crop; compute peak memory."""

import copy
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olvae.modules.base import Decoder, Stage, dtype_of

GIB = 2**30
CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.conv2d.default,
)  # the latter in inference mode

Range = tuple[int, int]  # rows or columns: start and stop, without the stop


def pad_to_multiple(x: Tensor, f: int) -> Tensor:
    """(..., H, W) -> (..., H', W'), the next multiples of f, of any dtype; :func:`crop_to` is the inverse.

    Rows are added at the bottom and columns at the right, so that latent position (i, j) belongs to the pixels from
    (f i, f j) for any size. They are the image's reflection, or copies of its last row or column along an axis with no
    more pixels than are added [D].
    """
    for axis in (-2, -1):
        last = x.shape[axis] - 1
        if pad := -x.shape[axis] % f:
            places = torch.arange(last + 1 + pad, device=x.device)
            mirrored = last - (places - last).abs() if pad <= last else places.clamp(max=last)
            x = x.index_select(axis % x.ndim, mirrored)
    return x


def crop_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop (..., H', W') to the image before padding, (..., H, W); ``size`` is (H, W)."""
    return x[..., : size[0], : size[1]]


def receptive_field(decoder: Decoder) -> int | None:
    """The most latent positions beyond its own, on each side, that an output pixel depends on; tight [D].

    None for a decoder such as Stable Diffusion's, whose GroupNorm and attention depend on the whole latent.
    """
    paths = decoder.paths()
    if paths is None:
        return None
    f, far = decoder.upscale, 2**20  # a position away from any border
    needed = [_needed(stages, (far * f, (far + 1) * f), 2 * far)[0] for stages in paths]
    return max(max(far - low, high - 1 - far) for low, high in needed)


def decode_window(
    paths: Sequence[Sequence[Stage]], z: Tensor, window: tuple[Range, Range]
) -> Tensor:
    """Decode a window of the image, rows and columns in pixels, from the latent positions that it depends on."""
    return reduce(torch.add, [_run_window(stages, z, window) for stages in paths])


def _run_window(stages: Sequence[Stage], z: Tensor, window: tuple[Range, Range]) -> Tensor:
    """Compute one path's window, cutting off between two stages whatever the rest does not need.

    At the image's borders nothing is cut, and the zero padding is that of the whole image.
    """
    rows = _needed(stages, window[0], z.shape[-2])
    columns = _needed(stages, window[1], z.shape[-1])
    h = z[..., slice(*rows[0]), slice(*columns[0])]
    for stage, (row, next_row), (column, next_column) in zip(
        stages, pairwise(rows), pairwise(columns), strict=True
    ):
        top, left = row[0] * stage.scale, column[0] * stage.scale  # where the stage's output starts
        h = stage.run(h)[
            ...,
            next_row[0] - top : next_row[1] - top,
            next_column[0] - left : next_column[1] - left,
        ]
    return h


def _needed(stages: Sequence[Stage], wanted: Range, size: int) -> list[Range]:
    """Along one axis: the range needed before each stage, and last the wanted one; ``size`` is the latent's."""
    for stage in stages:
        size *= stage.scale
    out = [wanted]
    for stage in reversed(stages):
        size //= stage.scale
        low, high = out[-1][0] - stage.reach, out[-1][1] + stage.reach
        out.append((max(0, low // stage.scale), min(size, -(-high // stage.scale))))
    return out[::-1]


@torch.no_grad()
def decode_tiled(
    decoder: Decoder,
    z: Tensor,
    tile: int | None = None,
    memory: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """``decoder(z)`` tile by tile: equal to rounding, because each tile includes all that it depends on.

    A tile's side is ``tile`` latent positions. With ``memory``, in bytes beside z, the image and the parameters, as
    many whole images at once as fit are decoded; if not even one does, each in tiles of the largest side that fits.
    A decoder without a finite :func:`receptive_field` is never tiled. ValueError if it can't be tiled, or no tile is
    small enough. ``progress`` is called after every tile, or whole images.
    """
    if (tile is None) == (memory is None):
        raise ValueError("give either `tile` or `memory`")
    paths, together = decoder.paths(), len(z)  # images at a time
    f, (height, width) = decoder.upscale, z.shape[-2:]
    sees = f"{type(decoder).__name__} sees the whole latent at every position"
    if memory is not None:
        needs = max(1, peak_bytes(decoder, lambda d, x: d(x), (1, *z.shape[1:])))
        if paths is None and needs > memory:
            raise ValueError(
                f"{sees} and can't be tiled; decoding {f * width}x{f * height} pixels whole takes {needs / GIB:.3g} "
                f"GiB, more than {memory / GIB:.3g}: allow more memory, or a smaller image"
            )
        together = max(1, memory // needs)
        tile = tile_for(decoder, memory, (1, *z.shape[1:])) if needs > memory else None
    elif paths is None:
        raise ValueError(f"{sees}: leave `tile` out")
    elif tile is not None and tile < 1:
        raise ValueError(f"a tile has at least one latent position, got {tile}")
    image = torch.empty(
        len(z), decoder.out_channels, f * height, f * width, dtype=z.dtype, device=z.device
    )
    if tile is None or len(z) > together:
        decode = decoder if tile is None else partial(decode_tiled, decoder, tile=tile)
        for start in range(0, len(z), together):
            image[start : start + together] = decode(z[start : start + together])
            if progress is not None:
                progress(min(1.0, (start + together) / len(z)))
        return image
    assert paths is not None
    windows = [
        (rows, columns) for rows in split(height, tile, f) for columns in split(width, tile, f)
    ]
    for done, (rows, columns) in enumerate(windows, start=1):
        image[..., slice(*rows), slice(*columns)] = decode_window(paths, z, (rows, columns))
        if progress is not None:
            progress(done / len(windows))
    return image


def split(size: int, tile: int, f: int) -> list[Range]:
    """The fewest pieces of at most ``tile`` positions, of about equal size; in pixels."""
    pieces = -(-size // tile)
    return list(pairwise(f * (size * i // pieces) for i in range(pieces + 1)))


def tile_bytes(decoder: Decoder, tile: int, shape: tuple[int, ...]) -> int:
    """The bytes of the largest tile of a latent of shape (B, z_channels, h, w); see :func:`peak_bytes`."""
    f = decoder.upscale
    sides = [
        (min(tile, size), (size - min(tile, size)) // 2) for size in shape[-2:]
    ]  # in the middle of the latent
    rows, columns = ((f * start, f * (start + side)) for side, start in sides)
    shape = (shape[0], decoder.z_channels, *shape[-2:])
    return peak_bytes(decoder, lambda d, z: decode_window(d.paths(), z, (rows, columns)), shape)


def tile_for(decoder: Decoder, memory: int, shape: tuple[int, ...]) -> int:
    """The largest tile within ``memory`` bytes for a latent of that shape; ValueError if one position takes more."""
    tile = bisect_right(
        range(1, max(shape[-2:]) + 1), memory, key=lambda tile: tile_bytes(decoder, tile, shape)
    )
    if not tile:
        least = tile_bytes(decoder, 1, shape) / GIB
        raise ValueError(
            f"the smallest tile takes {least:.3g} GiB, more than {memory / GIB:.3g}: allow more memory"
        )
    return tile


def default_memory(device: torch.device) -> int:
    """The default limit in bytes: half of a GPU's free memory, or 1 GiB on the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) // 2 if device.type == "cuda" else GIB


def peak_bytes(
    module: nn.Module, run: Callable[[Any, Tensor], object], shape: tuple[int, ...]
) -> int:
    """The peak of bytes in tensors while ``run(module, x)`` runs without gradients, beside x and parameters.

    Computed on the meta device, from shapes alone, in the parameters' dtype, in milliseconds for any size. A
    convolution's input and output count twice, because oneDNN and cuDNN may copy both into another layout.
    """
    meta = _meta_copy(module)
    x = torch.empty(shape, dtype=dtype_of(meta), device="meta")
    with torch.no_grad(), LiveBytes() as live:
        run(meta, x)
    return int(live.peak)


def _meta_copy(module: nn.Module) -> nn.Module:
    """A copy of the module on the meta device, without copying its tensors, and without its hooks."""
    memo: dict[int, Any] = {
        id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()
    }
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=False
        )
    meta = copy.deepcopy(module, memo)
    for part in meta.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return meta


class LiveBytes(TorchDispatchMode):
    """Add up the storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known:
                self._count(leaf.untyped_storage())
        extra = sum(t.nbytes for t in (args[0], out)) if func in CONVOLUTIONS else 0
        self.peak = max(self.peak, self.now + extra)
        return out

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
