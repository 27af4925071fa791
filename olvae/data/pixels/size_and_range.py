"""Size of images and range of their values, as data state them: check, normalise, restore, show."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from olvae.config import ConfigError

Size = int | Sequence[int]
"""``data.params.size``: the side of squares in pixels, or height and width, as [80, 256]."""

# The largest camera's pictures have 151 million; reading takes up to 12 bytes for each.
MAX_PIXELS = 160_000_000
# Largest ratio of a picture's sides: resized to size s, it has up to 100 s^2 pixels.
MAX_RATIO = 100


class Sides(NamedTuple):
    """Height and width of images, in pixels or in latent positions."""

    height: int
    width: int

    @classmethod
    def of(cls, size: Size) -> "Sides":
        """Read a config's size: one or two whole numbers from 1 on; ValueError for others."""
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(
                f"size must be at least 1, or [height, width] of such numbers, got {size}"
            )
        return cls(*sides)

    @classmethod
    def read(cls, text: str) -> "Sides":
        """Read a command's argument, 64 or 80x256; ConfigError for others."""
        try:
            sides = [int(side) for side in text.split("x")]
            return cls.of(sides if len(sides) > 1 else sides[0])
        except ValueError as error:
            raise ConfigError(
                f"`size` {text}: expected pixels, as in 256 or, height before width, 80x256"
            ) from error

    @property
    def node(self) -> int | list[int]:
        """The size as a config or JSON has it: one number for squares."""
        return self.height if self.height == self.width else [*self]

    @property
    def short(self) -> str:
        """The size as a command takes it, 64 or 80x256."""
        return str(self.height) if self.height == self.width else str(self)

    def __floordiv__(self, factor: int) -> "Sides":
        return Sides(self.height // factor, self.width // factor)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    def fits(self, factor: int) -> bool:
        """Whether both are multiples of a factor."""
        return self.height % factor == self.width % factor == 0

    def multiples(self, factor: int) -> tuple["Sides", "Sides"]:
        """The nearest multiples below, or the factor itself, and above."""
        below = Sides(*(factor * max(1, side // factor) for side in self))
        above = Sides(*(factor * ((side + factor - 1) // factor) for side in self))
        return below, above


class TooManyPixelsError(ValueError):
    """A picture is larger than those that are read at once."""


def check_size(width: int, height: int, most: float = MAX_PIXELS) -> None:
    """Raise ValueError for a picture that would take too much memory."""
    if width * height > most:
        raise TooManyPixelsError(
            f"its header claims {width}x{height} pixels, more than {MAX_PIXELS // 10**6} million"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"{width}x{height} pixels: one side is more than {MAX_RATIO} times the other"
        )


Values = Literal["linear", "log", "log1p", "logc3", "pq"]
Outside = Literal["clip", "error"]
Number = float | int

# An assignment, which `validate` can evaluate without an import.
RangeSettings = TypedDict(  # noqa: UP013
    "RangeSettings",
    {
        "pairs": Sequence[Number] | Sequence[Sequence[Number]],
        "values": Values,
        "outside": Outside,
        # Null undoes what an included config has.
        "nodata": Number | None,
        "shown": Sequence[int] | None,
        "stretch": Sequence[Number],
    },
    total=False,
)

RangeNode = RangeSettings | Sequence[Number] | Sequence[Sequence[Number]]
"""``data.params.range``: a pair, a pair for each channel, or a mapping with these as ``pairs``."""

Array = NDArray[np.generic]


def from_uint8(x: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    # In the memory of the first floats: on a CPU, fresh memory takes most of the time.
    return x.float().div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Floats, nominally in [-1, 1] -> uint8 in 0..255, clamped, rounded; inverse of from_uint8."""
    return ((_clamped(x) + 1.0) * 127.5).round().to(torch.uint8)


def _clamped(y: Tensor) -> Tensor:
    return y.float().clamp(-1.0, 1.0)


def nearest_float32(value: float) -> np.float32:
    """Round to float32; a double beyond its range becomes the largest, as GDAL writes it."""
    largest = float(np.finfo(np.float32).max)
    found: np.float32 = np.float32(min(max(value, -largest), largest))
    return found


@dataclass(frozen=True)
class PixelRange:
    """The values that become -1 and 1, for all channels or each, and the treatment of others.

    Metrics and pictures see levels: 0 to 255 over the range, uint8 for 8-bit images and float32 for
    others.
    """

    # One number for all channels, or one for each.
    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    # What is linear between them: the value, its logarithm, the logarithm of 1 + value, ARRI's
    # LogC3 at EI 800 of scene-linear values, or SMPTE ST 2084's signal (PQ) of luminances in cd/m2.
    values: Values = "linear"
    # Values outside become the nearest end, or make an image unreadable.
    outside: Outside = "error"
    # Stands for a missing value; images with it, with NaN or infinity are unreadable.
    nodata: float | None = None
    # Channels of pictures, counted from 0, one or three; else the first three.
    shown: tuple[int, ...] | None = None
    # Fractions of the range that pictures show as black and white.
    stretch: tuple[float, float] = (0.0, 1.0)
    # Images are uint8, in 0 to 255.
    eight_bits: bool = False

    @classmethod
    def from_node(cls, node: Any, where: str = "data.params.range") -> "PixelRange":
        """Read a range in a config or an export, a :data:`RangeNode` or None for 8 bits.

        Raises ConfigError for mistakes.
        """
        if node is None:
            return EIGHT_BITS
        settings = dict(node) if isinstance(node, Mapping) else {"pairs": node}

        # Convert each setting to its type.
        try:
            pairs = np.array(settings.pop("pairs"), dtype=float)
            if pairs.ndim == 1:
                pairs = pairs[None]
            low, high = (tuple(map(float, column)) for column in pairs.T)
            if settings.get("shown") is not None:
                settings["shown"] = tuple(map(operator.index, settings["shown"]))
            if "stretch" in settings:
                settings["stretch"] = tuple(map(float, settings["stretch"]))
            if settings.get("nodata") is not None:
                settings["nodata"] = float(settings["nodata"])
            found = cls(low, high, **settings)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            wanted = "a pair of numbers, a pair for each channel, or a mapping with these as pairs"
            others = "shown, stretch and nodata are numbers"
            raise ConfigError(f"{where}: expected {wanted} ({others}), got {node!r}") from error

        # Then their values must make sense.
        mistake = found._mistake()
        if mistake:
            raise ConfigError(f"{where}: {mistake}")
        return found

    def _mistake(self) -> str | None:
        """Describe the first setting that makes no sense; None if all do."""
        least = {"log": 0.0, "log1p": -1.0}
        if (
            self.values not in get_args(Values)
            or self.outside not in get_args(Outside)
            or self.eight_bits
        ):
            return (
                "values is linear, log, log1p, logc3 or pq, outside clip or error, "
                f"got {self.values!r} and {self.outside!r}"
            )

        # The range in float32, as images are normalised: rounding may make both ends equal.
        # A logarithm that is infinite or none makes the factor 0 or none.
        low, high = self._ends(torch.empty(()))
        factor = 2.0 / (self._curve(high) - self._curve(low))
        if self.values == "pq" and not (min(self.low) >= 0.0 and max(self.high) <= PQ_PEAK):
            return f"pq takes luminances of 0 to {PQ_PEAK:g} cd/m2, got {self.as_node()['pairs']}"
        if not ((factor > 0.0) & (factor < math.inf)).all():
            above = ""
            if self.values in least:
                above = f", above {least[self.values]:g} for {self.values}"
            return (
                "expected a finite distance in float32, the first below the second"
                f"{above}: {self.as_node()['pairs']}"
            )

        # Settings of pictures.
        if self.shown is not None and not (
            len(self.shown) in (1, 3) and all(n >= 0 for n in self.shown)
        ):
            return f"shown: expected one or three channels, counted from 0, got {list(self.shown)}"
        if len(self.stretch) != 2 or not 0.0 <= self.stretch[0] < self.stretch[1] <= 1.0:
            return (
                "stretch: expected two fractions of the range, as in [0, 0.3], "
                f"got {list(self.stretch)}"
            )
        return None

    def as_node(self) -> Any:
        """Write the range as a config states it, ready for JSON; None for 8 bits."""
        if self.eight_bits:
            return None
        node: dict[str, Any] = {
            "pairs": [list(pair) for pair in zip(self.low, self.high, strict=True)],
            "values": self.values,
            "outside": self.outside,
            "nodata": self.nodata,
            "shown": self.shown and list(self.shown),
            "stretch": list(self.stretch),
        }
        return {name: value for name, value in node.items() if value is not None}

    def __str__(self) -> str:
        if self.eight_bits:
            return "8 bits, 0 to 255"
        pairs = [f"{low:g} to {high:g}" for low, high in zip(self.low, self.high, strict=True)]
        return f"{', '.join(dict.fromkeys(pairs))}, {self.values}"

    def ends_of(self, channel: int) -> tuple[np.float32, np.float32]:
        """The values of a channel that become -1 and 1."""
        own = channel if len(self.low) > 1 else 0
        return np.float32(self.low[own]), np.float32(self.high[own])

    def check_channels(self, channels: int, where: str = "data.params.range") -> None:
        """Raise ConfigError for another number of pairs, or a shown channel that images lack."""
        if len(self.low) not in (1, channels):
            raise ConfigError(f"{where}: {len(self.low)} pairs for images of {channels} channels")
        if self.shown is not None and max(self.shown) >= channels:
            raise ConfigError(
                f"{where}.shown: {list(self.shown)}, but the last of {channels} channels is "
                f"{channels - 1}"
            )

    def check_data(self, found: "PixelRange") -> None:
        """Raise ConfigError unless models of this range take images whose range is ``found``.

        The data may show them, and treat values outside, in another way.
        """
        if any(
            getattr(found, name) != getattr(self, name)
            for name in ("low", "high", "values", "eight_bits")
        ):
            raise ConfigError(f"`data`: its values are {found}, the targets take {self}")

    def checked(self, array: Array, nodata: float | None = None) -> NDArray[np.float32]:
        """Convert a file's values, (H, W, C), to float32 inside the range.

        ``nodata`` is the file's own, which :attr:`nodata` replaces. ValueError names the first
        value that is missing or outside.
        """
        values = array.astype(np.float32)
        if self == AS_STORED:
            return values
        if array.dtype == np.uint8:
            raise ValueError(EIGHT_BIT_FILE)
        low = np.array(self.low, dtype=np.float32)
        high = np.array(self.high, dtype=np.float32)
        _refuse(~np.isfinite(values), values, "not a number in the range")
        missing = nodata if self.nodata is None else self.nodata
        if missing is not None:
            _refuse(values == nearest_float32(missing), values, "no data there")
        if self.outside == "error":
            _refuse((values < low) | (values > high), values, f"outside the range, {self}")
        return np.clip(values, low, high, out=values)

    def normalise(self, x: Tensor) -> Tensor:
        """Images of a batch, (..., C, H, W) as they are read -> float32 in [-1, 1]."""
        if x.dtype == torch.uint8:
            return from_uint8(x)
        low, high = self._ends(x)
        x = torch.minimum(torch.maximum(x.float(), low), high)
        start = self._curve(low)
        span = self._curve(high) - start
        # Rounding may lead out of [-1, 1].
        return _clamped((self._curve(x) - start) * (2.0 / span) - 1.0)

    def restore(self, y: Tensor) -> Tensor:
        """[-1, 1], (..., C, H, W), clamped -> float32 values, or uint8; inverse of normalise."""
        if self.eight_bits:
            return to_uint8(y)
        low, high = self._ends(y)
        start = self._curve(low)
        span = self._curve(high) - start
        y = start + (_clamped(y) + 1.0) * (span / 2.0)
        if self.values == "log":
            y = y.exp()
        elif self.values == "log1p":
            y = y.expm1()
        elif self.values == "logc3":
            y = logc3_to_linear(y)
        elif self.values == "pq":
            y = pq_to_luminance(y)
        return torch.minimum(torch.maximum(y, low), high)

    def levels(self, x: Tensor) -> Tensor:
        """Images of a batch as they are read -> their levels."""
        if x.dtype == torch.uint8:
            return x
        return self.to_levels(self.normalise(x))

    def to_levels(self, y: Tensor) -> Tensor:
        """[-1, 1], clamped -> levels; rounded for 8 bits only."""
        if self.eight_bits:
            return to_uint8(y)
        return (_clamped(y) + 1.0) * 127.5

    def from_levels(self, levels: Tensor) -> Tensor:
        """Levels -> float32 in [-1, 1]; inverse of to_levels."""
        return levels.float() / 127.5 - 1.0

    def real(self, levels: Tensor) -> Tensor:
        """Levels, (..., C, H, W) -> real values in float32."""
        if self.eight_bits:
            return levels.float()
        return self.restore(self.from_levels(levels))

    def picture(self, levels: Tensor) -> Tensor:
        """Levels, (..., C, H, W) -> uint8 of the channels that are shown, stretched."""
        # By default all channels of 8-bit images are shown, and at most three of others.
        shown = self.shown
        if shown is None and not self.eight_bits and levels.shape[-3] >= 4:
            shown = (0, 1, 2)
        if shown is not None:
            levels = levels[..., list(shown), :, :]
        if levels.dtype == torch.uint8:
            return levels
        low = 255.0 * self.stretch[0]
        high = 255.0 * self.stretch[1]
        return ((levels - low) * (255.0 / (high - low))).clamp(0.0, 255.0).round().to(torch.uint8)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the range on x's device, (C, 1, 1) or (1, 1, 1) each."""
        low = torch.tensor(self.low, dtype=torch.float32, device=x.device)
        high = torch.tensor(self.high, dtype=torch.float32, device=x.device)
        return low[:, None, None], high[:, None, None]

    def _curve(self, x: Tensor) -> Tensor:
        """Map values to a scale on which the range is linear."""
        if self.values == "linear":
            return x
        if self.values == "log":
            return x.log()
        if self.values == "log1p":
            return x.log1p()
        return linear_to_logc3(x) if self.values == "logc3" else luminance_to_pq(x)


# ARRI, "ALEXA Log C Curve, Usage in VFX": exposure index 800. Below the cut it is a line.
LOGC3 = {"cut": 0.010591, "a": 5.555556, "b": 0.052272, "c": 0.247190, "d": 0.385537}
LOGC3_LINE = (5.367655, 0.092809)  # slope and offset


def linear_to_logc3(x: Tensor) -> Tensor:
    """Scene-linear values, where 0.18 is middle grey -> LogC3 at EI 800, 0 to 1."""
    slope, offset = LOGC3_LINE
    inside = (LOGC3["a"] * x + LOGC3["b"]).clamp(min=LOGC3["b"])
    curve = LOGC3["c"] * inside.log10() + LOGC3["d"]
    return torch.where(x > LOGC3["cut"], curve, slope * x + offset)


def logc3_to_linear(y: Tensor) -> Tensor:
    """Undo :func:`linear_to_logc3`."""
    slope, offset = LOGC3_LINE
    curve = (10.0 ** ((y - LOGC3["d"]) / LOGC3["c"]) - LOGC3["b"]) / LOGC3["a"]
    return torch.where(y > slope * LOGC3["cut"] + offset, curve, (y - offset) / slope)


# SMPTE ST 2084: ((c1 + c2 y) / (1 + c3 y))^m2, where y = (luminance / 10,000)^m1, and c1 is
# 1 + c3 - c2. In float32 the 79th power would lose digits, so the base's distance to 1 is computed.
PQ_PEAK = 10_000.0
PQ_M1 = 2610 / 16384
PQ_M2 = 2523 / 32
PQ_C3 = 2392 / 128
PQ_GAP = 21 / 128  # c2 - c3


def luminance_to_pq(x: Tensor) -> Tensor:
    """Luminances in cd/m2, 0 to 10,000 -> the signal of SMPTE ST 2084, 0 to 1."""
    y = (x / PQ_PEAK) ** PQ_M1
    return (PQ_M2 * torch.log1p(PQ_GAP * (y - 1.0) / (1.0 + PQ_C3 * y))).exp()


def pq_to_luminance(y: Tensor) -> Tensor:
    """Undo :func:`luminance_to_pq`."""
    gap = torch.expm1(y.log() / PQ_M2)
    ratio = ((gap + PQ_GAP) / (PQ_GAP - PQ_C3 * gap)).clamp(min=0.0)
    return PQ_PEAK * ratio ** (1.0 / PQ_M1)


EIGHT_BIT_FILE = (
    "8 bits per channel, whose range is 0 to 255: leave `range` out, or convert all files"
)
UNSTATED = (
    "more than 8 bits per channel: state data.params.range, which `olvae data range SRC` measures, "
    "or convert the files to 8 bits"
)
UNKEPT = (
    "more than 8 bits per channel, which are not read from this format: convert it to PNG or TIFF"
)
EIGHT_BITS = PixelRange(eight_bits=True)
# Any values, of any kind of file, unchanged.
AS_STORED = PixelRange((-math.inf,), (math.inf,), outside="clip")


def _refuse(bad: NDArray[np.bool_], values: NDArray[np.float32], why: str) -> None:
    """Raise ValueError with the first place of ``bad``, (H, W, C), if there is one."""
    if bad.any():
        row, column, channel = (int(place) for place in np.argwhere(bad)[0])
        where = f"row {row}, column {column}, channel {channel}"
        raise ValueError(
            f"{values[row, column, channel]:g} at {where}, counted from 0, "
            f"and {bad.sum()} in all: {why}"
        )
