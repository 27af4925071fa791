"""Check the arguments of constructors: counts, ranges, choices."""

from collections.abc import Iterable, Sequence


def check_counts(least: int, **counts: int | Sequence[int]) -> None:
    """Check numbers of channels, blocks or multiples, one or several each: ``least`` or more."""
    for name, value in counts.items():
        several = [value] if isinstance(value, int) else list(value)
        if not several or min(several) < least:
            got = value if isinstance(value, int) else several
            raise ValueError(f"{name} must be at least {least}, got {got}")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError for a number below 0, or nan."""
    for name, number in numbers.items():
        # Not ``number < 0``, which is False for nan.
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Check the betas of Adam or Muon: two numbers from 0 to below 1."""
    if len(betas) != 2 or not 0 <= min(betas) <= max(betas) < 1:
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {list(betas)}")
    return betas[0], betas[1]


def check_choice(choices: Iterable[str], **settings: str) -> None:
    """Raise ValueError for a setting that is not among the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
