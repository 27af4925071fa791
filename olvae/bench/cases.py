"""What ``olvae bench all`` measures, in groups: wavelets, encoders, decoders, training steps, data, encoding."""

import copy
import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from olvae.bench.data import floor_work, loader_work
from olvae.bench.encode import encode_passes
from olvae.bench.limits import copy_of, heaviest_convolution, matrix_product
from olvae.bench.networks import DECODERS, ENCODERS, FACTOR, LATENT
from olvae.bench.timing import Work, clocked
from olvae.bench.train import Precision, time_steps
from olvae.data.mapped.dataset import HELD_OUT, PHOTOGRAPHS
from olvae.data.opening import open_source
from olvae.models.compilation import compile_networks
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.modules.base import count_macs
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.precision import FULL, PRECISIONS, in_precision
from olvae.modules.wavelet import wavedec2

__all__ = ["GROUPS", "Case", "Group", "Phase", "Setting"]

LAYOUTS = {"eager": torch.contiguous_format, "channels-last": torch.channels_last, "compiled": torch.contiguous_format}
"""The memory layouts in which networks are measured, by variant."""

LEVELS = 3
"""Of the wavelet transform."""

EVERY = "every option"

STEP_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "plain": {},
    "channels-last": {"channels_last": True},
    "checkpoint": {"checkpoint": True},
    "compiled": {"compile": True},
    EVERY: {"channels_last": True, "checkpoint": True, "compile": True},
}
"""Options of the model by which training steps are measured; without ``--compile`` none is compiled.

The first and the last are measured in each precision, the others in float32."""

TRAINERS: Mapping[str, Precision] = {FULL: "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Lightning's names of precisions."""

DATA_SECONDS = 1.0
WORKERS = (0, 1, 2)


class Phase(NamedTuple):
    """A training phase: ``model.params`` of a config, pixels, and images of a step."""

    params: Mapping[str, Any]
    size: int
    batch_size: int


@dataclass
class Setting:
    """What a group's cases have in common.

    Args:
        stack: closes what the cases hold after they were measured.
        compiled: whether compiled variants are measured too.
        phases: by name; for the training steps only.
    """

    device: str
    size: int
    batch_size: int
    stack: ExitStack
    compiled: bool = False
    phases: Mapping[str, Phase] = field(default_factory=dict)

    @property
    def precisions(self) -> dict[str, torch.dtype]:
        """float32 and bfloat16, on a GPU also float16, by name."""
        return {name: PRECISIONS[name] for name in (FULL, "bf16", "fp16")[: 2 if self.device == "cpu" else 3]}


@dataclass(frozen=True, eq=False)
class Case:
    """Something that is measured.

    Args:
        images: of which ``run`` measures the seconds; 0 for a limit that has none.
        size: pixels, and ``batch_size`` images at a time; 0 where there are no images.
        work: what these images take, in ``unit``.
        unit: multiply-accumulates, bytes, or images.
        limits: cases that do work of the same unit with nothing in the way, by the name of the share that is reported.
    """

    name: str
    variant: str
    precision: str
    run: Work
    images: int
    size: int = 0
    batch_size: int = 0
    work: float = 0.0
    unit: Literal["macs", "bytes", "images"] = "macs"
    limits: Mapping[str, "Case"] = field(default_factory=dict)


def _inference(function: Callable[[], object], setting: Setting, precision: str = FULL) -> Work:
    """Work without gradients, under autocast unless the precision is float32."""

    def run() -> None:
        kind = setting.device.partition(":")[0]
        with torch.inference_mode(), in_precision(kind, precision):
            function()

    return clocked(run, setting.device)


def _products(setting: Setting) -> dict[str, Case]:
    """The matrix product in each precision."""
    cases = {}
    for precision, dtype in setting.precisions.items():
        product, macs = matrix_product(setting.device, dtype)
        cases[precision] = Case("matrix product", "limit", precision, _inference(product, setting), 0, work=macs)
    return cases


def _networks(
    builders: Mapping[str, Callable[[], nn.Module]], shape: tuple[int, int, int, int], setting: Setting
) -> list[Case]:
    products = _products(setting)
    cases = list(products.values())
    sizes = setting.size, setting.batch_size
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    eager = {name: build().eval().to(setting.device) for name, build in builders.items()}
    compiled = {name: nn.Sequential(network) for name, network in eager.items()}  # around it: it stays plain itself
    works = setting.compiled and compile_networks(list(compiled.values()), torch.device(setting.device))
    for name, network in eager.items():
        variants = {
            "eager": network,
            "channels-last": copy.deepcopy(network).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            **({"compiled": compiled[name]} if works else {}),
        }
        macs, heaviest = count_macs(network, *shape), heaviest_convolution(network, shape)
        for precision, dtype in setting.precisions.items():
            convolutions = {}
            for layout in (torch.contiguous_format, torch.channels_last):
                convolution = _inference(heaviest.build(setting.device, dtype, layout), setting)
                label = "limit" if layout is torch.contiguous_format else "limit, channels-last"
                title = f"3x3 convolution of {name}"
                convolutions[layout] = Case(title, label, precision, convolution, 0, *sizes, heaviest.macs())
            cases += convolutions.values()
            for variant, module in variants.items():
                layout = LAYOUTS[variant]
                run = _inference(partial(module, x.contiguous(memory_format=layout)), setting, precision)
                limits = {"of_product": products[precision], "of_convolution": convolutions[layout]}
                cases.append(Case(name, variant, precision, run, shape[0], *sizes, macs, limits=limits))
    return cases


def _encoders(setting: Setting) -> list[Case]:
    return _networks(ENCODERS, (setting.batch_size, 3, setting.size, setting.size), setting)


def _decoders(setting: Setting) -> list[Case]:
    side = setting.size // FACTOR
    return _networks(DECODERS, (setting.batch_size, LATENT, side, side), setting)


class _Transform(nn.Module):
    """Three levels of Haar, as a module, which can be compiled."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return wavedec2(x, "haar", LEVELS)


def _wavelet(setting: Setting) -> list[Case]:
    """Three levels, and the gradient of all that they give, beside a copy of the images.

    Each level reads its images or LL once and writes as much; so does its gradient.
    """
    x = torch.randn(setting.batch_size, 3, setting.size, setting.size, generator=torch.Generator().manual_seed(0))
    x = x.to(setting.device)
    implementations: dict[str, Callable[[Tensor], list[Tensor]]] = {"olvae.modules.wavelet.wavedec2": _Transform()}
    if setting.compiled:
        compiled = _Transform()
        if compile_networks([compiled], x.device):
            implementations["olvae.modules.wavelet.wavedec2, compiled"] = compiled
    if find_spec("ptwt"):
        ptwt = importlib.import_module("ptwt")
        implementations["ptwt.wavedec2"] = lambda images: _bands(
            ptwt.wavedec2(images, "haar", mode="zero", level=LEVELS)
        )
    sizes = setting.size, setting.batch_size
    duplicate, copied = copy_of(x)
    limit = Case("copy", "limit", FULL, _inference(duplicate, setting), 0, *sizes, copied, "bytes")
    once = sum(copied / 4**level for level in range(LEVELS))
    cases = [limit]
    for name, transform in implementations.items():
        for variant, run, work in (
            ("forward", _inference(partial(transform, x), setting), once),
            ("with gradient", clocked(partial(_gradient, transform, x), setting.device), 2 * once),
        ):
            cases.append(Case(name, variant, FULL, run, sizes[1], *sizes, work, "bytes", {"of_copy": limit}))
    return cases


def _bands(coefficients: Any) -> list[Tensor]:
    low, *details = coefficients
    return [low, *(band for level in details for band in level)]


def _gradient(transform: Callable[[Tensor], list[Tensor]], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    out = transform(leaf)
    return torch.autograd.grad(out, leaf, out)[0]


def _train(setting: Setting) -> list[Case]:
    products = _products(setting)
    cases = list(products.values())
    for name, (params, size, batch_size) in setting.phases.items():
        plain = {**params, "channels_last": False, "checkpoint": False, "compile": False}
        with FlopCounterMode(display=False) as counter:
            time_steps(LiteAutoencoderKL(**plain), size, batch_size, 0, setting.device)
        macs = counter.get_total_flops() / 2
        for variant, options in STEP_OPTIONS.items():
            chosen = {**options, "compile": options.get("compile", False) and setting.compiled}
            if variant == "compiled" and not setting.compiled:
                continue
            model = LiteAutoencoderKL(**{**plain, **chosen})
            for precision in setting.precisions if variant in ("plain", EVERY) else (FULL,):
                run = partial(time_steps, model, size, batch_size, 2, setting.device, TRAINERS[precision])
                limits = {"of_product": products[precision]}
                cases.append(Case(name, variant, precision, run, batch_size, size, batch_size, macs, limits=limits))
    return cases


def _data(setting: Setting) -> list[Case]:
    folder = str(PHOTOGRAPHS[0].path.parent)
    source = open_source(folder, setting.size, setting.batch_size)
    decode = floor_work(folder, source, DATA_SECONDS)
    floor = Case("decoding alone", "limit", "uint8", decode, 1, setting.size, 1, 1, "images")
    cases = [floor]
    for workers in WORKERS:
        run, share = loader_work(source, workers, DATA_SECONDS), 1 / max(1, workers)
        variant, sizes = f"{workers} workers", (setting.size, setting.batch_size)
        cases.append(Case("loader", variant, "uint8", run, 1, *sizes, share, "images", {"of_floor": floor}))
    return cases


def _encode(setting: Setting) -> list[Case]:
    on_cpu = setting.device == "cpu"
    scale: Literal["S", "B"] = "S" if on_cpu else "B"
    width = 32 if on_cpu else 128
    paths = [photograph.path for photograph in (*PHOTOGRAPHS, *HELD_OUT)][: 24 if on_cpu else None]
    encoder = LiteVAE_Encoder(scale=scale, latent_dim=2 * LATENT).eval().to(setting.device)
    x = torch.randn(setting.batch_size, 3, setting.size, setting.size, device=setting.device)
    cases, sizes = [], (setting.size, setting.batch_size)
    for precision in setting.precisions:
        alone = _inference(partial(encoder, x), setting, precision)
        name, images = f"encoder of LiteVAE-{scale}", setting.batch_size
        limit = Case(name, "limit", precision, alone, images, *sizes, images, "images")
        cases.append(limit)
        passes = encode_passes(paths, setting.size, images, setting.device, precision, scale, width)
        for title, encode in setting.stack.enter_context(passes).items():
            limits = {"of_encoder": limit} if f"LiteVAE-{scale}" in title else {}
            run, count = _inference(encode, setting), len(paths)
            cases.append(Case(title, "files to files", precision, run, count, *sizes, count, "images", limits))
    return cases


class Group(NamedTuple):
    """Cases that are measured in turns.

    Args:
        cases: builds them.
        warm_up: whether a round that does not count comes first; where the work itself warms up, none does.
        sizes: pixels, and images at a time, by default on a CPU and on a GPU. Training steps have their config's.
    """

    cases: Callable[[Setting], list[Case]]
    warm_up: bool
    sizes: Mapping[str, tuple[int, int]]


GROUPS: Mapping[str, Group] = {
    "wavelet": Group(_wavelet, True, {"cpu": (256, 16), "cuda": (256, 16)}),
    "encoders": Group(_encoders, True, {"cpu": (64, 1), "cuda": (256, 16)}),
    "decoders": Group(_decoders, True, {"cpu": (64, 1), "cuda": (256, 16)}),
    "train": Group(_train, False, {}),
    "data": Group(_data, False, {"cpu": (64, 16), "cuda": (256, 32)}),
    "encode": Group(_encode, True, {"cpu": (64, 16), "cuda": (256, 32)}),
}
