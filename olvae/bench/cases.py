"""Benchmarks of `olvae bench`, in groups; and the table of networks that `olvae tables` prints."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, cycle, islice, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from olvae import config as cfg
from olvae.bench.encode_parts import encode_cases
from olvae.bench.measure import Case, Setting, Work, clocked, machine, rows_of
from olvae.config import ConfigError
from olvae.data.dataset import MappedSource
from olvae.data.image import Photo, Picture, image_to_tensor
from olvae.data.opening import open_source
from olvae.data.places import load
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.tar_reading import Entry, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import Batch, Source
from olvae.devices import FULL, PRECISIONS, now, seconds_per_image
from olvae.models.large.tiling import peak_bytes
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.modules.base import Decoder
from olvae.modules.counting import ShapesOnly, count_macs, count_parameters
from olvae.modules.gigagan import GigaGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.litevae.smc import fold_smc
from olvae.modules.mixed_precision import compile_networks
from olvae.modules.patchgan import PatchGAN
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.unetgan import UNetGAN
from olvae.modules.wavelet import wavedec2

N_Z = 12  # latent channels of the networks that are timed
F8 = 8  # their pixels per latent position, along a side
ENCODER_SCALES: tuple[Literal["S", "B", "M", "L"], ...] = ("S", "B", "M", "L")

Networks = Mapping[str, Callable[[], nn.Module]]

ENCODERS: Networks = {
    "sd": partial(SDEncoder, latent_dim=2 * N_Z),
    **{
        scale: partial(LiteVAE_Encoder, scale=scale, latent_dim=2 * N_Z) for scale in ENCODER_SCALES
    },
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
"""Options of the model in timed training steps; the first and the last in each precision."""

SECONDS = 1.0  # of a loader, or of decoding alone, in each round
FLOOR_IMAGES = 256  # images that are kept undecoded in memory and decoded in turn

Undecoded = tuple[bytes | Picture, str]  # a file's content, or pixels, and the image's name


def network_cases(builders: Networks, channels: int, side: int, setting: Setting) -> list[Case]:
    """Time each network in each precision and memory layout; the peer is the first one, eager."""
    products = setting.products()
    x = setting.noise(channels, side)
    cases = list(products.values())
    peers: dict[str, Case] = {}  # by precision; the first case in it

    # The compiled ones are wrapped, so that the eager ones stay eager.
    eager = {name: build().eval().to(setting.device) for name, build in builders.items()}
    compiled = {name: nn.Sequential(network) for name, network in eager.items()}
    works = setting.compiled and compile_networks(
        list(compiled.values()), torch.device(setting.device)
    )
    for name, network in eager.items():
        # The layout is changed in place: take a copy.
        last = copy.deepcopy(network)
        last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        variants = {
            "eager": (network, torch.contiguous_format),
            "channels-last": (last, torch.channels_last),
        }
        if works:
            variants["compiled"] = (compiled[name], torch.contiguous_format)
        macs = count_macs(network, *x.shape)
        counted = peak_bytes(network, lambda module, images: module(images), x.shape)
        for precision in setting.precisions:
            for variant, (module, layout) in variants.items():
                images = x.contiguous(memory_format=layout)
                case = Case(
                    name,
                    variant,
                    precision,
                    run=setting.inference(partial(module, images), precision),
                    images=len(x),
                    size=setting.size,
                    batch_size=setting.batch_size,
                    work=macs,
                    limits={"of_product": products[precision]},
                    peer=peers.get(precision),
                    computed_bytes=counted if (variant, precision) == ("eager", FULL) else None,
                )
                peers.setdefault(precision, case)
                cases.append(case)
    return cases


class _Transform(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return wavedec2(x, "haar", WAVELET_LEVELS)

    def gradient(self, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        out = self(leaf)
        return torch.autograd.grad(out, leaf, out)[0]


def _wavelet(setting: Setting) -> list[Case]:
    """Three levels of Haar, and their gradient, beside a copy of the images and PyWavelets.

    PyWavelets runs on the CPU. Each level reads its images or LL once and writes as much; so does
    its gradient.
    """
    import pywt

    x = setting.noise(3, setting.size)
    sizes = (setting.size, setting.batch_size)

    # The limit: a copy of the images, which are read and written.
    target = torch.empty_like(x)
    copied = 2 * x.nbytes
    copy_images = setting.inference(lambda: target.copy_(x))
    limit = Case("copy", "limit", FULL, copy_images, 0, *sizes, copied, "bytes")
    once = sum(copied / 4**level for level in range(WAVELET_LEVELS))

    def case(name: str, variant: str, run: Work, passes: int, peer: Case | None) -> Case:
        limits = {"of_copy": limit}
        work = passes * once
        return Case(name, variant, FULL, run, sizes[1], *sizes, work, "bytes", limits, peer)

    # The peer, and ours.
    pixels = x.cpu().numpy()
    plain = partial(pywt.wavedec2, pixels, "haar", mode="periodization", level=WAVELET_LEVELS)
    peer = case("PyWavelets, on the CPU", "forward", setting.inference(plain), 1, None)
    transforms = {"wavedec2": _Transform()}
    compiled = _Transform()
    if setting.compiled and compile_networks([compiled], x.device):
        transforms["wavedec2, compiled"] = compiled
    cases = [limit, peer]
    for name, transform in transforms.items():
        backward = clocked(partial(transform.gradient, x), setting.device)
        cases.append(case(name, "forward", setting.inference(partial(transform, x)), 1, peer))
        cases.append(case(name, "with gradient", backward, 2, None))
    return cases


class TwoForwards(LiteAutoencoderKL):
    """The training step after another forward pass: one per optimizer, as in the published code."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self(self.images(batch), sample_posterior=True)
        super().training_step(batch, batch_idx)


def _train(setting: Setting) -> list[Case]:
    """Training steps of each config on random images, without LPIPS, which costs all the same."""
    products = setting.products()
    cases = list(products.values())
    for config in setting.configs:
        cases += _steps(config, setting, products)
    return cases


def _steps(config: str | Path, setting: Setting, products: Mapping[str, Case]) -> Iterator[Case]:
    """Training steps of a config, by options and precision."""
    # Their work, counted in a plain step.
    params, size, batch_size = read_step(config, setting.size, setting.batch_size)
    plain = {**params, **dict.fromkeys(STEP_OPTIONS[EVERY], False)}
    with FlopCounterMode(display=False) as counter:
        time_steps(LiteAutoencoderKL(**plain), size, batch_size, 0, setting.device)
    macs = counter.get_total_flops() / 2

    def case(model: LiteAutoencoderKL, variant: str, precision: str, peer: Case | None) -> Case:
        lightning = PRECISIONS[precision].lightning
        run = partial(time_steps, model, size, batch_size, 2, setting.device, lightning)
        sizes = (batch_size, size, batch_size)  # images of a step, pixels, batch size
        limits = {"of_product": products[precision]}
        return Case(str(config), variant, precision, run, *sizes, macs, "macs", limits, peer)

    # The peer of the steps in float32 of both players.
    peer = None
    if params.get("adversary_config") is not None:
        peer = case(TwoForwards(**plain), "two forward passes", FULL, None)
        yield peer
    for variant, options in STEP_OPTIONS.items():
        if variant == "compiled" and not setting.compiled:
            continue
        chosen = {**plain, **options, "compile": setting.compiled and "compile" in options}
        model = LiteAutoencoderKL(**chosen)
        precisions = setting.precisions if variant in ("plain", EVERY) else [FULL]
        for precision in precisions:
            yield case(model, variant, precision, peer if precision == FULL else None)


def read_step(config: str | Path, size: int, batch_size: int) -> tuple[dict[str, Any], int, int]:
    """Read the model's params without LPIPS, pixels and batch size of a config.

    ``size`` and ``batch_size`` replace the config's, unless 0.
    """
    loaded = load([config], ["model.params.lossconfig.params.lpips_weight=0"])
    mistakes = cfg.validate(loaded)
    if mistakes:
        raise ConfigError(*mistakes)
    if loaded["model"].get("from") is not None:
        raise ConfigError(f"{config}: model.from names an autoencoder: give the run's config.yaml")
    params = loaded["model"]["params"]
    data = loaded.get("data", {}).get("params", {})
    adversary = params.get("adversary_config")
    if adversary:
        adversary["params"] |= {"start_step": 0, "warmup_updates": 0}  # a step of both players
    size = size or data.get("size", 0)
    batch_size = batch_size or data.get("batch_size", 0)
    if not batch_size or not size or not isinstance(size, int):
        raise ConfigError(
            f"{config}: has no data.params.size of squares and batch_size: "
            "set `size` and `batch_size`"
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
    """Train on random images; return the seconds of each step but the first, which warms up.

    An upper bound: the device is waited for before and after each step, as training never does.
    """
    times: list[float] = []  # start and end of each step

    def note(*_: Any) -> None:
        times.append(now(device))

    watch = LambdaCallback(on_train_batch_start=note, on_train_batch_end=note)
    train_on_noise(model, size, batch_size, steps + 1, device, precision, watch)
    # The first two times are the start and the end of the step that warms up.
    return [end - start for start, end in zip(times[2::2], times[3::2], strict=True)]


def train_on_noise(
    model: LiteAutoencoderKL,
    size: int,
    batch_size: int,
    steps: int,
    device: str,
    precision: str,
    watch: Callback,
) -> None:
    """Train on random images, for a callback to measure it."""
    trainer = pl.Trainer(
        accelerator=device.partition(":")[0],
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    shape = (batch_size, model.autoencoder.encoder.in_channels, size, size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    trainer.fit(model, repeat({"image": x}, steps))


def _loaders(setting: Setting) -> list[Case]:
    """Training loaders beside decoding and cropping the same images in memory, one by one."""
    cases = []
    usual = 64 if setting.kind == "cpu" else 256
    for name in setting.sources:
        side = setting.size or usual
        source = open_source(name, side, setting.batch_size, resized=setting.size > 0)
        source.batch_size = setting.batch_size
        size = source.size.node

        # The limit: one image at a time, in this process.
        decode = partial(_time_images, _floor(name, source), 1)
        floor = Case(name, "limit: decoding alone", "uint8", decode, 1, size, 1, 1, "images")
        cases.append(floor)
        for workers in setting.workers:
            source.num_workers = workers
            try:
                source.check_processes(1)
            except ValueError as error:
                raise ConfigError(f"`workers` {workers}: {name}: {error}") from error
            case = Case(
                name,
                f"{workers} workers",
                "uint8",
                run=_loader(source, workers),
                images=1,
                size=size,
                batch_size=setting.batch_size,
                work=1 / max(1, workers),
                unit="images",
                limits={"of_floor": floor},
            )
            cases.append(case)
    return cases


def _time_images(work: Callable[[], object], images: int) -> list[float]:
    return [seconds_per_image(work, images, SECONDS)]


def _loader(source: Source, workers: int) -> Work:
    """Time batches of a training loader, once its processes run and their queues are empty."""
    seeds = count()

    def run() -> list[float]:
        source.num_workers = workers
        batches = iter(source.train_loader(seed=next(seeds)))
        # Two batches per process may have been read ahead.
        for _ in islice(batches, 2 * max(1, workers) + 1):
            pass
        return _time_images(lambda: next(batches), source.batch_size)

    return run


def _floor(name: str, source: Source) -> Callable[[], Tensor]:
    """Decode and crop training images that are in memory, in turn."""
    if not isinstance(source, MappedSource | WebDatasetSource):
        kind = type(source).__name__
        raise ConfigError(f"data.target: {kind} can't be timed against decoding alone")
    rng = np.random.default_rng(0)

    def decode(image: Undecoded) -> Tensor:
        photo = Photo(*image, source.channels, source.pixel_range)
        return image_to_tensor(source.transform(photo, rng))

    # Keep those that can be decoded.
    images: list[Undecoded] = []
    for image in islice(_undecoded(source), FLOOR_IMAGES):
        with contextlib.suppress(UnreadableImageError):
            decode(image)
            images.append(image)
    if not images:
        raise ValueError(f"{name}: no image of it can be read")
    turns = cycle(images)
    return lambda: decode(next(turns))


def _undecoded(source: MappedSource | WebDatasetSource) -> Iterator[Undecoded]:
    """Read training images without decoding them: shards in order, others at random."""
    if isinstance(source, WebDatasetSource):
        for shard in source.train:
            for entry in read_shard(shard, source.image_key):
                if isinstance(entry, Entry):
                    yield entry.data, entry.name
        return
    for i in np.random.default_rng(0).permutation(len(source.train)):
        with contextlib.suppress(UnreadableImageError):
            photo = source.train[int(i)]
            yield photo.undecoded(), photo.name


class Group(NamedTuple):
    """Cases that are measured in turns."""

    cases: Callable[[Setting], list[Case]]
    warm_up: bool  # whether a round that does not count comes first; False where the work warms up
    sizes: Mapping[str, tuple[int, int]]  # default pixels and batch size; 0 for a config's own


GROUPS: Mapping[str, Group] = {
    "dwt": Group(_wavelet, True, {"cpu": (256, 16), "cuda": (256, 16)}),
    "encoder": Group(
        lambda s: network_cases(ENCODERS, 3, s.size, s),
        True,
        {"cpu": (64, 1), "cuda": (256, 16)},
    ),
    "decoder": Group(
        lambda s: network_cases(DECODERS, N_Z, s.size // F8, s),
        True,
        {"cpu": (64, 1), "cuda": (256, 16)},
    ),
    "train": Group(_train, False, {"cpu": (0, 0), "cuda": (0, 0)}),
    "data": Group(_loaders, False, {"cpu": (0, 16), "cuda": (0, 32)}),
    "encode": Group(encode_cases, True, {"cpu": (256, 16), "cuda": (256, 16)}),
}


def bench(
    groups: Sequence[str], setting: Setting, rounds: int, on_group: Callable[[str, int], None]
) -> dict[str, Any]:
    """Measure groups of :data:`GROUPS`, the cases of a group in turns.

    ``on_group`` is called before each, with its name and number of cases.

    Returns the machine, date, rounds, and ``rows``, see :func:`~olvae.bench.measure.rows_of`.
    """
    rows = []
    for name in groups:
        group = GROUPS[name]
        pixels, images = group.sizes.get(setting.kind, group.sizes["cuda"])
        size = setting.size or pixels
        batch_size = setting.batch_size or images
        cases = group.cases(replace(setting, size=size, batch_size=batch_size))
        on_group(name, len(cases))
        rows += rows_of(name, cases, setting.device, rounds, group.warm_up)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**machine(setting.device), "date": date, "rounds": rounds, "rows": rows}


class NetworkRow(NamedTuple):
    """A network's parameters, and multiply-accumulates for a 256x256 image, ours and published."""

    group: str
    variant: str
    name: str
    params: int
    macs: int
    published_params: float
    published_macs: float | None


# In millions of parameters and billions of multiply-accumulates. Published for other latents than
# the ones timed above: the README's encoders [R] have latent_dim = n_z = 12, as the published YAML
# says [M], the paper's [P] have latent_dim = 2 n_z = 8, and the Stable Diffusion networks n_z = 4.
_PUBLISHED: tuple[tuple[str, str, str, float, float | None, Callable[[], nn.Module]], ...] = (
    # Encoders
    ("encoder", "open_litevae", "S", 0.97, 5.5, partial(LiteVAE_Encoder, 12, "S")),  # [R]
    ("encoder", "open_litevae", "B", 6.6, 37.4, partial(LiteVAE_Encoder, 12, "B")),  # [R]
    ("encoder", "open_litevae", "M", 34.0, 234.9, partial(LiteVAE_Encoder, 12, "M")),  # [R]
    ("encoder", "open_litevae", "L", 41.15, 242.1, partial(LiteVAE_Encoder, 12, "L")),  # [R]
    ("encoder", "paper", "S", 1.03, None, partial(LiteVAE_Encoder, 8, "S", "paper")),  # [P]
    ("encoder", "paper", "B", 6.75, None, partial(LiteVAE_Encoder, 8, "B", "paper")),  # [P]
    ("encoder", "paper", "M", 32.75, None, partial(LiteVAE_Encoder, 8, "M", "paper")),  # [P]
    ("encoder", "paper", "L", 41.42, None, partial(LiteVAE_Encoder, 8, "L", "paper")),  # [P]
    ("encoder", "sd", "sd", 34.16, 137, partial(SDEncoder, latent_dim=8)),  # [R]
    # Decoders
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
    # Discriminators, all as in [R]
    ("discriminator", "patchgan", "PatchGAN", 2.77, 3.15, PatchGAN),
    ("discriminator", "gigagan", "GigaGAN", 14.38, 3.23, GigaGAN),
    ("discriminator", "unetgan", "UNetGAN-S", 2.75, 2.31, partial(UNetGAN, base_channels=16)),
    ("discriminator", "unetgan", "UNetGAN-M", 11.0, 9.13, partial(UNetGAN, base_channels=32)),
    ("discriminator", "unetgan", "UNetGAN-L", 44.1, 36.34, partial(UNetGAN, base_channels=64)),
)


def network_table() -> list[NetworkRow]:
    """Count the published networks on the meta device, so in seconds and without memory."""
    rows = []
    for group, variant, name, params, macs, build in _PUBLISHED:
        # Shapes only, also in the first power iterations of the spectral norms.
        with ShapesOnly(), torch.device("meta"):
            module = build()
        shape = (module.z_channels, 32, 32) if isinstance(module, Decoder) else (3, 256, 256)
        counted = (count_parameters(module), count_macs(module, 1, *shape))
        published_macs = None if macs is None else macs * 1e9
        rows.append(NetworkRow(group, variant, name, *counted, params * 1e6, published_macs))
    return rows
