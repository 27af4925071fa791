"""What every export is held against: the model that was meant, tensor for tensor and output for output."""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from olvae.models.autoencoder import LiteVAE

__all__ = ["FOLDING", "TOLERANCE", "as_exported", "check_equal", "check_factors", "check_tensors", "distance"]


TOLERANCE = 1e-6
"""How far the model that is loaded back may be from the one that was written, relative to the largest value."""

FOLDING = 1e-5
"""The same for folding, which computes in another order."""


def as_exported(model: LiteVAE, dtype: torch.dtype, fold: bool = False) -> tuple[LiteVAE, dict[str, float]]:
    """The model as it is written, in evaluation mode, and by how much folding changed it.

    Args:
        model: in float32.
        dtype: to round the weights to.
        fold: turn the self-modulated convolutions into ordinary ones.

    Raises:
        ValueError: weights are non-finite, also after rounding, or folding changes the result.
    """
    differences: dict[str, float] = {}
    out = model.eval()
    if fold and not model.folded:
        out = model.fold().eval()
        differences["folded"] = check_equal("folding", distance(model, out.moments, out.decode), FOLDING)
    if broken := _non_finite(out):
        raise ValueError(f"{len(broken)} of the model's tensors have non-finite values ({broken[0]}, ...)")
    if dtype == torch.float32:
        return out, differences
    rounded = copy.deepcopy(out).to(dtype)
    if lost := _non_finite(rounded):
        raise ValueError(f"{len(lost)} tensors do not fit into {dtype} ({lost[0]}, ...): use bfloat16 or float32")
    return rounded, differences


def _non_finite(model: LiteVAE) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


def check_tensors(file: Path, meant: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a safetensors file holds these tensors, bit for bit, and no others."""
    written = load_file(file)
    for name in {*written, *meant}:
        a, b = written.get(name), meant.get(name)
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b.cpu()):
            raise ValueError(f"{file}: {name} differs from what was written: is the disk full, or broken?")


def check_factors(file: Path, written: Mapping[str, object], meant: Mapping[str, object]) -> None:
    """Raise ValueError unless what a diffusion model has to know, see ``for_diffusion``, is as it was meant."""
    if wrong := [name for name, value in meant.items() if written[name] != value]:
        raise ValueError(f"{file}: {', '.join(wrong)} differs from what was written")


@torch.no_grad()
def distance(model: LiteVAE, moments: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of another model's moments and reconstructions of one image of noise, relative to the
    largest value, in float32: half precision would hide differences, and overflow in some networks.

    Args:
        model: of any dtype.
        moments, decode: of the other model, in float32.
    """
    whole = model if next(model.parameters()).dtype == torch.float32 else copy.deepcopy(model).float()
    size = 4 * model.downscale
    x = torch.rand((1, model.in_channels, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = x.to(next(model.parameters()).device)
    own = whole.moments(x)
    z = own.chunk(2, dim=1)[0]
    pairs = ((own, moments(x)), (whole.decode(z), decode(z)))
    return float(torch.stack([(m - n).abs().max() / m.abs().max() for m, n in pairs]).max())


def check_equal(what: str, difference: float, limit: float = TOLERANCE) -> float:
    """The difference, if it is within the limit.

    Raises:
        ValueError: it is not.
    """
    if not math.isfinite(difference) or difference > limit:
        raise ValueError(f"{what} changes the result by {difference:.1e} of the largest value: nothing is written")
    return difference
