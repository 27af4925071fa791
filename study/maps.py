"""Which statistic of a latent makes it learnable for a diffusion model, if pictures stay the same?

    python -m study.maps --corpus study/corpus-out --out study/out/maps

The latents of one autoencoder go through an invertible map (study/latent_maps.py), a diffusion
model learns what comes out, and its samples go back through the map before they are decoded. So
all rows have the same pictures to the bit, and only the latents differ. Rows: :data:`MAPS`, of
olvae:photos-f8c12 and of the linear code of the same shape.

Setting, chosen before the runs for two hours of a thread: 4000 crops of 64 pixels, 8x8 positions;
examples/diffusability.py's network, batches of 16, rate and sampling; 2000 steps, three seeds, 500
samples. A token is 2x2 positions, or one position where the map packs them, so that all rows have
16 tokens of 48 numbers.

What counts as a difference, written down before the runs: a row differs from the control `plain` in
a number if the means over three seeds are apart by more than two pooled standard deviations, and by
more than any two seeds of the control.

What to expect, written down before the runs: U rotates channels and F reorders a token's numbers,
so that for both only the network's first weights change: they are placebos, and so is R beside W.
If T+, T- or E differ and X does not, the spectrum explains; if X alone differs, smoothness does.

Numbers of a row and seed: the Fréchet distance in Lite0's features of samples to as many decoded
latents, and the loss on other crops in units of the best linear denoiser's, which covariances alone
give. Each leaves OUT/results/AUTOENCODER_MAP_SEED.json; files that are there are kept. All rows get
seed 0 first, then 1, then 2; the linear code comes last. Seeds share the order of crops, their
noise and the noise of samples between rows. The table of docs/results.md is made of the files in
study/results/maps/.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.diffusability import BATCH, decode, features, read_images, sample, train
from olvae.cli.main import print_error
from olvae.data.pixels.size_and_range import from_uint8
from olvae.data.shards.latent_source import LatentSource
from olvae.data.shards.webdataset import Entry
from olvae.data.source import Sample
from olvae.devices import keep_freed_memory
from olvae.files import check_folder, write_json
from olvae.metrics.features import Extract
from olvae.models.autoencoder import LiteVAE
from olvae.models.linear_code import LinearDecoder, LinearEncoder, fit_linear_paths
from olvae.models.loading.targets import find_target
from olvae.modules.others.denoiser import DiT
from study import predictors
from study.features import Lite0, frechet_lite0
from study.latent_maps import MAPS, LatentMap, fit
from study.maps_table import AUTOENCODERS, SEEDS, read, table
from study.run import CROP, Study, corpus_and_out

CHANNELS, FACTOR = 12, 8
OTHERS = 500
"""Crops that no diffusion model learns, for its loss and for the predictors."""


@dataclass(frozen=True)
class Setting:
    """Of the diffusion models; a file that was made with another one is refused."""

    steps: int = 2000
    batch_size: int = 16
    lr: float = 1e-3
    width: int = 128
    depth: int = 4
    patch: int = 2
    samples: int = 500
    fitted_on: int = 8000  # latents drawn, twice each crop, for maps and the linear denoiser


class MappedLatents(LatentSource):
    """Encoded latents, normalised as today and then mapped."""

    def __init__(self, folder: Path, batch_size: int, latent_map: LatentMap) -> None:
        super().__init__(folder, batch_size)
        self.latent_map = latent_map

    def train_sample(self, entry: Entry, rng: np.random.Generator) -> Sample:
        found = super().train_sample(entry, rng)
        assert found.image is not None
        return found._replace(image=self.latent_map.apply(found.image[None])[0].float())


@dataclass(frozen=True)
class Encoded:
    """An autoencoder, and what of its latents does not depend on the map."""

    name: str
    target: str
    latents: Path
    crops: Tensor  # uint8 (N, 3, H, W), which no diffusion model learns
    setting: Setting
    extract: Extract

    @cached_property
    def decoder(self) -> Any:
        return find_target(self.target).load()

    @cached_property
    def source(self) -> LatentSource:
        return LatentSource(self.latents, self.setting.batch_size)

    @cached_property
    def drawn(self) -> Tensor:
        """The first latents that a diffusion training draws, in float32."""
        setting = self.setting
        batches = islice(self.source.train_loader(0), -(-setting.fitted_on // setting.batch_size))
        return torch.cat([batch["latent"] for batch in batches])[: setting.fitted_on]

    @cached_property
    def others(self) -> Tensor:
        """Latents of the crops that are not learnt, drawn once and normalised."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            parts = [
                self.decoder.encode(from_uint8(part)).sample(generator)
                for part in self.crops.split(BATCH)
            ]
        return (torch.cat(parts) - self.source.shift_factor) * self.source.scaling_factor

    @cached_property
    def shrunk(self) -> Tensor:
        """The crops, averaged to as many positions as latents have."""
        return F.adaptive_avg_pool2d(from_uint8(self.crops).double(), self.drawn.shape[-2:])

    def decoded(self, latents: Tensor, latent_map: LatentMap) -> Tensor:
        """Mapped latents to uint8 images: the map is undone first."""
        return decode(self.decoder, self.source, latent_map.undo(latents).float())

    @cached_property
    def reference(self) -> Any:
        """Features of decoded latents, which samples are compared with; no map changes them."""
        some = self.drawn[: self.setting.samples]
        return features(self.extract, decode(self.decoder, self.source, some))

    @cached_property
    def images(self) -> Any:
        """Features of the crops that are not learnt."""
        return features(self.extract, self.crops)

    def baselines(self) -> dict[str, Any]:
        """Distances to :attr:`reference`, which no diffusion model is needed for.

        Of other crops' latents, decoded, and of a normal distribution's, which has the latents'
        mean and covariance.
        """
        count = self.setting.samples
        noise = torch.Generator().manual_seed(0)
        normal = predictors.Wiener(self.drawn).draw(count, noise)
        pictures = {
            "other_crops": self.others[:count],
            "normal": normal.view(count, *self.drawn.shape[1:]).float(),
        }
        return {
            name: frechet_lite0(
                self.reference, features(self.extract, decode(self.decoder, self.source, latents))
            )
            for name, latents in pictures.items()
        }

    def predict(self, name: str) -> dict[str, Any]:
        """Measure the predictors of a row."""
        latent_map = fit(name, self.drawn, self.shrunk)
        z = latent_map.apply(self.others).float()
        small = F.adaptive_avg_pool2d(self.shrunk, z.shape[-2:])

        def decoded(latents: Tensor) -> Tensor:
            return self.decoded(latents, latent_map)

        between = predictors.interpolated(z, decoded, lambda found: features(self.extract, found))
        return {
            "high_frequencies": predictors.share_of_high_frequencies(z),
            "spectrum_divergence": predictors.spectrum_divergence(z, small),
            "local_correlation": predictors.local_correlation(z),
            "equivariance_error": predictors.equivariance_error(z, decoded, self.crops),
            "ifid": frechet_lite0(self.images, between),
            "precision": predictors.precision(between, self.images),
        }

    def learn(self, name: str, seed: int) -> dict[str, Any]:
        """Train a row's diffusion model with a seed, and measure it."""
        setting = self.setting
        start = time.process_time()
        latent_map = fit(name, self.drawn, self.shrunk)
        source = MappedLatents(self.latents, setting.batch_size, latent_map)
        shape = latent_map.apply(self.drawn[:1]).shape[1:]
        patch = setting.patch // 2 if latent_map.packs else setting.patch

        # As in examples/diffusability.py.
        torch.manual_seed(seed)
        model = DiT(tuple(shape), setting.width, setting.depth, patch)
        average, losses = train(source, model, setting.steps, setting.lr, seed)
        trained = time.process_time()
        noise = torch.randn(setting.samples, *shape, generator=torch.Generator().manual_seed(0))
        latents = torch.cat([sample(average, part) for part in noise.split(BATCH)])
        pictures = self.decoded(latents, latent_map)

        # The loss on other crops, and the best linear denoiser's.
        wiener = predictors.Wiener(latent_map.apply(self.drawn))
        others = latent_map.apply(self.others).float()
        network, linear = predictors.velocity_losses([average, wiener], others)
        return {
            "frechet_lite0_to_decoded": frechet_lite0(
                self.reference, features(self.extract, pictures)
            ),
            "loss": network,
            "loss_of_linear": linear,
            "loss_in_linear": network / linear,
            "training_loss": [fmean(part) for part in np.array_split(losses, 50) if len(part)],
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "seconds": {
                "training": trained - start,
                "rest": time.process_time() - trained,
            },
        }


def fit_linear(crops: Path, out: Path) -> None:
    """Fit the linear code on the crops, and keep it as an export."""
    images = read_images(str(crops), CROP)
    code = LiteVAE(
        LinearEncoder(2 * CHANNELS, 3, FACTOR, CROP), LinearDecoder(CHANNELS, 3, FACTOR)
    ).eval()
    fit_linear_paths(code, images)
    code.save_pretrained(out)


def encode(study: Study, name: str, setting: Setting, extract: Extract) -> Encoded:
    """Encode the crops with an autoencoder, unless that is done."""
    target = AUTOENCODERS[name]
    if name == "linear":
        target = str(study.out / "linear")
        if not (study.out / "linear").is_dir():
            fit_linear(study.out / "crops", study.out / "linear")
    latents = study.out / "latents" / name
    crops = ("--data", str(study.out / "crops"), "--size", str(CROP), "--flip")
    study.command(name, "-m", "olvae.cli.main", "encode", target, *crops, "--out", str(latents))
    others = read_images(str(study.out / f"reference_{OTHERS}"), CROP)
    return Encoded(name, target, latents, others, setting, extract)


def keep(path: Path, setting: Setting, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file has; it is made first if it is not there.

    Raises:
        ValueError: it was made with another setting.
    """
    if not path.is_file():
        write_json({"setting": asdict(setting), **make()}, path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["setting"] != asdict(setting):
        raise ValueError(f"{path} was made with another setting: name another --out, or remove it")
    return found


def run(autoencoders: Iterable[Encoded], results: Path, maps: Iterable[str] = tuple(MAPS)) -> None:
    """Measure all rows of each autoencoder: first the predictors, then seed by seed."""
    names = list(maps)
    for encoded in autoencoders:
        stem = encoded.name
        keep(results / f"{stem}.json", encoded.setting, encoded.baselines)
        for name in names:
            path = results / f"{stem}_{name}.json"
            keep(path, encoded.setting, partial(encoded.predict, name))
        for seed in SEEDS:
            for name in names:
                path = results / f"{stem}_{name}_{seed}.json"
                began = time.monotonic()
                found = keep(path, encoded.setting, partial(encoded.learn, name, seed))
                distance = found["frechet_lite0_to_decoded"]
                loss = found["loss_in_linear"]
                seconds = time.monotonic() - began
                print(
                    f"{path.stem}: {distance:.1f}, {loss:.3f} of the linear denoiser's loss, "
                    f"{seconds:.0f} s",
                    flush=True,
                )


def main(arguments: list[str] | None = None) -> None:
    options = corpus_and_out(__doc__, "study/out/maps").parse_args(arguments)
    try:
        keep_freed_memory()
        results = check_folder(options.out) / "results"
        results.mkdir(parents=True, exist_ok=True)
        study = Study(options.corpus, options.out, [])
        setting = Setting()
        extract = Lite0()
        study.cut_crops(f"reference_{OTHERS}", OTHERS)
        run((encode(study, name, setting, extract) for name in AUTOENCODERS), results)
        for name, rows in read(results).items():
            print(f"{AUTOENCODERS[name]}\n\n{table(rows)}\n")
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
