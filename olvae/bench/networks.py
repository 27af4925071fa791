"""Networks measured: speed and memory beside Stable Diffusion's, the wavelet transform beside PyWavelets, and the
README's tables of parameters and multiply-accumulates."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import pywt
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from olvae.bench.timing import clocked, measure
from olvae.models.large.tiling import peak_bytes
from olvae.modules.base import Decoder, ShapesOnly, count_macs, count_parameters
from olvae.modules.gigagan import GigaGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.patchgan import PatchGAN
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.unetgan import UNetGAN
from olvae.modules.wavelet import dwt2

__all__ = [
    "DECODERS",
    "ENCODERS",
    "SIZES",
    "NetworkRow",
    "bench_dwt",
    "bench_networks",
    "forward_bytes",
    "network_table",
    "print_table",
]

LATENT, FACTOR = 12, 8
"""Latent channels, and pixels per latent position along a side."""

SIZES: tuple[Literal["S", "B", "M", "L"], ...] = ("S", "B", "M", "L")

PEER = "sd"
"""The network that ratios are relative to."""

ENCODERS: Mapping[str, Callable[[], nn.Module]] = {
    PEER: partial(SDEncoder, latent_dim=2 * LATENT),
    **{scale: partial(LiteVAE_Encoder, scale=scale, latent_dim=2 * LATENT) for scale in SIZES},
}

DECODERS: Mapping[str, Callable[[], nn.Module]] = {
    PEER: partial(SDDecoder, z_channels=LATENT),
    "open_litevae": partial(LiteVAE_Decoder, z_channels=LATENT),
    "open_litevae, folded": lambda: fold_smc(LiteVAE_Decoder(z_channels=LATENT)),
    "paper_smc": partial(LiteVAE_Decoder, z_channels=LATENT, variant="paper_smc"),
    "paper_smc, folded": lambda: fold_smc(LiteVAE_Decoder(z_channels=LATENT, variant="paper_smc")),
}


def bench_networks(
    networks: Mapping[str, Callable[[], nn.Module]], shape: tuple[int, int, int, int], device: str, rounds: int = 3
) -> list[dict[str, Any]]:
    """Time a forward pass of each network in turn; float32, without gradients.

    Args:
        networks: functions that build them, by name; ratios are relative to the one named ``sd``.
        shape: of the input.
        rounds: measured passes of each network after a warm-up; the fastest counts.

    Returns:
        For each network: name, params, images_per_s, ratio (of images per second to the peer's) and
        peak_memory_bytes besides parameters and input, measured on a GPU, computed from shapes on the CPU.
    """
    built = {name: build().eval().to(device) for name, build in networks.items()}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    memory = {name: forward_bytes(network, x) for name, network in built.items()}
    best = _best_seconds({name: partial(network, x) for name, network in built.items()}, device, rounds)
    return [
        {
            "name": name,
            "params": count_parameters(network),
            "images_per_s": shape[0] / best[name],
            "ratio": best[PEER] / best[name],
            "peak_memory_bytes": memory[name],
        }
        for name, network in built.items()
    ]


def forward_bytes(network: nn.Module, x: Tensor) -> int:
    """The peak of bytes of a forward pass without gradients, beside parameters and input.

    Measured on a GPU, computed from shapes on the CPU.
    """
    if x.device.type != "cuda":
        return peak_bytes(network, lambda module, images: module(images), tuple(x.shape))
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    with torch.inference_mode():
        network(x)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before


@torch.inference_mode()
def _best_seconds(functions: Mapping[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    times = measure({name: clocked(function, device) for name, function in functions.items()}, device, rounds)
    return {name: measured.best for name, measured in times.items()}


PYWAVELETS = "PyWavelets"


def bench_dwt(batch_size: int, size: int, wavelet: str, device: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Time one level of the transform of RGB images by each implementation in turn; float32.

    PyWavelets always runs on the CPU. The strided convolution has the same filters, four per channel, and is what one
    would write without a library; Haar only.

    Returns:
        For each implementation: name, images_per_s, ratio (to PyWavelets) and max_difference from PyWavelets.
    """
    x = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    on_device = x.to(device)
    implementations: dict[str, Callable[[], Tensor]] = {
        PYWAVELETS: lambda: _pywavelets(x, wavelet),
        "olvae.modules.wavelet.dwt2": lambda: dwt2(on_device, wavelet),
    }
    if wavelet == "haar":
        filters = _haar_filters().to(device)
        implementations["strided convolution"] = lambda: _convolution(on_device, filters)
    expected = _pywavelets(x, wavelet)
    best = _best_seconds(implementations, device, rounds)
    with torch.inference_mode():
        differences = {name: float((run().cpu() - expected).abs().max()) for name, run in implementations.items()}
    return [
        {
            "name": name,
            "images_per_s": batch_size / best[name],
            "ratio": best[PYWAVELETS] / best[name],
            "max_difference": differences[name],
        }
        for name in implementations
    ]


def _pywavelets(x: Tensor, wavelet: str) -> Tensor:
    ll, (height, width, diagonal) = pywt.dwt2(x.numpy(), wavelet, mode="periodization")
    return torch.cat([torch.from_numpy(band) for band in (ll, width, height, diagonal)], dim=1)  # (B, 4C, H/2, W/2)


def _haar_filters() -> Tensor:
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    bands = torch.tensor(signs, dtype=torch.float32).reshape(4, 1, 2, 2) / 2.0
    return bands.repeat(3, 1, 1, 1)  # (12, 1, 2, 2), four for each channel


def _convolution(x: Tensor, filters: Tensor) -> Tensor:
    bands: Tensor = F.conv2d(x, filters, stride=2, groups=3)  # (B, 12, H/2, W/2), channel by channel
    ordered: Tensor = bands.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)  # band by band
    return ordered


class NetworkRow(NamedTuple):
    """A network: parameters, and multiply-accumulates for one 256x256 image, counted and as published."""

    group: str
    variant: str
    name: str
    params: int
    macs: int
    published_params: float
    published_macs: float | None


# Published for other latents than those timed above: the README's encoders have latent_dim = n_z = 12, as the published
# YAML says [M], the paper's have latent_dim = 2 n_z = 8, and the Stable Diffusion networks have n_z = 4.
# In millions of parameters and billions of multiply-accumulates.
_PUBLISHED: tuple[tuple[str, str, str, float, float | None, Callable[[], nn.Module]], ...] = (
    *(
        ("encoder", "open_litevae", scale, params, macs, partial(LiteVAE_Encoder, 12, scale))
        for scale, params, macs in zip(SIZES, (0.97, 6.6, 34.0, 41.15), (5.5, 37.4, 234.9, 242.1), strict=True)  # [R]
    ),
    *(
        ("encoder", "paper", scale, params, None, partial(LiteVAE_Encoder, 8, scale, "paper"))
        for scale, params in zip(SIZES, (1.03, 6.75, 32.75, 41.42), strict=True)  # [P]
    ),
    ("encoder", "sd", "sd", 34.16, 137, partial(SDEncoder, latent_dim=8)),  # [R]
    ("decoder", "open_litevae", "open_litevae", 53.33, 324, LiteVAE_Decoder),
    ("decoder", "paper_smc", "paper_smc", 48.46, None, partial(LiteVAE_Decoder, variant="paper_smc")),  # [P]
    ("decoder", "sd", "sd", 49.49, 312, partial(SDDecoder, z_channels=4)),  # [R]
    ("discriminator", "patchgan", "PatchGAN", 2.77, 3.15, PatchGAN),  # [R]
    ("discriminator", "gigagan", "GigaGAN", 14.38, 3.23, GigaGAN),  # [R]
    *(
        ("discriminator", "unetgan", f"UNetGAN-{size}", params, macs, partial(UNetGAN, base_channels=base))
        for size, base, params, macs in (("S", 16, 2.75, 2.31), ("M", 32, 11.0, 9.13), ("L", 64, 44.1, 36.34))  # [R]
    ),
)


def network_table() -> list[NetworkRow]:
    """Count the networks of the README's tables; on the meta device, so in seconds and without memory."""
    rows = []
    for group, variant, name, params, macs, build in _PUBLISHED:
        with ShapesOnly(), torch.device("meta"):  # the spectral norms' first power iterations among them
            module = build()
        shape = (module.z_channels, 32, 32) if isinstance(module, Decoder) else (3, 256, 256)
        counted = count_parameters(module), count_macs(module, 1, *shape)
        rows.append(NetworkRow(group, variant, name, *counted, params * 1e6, None if macs is None else macs * 1e9))
    return rows


def print_table(rows: list[NetworkRow]) -> None:
    """Print the rows as a table to standard output."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="Networks at 256x256: counted now, and as published",
    )
    for heading in ("group", "variant", "name"):
        table.add_column(heading, no_wrap=True)
    for heading in ("M\nparams", "pub-\nlished", "\nGMACs", "pub-\nlished"):
        table.add_column(heading, justify="right")
    group = ""
    for row in rows:
        if row.group != group and group:
            table.add_section()
        group = row.group
        table.add_row(
            row.group,
            row.variant,
            row.name,
            f"{row.params / 1e6:.4f}",
            f"{row.published_params / 1e6:.2f}",
            f"{row.macs / 1e9:.2f}",
            "-" if row.published_macs is None else f"{row.published_macs / 1e9:.1f}",
        )
    Console().print(table)
