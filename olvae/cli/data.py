"""Run ``olvae data``: pack images into shards, check a source, measure its values."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from olvae.cli.options import ProgressBar, check_applies, check_paths, in_flags, loading, stop_code
from olvae.config import ConfigError
from olvae.data.places import load
from olvae.files import counted, list_skipped, printable

app = typer.Typer(
    no_args_is_help=True, help="Pack images into shards; check a source; measure its values."
)

# Arguments that the commands share; shards can be checked, but not packed again.
NUMBERED = (
    "a .txt list of files, samples, torchvision:CIFAR10,root=data, "
    "hf:cifar10,split=test,column=img, or scenes:FOLDER."
)
Src = typer.Argument(metavar="SRC", help=f"A folder of images, a pattern, {NUMBERED}")
CheckSrc = typer.Argument(
    metavar="SRC", help=f"A folder of images or .tar shards, a pattern, a URL, {NUMBERED}"
)
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes; one per core by default, of all ranks.")
]
Channels = Annotated[
    int, typer.Option(min=1, help="Channels: 1, 3 or 4; any number for .npy arrays.")
]
HoldOutBy = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="Images that are never parted: of a file, a folder, or a pattern's group, such as "
        "'(?P<group>patient\\d+)'; as data.params.hold_out_by.",
    ),
]
MaxUnreadable = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Largest share of unreadable images.")
]


@app.command("pack")
def pack_command(
    src: Annotated[str, Src],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the shards to.")],
    shard_size: Annotated[
        int,
        typer.Option(
            min=0, help="Images in a shard at most; 0 = 1000, or fewer, to have 20 shards."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffled order.")] = 0,
    shuffle: Annotated[
        bool, typer.Option(help="Shuffle, so that each shard is a random sample.")
    ] = True,
    resize: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Resize larger images to this shorter side."),
    ] = None,
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="{jpg,png,webp}", help="Format of resized images; jpg by default."
        ),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Quality of jpg and webp; 95 by default.")
    ] = None,
    channels: Channels = 3,
    hold_out_by: HoldOutBy = "file",
    max_unreadable: MaxUnreadable = 0.01,
    workers: Workers = None,
) -> None:
    """Pack images into WebDataset shards, with an index of counts and checksums.

    JPEG, PNG, WebP, arrays and files of more than 8 bits are stored unchanged, others as PNG. After
    an interruption, the same command continues where it stopped, and the shards are the same byte
    for byte. Groups by --hold-out-by are whole in a shard: a large group makes a large shard. Under
    torchrun or srun, ranks share the work.

    Example: olvae data pack photos --out shards --resize 512
    """
    check_paths(data=src)
    with loading():
        from olvae.data import packing
        from olvae.data.shards.index import is_begun
        from olvae.devices import cores_of_rank
        from olvae.launcher import together

    # Settings that would have no effect.
    if resize is None and (image_format is not None or quality is not None):
        raise ConfigError(
            "--format and --quality apply to images that --resize makes smaller: add --resize"
        )
    check_applies("--seed", bool(seed), "--shuffle", shuffle)
    check_applies("--quality", quality is not None, "--format jpg or webp", image_format != "png")

    # Pack; what is finished stays after an interruption.
    order = seed if shuffle else None
    with together() as (rank, _), ProgressBar("packing", enabled=rank == 0) as bar:
        options = packing.PackOptions(
            shard_size,
            order,
            resize,
            image_format or "jpg",
            quality or 95,
            channels,
            hold_out_by,
        )
        try:
            packed = packing.pack(
                src, out, options, workers or cores_of_rank(), max_unreadable, bar.set
            )
        except KeyboardInterrupt:
            line = "stopped"
            if is_begun(out):
                line += f": finished shards are in {out}; the same command continues from there"
            if rank == 0:
                typer.echo(line, err=True)
            sys.exit(stop_code())

    # Report what was left out, and what there is now, also from an earlier run.
    if packed is not None:
        index = packed.index
        if index.unreadable:
            skipped = list_skipped((one["name"], one["reason"]) for one in index.unreadable)
            lost = counted(len(index.unreadable), "unreadable image")
            typer.echo(f"{lost} left out: {in_flags(skipped)}", err=True)
        found = ""
        if packed.found:
            found = f", {packed.found} of them from an earlier run"
        shards = counted(len(index.shards), "shard")
        size = f"{counted(index.images, 'image')}, {index.bytes / 1e6:.1f} MB"
        typer.echo(
            f"{size} in {shards}{found}\nshards:  {out}\nindex:   {out / 'index.json'}", err=True
        )


@app.command("index")
def index_command(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="Shards: a folder, a pattern, or URLs with braces.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the index; by default the shards' own."),
    ] = None,
    image_key: Annotated[
        str | None,
        typer.Option(
            metavar="EXT", help="Extension of the images, as data.params.image_key of a config."
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Count the images in shards that have no index, and note where each begins.

    With it, training reads the middle of a shard without its beginning, mixes images of many
    shards, and continues an epoch with any number of processes. Remote shards are read once.

    Example: olvae data index 's3://bucket/{000..127}.tar' --out index
    """
    with loading():
        from olvae.data.shards.indexing import index_shards
        from olvae.devices import cores_of_rank
        from olvae.launcher import together

    with together() as (rank, _), ProgressBar("indexing", unit="shards", enabled=rank == 0) as bar:
        found = index_shards(src, out, image_key, workers or cores_of_rank(), bar.set)
    if found is None:
        return
    place, index, damaged = found
    if damaged:
        listed = list_skipped((name, "can't be read to its end") for name in damaged)
        typer.echo(in_flags(f"{counted(len(damaged), 'damaged shard')}: {listed}"), err=True)
    shards = counted(len(index.shards), "shard")
    typer.echo(f"{counted(index.images, 'image')} in {shards}\nindex: {place}", err=True)


@app.command("check")
def check_command(
    src: Annotated[str, CheckSrc],
    size: Annotated[
        str, typer.Option(metavar="PIXELS", help="Size of the training crops: 256, or 80x256.")
    ] = "256",
    channels: Channels = 3,
    values: Annotated[
        str | None,
        typer.Option("--range", metavar="YAML", help="Range of values, as data.params.range."),
    ] = None,
    hold_out_by: HoldOutBy = "file",
    max_unreadable: MaxUnreadable = 0.01,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Read every image of a source and report problems; exits with 1 if there are any.

    Reports unreadable files, sizes, groups with images of training and of validation, shards that
    differ from their index, and the speed of a loader process. Under torchrun or srun, ranks share
    the work.

    Example: olvae data check shards --size 256
    """
    check_paths(data=src)
    with loading():
        from olvae.data import audit
        from olvae.data.pixels.size_and_range import PixelRange, Sides
        from olvae.devices import cores_of_rank
        from olvae.launcher import together

    # The range, read as a config's.
    node = None
    try:
        if values is not None:
            node = load((), [f"data.params.range={values}"])["data"]["params"]["range"]
    except ConfigError as error:
        raise ConfigError(f"`range`: expected YAML, as in [0, 65535], got {values}") from error
    pixels = PixelRange.from_node(node, "`range`")
    pixels.check_channels(channels, "`range`")
    crops = Sides.read(size).node

    # Read the images; the first rank prints what all of them found.
    with together() as (rank, _), ProgressBar("reading", enabled=rank == 0) as bar:
        result = audit.audit_source(
            src,
            crops,
            channels,
            max_unreadable,
            workers or cores_of_rank(),
            bar.set,
            pixels,
            hold_out_by,
        )
    if result is None:
        return
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        for line in audit.audit_lines(result):
            typer.echo(in_flags(line), err=True)
    if result.problems:
        raise typer.Exit(1)


@app.command("range")
def range_command(
    src: Annotated[str, CheckSrc],
    images: Annotated[int, typer.Option(min=1, metavar="N", help="Read N images at most.")] = 200,
) -> None:
    """Measure values of images of more than 8 bits: percentiles per channel, a line for a config.

    The line goes to standard output. It runs from the 0.1th to the 99.9th percentile; write the
    true range instead if you know it.

    Example: olvae data range scans
    """
    check_paths(data=src)
    with loading():
        from olvae.data.value_range import measure_range

    found = measure_range(src, images)
    if found.unreadable:
        skipped = in_flags(list_skipped((error.name, error.reason) for error in found.unreadable))
        typer.echo(
            f"{counted(len(found.unreadable), 'unreadable image')} left out: {skipped}", err=True
        )
    kinds = " and ".join(f"{count} of {kind}" for kind, count in found.kinds.items())
    missing = ""
    if found.missing:
        missing = f"; {found.missing:.2%} of the values are missing"
    typer.echo(
        f"{counted(found.images, 'image')}, {kinds}, "
        f"{counted(len(found.percentiles), 'channel')}{missing}",
        err=True,
    )
    if found.stack:
        typer.echo(
            f"note: {printable(found.stack)}: its {len(found.percentiles)} channels are the pages "
            "of a TIFF: if they are slices of a stack and not bands, save each in a file of its "
            "own",
            err=True,
        )
    Console(stderr=True).print(found.table())
    typer.echo(found.line())
