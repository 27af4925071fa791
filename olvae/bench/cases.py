"""Benchmarks of `olvae bench`, in groups; and the table of networks that `olvae tables` prints."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import count, cycle, islice, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pywt
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from olvae import config as cfg
from olvae.bench.measure import Case, Setting, Work, clocked, machine, rows_of
from olvae.config import ConfigError
from olvae.data.dataset import MappedSource
from olvae.data.image import Photo, Picture, image_to_tensor
from olvae.data.opening import open_source
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.tar_reading import Entry, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import Batch, Source
from olvae.devices import FULL, PRECISIONS, now, seconds_per_image
from olvae.models.large.tiling import peak_bytes
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.optimization import compile_networks
from olvae.modules.base import Decoder, ShapesOnly, count_macs, count_parameters
from olvae.modules.gigagan import GigaGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.patchgan import PatchGAN
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.unetgan import UNetGAN
from olvae.modules.wavelet import wavedec2

N_Z, F8 = (
    12,
    8,
)  # latent channels, and pixels per latent position along a side, of the networks that are timed
SCALES: tuple[Literal["S", "B", "M", "L"], ...] = ("S", "B", "M", "L")

Networks = Mapping[str, Callable[[], nn.Module]]

ENCODERS: Networks = {
    "sd": partial(SDEncoder, latent_dim=2 * N_Z),
    **{scale: partial(LiteVAE_Encoder, scale=scale, latent_dim=2 * N_Z) for scale in SCALES},
}

DECODERS: Networks = {
    "sd": partial(SDDecoder, z_channels=N_Z),
    "open_litevae": partial(LiteVAE_Decoder, z_channels=N_Z),
    "open_litevae, folded": lambda: fold_smc(LiteVAE_Decoder(z_channels=N_Z)),
    "paper_smc": partial(LiteVAE_Decoder, z_channels=N_Z, variant="paper_smc"),
    "paper_smc, folded": lambda: fold_smc(LiteVAE_Decoder(z_channels=N_Z, variant="paper_smc")),
}

WAVELET_LEVELS = 3

EVERY = "every option"
STEP_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "plain": {},
    "channels-last": {"channels_last": True},
    "checkpoint": {"checkpoint": True},
    "compiled": {"compile": True},
    EVERY: {"channels_last": True, "checkpoint": True, "compile": True},
}
"""Options of the model by which training steps are measured; the first and the last in each precision."""

SECONDS = 1.0  # of a loader, or of decoding alone, in each round
FLOOR_IMAGES = 256  # images that are kept undecoded in memory and decoded in turn

Undecoded = tuple[bytes | Picture, str]


def network_cases(builders: Networks, channels: int, side: int, setting: Setting) -> list[Case]:
    """Each network in each precision and memory layout; the peer is the first, plain."""
    products, x = setting.products(), setting.noise(channels, side)
    cases, peers = list(products.values()), dict[str, Case]()
    sizes = setting.size, setting.batch_size
    eager = {name: build().eval().to(setting.device) for name, build in builders.items()}
    compiled = {
        name: nn.Sequential(network) for name, network in eager.items()
    }  # around it: it stays plain itself
    works = setting.compiled and compile_networks(
        list(compiled.values()), torch.device(setting.device)
    )
    for name, network in eager.items():
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        variants = {
            "eager": (network, torch.contiguous_format),
            "channels-last": (last, torch.channels_last),
            **({"compiled": (compiled[name], torch.contiguous_format)} if works else {}),
        }
        macs = count_macs(network, *x.shape)
        counted = peak_bytes(network, lambda module, images: module(images), x.shape)
        for precision in setting.precisions:
            for variant, (module, layout) in variants.items():
                run = setting.inference(
                    partial(module, x.contiguous(memory_format=layout)), precision
                )
                peer, limits = peers.get(precision), {"of_product": products[precision]}
                memory = counted if (variant, precision) == ("eager", FULL) else None
                case = Case(
                    name,
                    variant,
                    precision,
                    run,
                    len(x),
                    *sizes,
                    macs,
                    "macs",
                    limits,
                    peer,
                    memory,
                )
                peers.setdefault(precision, case)
                cases.append(case)
    return cases


class _Transform(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return wavedec2(x, "haar", WAVELET_LEVELS)


def _wavelet(setting: Setting) -> list[Case]:
    """Three levels of Haar, and their gradient, beside a copy of the images and PyWavelets on the CPU.

    Each level reads its images or LL once and writes as much; so does its gradient.
    """
    x = setting.noise(3, setting.size)
    target, copied = torch.empty_like(x), 2 * x.nbytes  # read and written
    sizes = setting.size, setting.batch_size
    limit = Case(
        "copy",
        "limit",
        FULL,
        setting.inference(lambda: target.copy_(x)),
        0,
        *sizes,
        copied,
        "bytes",
    )
    once = sum(copied / 4**level for level in range(WAVELET_LEVELS))

    def case(name: str, variant: str, run: Work, passes: int, peer: Case | None) -> Case:
        return Case(
            name,
            variant,
            FULL,
            run,
            sizes[1],
            *sizes,
            passes * once,
            "bytes",
            {"of_copy": limit},
            peer,
        )

    plain = partial(
        pywt.wavedec2, x.cpu().numpy(), "haar", mode="periodization", level=WAVELET_LEVELS
    )
    peer = case("PyWavelets, on the CPU", "forward", setting.inference(plain), 1, None)
    transforms = {"wavedec2": _Transform()}
    compiled = _Transform()
    if setting.compiled and compile_networks([compiled], x.device):
        transforms["wavedec2, compiled"] = compiled
    cases = [limit, peer]
    for name, transform in transforms.items():
        backward = clocked(partial(_gradient, transform, x), setting.device)
        cases.append(case(name, "forward", setting.inference(partial(transform, x)), 1, peer))
        cases.append(case(name, "with gradient", backward, 2, None))
    return cases


def _gradient(transform: Callable[[Tensor], list[Tensor]], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    out = transform(leaf)
    return torch.autograd.grad(out, leaf, out)[0]


class TwoForwards(LiteAutoencoderKL):
    """The training step after another forward pass, one per optimizer, as the published module runs it."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self(self.images(batch), sample_posterior=True)
        super().training_step(batch, batch_idx)


def _train(setting: Setting) -> list[Case]:
    """Training steps of each config on random images, without LPIPS, which costs all the same."""
    products = setting.products()
    steps = [case for config in setting.configs for case in _steps(config, setting, products)]
    return [*products.values(), *steps]


def _steps(config: str | Path, setting: Setting, products: Mapping[str, Case]) -> Iterator[Case]:
    params, size, batch_size = read_step(config, setting.size, setting.batch_size)
    plain = {**params, **dict.fromkeys(STEP_OPTIONS[EVERY], False)}
    with FlopCounterMode(display=False) as counter:
        time_steps(LiteAutoencoderKL(**plain), size, batch_size, 0, setting.device)
    macs = counter.get_total_flops() / 2

    def case(model: LiteAutoencoderKL, variant: str, precision: str, peer: Case | None) -> Case:
        limits, lightning = {"of_product": products[precision]}, PRECISIONS[precision].lightning
        run = partial(time_steps, model, size, batch_size, 2, setting.device, lightning)
        return Case(
            str(config),
            variant,
            precision,
            run,
            batch_size,
            size,
            batch_size,
            macs,
            "macs",
            limits,
            peer,
        )

    peer = None
    if params.get("adversary_config") is not None:
        yield (peer := case(TwoForwards(**plain), "two forward passes", FULL, None))
    for variant, options in STEP_OPTIONS.items():
        if variant == "compiled" and not setting.compiled:
            continue
        model = LiteAutoencoderKL(
            **{**plain, **options, "compile": setting.compiled and "compile" in options}
        )
        for precision in setting.precisions if variant in ("plain", EVERY) else [FULL]:
            yield case(model, variant, precision, peer if precision == FULL else None)


def read_step(config: str | Path, size: int, batch_size: int) -> tuple[dict[str, Any], int, int]:
    """The model's params without LPIPS, pixels and batch size: those given, else (0) those of the config."""
    loaded = cfg.load([config], ["model.params.lossconfig.params.lpips_weight=0"])
    if mistakes := cfg.validate(loaded):
        raise ConfigError(*mistakes)
    if loaded["model"].get("from") is not None:
        raise ConfigError(f"{config}: model.from names an autoencoder: give the run's config.yaml")
    params, data = loaded["model"]["params"], loaded.get("data", {}).get("params", {})
    if adversary := params.get("adversary_config"):
        adversary["params"] |= {"start_step": 0, "warmup_updates": 0}  # a step of both players
    size, batch_size = size or data.get("size", 0), batch_size or data.get("batch_size", 0)
    if not batch_size or not size or not isinstance(size, int):
        raise ConfigError(
            f"{config}: has no data.params.size of squares and batch_size: set `size` and `batch_size`"
        )
    return params, size, batch_size


def time_steps(
    model: LiteAutoencoderKL,
    size: int,
    batch_size: int,
    steps: int,
    device: str,
    precision: str = "32-true",
) -> list[float]:
    """Train on random images; the seconds of each step but the first, which warms up."""
    times: list[float] = []

    def note(*_: Any) -> None:
        times.append(now(device))

    trainer = pl.Trainer(
        accelerator="cpu" if device == "cpu" else "cuda",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_batch_start=note, on_train_batch_end=note)],
    )
    shape = batch_size, model.autoencoder.encoder.in_channels, size, size
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trainer.fit(model, repeat({"image": x}, steps + 1))
    return [end - start for start, end in zip(times[2::2], times[3::2], strict=True)]


def _loaders(setting: Setting) -> list[Case]:
    """Training loaders beside decoding and cropping the same images in memory, one by one."""
    cases, usual = [], 64 if setting.kind == "cpu" else 256
    for name in setting.sources:
        source = open_source(
            name, setting.size or usual, setting.batch_size, resized=setting.size > 0
        )
        source.batch_size = setting.batch_size
        sizes = source.size.node, setting.batch_size
        decode = partial(_time_images, _floor(name, source), 1)
        floor = Case(
            name, "limit: decoding alone", "uint8", decode, 1, source.size.node, 1, 1, "images"
        )
        cases.append(floor)
        for workers in setting.workers:
            source.num_workers = workers
            try:
                source.check_processes(1)
            except ValueError as error:
                raise ConfigError(f"`workers` {workers}: {name}: {error}") from error
            run, work, limits = _loader(source, workers), 1 / max(1, workers), {"of_floor": floor}
            cases.append(
                Case(name, f"{workers} workers", "uint8", run, 1, *sizes, work, "images", limits)
            )
    return cases


def _time_images(work: Callable[[], object], images: int) -> list[float]:
    return [seconds_per_image(work, images, SECONDS)]


def _loader(source: Source, workers: int) -> Work:
    """Take batches of a source's training loader, once its processes have started and their queues are empty."""
    seeds = count()

    def run() -> list[float]:
        source.num_workers = workers
        batches = iter(source.train_loader(seed=next(seeds)))
        for _ in islice(batches, 2 * max(1, workers) + 1):
            pass
        return _time_images(lambda: next(batches), source.batch_size)

    return run


def _floor(name: str, source: Source) -> Callable[[], Tensor]:
    """Decode and crop training images that are in memory, in turn."""
    if not isinstance(source, MappedSource | WebDatasetSource):
        raise ConfigError(
            f"data.target: {type(source).__name__} can't be timed against decoding alone"
        )
    rng, images = np.random.default_rng(0), list[Undecoded]()

    def decode(image: Undecoded) -> Tensor:
        return image_to_tensor(
            source.transform(Photo(*image, source.channels, source.pixel_range), rng)
        )

    for image in islice(_undecoded(source), FLOOR_IMAGES):
        with contextlib.suppress(UnreadableImageError):
            decode(image)
            images.append(image)
    if not images:
        raise ValueError(f"{name}: no image of it can be read")
    turns = cycle(images)
    return lambda: decode(next(turns))


def _undecoded(source: MappedSource | WebDatasetSource) -> Iterator[Undecoded]:
    if isinstance(source, WebDatasetSource):
        for shard in source.train:
            entries = read_shard(shard, source.image_key)
            yield from ((entry.data, entry.name) for entry in entries if isinstance(entry, Entry))
        return
    for i in np.random.default_rng(0).permutation(len(source.train)):
        with contextlib.suppress(UnreadableImageError):
            photo = source.train[int(i)]
            yield photo.undecoded(), photo.name


class Group(NamedTuple):
    """Cases that are measured in turns."""

    cases: Callable[[Setting], list[Case]]
    warm_up: bool  # whether a round that does not count comes first; where the work itself warms up, none does
    sizes: Mapping[
        str, tuple[int, int]
    ]  # pixels, and images at a time, by default; 0 for those of a config


GROUPS: Mapping[str, Group] = {
    "dwt": Group(_wavelet, True, {"cpu": (256, 16), "cuda": (256, 16)}),
    "encoder": Group(
        lambda s: network_cases(ENCODERS, 3, s.size, s), True, {"cpu": (64, 1), "cuda": (256, 16)}
    ),
    "decoder": Group(
        lambda s: network_cases(DECODERS, N_Z, s.size // F8, s),
        True,
        {"cpu": (64, 1), "cuda": (256, 16)},
    ),
    "train": Group(_train, False, {"cpu": (0, 0), "cuda": (0, 0)}),
    "data": Group(_loaders, False, {"cpu": (0, 16), "cuda": (0, 32)}),
}


def bench(
    groups: Sequence[str], setting: Setting, rounds: int, on_group: Callable[[str, int], None]
) -> dict[str, Any]:
    """Measure groups of :data:`GROUPS`, the cases of a group in turns; ``on_group`` hears of each before.

    Returns the machine, date, rounds, and ``rows``, see :func:`~olvae.bench.measure.rows_of`.
    """
    rows = []
    for name in groups:
        group = GROUPS[name]
        pixels, images = group.sizes[setting.kind]
        own = replace(setting, size=setting.size or pixels, batch_size=setting.batch_size or images)
        cases = group.cases(own)
        on_group(name, len(cases))
        rows += rows_of(name, cases, setting.device, rounds, group.warm_up)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**machine(setting.device), "date": date, "rounds": rounds, "rows": rows}


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
        for scale, params, macs in zip(
            SCALES, (0.97, 6.6, 34.0, 41.15), (5.5, 37.4, 234.9, 242.1), strict=True
        )  # [R]
    ),
    *(
        ("encoder", "paper", scale, params, None, partial(LiteVAE_Encoder, 8, scale, "paper"))
        for scale, params in zip(SCALES, (1.03, 6.75, 32.75, 41.42), strict=True)  # [P]
    ),
    ("encoder", "sd", "sd", 34.16, 137, partial(SDEncoder, latent_dim=8)),  # [R]
    ("decoder", "open_litevae", "open_litevae", 53.33, 324, LiteVAE_Decoder),
    (
        "decoder",
        "paper_smc",
        "paper_smc",
        48.46,
        None,
        partial(LiteVAE_Decoder, variant="paper_smc"),
    ),  # [P]
    ("decoder", "sd", "sd", 49.49, 312, partial(SDDecoder, z_channels=4)),  # [R]
    ("discriminator", "patchgan", "PatchGAN", 2.77, 3.15, PatchGAN),  # [R]
    ("discriminator", "gigagan", "GigaGAN", 14.38, 3.23, GigaGAN),  # [R]
    *(
        (
            "discriminator",
            "unetgan",
            f"UNetGAN-{size}",
            params,
            macs,
            partial(UNetGAN, base_channels=base),
        )
        for size, base, params, macs in (
            ("S", 16, 2.75, 2.31),
            ("M", 32, 11.0, 9.13),
            ("L", 64, 44.1, 36.34),
        )  # [R]
    ),
)


def network_table() -> list[NetworkRow]:
    """Count the published networks on the meta device, so in seconds and without memory."""
    rows = []
    for group, variant, name, params, macs, build in _PUBLISHED:
        with (
            ShapesOnly(),
            torch.device("meta"),
        ):  # the spectral norms' first power iterations among them
            module = build()
        shape = (module.z_channels, 32, 32) if isinstance(module, Decoder) else (3, 256, 256)
        counted = count_parameters(module), count_macs(module, 1, *shape)
        rows.append(
            NetworkRow(
                group, variant, name, *counted, params * 1e6, None if macs is None else macs * 1e9
            )
        )
    return rows
