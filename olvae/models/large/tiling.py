"""Decode in tiles, each from exactly the latent positions it needs; pad; compute peak memory."""

import copy
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from olvae.library_internals import TorchDispatchMode, forget_hooks, hooks_around, tree_leaves
from olvae.modules.base import Decoder, Stage

GIB = 2**30
# In inference mode, torch dispatches conv2d.
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)

# Rows or columns: start and stop, without the stop.
Range = tuple[int, int]


class Windows(Protocol):
    """A latent whose windows are read, as ``z[..., rows, columns]``: a tensor, or a file's."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, window: Any, /) -> Tensor: ...


def pad_to_multiple(x: Tensor, f: int) -> Tensor:
    """(..., H, W) -> (..., H', W'), the next multiples of f; :func:`crop_to` undoes it.

    Any dtype. Rows are added at the bottom and columns at the right, so that latent position
    (i, j) belongs to the pixels from (f i, f j) for any size. They are the image's reflection, or
    copies of its last row or column along an axis with no more pixels than are added [D].
    """
    for axis in (-2, -1):
        pad = -x.shape[axis] % f
        if not pad:
            continue
        last = x.shape[axis] - 1
        places = torch.arange(last + 1 + pad, device=x.device)
        mirrored = last - (places - last).abs() if pad <= last else places.clamp(max=last)
        x = x.index_select(axis % x.ndim, mirrored)
    return x


def crop_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop (..., H', W') to the image before padding, (..., H, W); ``size`` is (H, W)."""
    return x[..., : size[0], : size[1]]


def receptive_field(decoder: Decoder) -> int | None:
    """Count the latent positions beyond its own, on each side, that a pixel depends on; tight [D].

    None for a decoder such as Stable Diffusion's, whose GroupNorm and attention depend on the whole
    latent.
    """
    paths = decoder.paths()
    if paths is None:
        return None
    f = decoder.upscale
    far = 2**20  # a position away from any border
    needed = [_needed(stages, (far * f, (far + 1) * f), 2 * far)[0] for stages in paths]
    return max(max(far - low, high - 1 - far) for low, high in needed)


def decode_window(
    paths: Sequence[Sequence[Stage]], z: Windows, window: tuple[Range, Range]
) -> Tensor:
    """Decode a window of the image, rows and columns in pixels, from the positions it needs.

    Whatever the rest does not need is cut off between two stages. At the image's borders nothing is
    cut, so the zero padding there is the whole image's.
    """
    outputs = []
    for stages in paths:
        rows = _needed(stages, window[0], z.shape[-2])
        columns = _needed(stages, window[1], z.shape[-1])
        h = z[..., slice(*rows[0]), slice(*columns[0])]
        for stage, (row, next_row), (column, next_column) in zip(
            stages, pairwise(rows), pairwise(columns), strict=True
        ):
            # Where the stage's output starts, in its own positions.
            top = row[0] * stage.scale
            left = column[0] * stage.scale
            h = stage.run(h)[
                ...,
                next_row[0] - top : next_row[1] - top,
                next_column[0] - left : next_column[1] - left,
            ]
        outputs.append(h)
    return reduce(torch.add, outputs)


def _needed(stages: Sequence[Stage], wanted: Range, size: int) -> list[Range]:
    """Find along one axis the range needed before each stage, and last the wanted one.

    ``size`` is the latent's. Example: stages (reach 1), (reach 0, scale 2), (reach 1) and pixels 8
    to 16 of a latent with 16 positions need [(2, 10), (3, 9), (7, 17), (8, 16)].
    """
    for stage in stages:
        size *= stage.scale
    out = [wanted]
    for stage in reversed(stages):
        size //= stage.scale
        low = out[-1][0] - stage.reach
        high = out[-1][1] + stage.reach
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
    """Compute ``decoder(z)`` tile by tile, equal to rounding: each tile has all that it depends on.

    A tile's side is ``tile`` latent positions. With ``memory``, in bytes beside z, the image and
    the parameters, as many whole images at once as fit are decoded; if not even one does, each in
    tiles of the largest side that fits. A decoder without a finite :func:`receptive_field` is never
    tiled. ValueError if it can't be tiled, or no tile is small enough. ``progress`` is called after
    every tile, or whole images.
    """
    if (tile is None) == (memory is None):
        raise ValueError("give either `tile` or `memory`")
    paths = decoder.paths()
    f = decoder.upscale
    height, width = z.shape[-2:]

    # How many images at a time, and the tile's side; None decodes them whole.
    together = len(z)
    sees = f"{type(decoder).__name__} sees the whole latent at every position"
    if memory is not None:
        one = (1, *z.shape[1:])
        needs = max(1, peak_bytes(decoder, lambda d, x: d(x), one))
        if paths is None and needs > memory:
            raise ValueError(
                f"{sees} and can't be tiled; decoding {f * width}x{f * height} pixels whole takes "
                f"{needs / GIB:.3g} GiB, more than {memory / GIB:.3g}: allow more memory, or a "
                "smaller image"
            )
        together = max(1, memory // needs)
        if needs > memory:
            tile = tile_for(decoder, memory, one)
    elif paths is None:
        raise ValueError(f"{sees}: leave `tile` out")
    elif tile is not None and tile < 1:
        raise ValueError(f"a tile has at least one latent position, got {tile}")
    image = torch.empty(
        len(z), decoder.out_channels, f * height, f * width, dtype=z.dtype, device=z.device
    )

    # Whole images, or part of the images at a time, each part in tiles.
    if tile is None or len(z) > together:
        decode = decoder if tile is None else partial(decode_tiled, decoder, tile=tile)
        for start in range(0, len(z), together):
            image[start : start + together] = decode(z[start : start + together])
            if progress is not None:
                progress(min(1.0, (start + together) / len(z)))
        return image

    # Tiles of all images.
    assert paths is not None
    latent = decoder.windows(z)
    windows = [
        (rows, columns) for rows in split(height, tile, f) for columns in split(width, tile, f)
    ]
    for done, (rows, columns) in enumerate(windows, start=1):
        image[..., slice(*rows), slice(*columns)] = decode_window(paths, latent, (rows, columns))
        if progress is not None:
            progress(done / len(windows))
    return image


def split(size: int, tile: int, f: int) -> list[Range]:
    """Cut a side into the fewest pieces of at most ``tile`` positions, about equal; in pixels."""
    pieces = -(-size // tile)
    return list(pairwise(f * (size * i // pieces) for i in range(pieces + 1)))


def tile_bytes(decoder: Decoder, tile: int, shape: tuple[int, ...]) -> int:
    """Compute :func:`peak_bytes` of the largest tile of a latent of shape (B, z_channels, h, w)."""
    f = decoder.upscale
    # In the middle of the latent, because a tile at a border needs fewer positions.
    window: list[Range] = []
    for size in shape[-2:]:
        side = min(tile, size)
        start = (size - side) // 2
        window.append((f * start, f * (start + side)))
    rows, columns = window
    shape = (shape[0], decoder.z_channels, *shape[-2:])
    return peak_bytes(
        decoder, lambda d, z: decode_window(d.paths(), d.windows(z), (rows, columns)), shape
    )


def tile_for(decoder: Decoder, memory: int, shape: tuple[int, ...]) -> int:
    """Find the largest tile within ``memory`` bytes for a latent of that shape.

    ValueError if one position takes more.
    """
    tile = bisect_right(
        range(1, max(shape[-2:]) + 1), memory, key=lambda tile: tile_bytes(decoder, tile, shape)
    )
    if not tile:
        least = tile_bytes(decoder, 1, shape) / GIB
        raise ValueError(
            f"the smallest tile takes {least:.3g} GiB, more than {memory / GIB:.3g}: "
            "allow more memory"
        )
    return tile


def default_memory(device: torch.device) -> int:
    """The default limit in bytes: half of a GPU's free memory, or 1 GiB on the CPU."""
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(GIB, free // 2)
    if device.type != "cuda":
        return GIB
    return int(torch.cuda.mem_get_info(device)[0]) // 2


def peak_bytes(
    module: nn.Module, run: Callable[[Any, Tensor], object], shape: tuple[int, ...]
) -> int:
    """Compute the peak of bytes in tensors during ``run(module, x)``, beside x and parameters.

    It runs without gradients on the meta device, from shapes alone, in the parameters' dtype, in
    milliseconds for any size. A convolution's input and output count twice, because oneDNN and
    cuDNN may copy both into another layout.
    """
    # Of several dtypes the widest computes: diffusers' layerwise casting stores in narrower ones.
    dtype = max(
        (parameter.dtype for parameter in module.parameters()),
        key=lambda one: one.itemsize,
        default=torch.float32,
    )

    # Copy the module to the meta device, without hooks: deepcopy takes what the memo has for a
    # tensor, instead of copying it.
    memo: dict[int, Any] = {}
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, dtype=dtype, device="meta"), requires_grad=False
        )
    for part in module.modules():
        memo |= {id(hook): () for hook in hooks_around(part)}
    meta = copy.deepcopy(module, memo)
    for part in meta.modules():
        forget_hooks(part)

    x = torch.empty(shape, dtype=dtype, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        run(meta, x)
    return int(live.peak)


class LiveBytes(TorchDispatchMode):
    """Add up the storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Weak references to the storages by id.
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Storages of the arguments: an output that shares one, such as a view, takes no memory.
        known = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known:
                self._count(leaf.untyped_storage())
        extra = 0
        if func in CONVOLUTIONS:
            extra = args[0].nbytes + out.nbytes
        self.peak = max(self.peak, self.now + extra)
        return out

    def _count(self, storage: Any) -> None:
        """Add a new storage, and take it off again when it is freed."""
        key = id(storage)
        size = storage.nbytes()
        if key in self.alive:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
