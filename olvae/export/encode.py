"""Images to shards of latents: planned up front, shared among processes, to be continued after any interruption."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.errors import ReadError
from olvae.data.image import from_uint8
from olvae.data.shards.index import INDEX
from olvae.data.shards.latents import LATENT, META, STATS, Latent, latent_bytes
from olvae.export.inputs import Inputs, ReadImage, read_batches
from olvae.files import write_json
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.large.memory import GIB
from olvae.models.large.padding import pad_to_multiple
from olvae.models.large.streaming import encode_within
from olvae.modules.distributions import Posterior

__all__ = ["DTYPES", "EncodeJob", "EncodeOptions", "LatentSums", "fingerprint"]


class LatentSums:
    """Per channel and in float64, of images and positions: counts and moments of z = mean + std * noise.

    Kept for each shard, and added up in the shards' order, so that an interruption can't change the last digit.
    The conventions are those of ``olvae latents``: the variance of z is that of the means plus the mean variance.

    Args:
        images: seen.
        positions: of their latents, the mirrored ones' included.
        shape: of each latent, (n_z, h, w); None if they differ.
        mean, square, var: sums of the means, of their squares, of the variances; n_z numbers each.
    """

    def __init__(
        self,
        images: int = 0,
        positions: int = 0,
        shape: Iterable[int] | None = None,
        mean: Iterable[float] = (),
        square: Iterable[float] = (),
        var: Iterable[float] = (),
    ) -> None:
        self.images = images
        self.positions = positions
        self.shape = None if shape is None else tuple(shape)
        self.sums = torch.tensor([list(mean), list(square), list(var)], dtype=torch.float64)  # (3, n_z)

    def update(self, latents: Iterable[Latent]) -> None:
        """Add those of one image: its latent, and the mirrored one's."""
        for i, latent in enumerate(latents):
            mean = latent.mean.double().flatten(1)  # (n_z, h w)
            var = torch.zeros_like(mean) if latent.std is None else latent.std.double().flatten(1).square()
            sums = torch.stack([mean.sum(1), mean.square().sum(1), var.sum(1)])
            self._add(int(i == 0), mean.shape[1], tuple(latent.mean.shape), sums)

    def add(self, other: "LatentSums") -> None:
        self._add(other.images, other.positions, other.shape, other.sums)

    def _add(self, images: int, positions: int, shape: tuple[int, ...] | None, sums: torch.Tensor) -> None:
        self.shape = shape if not self.positions or shape == self.shape else None
        self.sums = self.sums + sums if self.positions else sums
        self.images += images
        self.positions += positions

    def state(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON has them."""
        mean, square, var = self.sums.tolist()
        shape = None if self.shape is None else list(self.shape)
        return {
            "images": self.images,
            "positions": self.positions,
            "shape": shape,
            "mean": mean,
            "square": square,
            "var": var,
        }

    def as_dict(self) -> dict[str, Any]:
        """Shape, shift and scaling over everything, and mean and standard deviation per channel."""
        mean, square, var = self.sums / self.positions
        shift = float(mean.mean())
        variance = float((square + var).mean()) - shift**2
        if not variance > 0.0:
            raise ValueError("the latents are all equal: there is nothing to scale, and nothing to learn from them")
        return {
            "latent_shape": None if self.shape is None else list(self.shape),
            "shift_factor": shift,
            "scaling_factor": variance**-0.5,
            "latents_mean": mean.tolist(),
            "latents_std": (square - mean.square() + var).clamp(min=0.0).sqrt().tolist(),
        }


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

STATE = ".encode"
"""The folder, inside the one of the latents, with the plan and what is known of each finished shard."""


@dataclass(frozen=True)
class EncodeOptions:
    """What is stored.

    Args:
        size: of the images, after resizing the shorter side and cropping the centre; 0 leaves each at its own, padded
            at the bottom and the right to a multiple of f.
        moments: the posterior's mean and standard deviation; else one sample of it.
        seed: of the samples.
        dtype: of the latents, a name of :data:`DTYPES`.
        flip: the mirrored image's latent as well.
    """

    size: int
    moments: bool = True
    seed: int = 0
    dtype: str = "float16"
    flip: bool = False


class EncodeJob:
    """Encodes the images of :class:`Inputs` into a folder, in one process or several.

    Output shard i goes to process i modulo their number. A shard is written under another name and renamed when it
    is whole; then its sums and faults are written down. So whoever is killed, and however often, begins a shard
    anew or finds it finished, and neither this nor the number of processes changes a byte.

    Args:
        model: on its device, in evaluation mode.
        inputs: the images.
        options: what is stored.
        folder: where; made if need be.
        describe: what stats.json says besides, such as the target's name.

    Raises:
        ConfigError: the folder has other latents, or something else.
        ValueError: images of this size don't suit the model.
    """

    def __init__(
        self, model: Autoencoder, inputs: Inputs, options: EncodeOptions, folder: Path, describe: dict[str, Any]
    ) -> None:
        if options.size % model.downscale:
            raise ValueError(
                f"images of {options.size}x{options.size} pixels, but a latent stands for "
                f"{model.downscale}x{model.downscale} of them: choose a --size that is a multiple of {model.downscale}"
            )
        self.model = model
        self.inputs = inputs
        self.options = options
        self.folder = folder
        self.weights = fingerprint(model)
        self.describe = {**describe, "weights": self.weights, "downscale": model.downscale}
        self._begin()

    @property
    def shards(self) -> int:
        return len(self.inputs)

    def _begin(self) -> None:
        """Write the plan down, or compare it with the one that is there."""
        plan = {"version": 1, "weights": self.weights, **asdict(self.options), **self.inputs.plan()}
        path = self.folder / STATE / "plan.json"
        if not path.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / STATE).is_dir():
                raise ConfigError(f"{self.folder}: has other files already: name a new or empty folder with --out")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(plan, path)
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        if begun != plan and not any(other != path for other in path.parent.glob("*.json")):
            write_json(plan, path)  # nothing was finished under the other plan
        elif begun != plan:
            changed = [name for name in {**begun, **plan} if begun.get(name) != plan.get(name)]
            changes = dict.fromkeys(self._change(name, begun, plan) for name in changed)
            raise ConfigError(
                f"{self.folder}: begun as something else ({', '.join(changes)}): give the same target, images and "
                "options to continue, or another --out"
            )

    def _change(self, name: str, begun: Mapping[str, object], plan: Mapping[str, object]) -> str:
        """What a user did otherwise, where two plans differ in an entry."""
        if name in ("images", "keys", "shards"):
            return "other images"
        if name == "classes":
            return "other classes"
        return "other weights" if name == "weights" else f"{name} was {begun.get(name)}, now {plan.get(name)}"

    def run(
        self,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 8,
        threads: int = 2,
        memory: int = 4 * GIB,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Encode this process's shards, those that are not finished yet.

        Args:
            batch_size: of images, all of one size.
            threads: that read images; 0 reads them in between.
            memory: bytes that encoding images of their own sizes may take; see :func:`encode_within`.
            advance: is told how many images more are done, finished shards' included.

        Raises:
            ValueError: latents are not finite.
            OSError: a remote shard can't be read now.
        """
        for shard in range(rank, self.shards, world):
            state = self._state(shard)
            if state is None:
                self._write(shard, batch_size, threads, memory, advance)
            else:
                advance(state["images"] + len(state["unreadable"]))

    def finish(self) -> dict[str, Any]:
        """When all shards are finished: write ``index.json``, and last ``stats.json``, whose content is returned.

        Raises:
            ValueError: no image could be read.
        """
        states = [self._state(shard) for shard in range(self.shards)]
        done = [state for state in states if state is not None]
        assert len(done) == self.shards
        sums, unreadable = LatentSums(), [fault for state in done for fault in state["unreadable"]]
        for state in done:
            if state["images"]:
                sums.add(LatentSums(**state["sums"]))
        if not sums.images:
            for shard in range(self.shards):  # so that the command tries again
                self._note(shard).unlink()
            if not unreadable:
                raise ValueError("no image is in these shards: they hold images as KEY.jpg, KEY.png, ...")
            first = unreadable[0]
            raise ValueError(f"none of the images could be read: {first['name']}: {first['reason']}")
        stats = {
            "count": sums.images,
            **sums.as_dict(),
            **asdict(self.options),
            **self.describe,
            "classes": self.inputs.plan().get("classes", []),
            "unreadable": {"count": len(unreadable), "images": unreadable},
        }
        counts = {self._path(i).name: {"images": state["images"]} for i, state in enumerate(done) if state["images"]}
        write_json({"version": 1, "images": sums.images, "shards": counts}, self.folder / INDEX)
        write_json(stats, self.folder / STATS)
        return stats

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.tar"

    def _note(self, shard: int) -> Path:
        return self.folder / STATE / f"{shard:06d}.json"

    def _state(self, shard: int) -> dict[str, Any] | None:
        """What was written down of a shard, if it is finished."""
        path = self._note(shard)
        if not path.is_file():
            return None
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tar = self._path(shard)
        there = tar.stat().st_size if tar.is_file() else 0
        return state if there == state["bytes"] else None

    @torch.inference_mode()
    def _write(self, shard: int, batch_size: int, threads: int, memory: int, advance: Callable[[int], None]) -> None:
        path, sums, faults = self._path(shard), LatentSums(), []
        partial = path.with_name(f".{path.name}.partial")
        try:
            with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
                for batch in read_batches(self.inputs.read(shard), self.options.size, batch_size, threads):
                    images = [one for one in batch if isinstance(one, ReadImage)]
                    faults += [one for one in batch if isinstance(one, ReadError)]
                    if images:
                        self._encode(images, memory, archive, sums)
                    advance(len(batch))
            if sums.images:
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        state = {
            "images": sums.images,
            "bytes": path.stat().st_size if sums.images else 0,
            "unreadable": [{"name": fault.name, "reason": fault.reason} for fault in faults],
            "sums": sums.state(),
        }
        write_json(state, self._note(shard))

    def _encode(self, images: Sequence[ReadImage], memory: int, archive: tarfile.TarFile, sums: LatentSums) -> None:
        device = next(self.model.parameters()).device
        x = from_uint8(torch.stack([image.pixels for image in images]).to(device))  # (B, C, H, W)
        keys = [image.item.key for image in images]
        latents = self._latents(self._posterior(x, memory), keys)
        mirrored: list[Latent | None] = [None] * len(images)
        if self.options.flip:
            mirrored = [*self._latents(self._posterior(x.flip(-1), memory), [f"{key}\nflip" for key in keys])]
        for image, latent, flipped in zip(images, latents, mirrored, strict=True):
            sums.update([latent] if flipped is None else [latent, flipped])
            meta = {
                "key": image.item.key,
                "width": image.size[0],
                "height": image.size[1],
                "image": [image.pixels.shape[2], image.pixels.shape[1]],
            }
            files = {
                **image.item.files,
                META: json.dumps(meta).encode(),
                LATENT: latent_bytes(latent, flipped),
            }
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{image.item.name}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    def _posterior(self, x: Tensor, memory: int) -> Posterior:
        if self.options.size:
            return self.model.encode(x)
        x = pad_to_multiple(x, self.model.downscale)
        return encode_within(self.model, x, memory) if isinstance(self.model, LiteVAE) else self.model.encode(x)

    def _latents(self, posterior: Posterior, keys: Sequence[str]) -> list[Latent]:
        """As they are stored, on the CPU."""
        dtype = DTYPES[self.options.dtype]
        mean = posterior.mean.float().cpu()
        std = None if posterior.deterministic else posterior.std.float().cpu()
        if std is not None and not self.options.moments:
            drawn = [Latent(m, s).draw(self._noise(key)) for m, s, key in zip(mean, std, keys, strict=True)]
            mean, std = torch.stack(drawn), None
        stored = mean.to(dtype), None if std is None else std.to(dtype)
        for exact, rounded in ((mean, stored[0]), (std, stored[1])):
            if exact is None or rounded is None or rounded.isfinite().all():
                continue
            if exact.isfinite().all():
                raise ValueError(f"latents of up to {exact.abs().max():.3g} are too large for {self.options.dtype}")
            raise ValueError("the latents are not finite: the weights may be of a run that diverged")
        means, stds = stored
        return [Latent(means[i], None if stds is None else stds[i]) for i in range(len(keys))]

    def _noise(self, key: str) -> torch.Generator:
        """Of an image's sample: depends on the seed and its key alone."""
        digest = hashlib.sha256(f"{self.options.seed}\n{key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fingerprint(model: Autoencoder) -> str:
    """A checksum of a model's parameters and buffers: of their names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
