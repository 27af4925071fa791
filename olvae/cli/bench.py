"""``olvae bench``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from olvae.cli.options import check_device, check_precision

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure speed and memory beside a named peer.",
)

BatchSize = Annotated[int, typer.Option("--batch-size", "-B", min=1)]
Device = Annotated[str, typer.Option(callback=check_device, help="cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Pixels = Annotated[int, typer.Option(min=8, help="Pixels, a multiple of 8.")]


@app.callback()
def prepare() -> None:
    from olvae.allocator import keep_freed_memory

    keep_freed_memory()


@app.command("all")
def everything(
    groups: Annotated[
        str, typer.Option(metavar="LIST", help="wavelet, encoders, decoders, train, data, encode; by default all.")
    ] = "wavelet,encoders,decoders,train,data,encode",
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels, a multiple of 8; by default each group's own, small on a CPU, 256 on a GPU."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-B", min=1, help="By default each group's own.")
    ] = None,
    phase_a: Annotated[
        Path | None,
        typer.Option(metavar="CFG", help="By default the recipe demo on a CPU, imagenet/A2 on a GPU."),
    ] = None,
    phase_b: Annotated[
        Path | None,
        typer.Option(metavar="CFG", help="By default the recipe demo_b on a CPU, imagenet/B4 on a GPU."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Of all cases of a group; by default 3 on a CPU, 10 on a GPU.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Measure compiled variants too; compiling takes minutes on a CPU.")
    ] = False,
    device: Device = "cpu",
    as_json: Json = False,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What --json printed before: show what moved since.")
    ] = None,
) -> None:
    """Time everything in one run: wavelets, networks, training steps, data, encoding.

    The cases of a group take turns. Each has a median, the spread of the middle half of its times, and its share of a
    limit that is measured in the same turns: a matrix product, a convolution, a copy, decoding or the encoder alone.

    Example: olvae bench all --device cuda --json > now.json
    """
    import json

    from olvae.bench.cases import GROUPS, Phase
    from olvae.bench.document import bench_all, check_machine, machine, moved, read_document
    from olvae.config import ConfigError
    from olvae.devices import resolve_device
    from olvae.training.run import quieten

    chosen = [name.strip() for name in groups.split(",")]
    if unknown := [name for name in chosen if name not in GROUPS]:
        raise ConfigError(f"--groups {', '.join(unknown)}: choose from {', '.join(GROUPS)}")
    device = resolve_device(device)
    on_cpu = device == "cpu"
    before = None
    if against is not None:
        before = read_document(against)
        check_machine(before, machine(device))
    phases = {}
    if "train" in chosen:
        config_a = phase_a or Path("demo" if on_cpu else "imagenet/A2")
        config_b = phase_b or Path("demo_b" if on_cpu else "imagenet/B4")
        phases = {
            f"phase {phase}, {config}": Phase(*_phase(config, size, batch_size))
            for phase, config in (("A", config_a), ("B", config_b))
        }
    quieten()
    document = bench_all(
        chosen,
        device,
        rounds or (3 if on_cpu else 10),
        lambda name, cases: typer.echo(f"{name}: {cases} cases", err=True),
        size=None if size is None else _multiple(size),
        batch_size=batch_size,
        compiled=compiled,
        phases=phases,
    )
    rows = document["rows"]
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        typer.echo(", ".join(f"{key} {value}" for key, value in document.items() if key != "rows"), err=True)
        for name in chosen:
            of_group = [row for row in rows if row["group"] == name]
            _show([{key: row[key] for key in row if key != "group"} for row in of_group], name, False, wide=True)
    if before is not None:
        changed = moved(before["rows"], rows)
        title = f"{len(changed)} of {len(rows)} moved since {against} by more than both spreads"
        if changed:
            _show(changed, title, False, wide=True)
        else:
            typer.echo(title, err=True)


@app.command()
def train(
    config: Annotated[
        Path, typer.Option(metavar="CFG", help="A config or recipe with an adversary, or a run's config.yaml.")
    ] = Path("demo_b"),
    size: Annotated[int | None, typer.Option(min=1, help="Pixels; by default the config's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-B", min=1, help="By default the config's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps per round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each kind of step.")] = 3,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time the training step of phase B beside one that runs the autoencoder's forward pass twice.

    Without LPIPS, which costs both the same.

    Example: olvae bench train --config imagenet/B3 --size 128 -B 1 --json
    """
    import json

    from olvae.bench.train import bench_train
    from olvae.config import ConfigError
    from olvae.devices import resolve_device
    from olvae.training.run import quieten

    params, size, batch_size = _phase(config, size, batch_size)
    if params.get("adversary_config") is None:
        raise ConfigError(f"{config}: has no adversary_config: name a config of phase B")
    quieten()
    result = bench_train(params, size, batch_size, steps, rounds, resolve_device(device))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(f"{config}, {size}x{size}, {batch_size} images per step, {device}", err=True)
    for name, value in result.items():
        typer.echo(f"  {name:<26} {value:.3f}", err=True)


@app.command()
def data(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC...", help="Folders, shards, lists, data sets, as for --data.")
    ],
    size: Annotated[int, typer.Option(min=1, help="Side of the training crops in pixels; a config has its own.")] = 256,
    batch_size: BatchSize = 32,
    workers: Annotated[str, typer.Option(metavar="LIST", help="Numbers of loader processes to try.")] = "0,1,2",
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds per measurement; the best of three counts.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Time the training loaders of sources beside decoding and cropping the same images without a loader.

    Example: olvae bench data photos photos_shards --size 256 --workers 1,2
    """
    from olvae.bench.data import bench_data
    from olvae.config import ConfigError

    if (numbers := _numbers(workers)) is None:
        raise ConfigError(f"--workers {workers}: give numbers of processes, such as 0,1,2")
    rows = bench_data(sources, size, batch_size, numbers, seconds)
    _show(rows, "training loaders; of the floor, per worker", as_json)


@app.command()
def dwt(
    size: Annotated[int, typer.Option(min=2, help="Pixels.")] = 256,
    batch_size: BatchSize = 8,
    wavelet: Annotated[str, typer.Option(help="An orthogonal wavelet of PyWavelets.")] = "haar",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time one level of the wavelet transform beside PyWavelets and a strided convolution.

    Example: olvae bench dwt --size 512 --device cuda --json
    """
    from olvae.bench.networks import bench_dwt
    from olvae.devices import resolve_device

    rows = bench_dwt(batch_size, size, wavelet, resolve_device(device))
    _show(rows, f"{wavelet}, {batch_size} RGB images of {size}x{size}, {device}", as_json)


@app.command()
def encoder(
    size: Pixels = 256,
    batch_size: BatchSize = 1,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time LiteVAE's encoders S, B, M and L beside Stable Diffusion's.

    Example: olvae bench encoder --size 256 -B 32 --device cuda
    """
    from olvae.bench.networks import ENCODERS, bench_networks
    from olvae.devices import resolve_device

    rows = bench_networks(ENCODERS, (batch_size, 3, _multiple(size), size), resolve_device(device))
    _show(rows, f"encoders, {batch_size} images of {size}x{size}, {device}", as_json)


@app.command()
def decoder(
    size: Pixels = 256,
    batch_size: BatchSize = 1,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time the decoders with self-modulated convolutions, as trained and folded, beside Stable Diffusion's.

    Example: olvae bench decoder --size 256 -B 8 --device cuda
    """
    from olvae.bench.networks import DECODERS, FACTOR, LATENT, bench_networks
    from olvae.devices import resolve_device

    side = _multiple(size) // FACTOR
    rows = bench_networks(DECODERS, (batch_size, LATENT, side, side), resolve_device(device))
    _show(rows, f"decoders, {batch_size} images of {size}x{size}, {device}", as_json)


@app.command()
def encode(
    size: Pixels = 256,
    batch_size: BatchSize = 16,
    images: Annotated[int, typer.Option(min=1, help="Sample photographs, at most 60.")] = 60,
    scale: Annotated[str, typer.Option(help="LiteVAE's encoder: S, B, M or L.")] = "S",
    width: Annotated[
        int, typer.Option(min=32, help="AutoencoderKL's channels, a multiple of 32; Stable Diffusion's has 128.")
    ] = 32,
    precision: Annotated[str, typer.Option(callback=check_precision, help="32, bf16 or fp16.")] = "32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time `olvae encode`, from files to files, beside a plain loop over diffusers with the same autoencoder.

    Example: olvae bench encode --size 256 -B 32 --width 128 --scale B --precision bf16 --device cuda
    """
    from olvae.bench.encode import bench_encode
    from olvae.bench.networks import SIZES
    from olvae.config import ConfigError
    from olvae.data.mapped.dataset import HELD_OUT, PHOTOGRAPHS
    from olvae.devices import resolve_device

    if scale not in SIZES:
        raise ConfigError(f"--scale {scale}: choose from {', '.join(SIZES)}")
    if width % 32:
        raise ConfigError(f"--width {width}: must be a multiple of 32")
    paths = [photograph.path for photograph in (*PHOTOGRAPHS, *HELD_OUT)][:images]
    rows = bench_encode(paths, _multiple(size), batch_size, resolve_device(device), precision, scale, width)
    _show(rows, f"{len(paths)} photographs, {batch_size} at a time, {size}x{size}, {precision}, {device}", as_json)


@app.command()
def scaling(
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The plot.")],
    sizes: Annotated[
        str | None, typer.Option(metavar="LIST", help="Pixels; by default 128 to 1024, on a GPU 256 to 2048.")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="LIST", help="Images at a time; by default 1,4, on a GPU 1,4,16.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of all sizes and batches; the median counts.")] = 3,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GiB", min=0.01, help="By default half of a GPU's free memory, or 1 on a CPU."),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Plot how an encoder's and a decoder's time and memory per pixel change with pixels and batch.

    What would take more memory than the limit is left out.

    Example: olvae bench scaling --out scaling.png --sizes 64,128,256 --batches 1,2
    """
    from olvae.bench.scaling import BATCHES, SIZES, bench_scaling, plot_scaling
    from olvae.config import ConfigError
    from olvae.devices import resolve_device
    from olvae.files import check_folder
    from olvae.models.large.tiling import GIB

    if out.suffix != ".png":
        raise ConfigError(f"--out {out}: the plot is a PNG: give it a name that ends with .png")
    device = resolve_device(device)
    kind = device.partition(":")[0]
    pixels = SIZES[kind] if sizes is None else _numbers(sizes)
    images = BATCHES[kind] if batches is None else _numbers(batches)
    if pixels is None or any(size < 8 or size % 8 for size in pixels):
        raise ConfigError(f"--sizes {sizes}: give multiples of 8, such as 128,256")
    if images is None or min(images) < 1:
        raise ConfigError(f"--batches {batches}: give numbers of images, such as 1,4")
    check_folder(out.parent)
    rows = bench_scaling(pixels, images, device, rounds, None if memory is None else int(memory * GIB))
    if not rows:
        raise ConfigError("--sizes, --batches: none of them fits the memory: give smaller ones, or more with --memory")
    out.parent.mkdir(parents=True, exist_ok=True)
    plot_scaling(rows, out)
    _show(rows, f"time and memory per pixel, {device}", as_json, wide=True)


def _numbers(text: str) -> list[int] | None:
    """The whole numbers of a list with commas; None if it is something else."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isdigit() for part in parts) else None


def _phase(config: Path, size: int | None, batch_size: int | None) -> tuple[dict[str, Any], int, int]:
    """The model's params without LPIPS, pixels and batch size: those given, else those of the config."""
    from olvae import config as cfg
    from olvae.config import ConfigError

    loaded = cfg.load([config], ["model.params.lossconfig.params.lpips_weight=0"])
    if mistakes := cfg.validate(loaded):
        raise ConfigError(*mistakes)
    if loaded["model"].get("from") is not None:
        raise ConfigError(f"{config}: model.from names an autoencoder: give the run's config.yaml")
    params, data = loaded["model"]["params"], loaded.get("data", {}).get("params", {})
    size, batch_size = size or data.get("size"), batch_size or data.get("batch_size")
    if size is None or batch_size is None:
        raise ConfigError(f"{config}: has no data.params.size and batch_size: add --size and --batch-size")
    return params, size, batch_size


def _multiple(size: int) -> int:
    from olvae.config import ConfigError

    if size % 8:
        raise ConfigError(f"--size {size}: must be a multiple of 8, such as {max(8, size // 8 * 8)}")
    return size


def _show(rows: list[dict[str, Any]], title: str, as_json: bool, wide: bool = False) -> None:
    """Print rows as JSON to standard output, or as a table to standard error; ``wide`` is Markdown, never folded."""
    import json

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = Console(stderr=True)
    table = Table(title=title)
    if wide:
        console, table = Console(stderr=True, width=200), Table(title=title, title_justify="left", box=box.MARKDOWN)
    keys = dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row)
    for key in keys:
        justify: Literal["left", "right"] = "left" if key in ("name", "source", "variant", "precision") else "right"
        table.add_column(key.removesuffix("_bytes").replace("_", " "), justify=justify)
    for row in rows:
        table.add_row(*(escape(_cell(key, row[key])) if key in row else "" for key in keys))
    console.print(table)


def _cell(key: str, value: Any) -> str:
    if key == "params":
        return f"{value / 1e6:.2f} M"
    if key == "peak_memory_bytes":
        return f"{value / 2**20:.0f} MiB"
    if key.startswith("of_"):
        return f"{value:.0%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
