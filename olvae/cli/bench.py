"""Run ``olvae bench`` and ``olvae tables``: speed and memory, parameters and operations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from olvae.cli.options import check_applies, check_device, print_rows, split_commas
from olvae.config import ConfigError

GROUP_NAMES = ("dwt", "encoder", "decoder", "train", "data", "encode")

# Entries of a row that say what was measured; the others are sizes and numbers.
CASE = ("name", "variant", "precision")


def command(
    groups: Annotated[
        str, typer.Argument(metavar="GROUPS", help=f"all, or some of {','.join(GROUP_NAMES)}.")
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SRC",
            help="Sources for data and encode; by default the sample photographs.",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=8, help="Pixels, a multiple of 8; by default each group's own, 256 on a GPU."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-B", min=1, help="By default each group's own.")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CFG",
            help="Configs for train; by default demo and demo_b, or imagenet/A2 and imagenet/B4 "
            "on a GPU.",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Numbers of loader processes for data and encode; by default 0,1,2.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="How often each case is measured; by default 3 on a CPU, 10 on a GPU."
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Measure compiled variants too; compiling takes minutes on a CPU."
        ),
    ] = False,
    device: Annotated[str, typer.Option(callback=check_device, help="cpu, cuda or mps.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Measure speed and memory, and compare them with named peers and with the machine's limits.

    dwt is the wavelet transform beside PyWavelets, encoder and decoder are the networks beside
    Stable Diffusion's, train is a step beside one that runs the autoencoder twice, data is loaders
    beside decoding alone, encode is `olvae encode` with a network of no cost. The cases of a group
    take turns. Each has a median, the spread of the middle half of its times, and its share of a
    limit that is measured in the same turns.

    Example: olvae bench encoder --device cuda --json > now.json

    Example: olvae bench data photos shards --size 256 --workers 1,2
    """
    # What is wrong with the arguments, before torch is imported.
    chosen = list(GROUP_NAMES) if groups == "all" else split_commas(groups)
    unknown = [name for name in chosen if name not in GROUP_NAMES]
    if unknown or not chosen:
        raise ConfigError(
            f"GROUPS {', '.join(unknown) or groups}: choose from all, {', '.join(GROUP_NAMES)}"
        )
    loads = "data" in chosen or "encode" in chosen
    if sources and not loads:
        raise ConfigError(f"{sources[0]}: only data and encode take sources")
    check_applies("--workers", workers is not None, "data or encode", loads)
    check_applies("--config", bool(config), "train", "train" in chosen)
    if size is not None and size % 8:
        raise ConfigError(f"`size` {size}: must be a multiple of 8, such as {size // 8 * 8}")
    counts = split_commas("0,1,2" if workers is None else workers)
    if not counts or not all(number.isdecimal() for number in counts):
        raise ConfigError(f"`workers` {workers}: give numbers of processes, such as 0,1,2")

    import torch

    from olvae.bench.cases import bench
    from olvae.bench.measure import Setting
    from olvae.data.dataset import PHOTOGRAPHS
    from olvae.devices import keep_freed_memory, resolve_device
    from olvae.training.run import quieten

    # Measure, with the settings of training that bear on speed.
    keep_freed_memory()
    device = resolve_device(device)
    torch.backends.cudnn.benchmark = True
    usual_configs = ["imagenet/A2", "imagenet/B4"]
    usual_rounds = 10
    if device == "cpu":
        usual_configs = ["demo", "demo_b"]
        usual_rounds = 3
    setting = Setting(
        device,
        size or 0,
        batch_size or 0,
        config or usual_configs,
        sources or [str(PHOTOGRAPHS[0].parent)],
        [int(number) for number in counts],
        compiled,
    )
    quieten()
    document = bench(
        chosen,
        setting,
        rounds or usual_rounds,
        lambda name, cases: typer.echo(f"{name}: {cases} cases", err=True),
    )

    # The whole document as JSON, or a table of each group.
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    about = [f"{key} {value}" for key, value in document.items() if key != "rows"]
    typer.echo(", ".join(about), err=True)
    for name in chosen:
        _print_group(name, [row for row in document["rows"] if row["group"] == name])


def _print_group(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of a group as a table; what they have in common goes to its title."""
    same = {}
    for key in ("size", "batch_size", *CASE[1:]):
        values = {row[key] for row in rows if key in row}
        if len(values) == 1:
            same[key] = values.pop()
    title = name
    for key, value in same.items():
        if key == "variant" and value:
            title += f", {value}"
        elif value:
            title += f", {key.replace('_', ' ')} {value}"

    # What differs names the case; the numbers are its cells.
    table = {}
    for row in rows:
        case = ", ".join(row[key] for key in CASE if key not in same)
        cells = {}
        for key, value in row.items():
            if key in ("group", *CASE, *same):
                continue
            # Each kind of number in its unit.
            text = str(value)
            if key == "peak_memory_bytes":
                text = f"{value / 2**20:.0f} MiB"
            elif key.startswith("of_"):
                text = f"{value:.0%}"
            elif isinstance(value, float):
                text = f"{value:.4g}"
            cells[key.removesuffix("_bytes").replace("_", " ")] = text
        table[case] = cells
    print_rows(title, table, "case", stderr=True)


def tables_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count parameters and multiply-accumulates of the README's tables, beside the published ones.

    Example: olvae tables --json > tables.json
    """
    from olvae.bench.cases import network_table

    rows = network_table()
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    shown = {}
    for row in rows:
        cells = {
            "M params": f"{row.params / 1e6:.4f}",
            "published": f"{row.published_params / 1e6:.2f}",
            "GMACs": f"{row.macs / 1e9:.2f}",
        }
        if row.published_macs is not None:
            cells["GMACs published"] = f"{row.published_macs / 1e9:.1f}"
        # A group may be called like its variant, or a variant like its network.
        shown[" ".join(dict.fromkeys((row.group, row.variant, row.name)))] = cells
    print_rows("Networks at 256x256: counted now, and as published", shown, "network")
