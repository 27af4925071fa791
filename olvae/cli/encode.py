"""Run ``olvae encode`` and ``olvae decode``: images to latents for a diffusion model, and back."""

import contextlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from olvae.cli.options import (
    AllowMismatch,
    ConfigFile,
    Device,
    ProgressBar,
    Raw,
    TargetArgument,
    check_applies,
    check_paths,
    check_precision,
    loading,
    memory_option,
    stop_code,
)
from olvae.config import ConfigError
from olvae.files import check_folder, counted, no_empty_folders, printable

if TYPE_CHECKING:  # slow to import
    from olvae.models.autoencoder import Autoencoder
    from olvae.models.loading.loader import Target

# By default one GPU has at most this many processes that read images for it.
MOST_READERS = 16

# With a default, unlike evaluation's, which takes the config's.
EncodeBatchSize = Annotated[
    int, typer.Option("--batch-size", "-B", min=1, help="Images at a time.")
]


def command(
    target: TargetArgument,
    data: Annotated[
        str, typer.Option(metavar="SRC", help="A folder, shards, a list, a data set or a config.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the files: empty, or to be continued.")
    ],
    config: ConfigFile = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            help="Size after resizing and cropping; by default SRC's if it is a config, or the "
            "training's.",
        ),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Keep images' sizes, padded to multiples of f.")
    ] = False,
    moments: Annotated[
        bool,
        typer.Option(
            "--moments/--sample",
            help="Store the posterior's mean and deviation, or one sample of it.",
        ),
    ] = True,
    seed: Annotated[
        int, typer.Option(help="Seed of --sample; noise depends on it and the image's key.")
    ] = 0,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"],
        typer.Option(help="Dtype that latents are stored in."),
    ] = "float16",
    flip: Annotated[
        bool, typer.Option("--flip", help="Store the latents of mirrored images as well.")
    ] = False,
    images: Annotated[
        bool, typer.Option("--images", help="Store the encoded pixels too, as PNG of one size.")
    ] = False,
    classes: Annotated[
        bool,
        typer.Option(
            "--classes", help="Folders are classes: store the number of an image's folder as .cls."
        ),
    ] = False,
    shard_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images in a shard; by default 1000, with --images fewer, to have 20 shards. "
            "Not for a SRC of shards.",
        ),
    ] = None,
    hold_out_by: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Keep images together in a shard, as data.params.hold_out_by of a config; by "
            "default as the training's config. Not for a SRC of shards.",
        ),
    ] = None,
    batch_size: EncodeBatchSize = 16,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Readers of images for each GPU, in processes of their own; by default one per "
            f"core, up to {MOST_READERS}.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GiB", callback=memory_option, help="Memory of --native; 4 by default."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            callback=check_precision, help="Precision of the encoder: 32, tf32, bf16 or fp16."
        ),
    ] = "32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder; new sizes take time.")
    ] = False,
    device: Device = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="N_OR_LIST",
            help="Share the shards among several GPUs: their number, or a list: 2, or 0,3.",
        ),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="A-B",
            help="Encode these shards of latents alone, both ends included; the first one is 0. "
            "Other commands, such as an array of jobs, do others into the same --out.",
        ),
    ] = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print stats.json to standard output as well.")
    ] = False,
) -> None:
    """Turn images into WebDataset shards of latents, with their statistics.

    After an interruption, the same command continues, and the result is the same byte for byte. To
    share the work among GPUs: --gpus 4; among machines: torchrun ... --module olvae encode ...;
    among jobs that start one by one: --shards. The shards, and how to train a diffusion model on
    them: https://open-litevae.github.io/open-litevae/encode/

    Example: olvae encode demo --data photos --size 128 --out latents

    Example: olvae encode my-vae --data shards --native --flip --out latents
    """
    check_applies("--seed", bool(seed), "--sample", not moments)
    check_applies("--memory", memory is not None, "--native", native)
    if native and size is not None:
        raise ConfigError("--native and --size: give one of the two")
    part = part_of(shards)
    check_paths(target, data=data)
    with loading():
        import torch

        from olvae.data.pixels.size_and_range import Sides
        from olvae.devices import (
            cores_of_rank,
            keep_freed_memory,
            precision_name,
        )
        from olvae.export.encode_inputs import (
            EncodeOptions,
            ShardInputs,
            find_inputs,
            usual_transform,
        )
        from olvae.export.encoding import EncodeJob
        from olvae.launcher import gather, start_each, together
        from olvae.models.large.tiling import GIB
        from olvae.models.loading.targets import find_target
        from olvae.runs import entry_of

    # The device of this process; with --gpus, the others start.
    check_folder(out)
    if not native:
        keep_freed_memory()  # images of one size need the same memory again and again
    own, devices = own_device(device, gpus)
    if len(devices) > 1:
        start_each("cuda", devices)
    stats = None
    with together() as (rank, world), no_empty_folders(out):
        # The autoencoder.
        found = find_target(target, config, raw=raw, allow_mismatch=allow_mismatch)
        where = torch.device(own)
        model = found.load().to(where)

        # The images, and how they are encoded.
        asked = Sides.read(size).node if size else None
        inputs = find_inputs(
            data,
            model.in_channels,
            shard_size or (0 if images else 1000),
            classes,
            model.pixel_range,
            asked,
            hold_out_by,
            entry_of(found.config, "data.params.hold_out_by"),
        )
        if shard_size is not None and isinstance(inputs, ShardInputs):
            raise ConfigError(
                "--shard-size: each of these shards becomes one of latents: leave it out"
            )
        usual = usual_transform(inputs, found.config, model)
        pixels = 0 if native else asked or Sides.of(usual.size).node
        options = EncodeOptions(
            pixels, moments, seed, dtype, flip, images, precision_name(precision), usual.resample
        )

        # Each process encodes its share of the shards; the first one finishes the folder.
        job = EncodeJob(model, inputs, options, out, {"target": found.name, "source": data}, part)
        readers = threads or min(MOST_READERS, cores_of_rank())
        n = len(job.numbers)
        if rank == 0 and n < world:
            typer.echo(
                f"note: {n} shard{'s' * (n > 1)} of latents for {world} processes: the others have "
                "nothing to do; a smaller --shard-size gives them work, unless the images come in "
                "shards",
                err=True,
            )
        if compiled:
            from olvae.modules.mixed_precision import compile_networks

            compile_networks([_encoder(model, target)], where)
        bar = ProgressBar(
            "encoding" if world == 1 else f"encoding, 1 of {world} shares",
            inputs.count(job.numbers[rank::world]),
            enabled=rank == 0,
        )
        with job.shards.locked("olvae encode"), bar:
            try:
                job.run(rank, world, batch_size, readers, int((memory or 4) * GIB), bar.advance)
            except KeyboardInterrupt:
                if rank == 0:
                    kept = (
                        f"finished shards are in {out}"
                        if job.shards.any_stored()
                        else "no shard is finished yet"
                    )
                    bar.print(f"stopped: {kept}; the same command continues")
                sys.exit(stop_code())
            # All processes have finished, and this is the first; perhaps all other commands, too.
            if gather(None) is not None and job.is_complete():
                stats = job.finish()
    if stats is not None:
        _report(stats, out, found, model, as_json)
    elif rank == 0:
        typer.echo(
            f"latents: {out}, shards {shards} of 0-{len(inputs) - 1}: others are not complete "
            "yet; the command that completes them writes index.json and stats.json",
            err=True,
        )


def part_of(shards: str | None) -> range | None:
    """Read the first and the last number of --shards."""
    if shards is None:
        return None
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", shards)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"--shards {shards}: give the first and the last number, such as 0-9")
    return range(int(match[1]), int(match[2]) + 1)


def own_device(device: str | None, gpus: str | None) -> tuple[str, list[int]]:
    """Choose this process's device; also return the GPUs of all, if ``gpus`` names some."""
    from olvae.devices import resolve_device, resolve_devices
    from olvae.launcher import local_rank

    if gpus is None:
        return resolve_device(device), []
    if device is not None:
        raise ConfigError("--gpus and --device: give one of the two")
    chosen = resolve_devices(gpus, {})
    devices = chosen["devices"]
    if isinstance(devices, int):
        return "cpu", []
    return resolve_device(f"{chosen['accelerator']}:{devices[local_rank()]}"), devices


def _encoder(model: Any, target: str) -> Any:
    if not hasattr(model, "encoder"):
        raise ConfigError(f"--compile: {target} has no module `encoder` to compile: leave it out")
    return model.encoder


def _report(
    stats: Mapping[str, Any], out: Path, target: "Target", model: "Autoencoder", as_json: bool
) -> None:
    """Print what was written, its factors, and warnings about other factors."""
    from olvae.data.pixels.size_and_range import Sides
    from olvae.data.shards.index import INDEX, Index
    from olvae.export.factors import Factors, read_factors

    if as_json:
        typer.echo(json.dumps(stats, indent=2))
    shards = len(Index.read(out / INDEX).shards)
    images = counted(stats["count"], "image")
    of = f" of {Sides.of(stats['size']).short} px" if stats["size"] else ""
    unreadable = stats["unreadable"]["count"]
    lost = ""
    if unreadable:
        lost = f"; {unreadable} could not be read, stats.json says why"
    typer.echo(
        f"latents: {out}, {images}{of} in {counted(shards, 'shard')}{lost}",
        err=True,
    )
    factors = (f"{name} {stats[name]:.4f}" for name in ("scaling_factor", "shift_factor"))
    typer.echo(f"numbers: {out / 'stats.json'}, {', '.join(factors)}", err=True)

    # Warn if factors that are known for the model differ from the ones of these latents.
    means = model.latents_mean
    if means is not None:
        packed = ""
        if len(means) != model.latent_channels:
            packed = ", of packed 2x2 positions,"
        typer.echo(
            f"warning: {target.name} has latents_mean and latents_std: its diffusion models take "
            f"these{packed} in place of the factors measured here",
            err=True,
        )

    # Other pairs by where they are from: the model's own, and what olvae latents measured.
    here = Factors(stats["scaling_factor"], stats["shift_factor"], stats["count"])
    others = {}
    if model.factors_known:
        others[target.name] = Factors(model.scaling_factor, model.shift_factor)
    if target.run is not None:
        file = target.run.path / "latents.json"
        if file.is_file():
            with contextlib.suppress(ValueError):
                others[str(file)] = read_factors(file, target.name)

    # Differences, relative to the standard deviation; 1 and 0 stand for no measurement.
    for name, other in others.items():
        scaling = abs(here.scaling / other.scaling - 1)
        shift = abs(here.shift - other.shift) * other.scaling
        if other[:2] != (1.0, 0.0) and max(scaling, shift) > 1e-3:
            images = ""
            if other.images is not None:
                images = f" (of {other.images} images)"
            typer.echo(
                f"warning: {name} has scaling_factor {other.scaling:.4f}, shift_factor "
                f"{other.shift:.4f}{images}, these latents' are of {here.images} images: use one "
                f"pair; olvae export --latents {out} takes this one",
                err=True,
            )


def decode_command(
    target: TargetArgument,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Shards of latents: a folder, a file, a pattern.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the images to.")],
    config: ConfigFile = None,
    image_format: Annotated[
        Literal["png", "jpg", "npy", "tif", "exr"] | None,
        typer.Option(
            "--format", help="By default png, or npy where PNG can't hold the values or channels."
        ),
    ] = None,
    batch_size: EncodeBatchSize = 16,
    memory: Annotated[
        float,
        typer.Option(
            metavar="GiB",
            callback=memory_option,
            help="Images that need more are decoded in tiles.",
        ),
    ] = 4.0,
    device: Device = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Turn the latents of `olvae encode` into images, named by their keys.

    A posterior is decoded at its mode.

    Example: olvae decode demo latents --out images
    """
    check_paths(target, data=source)
    with loading():
        from olvae.checkpoint import tensors_sum
        from olvae.data.places import holds_pictures
        from olvae.data.shards.index import find_shards, with_counts
        from olvae.data.shards.latent_files import LATENT, read_stats
        from olvae.data.source import total
        from olvae.devices import resolve_device
        from olvae.export.decoding import DECODED_LIST, decode_shards
        from olvae.models.large.tiling import GIB
        from olvae.models.loading.targets import find_target

    # The folder: among other pictures, the decoded ones would be taken for images.
    check_folder(out)
    if holds_pictures(out) and not (out / DECODED_LIST).is_file():
        raise ConfigError(
            f"`out` {out}: it has pictures that were not decoded, perhaps what was encoded: "
            "choose another folder"
        )

    # The shards, and the autoencoder; a folder that is not complete has no stats.json.
    where = resolve_device(device)
    descriptions = [read_stats(source)] if Path(source).is_dir() else []
    shards = with_counts(find_shards(source), image_key=LATENT)
    if not descriptions:
        # Beside single shards, it may be missing, or of something else.
        for folder in sorted({Path(shard.url).parent for shard in shards}):
            with contextlib.suppress(FileNotFoundError, ValueError):
                descriptions.append(read_stats(folder))
    model = find_target(target, config, raw=raw, allow_mismatch=allow_mismatch).load()

    # Other weights, such as later ones of the same run, may decode these latents, but not as well.
    mine = tensors_sum(model.state_dict())
    for stats in descriptions:
        if stats.get("weights", mine) != mine:
            typer.echo(
                f"note: {stats.get('target')} made these latents, with other weights than "
                f"{target}'s",
                err=True,
            )
    model.to(where)

    # Decode; what could not be read is named in the end.
    count = total([shard.images for shard in shards])
    with no_empty_folders(out), ProgressBar("decoding", count) as bar:
        done, unreadable = decode_shards(
            model, shards, out, image_format, batch_size, int(memory * GIB), bar.advance
        )
    for error in unreadable:
        typer.echo(f"skipped {printable(error.name)}: {printable(error.reason)}", err=True)
    typer.echo(f"images: {out}, {done} of them", err=True)
