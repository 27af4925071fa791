"""Put the table of all recipes into its page: what each is for, needs and takes.

    python -m study.recipes --document docs/recipes.md

Memory and operations are counted as `olvae validate --memory` does, which takes some ten seconds
for a recipe of full size. Autoencoders of the hub are made here with random weights.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import timm
import torch

from olvae.cli.configs import purpose_of
from olvae.cli.main import print_error
from olvae.config import recipes
from olvae.data.pixels.size_and_range import Sides
from olvae.data.places import load
from olvae.devices import peak_tflops
from olvae.models.footprint import MARGIN, Footprint, footprint, without_weights
from olvae.models.large.tiling import GIB
from olvae.runs import TEACHER, entry_of
from olvae.training.progress import USUAL_SHARE
from olvae.training.start_from import start_from
from study.tables import fill, table

GPUS = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-80GB"}

FOR_A_GPU = 1e11
"""Operations of a step. Smaller networks are trained on a CPU, and would not keep a GPU busy."""

FOLDERS = {"": "own", "imagenet": "imagenet", "deep": "deep", "distil": "distil"}
FOLDERS |= {"finetune": "finetune", "not_rgb": "not_rgb", "latents": "latents", "rae": "rae"}
"""A table's name for each folder of recipes."""

CONTINUES = {
    "phase_b": "`phase_a`",
    "demo_b": "`demo`",
    "deep/f16c32_b": "`deep/f16c32`",
    "deep/f16c32_dino": "`deep/f16c32`",
    "deep/f16c32_send": "`deep/f16c32_aligned`",
    "distil/decoder": "`distil/encoder`, or random",
    "distil/encoder": "random weights",
    "distil/teacher": "1200 steps of its own",
    "imagenet/VAE_b": "`imagenet/VAE`",
    "imagenet/paper_f8c12_b": "`imagenet/paper_f8c12_a`",
    **{f"imagenet/{name}": "`imagenet/A2`" for name in ("B0", "B1", "B2", "B3", "B4", "B5")},
    "imagenet/large_batch": "`imagenet/A2`",
}
"""What `--actual_resume` takes, where a recipe's comments name it."""

KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
WITHOUT_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
AUTOENCODERS: Mapping[str, Callable[[], Any]] = {
    "stabilityai/sd": lambda: diffusers.AutoencoderKL(**KL),
    "stabilityai/stable-diffusion-3": lambda: diffusers.AutoencoderKL(**KL, **WITHOUT_QUANT),
    "black-forest-labs/FLUX.1": lambda: diffusers.AutoencoderKL(**KL, **WITHOUT_QUANT),
    "black-forest-labs/FLUX.2": lambda: diffusers.AutoencoderKLFlux2(),
    "Qwen/": lambda: diffusers.AutoencoderKLQwenImage(),
    "Wan-AI/": lambda: diffusers.AutoencoderKLWan(),
    "madebyollin/": lambda: diffusers.AutoencoderTiny(),
}
"""Networks of published autoencoders, by how their names on the hub begin."""


def groups() -> Iterator[tuple[str, list[str]]]:
    """Each table's name, and its recipes: those that train something."""
    for folder, name in FOLDERS.items():
        inside = [
            recipe
            for recipe in recipes()
            if recipe.rpartition("/")[0] == folder and "lightning" in load([recipe])
        ]
        yield name, inside


def from_a_file(target: str, folder: Path) -> str:
    """The same TARGET as a folder of random weights, if it is one of the hub's."""
    if target.startswith("timm:"):
        name, reduced, channels = target.removeprefix("timm:").partition("::")
        file = folder / f"{name}.pt"
        if not file.is_file():
            torch.save(timm.create_model(name).state_dict(), file)
        return f"timm:{name}={file}{reduced}{channels}"
    for start, make in AUTOENCODERS.items():
        if target.startswith(f"diffusers:{start}"):
            place = folder / start.replace("/", "_")
            if not place.is_dir():
                make().save_pretrained(place)
            return f"diffusers:{place}"
    return target


class Counted:
    """Footprints in bf16 and parameters of configs; equal models are counted once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, tuple[Footprint, int]] = {}

    def of(self, name: str) -> tuple[Footprint, int]:
        config = load([name])
        params = config["model"]["params"]
        if config["model"].get("from"):
            config["model"]["from"] = from_a_file(config["model"]["from"], self.folder)
            start_from(config)
            params = config["model"]["params"]
        if entry_of(config, TEACHER):
            teacher = params["parts"]["teacher"]["params"]
            teacher["autoencoder"] = from_a_file(teacher["autoencoder"], self.folder)
        size = Sides.of(config["data"]["params"]["size"])
        key = json.dumps([params, size], sort_keys=True, default=str)
        if key not in self.known:
            model = without_weights(config["model"])
            parameters = sum(p.numel() for p in model.autoencoder.parameters())
            self.known[key] = footprint(model, size, "bf16"), parameters
        return self.known[key]


def settings(name: str) -> list[str]:
    """The cells that a config states: its start, pixels, images a step and steps."""
    config = load([name])
    data, trainer = config["data"]["params"], config["lightning"]["trainer"]
    processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    images = f"{data['batch_size'] * trainer.get('accumulate_grad_batches', 1)}"
    if processes > 1:
        images = f"{processes} x {images}"
    size = Sides.of(data["size"])
    pixels = f"{size.height}" if size.height == size.width else f"{size.height}x{size.width}"
    return [start(name, config), pixels, images, f"{trainer['max_steps']:,}"]


def start(name: str, config: Mapping[str, Any]) -> str:
    """What the weights are before the first step."""
    if config["model"].get("from"):
        return f"`{config['model']['from']}`"
    if name in CONTINUES:
        return CONTINUES[name]
    linear = entry_of(config, "model.params.encoder_config.params.linear")
    return "linear code" if linear else "random weights"


def costs(name: str, counted: Counted) -> list[str]:
    """The cells that are counted: parameters, a GPU's memory, hours of each GPU."""
    config = load([name])
    need, parameters = counted.of(name)
    trainer, images = config["lightning"]["trainer"], config["data"]["params"]["batch_size"]
    memory = MARGIN * need.total(images) / GIB
    images *= trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    images *= trainer.get("accumulate_grad_batches", 1)
    size = f"{parameters / 1e6:.3g}"
    if need.flop * images < FOR_A_GPU:
        return [size, *[""] * (1 + len(GPUS))]

    cells = [size, f"{memory:.0f}" if memory >= 10 else f"{memory:.1f}"]
    for gpu in GPUS.values():
        peak = peak_tflops(gpu, "bf16")
        assert peak is not None
        hours = need.flop * images * trainer["max_steps"] / (USUAL_SHARE * peak * 1e12) / 3600
        cells.append(time(hours))
    return cells


def time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def published(networks: str) -> dict[str, list[str]]:
    """PSNR and rFID that a page of networks gives for recipes of imagenet/."""
    found = {}
    for line in networks.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[1].startswith("`"):
            name = f"imagenet/{cells[1].strip('`')}"
            found[name] = [f"{float(cells[6]):.2f}", f"{float(cells[7]):.2f}"]
    return found


COSTS = ["recipe", "pixels", "images a step", "steps", "parameters, M", "GiB", *GPUS]
PUBLISHED = ["published PSNR", "rFID"]


def group(names: list[str], document: Path, counted: Counted) -> str:
    """Two tables of recipes: what each is for, and what it needs."""
    known = published((document.parent / "networks.md").read_text(encoding="utf-8"))
    has_published = bool(known.keys() & names)
    files = recipes()
    purposes = []
    numbers = []
    for name in names:
        what_for = purpose_of(files[name]).partition(" Start from ")[0]
        beginning, *sizes = settings(name)
        purposes.append([f"`{name}`", what_for, beginning])
        numbers.append([f"`{name}`", *sizes, *costs(name, counted)])
        if has_published:
            numbers[-1] += known.get(name, ["", ""])
    purpose = table(["recipe", "what for", "starts from"], purposes).replace("--:", "---")
    return f"{purpose}\n\n{table(COSTS + PUBLISHED * has_published, numbers)}"


def page(document: Path) -> str:
    """The page with its tables made again."""
    with tempfile.TemporaryDirectory() as folder:
        counted = Counted(Path(folder))
        tables = {
            name: lambda _, names=names: group(names, document, counted) for name, names in groups()
        }
        return fill(document.read_text(encoding="utf-8"), {}, tables)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--document", type=Path, default=Path("docs/recipes.md"))
    options = parser.parse_args(arguments)
    try:
        options.document.write_text(page(options.document), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
