"""Report on latents over images: moments, KL, histogram, spectrum, MMD to N(0, I)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides
from olvae.data.source import Batch
from olvae.devices import full_float32
from olvae.evaluation.cells import texts
from olvae.evaluation.observers.observer import Observation, Observer
from olvae.evaluation.report import print_grid
from olvae.evaluation.results import Row
from olvae.files import atomic_write, counted
from olvae.launcher import gather
from olvae.losses.cosine_transform import cosines
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Posterior, keyed_seed
from olvae.modules.mixed_precision import in_float64
from olvae.modules.moments import Moments

# A channel is active if its posterior mean varies by more than this over the data (Burda et al.
# 2016, section 5.1).
ACTIVE_VARIANCE = 0.01

NO_DISTRIBUTION = "a deterministic autoencoder: its latents have no distribution of their own"

# Edges of the histogram's bins: from -37 to 37, 0.025 wide at 0, 0.05 at 1 and 0.5 at 10 [D].
EDGES = 0.5 * torch.linspace(-5.0, 5.0, 201, dtype=torch.float64).sinh()

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)  # the bandwidths of the paper's comparison [P Table 6]

# Okabe and Ito's colours, for the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")


def image_key(image: Tensor) -> int:
    """Hash the pixels of a uint8 (C, H, W) image to a number below 2^63."""
    array = image.cpu().contiguous().numpy()
    return keyed_seed(repr(array.shape).encode() + array.tobytes())


@dataclass(frozen=True)
class _Totals:
    """Sums over images and positions."""

    n: int  # images
    shape: torch.Size  # of a latent (C, h, w)
    moments: Moments
    kl: Tensor | None  # nats (C,); None for deterministic latents
    minimum: Tensor  # of the posterior means (C,)
    maximum: Tensor
    # High and all energies, (2, 2): of the posterior means, and of the images averaged to as many
    # positions. See high_and_all.
    high: Tensor
    # Expected count of z below EDGES, in each bin, and above them (bins + 2,).
    mass: Tensor

    @classmethod
    def of(cls, mean: Tensor, logvar: Tensor | None, images: Tensor | None) -> "_Totals":
        """Sum over a batch, (B, C, h, w) in float64; deterministic latents have no log-variance."""
        # Spectra; without images, theirs has no energy.
        small = mean.new_zeros((1, 1, 1, 1))
        if images is not None:
            small = F.adaptive_avg_pool2d(images, (mean.shape[-2], mean.shape[-1]))
        spectra = torch.stack((high_and_all(mean), high_and_all(small))).cpu()

        # KL and histogram. Of a distribution, a bin's count is the mass of all normal densities.
        if logvar is None:
            var = kl = None
            bins = torch.bucketize(mean.flatten(), EDGES.to(mean.device), right=True)
            mass = torch.bincount(bins, minlength=len(EDGES) + 1).double()
        else:
            var = logvar.exp()
            std = (0.5 * logvar).exp()
            kl = (0.5 * (mean.square() + var - 1.0 - logvar)).sum((0, 2, 3)).cpu()
            below = torch.stack(
                [torch.special.ndtr((edge - mean) / std).sum() for edge in EDGES.tolist()]
            )
            mass = below.diff(prepend=below.new_zeros(1), append=below.new_full((1,), mean.numel()))
        return cls(
            len(mean),
            mean.shape[1:],
            Moments.of(mean, var),
            kl,
            mean.amin((0, 2, 3)).cpu(),
            mean.amax((0, 2, 3)).cpu(),
            spectra,
            mass.cpu(),
        )

    def __add__(self, other: "_Totals") -> "_Totals":
        if self.shape != other.shape:
            shapes = f"{tuple(self.shape)} and {tuple(other.shape)}"
            raise ValueError(
                f"latents of different shapes, {shapes}: the images must have one size"
            )
        return _Totals(
            self.n + other.n,
            self.shape,
            self.moments + other.moments,
            None if self.kl is None or other.kl is None else self.kl + other.kl,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            self.high + other.high,
            self.mass + other.mass,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return a row of latents.json without the MMD: plain numbers and lists."""
        # Factors of all channels together, and the share of high frequencies.
        scale, shift = self.moments.factors()
        row: dict[str, Any] = {
            "n": self.n,
            "latent_shape": list(self.shape),
            "deterministic": self.kl is None,
            "mean": shift,
            "std": 1.0 / scale,
        }
        names = ("high_frequencies", "high_frequencies_of_images")
        for name, (high, total) in zip(names, self.high.tolist(), strict=True):
            if total:
                row[name] = high / total

        # Per channel, and as diffusers' configs name the factors.
        mean = self.moments.mean.tolist()
        std = self.moments.std.tolist()
        row["diffusion"] = {
            "shift_factor": shift,
            "scaling_factor": scale,
            "latents_mean": mean,
            "latents_std": std,
        }
        of = "" if self.kl is None else "_of_posterior_means"
        ends = {f"min{of}": self.minimum.tolist(), f"max{of}": self.maximum.tolist()}
        row["channels"] = {"mean": mean, "std": std, **ends}

        # The posterior: its width, KL in nats, and which channels carry information.
        if self.kl is not None:
            moments = self.moments
            positions = self.shape[1:].numel()
            variances = moments.variances / moments.positions
            kl = self.kl / moments.positions
            active = moments.std_of_means.square() > ACTIVE_VARIANCE
            whole = moments.std_of_means.square() + variances
            row |= {
                "posterior_std": float(variances.mean().sqrt()),
                "noise_share": float(variances.mean() / whole.mean()),
                "kl_per_position": float(kl.sum()),
                "kl_per_image": float(kl.sum()) * positions,
                "active_channels": int(active.sum()),
            }
            row["channels"] |= {
                "std_of_posterior_means": moments.std_of_means.tolist(),
                "posterior_std": variances.sqrt().tolist(),
                "noise_share": (variances / whole).tolist(),
                "kl_per_position": kl.tolist(),
                "kl_per_image": (kl * positions).tolist(),
                "active": active.tolist(),
            }

        share = (self.mass / self.mass.sum()).tolist()
        row["histogram"] = {
            "edges": EDGES.tolist(),
            "normal": torch.special.ndtr(EDGES).diff().tolist(),
            "below": share[0],
            "share": share[1:-1],
            "above": share[-1],
        }
        return row


class LatentAccumulator:
    """Sum over batches of posteriors, in float64; order and size of batches make no difference.

    A latent is z = mean + std * noise; a deterministic one is z itself. Expectations over the noise
    have closed forms: the histogram is an average of normal distributions. Only the MMD needs
    samples: at most ``mmd_latents``, of the images with the smallest keys, with noise seeded by the
    key. Equal images count once in it.
    """

    def __init__(self, mmd_latents: int = 10_000) -> None:
        self.mmd_latents = mmd_latents
        self._totals: _Totals | None = None
        self._samples: dict[int, Tensor] = {}  # by key, sorted

    def update(
        self, posterior: Posterior, keys: Sequence[int], images: Tensor | None = None
    ) -> None:
        """Add a posterior over (B, n_z, h, w), on any device, with its images' :func:`image_key`.

        With the ``images``, (B, C, H, W) on its device, their spectrum is summed as well.
        ValueError if it is not finite, or its shape differs from earlier ones.
        """
        mean = in_float64(posterior.mean)  # (B, C, h, w)
        logvar = None if posterior.deterministic else in_float64(posterior.logvar)
        if not (mean.isfinite().all() and (logvar is None or logvar.isfinite().all())):
            raise ValueError(
                "the latents are not finite: the weights may be of a run that diverged"
            )

        # One sample of each image, for the MMD. Noise is drawn on the CPU, the same for any device.
        std = torch.zeros_like(mean) if logvar is None else (0.5 * logvar).exp()
        samples = {}
        for key, center, spread in zip(keys, mean.cpu(), std.cpu(), strict=True):
            noise = torch.randn(
                center.shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64
            )
            samples[key] = (center + spread * noise).float()

        if images is not None:
            images = in_float64(images)
        self._add(_Totals.of(mean, logvar, images), samples)

    def merge(self, other: "LatentAccumulator") -> None:
        """Add all batches of another accumulator, for example of another process."""
        if other._totals is not None:
            self._add(other._totals, other._samples)

    def compute(self) -> dict[str, Any]:
        """Compute a row of latents.json: numbers, lists, and why some are ``skipped``.

        ValueError if there were no images, or all latents are equal.
        """
        if self._totals is None:
            raise ValueError("no images: there are no latents to describe")
        row = self._totals.as_dict()
        skipped = dict.fromkeys(("kl", "active"), NO_DISTRIBUTION) if row["deterministic"] else {}
        if len(self._samples) < 2:
            skipped["mmd"] = "needs at least two different images"
        else:
            # MMD of the latents, then of shifted and scaled ones, in place: z may be large.
            z = torch.stack(list(self._samples.values())).flatten(1)  # (N, C h w)
            row["mmd"] = {
                "latents": len(z),
                "sigmas": list(SIGMAS),
                "mmd2": mmd2_normal(z).tolist(),
            }
            z.sub_(row["mean"]).mul_(row["diffusion"]["scaling_factor"])
            row["mmd"]["mmd2_scaled"] = mmd2_normal(z).tolist()
            row["mmd"]["standard_error_under_normal"] = mmd2_null_std(*z.shape).tolist()
        if skipped:
            row["skipped"] = skipped
        return row

    def _add(self, totals: _Totals, samples: Mapping[int, Tensor]) -> None:
        if self._totals is not None:
            totals = self._totals + totals
        self._totals = totals

        # Of the smallest keys. A key that is known keeps its sample.
        together = {**samples, **self._samples}
        self._samples = {key: together[key] for key in sorted(together)[: self.mmd_latents]}


def high_and_all(x: Tensor) -> Tensor:
    """Sum the energies of the cosine transform (DCT-II) of images, (B, C, h, w) -> (2,).

    First of the high frequencies, in the upper half along either axis, then of all. The mean of a
    channel is left out. White noise has 3/4 high.
    """
    energies = cosines(x).square().sum((0, 1))  # (h, w)
    energies[0, 0] = 0.0
    h, w = x.shape[-2:]
    low = energies[: -(-h // 2), : -(-w // 2)].sum()
    return torch.stack((energies.sum() - low, energies.sum()))


def mmd2_normal(z: Tensor, sigmas: Sequence[float] = SIGMAS, chunk: int = 512) -> Tensor:
    """Estimate MMD^2 between latents ``z`` (N, ...) and N(0, I), for RBF kernels of several widths.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), over whole flattened latents in float64, and the
    unbiased estimator [D: the paper specifies neither], with the kernel's exact expectations under
    N(0, I), s = sigma^2 and d values per latent:

        MMD^2 = mean over i != j of k(z_i, z_j) - 2 mean over i of e(z_i) + c
        e(x) = E k(x, y) = (s / (s + 1))^(d/2) exp(-|x|^2 / (2 (s + 1)))
        c = E k(y, y') = (s / (s + 2))^(d/2)

    Its error, which can make it slightly negative, is :func:`mmd2_null_std`. Memory is ``z`` and
    two chunks of rows.
    """
    z = z.flatten(1)  # (N, d)
    n, d = z.shape
    s = torch.tensor(sigmas, dtype=torch.float64, device=z.device).square()  # (S,)
    square = torch.cat([part.double().square().sum(1) for part in z.split(chunk)])  # (N,)

    # Sum of k over pairs. The matrix is symmetric: only its lower triangle of blocks is computed.
    pairs = torch.zeros_like(s)
    for start in range(0, n, chunk):
        rows = z[start : start + chunk].double()
        for other in range(0, start + 1, chunk):
            inner = rows @ z[other : other + chunk].double().T
            squares = square[start : start + chunk, None] + square[None, other : other + chunk]
            distance = (squares - 2.0 * inner).clamp(min=0.0)  # (rows, columns)
            weight = 2.0
            if other == start:
                distance.fill_diagonal_(torch.inf)  # excludes i = j
                weight = 1.0
            pairs += torch.stack([weight * (distance / (-2.0 * v)).exp().sum() for v in s])

    log_e = -0.5 * d * torch.log1p(1.0 / s)[:, None] - square / (2.0 * (s[:, None] + 1.0))  # (S, N)
    c = (-0.5 * d * torch.log1p(2.0 / s)).exp()
    return pairs / (n * (n - 1)) - 2.0 * log_e.exp().mean(1) + c


def mmd2_null_std(n: int, d: int, sigmas: Sequence[float] = SIGMAS) -> Tensor:
    """Compute the standard deviation of :func:`mmd2_normal` for ``n`` latents drawn from N(0, I).

    Latents have ``d`` values. The estimator is the mean over pairs of
    h(x, x') = k(x, x') - e(x) - e(x') + c, whose expectation given either argument is 0 under
    N(0, I). So its variance is 2 E h^2 / (n (n - 1)), with E h^2 = E k^2 - 2 E e^2 + c^2.
    """
    s = torch.tensor(sigmas, dtype=torch.float64).square()
    k2 = -0.5 * d * torch.log1p(4.0 / s)  # log E k^2: the kernel of half the squared width
    e2 = -d * torch.log1p(1.0 / s) - 0.5 * d * torch.log1p(2.0 / (s + 1.0))
    c2 = -d * torch.log1p(2.0 / s)
    h2 = c2.exp() * (torch.expm1(k2 - c2) - 2.0 * torch.expm1(e2 - c2))
    return (2.0 * h2.clamp(min=0.0) / (n * (n - 1))).sqrt()


@torch.inference_mode()
def encode_latents(
    models: Mapping[str, Autoencoder],
    batches: Iterable[Batch],
    device: str = "cpu",
    pixel_range: PixelRange = EIGHT_BITS,
    observer: Observer | None = None,
) -> dict[str, LatentAccumulator] | None:
    """Encode the same images with every model, in one pass; ValueError if latents are not finite.

    Returns accumulators by name; None in all processes but the first. The observer gets the images
    in place of reconstructions, which are not made.
    """
    observer = observer or Observer()
    accumulators = {name: LatentAccumulator() for name in models}
    for model in models.values():
        model.to(device)
    for batch in batches:
        keys = [image_key(image) for image in batch["image"]]
        names = list(map(str, keys))
        levels = pixel_range.levels(batch["image"])
        x = pixel_range.normalise(batch["image"].to(device))
        for name, model in models.items():
            with full_float32(x):
                posterior = model.encode(x)
            observer.update(
                Observation(name, 0, names, levels, levels, posterior.mean, {}, pixel_range)
            )
            try:
                accumulators[name].update(posterior, keys, x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    # Merge: the first process has its own part already.
    parts = gather((accumulators, observer.state()))
    if parts is None:
        return None
    for others, state in parts[1:]:
        observer.merge(state)
        for name, accumulator in accumulators.items():
            accumulator.merge(others[name])
    return accumulators


def report_latents(
    accumulators: Mapping[str, LatentAccumulator],
    weights: Mapping[str, str],
    observer: Observer,
    data: Mapping[str, Any],
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Make the content of latents.json, with checksums of ``weights`` and the observer's entries.

    ``advance`` is called after each model.
    """
    results = []
    for name, accumulator in accumulators.items():
        entry = observer.result(name, 0)
        observed = {observer.name: entry} if entry else {}
        results.append(
            {"target": name, "weights": weights[name], **accumulator.compute(), **observed}
        )
        advance()
    return {
        "data": {**data, "n": results[0]["n"]},
        "active_variance": ACTIVE_VARIANCE,
        "results": results,
    }


def print_latents(content: Mapping[str, Any], observer: Observer) -> None:
    """Print to standard error: tables of moments and MMD^2 by target, and the observer's lines."""
    console = Console(stderr=True)
    data = content["data"]
    rows = {row["target"]: row for row in content["results"]}

    # Moments, with the observer's columns.
    observed = {name: row[observer.name] for name, row in rows.items() if observer.name in row}
    moments = {}
    for name, row in rows.items():
        others = observer.columns(observed[name]) if name in observed else {}
        moments[name] = _moments(row, others)
    title = (
        f"latents of {counted(data['n'], 'image')} of {Sides.of(data['size'])}; shift is the mean; "
        "sigma is the posterior's; KL in nats per position, over all channels"
    )
    print_grid(console, title, texts(moments))

    # Lines about each target; its three rows of MMD^2, in thousandths.
    kinds = {"": "mmd2", ", scaled": "mmd2_scaled", ", error": "standard_error_under_normal"}
    mmds = {}
    for name, row in rows.items():
        if row["deterministic"]:
            console.print(f"{escape(name)}: KL and active channels skipped: {NO_DISTRIBUTION}")
        if "noise_share" in row:
            share = f"{100 * row['noise_share']:.3g} % of the variance of its samples"
            console.print(
                f"{escape(name)}: {share} is the posterior's noise: olvae encode stores "
                "moments, so each epoch draws it anew; a stored sample keeps one draw"
            )
        if "high_frequencies_of_images" in row:
            share = f"{100 * row['high_frequencies']:.0f} % of the energy"
            of_images = f"{100 * row['high_frequencies_of_images']:.0f} %"
            console.print(f"{escape(name)}: high frequencies have {share}, the images' {of_images}")
        mmd = row.get("mmd")
        if mmd:
            for suffix, kind in kinds.items():
                cells = {}
                for sigma, value in zip(mmd["sigmas"], mmd[kind], strict=True):
                    cells[f"{sigma:g}"] = f"{1000 * value:.3g}"
                mmds[name + suffix] = cells
    if mmds:
        title = (
            "1000 MMD^2 to N(0, I) by the kernel's bandwidth: of the latents, of (z - shift) x "
            "scaling, and the error that N(0, I) itself would have"
        )
        print_grid(console, title, texts(mmds))
    else:
        console.print("MMD: skipped, it needs at least two different images")

    # The observer's lines: as in an evaluation, from rows that have its entry alone.
    seen = [Row(n, data["n"], {}, observed={observer.name: e}) for n, e in observed.items()]
    for line in observer.lines(seen):
        console.print(escape(line))


def _moments(row: Mapping[str, Any], others: Mapping[str, str]) -> dict[str, str]:
    """Return a row of latents.json as cells by heading, with ``others`` among them."""
    cells = {
        "latent": "x".join(map(str, row["latent_shape"])),
        "shift": f"{row['mean']:.4f}",
        "std": f"{row['std']:.4f}",
        "scaling": f"{1.0 / row['std']:.4f}",
        **others,
    }
    if row["deterministic"]:
        return cells | dict.fromkeys(("sigma", "KL", "active"), "skipped")
    return cells | {
        "sigma": f"{row['posterior_std']:.3g}",
        "KL": f"{row['kl_per_position']:.1f}",
        "active": f"{row['active_channels']}/{row['latent_shape'][0]}",
    }


def draw_distribution(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the densities of several models' latents over the density of N(0, 1), as a PNG.

    Left: as they are. Right: after each model's shift and scaling, logarithmic for the tails.
    """
    from matplotlib.figure import Figure

    # Two panels, with the normal density behind.
    figure = Figure(figsize=(11.0, 4.4 + 0.22 * len(rows)), layout="constrained")
    raw, scaled = figure.subplots(1, 2)
    edges = EDGES.numpy()
    centres = (edges[1:] + edges[:-1]) / 2.0
    x = np.linspace(-40.0, 40.0, 8001)
    normal = np.exp(-(x**2) / 2.0) / np.sqrt(2.0 * np.pi)
    for panel in (raw, scaled):
        panel.fill_between(x, normal, color="0.85", zorder=0)
        panel.plot(x, normal, color="0.35", linewidth=1.0, zorder=1, label="N(0, 1)")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)

    # Densities: the bins differ in width. ``reach`` and ``top`` end the axes of the left panel.
    reach = 3.5
    top = float(normal.max())
    for i, (name, row) in enumerate(rows.items()):
        density = np.array(row["histogram"]["share"]) / np.diff(edges)
        shift = row["mean"]
        std = row["std"]
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "linewidth": 1.8,
        }
        raw.plot(centres, density, label=f"{name}: mean {shift:.3g}, std {std:.3g}", **style)
        scaled.plot((centres - shift) / std, density * std, **style)
        reach = max(reach, abs(shift) + 3.5 * std)
        top = max(top, float(density.max()))

    # Titles, axes, and one legend below both.
    reach = min(reach, 35.0)
    raw.set(
        title="as they are",
        xlabel="value of the latent",
        ylabel="density",
        xlim=(-reach, reach),
        ylim=(0.0, 1.06 * top),
    )
    scaled.set(
        title="as a diffusion model sees them: (z - shift) x scaling",
        yscale="log",
        xlabel="value of the latent, shifted and scaled",
        ylabel="density, logarithmic",
        xlim=(-8.0, 8.0),
        ylim=(1e-5, 2.0),
    )
    handles, labels = raw.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, frameon=False, ncols=1)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)
