"""Record the losses of every recipe's first 20 steps in small, and compare them with the record.

    python -m tests.configs.recipe_curves  # records all; `make curves` does so for two kinds

A file of tests/reference/curves/ has the losses on one kind of CPU, as torch names it, and the
torch and the processor that made them: with these, losses are the same to the digit.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from olvae import LiteVAE
from olvae.config import recipes, save
from olvae.data.places import VOLUMES
from olvae.losses import perceptual
from olvae.models import linear_code
from olvae.models.loading.targets import find_target
from olvae.modules.litevae.one_step import OneStepDecoder
from olvae.pretrained_networks import ALEXNET
from olvae.training import processes, summary
from olvae.training.loggers import read_curves
from olvae.training.run import RUN_ENV, train
from olvae.training.settings import TrainOptions
from tests.export.latents import encode
from tests.models.autoencoder_kl import tiny_kl
from tests.models.loading.classes import make
from tests.pretrained import classifier_of_torchvision
from tests.recipes import recipe
from tests.training.origins import EIGHT

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "reference" / "curves"

STEPS = 20
CROP = 32  # pixels; adversaries, deep/ and latents/ take twice that
RECIPES = [name for name, path in recipes().items() if recipe(path).get("lightning")]
"""All but the published model's networks, whose file has no training."""

TOLERANCE = 1e-4
"""Relative, on another kind of CPU or with another torch."""

WITHOUT_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
FOUR_LEVELS = {**EIGHT, "decoder_block_out_channels": (8, 8, 8, 16), "norm_num_groups": 4}

Curves = dict[str, list[float]]

ADVERSARIAL_STEPS = 5
"""Of curves with a discriminator, how many steps are compared there: between AVX512 and AVX2 they
differ by up to 4.1e-5 in 5 steps, 5e-4 in 10 and 1.7e-3 in 20; the others by 3.5e-5 in 20.
"""

NETWORKS: dict[str, dict[str, Any]] = {
    "LiteVAE_Encoder": {
        "extractor_channels": 8,
        "extractor_resblocks": 1,
        "aggregate_channels": 8,
        "aggregate_resblocks": 1,
    },
    "LiteVAE_Decoder": {"channels": 8, "num_res_blocks": 0},
    "OneStepDecoder": {},  # the shipped model's
    "SDEncoder": {"channels": 8, "norm_groups": 4, "num_res_blocks": 1},
    "SDDecoder": {"channels": 8, "norm_groups": 4, "num_res_blocks": 1},
    "TinyEncoder": {"channels": 8, "blocks": [1, 1, 1, 1]},
    "TinyDecoder": {"channels": 8, "blocks": [1, 1, 1, 1]},
    "PatchGAN": {"base_channels": 4},
    "UNetGAN": {"image_size": 64},
    "GigaGAN": {"image_size": 64, "base": 512, "max_channels": 16, "heads": 2, "head_channels": 8},
    "DinoDiscriminator": {"image_size": 64, "heads": 2},
    "ViTDecoder": {"width": 32, "depth": 1, "heads": 1, "hidden": 32},
}
"""Arguments that make each network narrow and shallow; its levels stay the recipe's."""

SOON = ("warmup_steps", "start_step", "ramp_steps")
"""Settings that count steps: 5 here, unless they are 0."""

AUTOENCODERS = {
    "FLUX.2": lambda: make("AutoencoderKLFlux2", latent_channels=32, **FOUR_LEVELS),
    "Qwen-Image": lambda: make("AutoencoderKLQwenImage"),
    "Wan2.1": lambda: make("AutoencoderKLWan"),
    "taesdxl": lambda: make("AutoencoderTiny"),
    "FLUX.1": lambda: tiny_kl(**EIGHT, latent_channels=16, **WITHOUT_QUANT),
    "stable-diffusion-3": lambda: tiny_kl(**EIGHT, latent_channels=16, **WITHOUT_QUANT),
    "sd": lambda: tiny_kl(**EIGHT),
}
"""A small model of the class of each published autoencoder, by how its repository's name begins."""


class Workshop:
    """Makes what recipes start from, in a folder and once: pictures, teachers, random weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pictures(self, channels: int, most: float | None) -> Path:
        """Make twelve smooth pictures: PNG, or .npy files with values of up to ``most``."""
        folder = self.folder / f"pictures-{channels}-{most}"
        if folder.is_dir():
            return folder
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(12):
            planes = [
                Image.fromarray(rng.integers(0, 256, (6, 7), dtype=np.uint8)).resize((96, 80))
                for _ in range(channels)
            ]
            pixels = np.stack([np.asarray(plane) for plane in planes], axis=-1)
            if most is None:
                Image.fromarray(pixels).save(folder / f"{i}.png")
            else:
                np.save(folder / f"{i}.npy", pixels.astype(np.float32) * (most / 255))
        return folder

    @cached_property
    def alexnet(self) -> str:
        """The file of LPIPS' network, in place of VGG16, whose steps take three times as long."""
        torch.manual_seed(0)
        path = self.folder / ALEXNET.name
        torch.save(classifier_of_torchvision(torchvision.models.alexnet), path)
        return str(path)

    @cached_property
    def vision(self) -> dict[str, str]:
        """The arguments of an alignment or a discriminator with a small vision encoder."""
        torch.manual_seed(0)
        path = self.folder / "vit.pt"
        torch.save(timm.create_model("test_vit").state_dict(), path)
        return {"encoder": "test_vit", "weights": str(path)}

    def autoencoder(self, target: str, generates: bool = False) -> str:
        """The small one in place of a published autoencoder; what ships is itself."""
        if generates:
            return self.one_step
        if target.startswith("timm:"):
            _, reduced, channels = target.partition("::")
            return f"timm:test_vit={self.vision['weights']}{reduced}{channels}"
        repository = target.rpartition("/")[2]
        for begins, build in AUTOENCODERS.items():
            if repository.startswith(begins):
                folder = self.folder / begins
                if not folder.is_dir():
                    build().save_pretrained(folder)
                return f"diffusers:{folder}"
        return target.replace("diffusers:", f"diffusers:{ROOT}/")

    @cached_property
    def one_step(self) -> str:
        """The shipped model with a decoder that generates, whose injections are random."""
        model = LiteVAE.from_pretrained("olvae:photos-f8c12")
        params = model.decoder.node["params"]
        params.pop("enlarge")
        torch.manual_seed(0)
        decoder = OneStepDecoder(**params)
        decoder.load_state_dict({**decoder.state_dict(), **model.decoder.state_dict()})
        for parameter in decoder.injections.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        path = self.folder / "one_step"
        LiteVAE(model.encoder, decoder).save_pretrained(path)
        return str(path)

    def pairs(self, target: str) -> str:
        """The folder of a teacher's latents of the pictures."""
        name = target.rpartition("/")[2].replace(":", "-")
        folder = self.folder / f"pairs-{name}"
        if not folder.is_dir():
            model = find_target(self.autoencoder(target)).load()
            options = {"size": CROP, "images": True, "dtype": "float32", "workers": 0}
            encode(self.pictures(3, None), folder, model, **options)
        return str(folder)


def narrow(node: dict[str, Any], shop: Workshop) -> dict[str, Any]:
    """Arguments of a node's network, narrow and shallow."""
    params = node.get("params", {})
    if "target" not in node:  # changes of the network to start from
        return {**NETWORKS["ViTDecoder"]} if "depth" in params else params
    kind = node["target"].rpartition(".")[2]
    params = {**params, **NETWORKS[kind]}
    if kind == "UNetGAN":
        params["base_channels"] = params.get("base_channels", 16) // 8
    if kind == "DinoDiscriminator":
        params |= shop.vision
    return params


def in_small(name: str, shop: Workshop) -> dict[str, Any]:
    """Write a recipe's config with narrow networks and small crops of the workshop's pictures."""
    config = recipe(recipes()[name])
    model = config["model"]
    params = model["params"]
    parts = params.get("parts", {})

    # Networks: narrow ones, and an adversary that plays from the fifth step.
    params["compile"] = False
    adversary = params.get("adversary_config", {}).get("params", {})
    halves = (params.get("encoder_config"), params.get("decoder_config"))
    for node in (*halves, adversary.get("discriminator_config")):
        if node:
            node["params"] = narrow(node, shop)
    for settings in (params, adversary):
        settings |= {key: 5 for key in SOON if settings.get(key)}

    # What would be a download.
    params["lossconfig"]["params"]["lpips_weights"] = shop.alexnet
    params["val_metrics"] = []
    config["lightning"].pop("callbacks", None)
    if "from" in model:
        model["from"] = shop.autoencoder(model["from"], generates="distillation" in parts)
    if "config" in params.get("decoder_config", {}).get("params", {}):
        params["decoder_config"]["params"]["config"] = {"decoder_block_out_channels": [4, 4, 4, 8]}
    if "alignment" in parts:
        parts["alignment"]["params"] |= shop.vision
    parts.get("prior", {"params": {}})["params"] |= {"width": 32, "depth": 1}
    parts.get("features", {"params": {}})["params"] |= {"depth": 1}

    # Data.
    data = config["data"]
    given = data["params"]
    crop = 2 * CROP if adversary or name.startswith(("deep/", "latents/")) else CROP
    if "teacher" in parts:
        teacher = parts["teacher"]["params"]
        if "folder" in given:
            crop = CROP  # that was encoded
            pairs = shop.pairs(teacher["autoencoder"])
            given |= {"folder": pairs, "val_folder": pairs}
        teacher["autoencoder"] = shop.autoencoder(teacher["autoencoder"])
    if "folder" not in given:
        given.setdefault("channels", {VOLUMES: 1}.get(data["target"], 3))
        keep = ("min_fraction", "shuffle_channels", "channels", "range", "flip")
        data["target"] = "olvae.data.picture_folder.FolderSource"
        most = given.get("range")
        if isinstance(most, dict):
            most.pop("nodata", None)  # the pictures have such values
            most = most["pairs"]
        pictures = shop.pictures(given.get("channels", 3), most and float(most[1]))
        given = {key: given[key] for key in keep if key in given} | {"root": str(pictures)}
        given["val_fraction"] = 0.2
    data["params"] = given | {"size": crop, "batch_size": 2, "num_workers": 0}
    trainer = {"max_steps": STEPS, "val_check_interval": STEPS, "log_every_n_steps": 1}
    clip = config["lightning"]["trainer"]["gradient_clip_val"]
    config["lightning"]["trainer"] = {"gradient_clip_val": clip, "limit_val_batches": 1, **trainer}
    return config


@contextmanager
def quietly() -> Iterator[None]:
    """Train without curves, MACs and loader processes, as ``quick_training`` of the tests."""
    network = perceptual.perceptual_network
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()):
        patch.delenv(RUN_ENV, raising=False)
        patch.setattr(summary, "plot_curves", lambda curves, path: path.touch())
        patch.setattr(summary, "count_macs", lambda *_: 0)
        patch.setattr(processes, "MOST_WORKERS", 0)
        patch.setattr(linear_code, "CROPS", (256, 512))
        patch.setattr(perceptual, "perceptual_network", lambda _, file: network("alex", file))
        yield


def losses(name: str, shop: Workshop) -> Curves:
    """Train a recipe in small, as the command does; return the losses of its steps."""
    with tempfile.TemporaryDirectory(dir=shop.folder) as folder, quietly():
        path = Path(folder) / "recipe.yaml"
        save(in_small(name, shop), path)
        options = TrainOptions(
            base=[path], logdir=Path(folder) / "runs", gpus="0", seed=0, precision="32"
        )
        found = read_curves(train(options))
    return {
        tag: [float(f"{value:.9g}") for value in found[tag][1]]
        for tag in ("train/loss", "train/discriminator")
        if tag in found
    }


def processor() -> str:
    """Name the processor with its generation, where Linux says it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    of_first = {key.strip(): value.strip() for key, _, value in lines}
    names = ("model name", "cpu family", "model")
    return ", ".join(of_first[key] for key in names if key in of_first) or platform.processor()


def makers() -> dict[str, str]:
    """Name what decides the last digits."""
    return {"torch": torch.__version__.partition("+")[0], "processor": processor()}


def record_file(kind: str | None = None) -> Path:
    return FOLDER / f"{kind or torch.backends.cpu.get_cpu_capability()}.json"


def read_record() -> tuple[dict[str, Curves], bool]:
    """Return the recipes' curves to compare with, and if they hold to the digit here.

    Of this kind of CPU, or of any other if there is none.
    """
    path = record_file()
    if not path.is_file():
        path = next(iter(sorted(FOLDER.glob("*.json"))))
    record = json.loads(path.read_text(encoding="utf-8"))
    same_makers = record["made with"] == makers()
    return record["recipes"], path == record_file() and same_makers


def difference(found: Curves, recorded: Curves, exact: bool) -> str | None:
    """Say where curves first leave the recorded ones; None if they don't."""
    if {tag: len(values) for tag, values in found.items()} != {
        tag: len(values) for tag, values in recorded.items()
    }:
        return f"has other losses: {', '.join(found)} for {', '.join(recorded)}"
    short = "train/discriminator" in found and not exact
    steps = ADVERSARIAL_STEPS if short else STEPS
    tolerance = 0.0 if exact else TOLERANCE
    for tag, values in found.items():
        for step, (value, before) in enumerate(zip(values, recorded[tag], strict=True), 1):
            near = abs(value - before) <= tolerance * abs(before)
            if step <= steps and not near:
                relative = abs(value / before - 1)
                return f"{tag} is {value} at step {step}, was {before} ({relative:.0e} of it)"
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = record_file()
    before, exact = read_record() if path.is_file() else ({}, False)

    # Each recipe's curves, and what the record had. Some recipes are the same in small.
    curves: dict[str, Curves] = {}
    trained: dict[str, Curves] = {}
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        for name in RECIPES:
            config = json.dumps(in_small(name, shop), sort_keys=True)
            if config not in trained:
                trained[config] = losses(name, shop)
            curves[name] = trained[config]
            moved = difference(curves[name], before[name], exact) if name in before else "is new"
            if moved is not None:
                sys.stdout.write(f"{path.stem}: {name}: {moved}\n")
                sys.stdout.flush()

    # A line for each curve.
    text = json.dumps({"made with": makers(), "recipes": curves}, indent=1)
    text = re.sub(r"\n {4,}|\n {3}(?=\])", " ", text)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
