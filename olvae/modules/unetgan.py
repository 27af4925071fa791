"""UNetGAN: a discriminator with logits for the image and for every pixel (Schönfeld et al. 2020).

Its convolutions have spectral norm, whose power iteration is here too (Miyato et al. 2018).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from olvae.library_internals import SPECTRAL_VECTORS, compiled_call, convolve, norms_of_each
from olvae.modules.mixed_precision import Operands, casts_together, no_autocast

# Widths of the blocks on the way down and on the way up, in units of base_channels, by the size in
# pixels of the published network (Schönfeld et al. 2020, arXiv 2002.12655).
_LAYOUTS = {
    128: ((1, 2, 4, 8, 16), (8, 4, 2, 1, 1)),
    256: ((1, 2, 4, 8, 8, 16), (8, 8, 4, 2, 1, 1)),
}


class SpectralConv2d(nn.Conv2d):
    """A convolution divided by its largest singular value (Miyato et al. 2018).

    Orthogonal init, zero bias; the arguments are Conv2d's. The weight is taken as a matrix
    (out_channels, in_channels k k). One power iteration per forward pass in training, none in
    evaluation. The normalised weight is computed in float32 under autocast too.
    """

    kept: Tensor | None = None  # the normalised weight, within :func:`shared_weights`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        spectral_norm(self)

    @property
    def norm(self) -> Any:
        """torch's parametrization of the weight."""
        return self.get_submodule("parametrizations.weight")

    @staticmethod
    def derive(layers: Sequence["SpectralConv2d"]) -> list[Operands]:
        """Return the normalised weight and the bias of each layer."""
        return [(layer._normalised(), layer.bias) for layer in layers]

    def _normalised(self) -> Tensor:
        if self.kept is None:
            # torch runs a power iteration here.
            return self.weight
        # It may have a graph from before the layer was frozen, in which no gradient must flow.
        return self.kept if self.norm.original.requires_grad else self.kept.detach()

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            weight = self._normalised()
        return convolve(self, x, weight, self.bias)


def stop_power_iterations(module: nn.Module) -> None:
    """Turn off the power iterations of forward passes; call :func:`power_iteration` per update.

    Then all passes of an update use the same weights, and the gradients of k micro-batches add up
    to the gradient of one batch k times as large.
    """
    for layer in _spectral_layers(module):
        layer.norm[0].n_power_iterations = 0


@contextmanager
def shared_weights(module: nn.Module) -> Iterator[None]:
    """Normalise each weight once for all forward passes in this context.

    On a GPU only, where kernel launches take the time; elsewhere, and in a compiled module, each
    pass normalises its own. Here the passes' gradients are added before the normalisation instead
    of after it, which rounds differently. Within another such context this one does nothing. The
    weights must not change inside, and one backward pass takes all passes whose gradients reach
    them.
    """
    layers = _spectral_layers(module)
    on_gpu = compiled_call(module) is None and all(p.is_cuda for p in module.parameters())
    if not on_gpu or any(layer.kept is not None for layer in layers):
        layers = []
    try:
        with no_autocast(next(module.parameters())):
            for layer in layers:
                layer.kept = layer.weight
        yield
    finally:
        for layer in layers:
            layer.kept = None


@torch.no_grad()
def power_iteration(module: nn.Module) -> None:
    """Run one power iteration of every :class:`SpectralConv2d` in ``module``, in any mode.

    In float32, as the weights are.
    """
    norms = [layer.norm for layer in _spectral_layers(module)]
    if not norms:
        return
    matrices = [norm.original.flatten(1) for norm in norms]  # (out_channels, in_channels k k)
    with no_autocast(next(module.parameters())):
        # u <- W v / |W v|, then v <- W^T u / |W^T u|: torch's iteration, for all layers at once.
        for updated, other in (SPECTRAL_VECTORS, reversed(SPECTRAL_VECTORS)):
            vectors = [getattr(norm[0], other) for norm in norms]
            products = [m.mv(vector) for m, vector in zip(matrices, vectors, strict=True)]
            lengths = norms_of_each(products, least=1e-12)
            for norm, product, length in zip(norms, products, lengths, strict=True):
                torch.div(product, length, out=getattr(norm[0], updated))
            matrices = [m.mT for m in matrices]


def _spectral_layers(module: nn.Module) -> list[SpectralConv2d]:
    return [m for m in module.modules() if isinstance(m, SpectralConv2d)]


class UNetGAN(nn.Module):
    """BigGAN-style residual blocks in a U, with spectral norm and orthogonal init [R].

    Each block on the way down halves the image; at its end, ReLU and a sum over the pixels give one
    logit per image. Each block on the way up doubles it, and all but the first also take the
    features of the same size from the way down; a plain 1x1 convolution gives one logit per pixel.

    Args:
        in_channels: of the images.
        base_channels: the width: 16, 32, 64 for UNetGAN-S, M, L.
        image_size: the intended size in pixels. Below 256 the network has five levels, like the
            paper's for 128 px, else six, like the paper's for 256 px. Both take images of any size
            in multiples of 64.
    """

    num_outputs = 2

    def __init__(
        self, in_channels: int = 3, base_channels: int = 16, image_size: int = 256
    ) -> None:
        super().__init__()
        if image_size < 64 or image_size % 64:
            raise ValueError(f"UNetGAN's image_size must be a multiple of 64, got {image_size}")
        down_widths, up_widths = _LAYOUTS[256 if image_size >= 256 else 128]
        down = [base_channels * m for m in down_widths]
        up = [base_channels * m for m in up_widths]

        # Block i leads from the width before, which is the image's channels at first.
        self.down = nn.ModuleList(
            _DownBlock(c_in, c_out) for c_in, c_out in zip([in_channels, *down], down, strict=False)
        )
        self.image_head = SpectralConv2d(down[-1], 1, kernel_size=1)

        # On the way up a block's input is the one before, beside a skip of the same size.
        skips = [0, *reversed(down[:-1])]
        self.up = nn.ModuleList(
            _UpBlock(c_in + skip, c_out)
            for c_in, skip, c_out in zip([down[-1], *up], skips, up, strict=False)
        )
        # The last width is the base's.
        self.pixel_head = nn.Conv2d(base_channels, 1, kernel_size=1)
        nn.init.orthogonal_(self.pixel_head.weight)
        nn.init.zeros_(self.pixel_head.bias)  # type: ignore[arg-type]

    @casts_together
    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> [logits of pixels (B, 1, H, W), of the image (B, 1)].

        H and W are multiples of 64.
        """
        if x.ndim != 4 or x.shape[-2] % 64 or x.shape[-1] % 64:
            raise ValueError(
                "UNetGAN takes images (B, C, H, W) with H and W multiples of 64, "
                f"got {tuple(x.shape)}"
            )
        features: list[Tensor] = []
        for block in self.down:
            x = block(x, is_image=not features)
            features.append(x)  # (B, width, H/2^i, W/2^i)
        pooled = F.relu(features.pop()).sum(dim=(2, 3), keepdim=True)  # (B, 16 base, 1, 1)
        image_logits = self.image_head(pooled).flatten(1)  # (B, 1)

        x = self.up[0](x)
        for block in self.up[1:]:
            x = block(x, features.pop())
        return [self.pixel_head(x), image_logits]  # (B, 1, H, W), (B, 1)


class _Block(nn.Module):
    """Two 3x3 convolutions and a 1x1 shortcut around them.

    On both ways the shortcut is computed at the larger size, not the smaller one, to match the
    published operation counts.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = SpectralConv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv2 = SpectralConv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = SpectralConv2d(in_channels, out_channels, kernel_size=1)


class _DownBlock(_Block):
    """ReLU (not on an image), conv, ReLU, conv, plus the shortcut; then the mean of 2x2 pixels."""

    def forward(self, x: Tensor, is_image: bool) -> Tensor:
        h = self.conv1(x if is_image else F.relu(x))
        h = self.conv2(F.relu(h))
        return F.avg_pool2d(h + self.shortcut(x), kernel_size=2)  # (B, out, H/2, W/2)


class _UpBlock(_Block):
    """Nearest upsampling; ReLU, conv, ReLU, conv, plus the shortcut."""

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        x = torch.cat((x, *skip), dim=1)
        x = F.interpolate(x, scale_factor=2, mode="nearest")  # (B, in, 2h, 2w)
        h = self.conv1(F.relu(x))
        out: Tensor = self.conv2(F.relu(h)) + self.shortcut(x)
        return out  # (B, out, 2h, 2w)
