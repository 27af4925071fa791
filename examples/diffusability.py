"""How well a small diffusion model learns a latent space: the Fréchet distance of its samples,
over several seeds.

Encode images, then train one small diffusion transformer for each seed,
and compare its samples with images:

    olvae encode demo --data crops --size 64 --flip --out latents
    python examples/diffusability.py latents --decoder demo --reference more-crops \\
        --out diffusability

Needs `pip install -e '.[train,lite0]'`, for the network in whose features images are compared. A
seed that is finished is not trained again; the same latents, seed and settings give the same
samples on the same machine and number of threads.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where study/ is

from olvae.cli.main import print_error
from olvae.data.opening import open_source
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.data.shards.latent_source import LatentSource
from olvae.devices import keep_freed_memory
from olvae.figures import labelled_grid
from olvae.files import atomic_write, check_folder, write_json
from olvae.metrics.features import Extract, Features, Inception, frechet_distance
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.targets import find_target
from olvae.modules.others.denoiser import DiT
from study.features import Lite0, frechet_lite0

HEUN_STEPS = 12
CURVE = 50  # points of the training's curve
SHOWN = 10  # images in a row of samples.png
BATCH = 50  # images that are decoded, or looked at, together

Velocity = Callable[[Tensor, Tensor], Tensor]
"""z (B, n_z, h, w) and t (B,) in [0, 1], where 1 is noise -> dz/dt."""


def train(
    source: LatentSource, model: DiT, steps: int, lr: float, seed: int
) -> tuple[nn.Module, list[float]]:
    """Flow matching: learn the velocity on the straight line from a latent to noise.

    Returns:
        the model with its weights averaged over about the last tenth of the steps,
        and the loss of every step.
    """
    generator = torch.Generator().manual_seed(seed)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(max(0.0, 1 - 10 / steps)))
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for batch in islice(source.train_loader(seed), steps):
        z = batch["latent"]  # a new sample of each posterior
        noise = torch.randn(z.shape, generator=generator)
        # logit-normal: more often in the middle
        t = torch.randn(len(z), generator=generator).sigmoid()
        at = t[:, None, None, None]
        loss = F.mse_loss(model((1 - at) * z + at * noise, t), noise - z)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        average.update_parameters(model)
        losses.append(loss.item())
    return average.module, losses


@torch.no_grad()
def sample(velocity: Velocity, noise: Tensor, steps: int = HEUN_STEPS) -> Tensor:
    """Follow the velocity back from noise to latents, (B, n_z, h, w), by Heun's method.

    The last step is Euler's.
    """
    z = noise
    for t, following in pairwise(torch.linspace(1, 0, steps + 1)):
        slope = velocity(z, t.expand(len(z)))
        if following > 0:
            ahead = z + (following - t) * slope
            slope = (slope + velocity(ahead, following.expand(len(z)))) / 2
        z = z + (following - t) * slope
    return z


def samples_of_seed(
    source: LatentSource, args: argparse.Namespace, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """The latents that a seed's model makes, (N, n_z, h, w), and how it was trained.

    From its file if there is one.

    Raises:
        ValueError: the file was made with other settings, or is not one of these.
    """
    path = args.out / f"seed-{seed}.safetensors"
    wanted = {"seed": seed, **settings(source, args)}
    if path.exists():
        return _read(path, wanted)
    start = time.process_time()
    torch.manual_seed(seed)
    model = DiT(tuple(source.stats["latent_shape"]), args.width, args.depth, args.patch)
    average, losses = train(source, model, args.steps, args.lr, seed)
    trained = time.process_time()
    noise = torch.randn(
        args.samples, *source.stats["latent_shape"], generator=torch.Generator().manual_seed(0)
    )
    latents = torch.cat([sample(average, part) for part in noise.split(BATCH)])
    record = {
        "settings": wanted,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "loss": [statistics.fmean(part) for part in _parts(losses, CURVE)],
        "seconds": {"training": trained - start, "sampling": time.process_time() - trained},
    }
    with atomic_write(path) as partial:
        save_file({"latents": latents}, partial, metadata={"record": json.dumps(record)})
    return latents, record


def settings(source: LatentSource, args: argparse.Namespace) -> dict[str, Any]:
    """What the samples of a seed depend on; a file that was made with others is refused."""
    options = ("per_channel", "steps", "batch_size", "lr", "width", "depth", "patch", "samples")
    described = {
        name: source.stats.get(name)
        for name in ("weights", "count", "latent_shape", "latents_mean", "flip")
    }
    return {
        **{name: getattr(args, name) for name in options},
        "heun_steps": HEUN_STEPS,
        "latents": described,
    }


def _read(path: Path, wanted: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()["record"])
            latents: Tensor = file.get_tensor("latents")
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a finished seed: remove it, or name another --out"
        ) from error
    made = record["settings"]
    if different := [name for name in wanted if made.get(name) != wanted[name]]:
        name = different[0]
        raise ValueError(
            f"{path} was made with {name} {made.get(name)}, not {wanted[name]}: name another "
            "--out, or remove the file"
        )
    return latents, record


def _parts(values: list[float], count: int) -> Iterator[list[float]]:
    """At most ``count`` successive parts of equal length; the last may be shorter."""
    length = math.ceil(len(values) / count)
    return (values[start : start + length] for start in range(0, len(values), length))


@torch.no_grad()
def decode(decoder: Autoencoder, source: LatentSource, latents: Tensor) -> Tensor:
    """Latents as the diffusion model sees them -> uint8 images (N, 3, H, W)."""
    z = latents / source.scaling_factor + source.shift_factor
    return torch.cat([to_uint8(decoder.decode(part)) for part in z.split(BATCH)])


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W), both, through the posterior's mode."""
    return torch.cat([to_uint8(autoencoder(from_uint8(part))[0]) for part in images.split(BATCH)])


def read_images(src: str, size: int) -> Tensor:
    """All images of SRC, resized and cropped as in evaluation: uint8 (N, 3, size, size).

    Raises:
        ValueError: there are too few of them to compare anything with.
    """
    batches = [batch["image"] for batch in open_source(src, size, 1).test_loader(BATCH)]
    if sum(map(len, batches)) < 2:
        raise ValueError(f"{src}: a Fréchet distance needs at least 2 images that can be read")
    return torch.cat(batches)


def features(extract: Extract, images: Tensor) -> Features:
    """uint8 (N, 3, H, W) -> (N, D)"""
    return np.concatenate([extract(part) for part in images.split(BATCH)])


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation over the seeds; the latter needs two of them."""
    deviation = {"std": statistics.stdev(values)} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **deviation}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("latents", help="a folder that olvae encode wrote, of one --size")
    parser.add_argument(
        "--decoder",
        required=True,
        metavar="TARGET",
        help="the autoencoder, as any command takes it",
    )
    parser.add_argument(
        "--reference", required=True, metavar="SRC", help="images to compare with, as of --data"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for results, or to continue"
    )
    parser.add_argument("--seeds", type=seed_list, default=[0, 1, 2], help="by default 0,1,2")
    parser.add_argument("--samples", type=int, default=1000, help="images to make, by default 1000")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, by default 2000")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="latents in a step, by default 16"
    )
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="learning rate, which falls to 0; by default 1e-3"
    )
    parser.add_argument(
        "--width", type=int, default=128, help="channels of a token, by default 128"
    )
    parser.add_argument("--depth", type=int, default=4, help="blocks, by default 4")
    parser.add_argument(
        "--patch", type=int, default=1, help="latent positions along a token's side, by default 1"
    )
    parser.add_argument(
        "--per-channel", action="store_true", help="shift and scale each channel by its own numbers"
    )
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="Inception's weights: adds gFID and rFID"
    )
    args = parser.parse_args(arguments)
    for name, smallest in {"samples": 2, "steps": 1, "width": 1, "depth": 1, "patch": 1}.items():
        if getattr(args, name) < smallest:
            parser.error(f"--{name} {getattr(args, name)}: give at least {smallest}")
    if args.inception is not None and not args.inception.is_file():
        parser.error(f"--inception {args.inception}: no such file")
    return args


def seed_list(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def open_both(args: argparse.Namespace) -> tuple[LatentSource, Autoencoder]:
    """The latents and what decodes them.

    Raises:
        ValueError: they do not fit each other, or the latents have several sizes.
    """
    source = LatentSource(args.latents, args.batch_size, per_channel=args.per_channel)
    decoder = find_target(args.decoder).load()
    shape = source.stats["latent_shape"]
    if shape is None:
        raise ValueError(f"{args.latents}: latents of several sizes: encode them with --size")
    if decoder.latent_channels != shape[0]:
        raise ValueError(
            f"{args.latents}: {shape[0]} channels, but {args.decoder} decodes "
            f"{decoder.latent_channels}"
        )
    if decoder.in_channels != 3:
        raise ValueError(
            f"{args.decoder}: makes images of {decoder.in_channels} channels, not 3, and can't "
            "be compared"
        )
    return source, decoder


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    keep_freed_memory()
    check_folder(args.out).mkdir(parents=True, exist_ok=True)
    source, decoder = open_both(args)
    networks: dict[str, tuple[Extract, Callable[[Features, Features], float]]] = {
        "frechet_lite0": (Lite0(), frechet_lite0)
    }
    if args.inception is not None:
        networks["fid"] = Inception(args.inception), frechet_distance
    reference = read_images(args.reference, source.stats["latent_shape"][1] * decoder.downscale)
    batches = islice(source.train_loader(0), math.ceil(args.samples / args.batch_size))
    drawn = torch.cat([batch["latent"] for batch in batches])[: args.samples]
    images = {
        "reference": reference,
        "reconstructions": reconstruct(decoder, reference),
        "decoded_latents": decode(decoder, source, drawn),
    }
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        latents, record = samples_of_seed(source, args, seed)
        images[f"seed {seed}"] = decode(decoder, source, latents)
        results.append(record)
        print(
            f"seed {seed}: loss {record['loss'][-1]:.3f}, {sum(record['seconds'].values()):.0f} "
            "s of processor time"
        )

    document: dict[str, Any] = {
        "settings": {
            "latents": str(args.latents),
            "decoder": args.decoder,
            "reference": args.reference,
            "reference_images": len(reference),
            "inception": args.inception and str(args.inception),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    }
    for name, (extract, distance) in networks.items():
        of = {key: features(extract, part) for key, part in images.items()}
        floors = {
            key: distance(of["reference"], of[key])
            for key in ("reconstructions", "decoded_latents")
        }
        for result in results:
            samples = of[f"seed {result['settings']['seed']}"]
            result[name] = distance(of["reference"], samples)
            result[f"{name}_to_decoded"] = distance(of["decoded_latents"], samples)
        document[name] = {**spread([result[name] for result in results]), **floors}
        to_decoded = spread([result[f"{name}_to_decoded"] for result in results])
        document[name] |= {f"{key}_to_decoded": value for key, value in to_decoded.items()}
        print(
            f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in document[name].items())
        )
    write_json({**document, "seeds": results}, args.out / "diffusability.json")
    rows = {
        name.replace("_", " "): part[:: max(1, len(part) // SHOWN)][:SHOWN]
        for name, part in images.items()
    }
    with atomic_write(args.out / "samples.png") as partial:
        labelled_grid(rows).save(partial)
    print(f"numbers: {args.out / 'diffusability.json'}\nimages: {args.out / 'samples.png'}")
    return document


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
