"""Write encoder and decoder as ONNX files for any batch, height and width, checked in onnxruntime.

Needs ``pip install onnx onnxscript onnxruntime``.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olvae.config import import_extra
from olvae.files import first_line
from olvae.models.autoencoder import LiteVAE
from olvae.modules.base import dtype_of

ONNX_PACKAGES = "onnx onnxscript onnxruntime"
ENCODER = "encoder.onnx"
DECODER = "decoder.onnx"

# By the weights' dtype, the largest difference between onnxruntime and torch in float32, relative
# to the largest value.
ONNX_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}

# Batch, height and width in latent positions, of the traced input and of the checked ones.
TRACED = (2, 3, 4)
ONNX_CHECKED = ((1, 5, 3), (2, 2, 6), (3, 1, 1))


class Half(nn.Module):
    """Encoder or decoder as a module: a method of the model, and its input's channels.

    The sides of the input are ``factor`` times the latent's.
    """

    def __init__(
        self, model: LiteVAE, function: Callable[[Tensor], Tensor], channels: int, factor: int
    ) -> None:
        super().__init__()
        self.model = model
        self.function = function
        self.channels = channels
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def example(self, batch: int, height: int, width: int) -> Tensor:
        """Make a random input for a latent of this size, the same in every call."""
        shape = (batch, self.channels, self.factor * height, self.factor * width)
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return x.to(dtype_of(self.model))


def export_onnx(model: LiteVAE, folder: Path, prefix: str = "") -> dict[str, float]:
    """Write ``encoder.onnx`` and ``decoder.onnx``, folded; check them at sizes not traced.

    The encoder maps ``image`` in [-1, 1] to ``moments`` (means, then log-variances, unclamped), the
    decoder ``latent`` to ``image`` (unclamped), all in the weights' dtype. Files' names begin with
    the ``prefix``. Return each file's largest difference from torch in float32, relative to the
    largest value. Raise ValueError if it is above :data:`ONNX_TOLERANCES`, the network can't be
    traced, or the model is in another dtype.
    """
    dtype = dtype_of(model)
    if dtype not in ONNX_TOLERANCES:
        raise ValueError(f"ONNX files are written in float32 and float16, not {dtype}")
    onnxruntime = import_extra("onnxruntime", ONNX_PACKAGES, "ONNX")
    import_extra("onnxscript", ONNX_PACKAGES, "ONNX")

    # For each half: file, names of input and output, module, and how many channels are compared. Of
    # a deterministic encoder only the means: log-variances of -30 would hide a difference.
    folded = model if model.folded else model.fold().eval()
    means = folded.latent_channels if folded.deterministic else None
    exact = folded if dtype == torch.float32 else copy.deepcopy(folded).float()
    encoder = Half(folded, folded.moments, folded.in_channels, folded.downscale)
    decoder = Half(folded, folded.decode, folded.latent_channels, 1)
    halves = (
        (ENCODER, ("image", "moments"), encoder, exact.moments, means),
        (DECODER, ("latent", "image"), decoder, exact.decode, None),
    )

    differences: dict[str, float] = {}
    for name, names, half, function, compared in halves:
        file = folder / f"{prefix}{name}"
        try:
            _write(half, names, file)
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = first_line(error.__cause__ or error)
            raise ValueError(
                f"{name}: torch can't trace this network: leave `onnx` out: {reason}"
            ) from error
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = []
        for size in ONNX_CHECKED:
            found.append(_difference(half, function, session, names, size, compared))
        differences[name] = max(found)
        if not differences[name] < ONNX_TOLERANCES[dtype]:
            remedy = "leave `onnx` out, or try another version of onnxruntime"
            if dtype == torch.float16:
                remedy = "write it with `dtype` float32"
            raise ValueError(
                f"{name}: onnxruntime differs from torch by {differences[name]:.1e} of the largest "
                f"value, above {ONNX_TOLERANCES[dtype]:g}: {remedy}"
            )
    return differences


def _write(half: Half, names: tuple[str, str], file: Path) -> None:
    """Trace one half, with batch, height and width free."""
    dim = torch.export.Dim
    # At least 2, because torch.export treats 1 as a constant.
    height = dim("latent_height", min=2)
    width = dim("latent_width", min=2)
    sides = {2: height, 3: width}
    if half.factor != 1:
        sides = {2: half.factor * height, 3: half.factor * width}
    how: dict[str, Any] = {
        "input_names": names[:1],
        "output_names": names[1:],
        "dynamic_shapes": {"x": {0: dim("batch", min=1), **sides}},
    }
    # onnxscript warns of each operation with several outputs that it does not fold.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            half, (half.example(*TRACED),), None, dynamo=True, verbose=False, **how
        )
    assert program is not None
    program.save(file, external_data=False)


@torch.no_grad()
def _difference(
    half: Half,
    function: Callable[[Tensor], Tensor],
    session: Any,
    names: tuple[str, str],
    size: tuple[int, int, int],
    channels: int | None,
) -> float:
    """Compare onnxruntime with a ``function`` in float32, in the first ``channels``, or in all."""
    x = half.example(*size)
    (theirs,) = session.run([names[1]], {names[0]: x.numpy()})
    ours = function(x.float())
    if tuple(theirs.shape) != tuple(ours.shape) or not np.isfinite(theirs).all():
        return float("inf")
    ours = ours[:, :channels]
    found = torch.from_numpy(theirs)[:, :channels].float()
    return float((found - ours).abs().max() / ours.abs().max())
