"""Mix several sources in one stream, by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from olvae.config import ConfigError, Node, instantiate
from olvae.data.pixels.size_and_range import RangeNode, Size
from olvae.data.source import LoaderProcess, Sample, Source, total

CYCLE = 1000  # samples in which each source has its exact share; weights are as fine as that


class MixSource(Source):
    """Training samples of several sources, each in its share; validation and test images of all.

    In every 1000 samples of a loader process each source has its share exactly, in a random order.
    The images of a source with few images and a large share come more often.

    Keys begin with the source's number, as ``0/photo.jpg``, because images of two sources may have
    the same key.

    Args:
        sources: their nodes. ``size``, ``channels`` and ``range`` must be the same in all; their
            ``batch_size`` and ``num_workers`` are not used.
        size, batch_size, num_workers, channels, max_unreadable, range: see :class:`Source`.
        weights: of the sources, in any scale; by default their numbers of training images.

    Raises ConfigError: a node is not a source, or the sources do not fit each other.
    """

    def __init__(
        self,
        sources: Sequence[Node],
        size: Size,
        batch_size: int,
        num_workers: int = 0,
        weights: Sequence[float] | None = None,
        channels: int = 3,
        max_unreadable: float = 0.01,
        range: RangeNode | None = None,  # noqa: A002
    ) -> None:
        super().__init__(size, batch_size, num_workers, channels, max_unreadable, range)
        self.sources = [instantiate(node) for node in sources]

        # Refuse sources whose images do not fit in one batch.
        for i, source in enumerate(self.sources):
            where = f"data.params.sources.{i}"
            if not isinstance(source, Source):
                raise ConfigError(f"{where}: {sources[i]['target']} is not a source of images")
            if source.pixel_range != self.pixel_range:
                raise ConfigError(
                    f"{where}: values of {source.pixel_range} do not mix with "
                    f"{self.pixel_range}: state one `range` in all"
                )
            if (source.size, source.channels) != (self.size, channels):
                raise ConfigError(
                    f"{where}: images of {source.channels} channels and {source.size} pixels "
                    f"do not mix with {channels} channels and {self.size} pixels"
                )

        # Describe the mix: shares, latents, and how validation images are made.
        self.shares = self._shares(weights)
        self.latent_stats = [stats for source in self.sources for stats in source.latent_stats]
        if all(source.eval_transform.resample == "nearest" for source in self.sources):
            # All of them are masks.
            self.eval_transform = replace(self.eval_transform, resample="nearest")
        if any(source.crops for source in self.sources):
            crops = [source.describe_val_images() for source in self.sources]
            self.crops = "; ".join(dict.fromkeys(crops))

    def _shares(self, weights: Sequence[float] | None) -> list[int]:
        """Samples of each source in a cycle, at least 1 if its weight is above 0, in all CYCLE."""
        if weights is None:
            counts = [source.samples_per_epoch for source in self.sources]
            if None in counts:
                raise ConfigError(
                    "data.params.weights: missing, and the number of images of a source is unknown"
                )
            # A source without training images counts as 0.
            weights = [float(count or 0) for count in counts]
        if len(weights) != len(self.sources) or min(weights, default=0) < 0 or sum(weights) <= 0:
            raise ConfigError(
                f"data.params.weights: expected {len(self.sources)} weights, not all 0, "
                f"got {weights}"
            )

        # Round down, then give the rest to the sources that are most short of their share.
        exact = [weight / sum(weights) * CYCLE for weight in weights]
        shares = [max(int(part), int(part > 0)) for part in exact]
        by_rest = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
        for i in range(CYCLE - sum(shares)):
            shares[by_rest[i % len(shares)]] += 1

        # Or take away from the largest, where many tiny weights were lifted to 1.
        for _ in range(sum(shares) - CYCLE):
            shares[shares.index(max(shares))] -= 1
        return shares

    @property
    def samples_per_epoch(self) -> int | None:
        return total([source.samples_per_epoch for source in self.sources])

    @property
    def val_images(self) -> int | None:
        return total([source.val_images for source in self.sources])

    def val_identities(self) -> Iterator[str]:
        return (line for source in self.sources for line in source.val_identities())

    def describe(self) -> str:
        parts = zip(self.shares, self.sources, strict=True)
        return "; ".join(f"{share / CYCLE:.1%} {source.describe()}" for share, source in parts)

    def check_processes(self, world: int) -> None:
        for source in self.sources:
            source.num_workers = self.num_workers
            source.check_processes(world)

    @property
    def order(self) -> Any:
        return [source.order for source in self.sources]

    def keep_order(self, order: Any) -> None:
        orders = order or [None] * len(self.sources)
        for source, own in zip(self.sources, orders, strict=False):
            source.keep_order(own)

    def describe_new_processes(self) -> str | None:
        return (
            "other loader processes than before: of this epoch, some images of the mixed sources "
            "come again and some do not come"
        )

    def stream(self, seed: int, position: int, process: LoaderProcess) -> Iterator[Sample]:
        process = _alone(process)
        cycle, place = divmod(position, CYCLE)
        order = self._order(seed, cycle, process)

        # Start each source after its samples of the cycles before, and of this one so far.
        streams: list[Iterator[Sample]] = []
        for i, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            first = cycle * share + order[:place].count(i)
            streams.append(source.stream(seed, first, process) if share else iter(()))

        while True:
            for i in order[place:]:
                yield _numbered(i, next(streams[i]))
            cycle += 1
            place = 0
            order = self._order(seed, cycle, process)

    def _order(self, seed: int, cycle: int, process: LoaderProcess) -> list[int]:
        """The source of each sample of a cycle."""
        rng = np.random.default_rng((seed, cycle, process.index, process.count, 3))
        numbers = np.repeat(np.arange(len(self.sources)), self.shares)
        order: list[int] = rng.permutation(numbers).tolist()
        return order

    def once(self, process: LoaderProcess) -> Iterator[Sample]:
        # An evaluation may have replaced this source's transform, which the others have to follow.
        for source in self.sources:
            source.evaluate_with(self.eval_transform)
        for i, source in enumerate(self.sources):
            for sample in source.once(_alone(process)):
                yield _numbered(i, sample)


def _alone(process: LoaderProcess) -> LoaderProcess:
    """The same process, for a source whose samples do not make up whole batches."""
    return replace(process, batch_size=1, offset=0)


def _numbered(source: int, sample: Sample) -> Sample:
    group = sample.group and f"{source}/{sample.group}"
    return sample._replace(key=f"{source}/{sample.key}", group=group)
