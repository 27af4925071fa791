"""Write encoder and decoder as ONNX files for any batch, height and width, checked in onnxruntime.

Needs ``pip install onnx onnxscript onnxruntime``.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.config import import_extra
from olvae.models.autoencoder import LiteVAE

ONNX_PACKAGES = "onnx onnxscript onnxruntime"
ENCODER = "encoder.onnx"
DECODER = "decoder.onnx"

# Largest difference between onnxruntime and torch, relative to the largest value.
ONNX_TOLERANCE = 1e-4

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
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def export_onnx(model: LiteVAE, folder: Path) -> dict[str, float]:
    """Write ``encoder.onnx`` and ``decoder.onnx``, folded; check them at sizes not traced.

    The encoder maps ``image`` in [-1, 1] to ``moments`` (means, then log-variances, unclamped), the
    decoder ``latent`` to ``image`` (unclamped). Return each file's largest difference from torch,
    relative to the largest value. Raise ValueError if it is above :data:`ONNX_TOLERANCE`, or the
    model is not float32.
    """
    if {p.dtype for p in model.parameters()} != {torch.float32}:
        raise ValueError("ONNX files are written and checked in float32: leave `dtype` at float32")
    onnxruntime = import_extra("onnxruntime", ONNX_PACKAGES, "ONNX")
    import_extra("onnxscript", ONNX_PACKAGES, "ONNX")

    # For each half: file, names of input and output, module, and how many channels are compared. Of
    # a deterministic encoder only the means: log-variances of -30 would hide a difference.
    folded = model if model.folded else model.fold().eval()
    means = folded.latent_channels if folded.deterministic else None
    encoder = Half(folded, folded.moments, folded.in_channels, folded.downscale)
    decoder = Half(folded, folded.decode, folded.latent_channels, 1)
    halves = (
        (ENCODER, ("image", "moments"), encoder, means),
        (DECODER, ("latent", "image"), decoder, None),
    )

    differences: dict[str, float] = {}
    for name, names, half, compared in halves:
        _write(half, names, folder / name)
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        differences[name] = max(
            _difference(half, session, names, size, compared) for size in ONNX_CHECKED
        )
        if not differences[name] < ONNX_TOLERANCE:
            raise ValueError(
                f"{name}: onnxruntime differs from torch by {differences[name]:.1e} of the largest "
                "value"
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
    session: Any,
    names: tuple[str, str],
    size: tuple[int, int, int],
    channels: int | None,
) -> float:
    """Compare onnxruntime with torch, in the first ``channels`` of the output, or in all."""
    x = half.example(*size)
    (theirs,) = session.run([names[1]], {names[0]: x.numpy()})
    ours = half(x)
    if tuple(theirs.shape) != tuple(ours.shape):
        return float("inf")
    ours = ours[:, :channels]
    return float((torch.from_numpy(theirs)[:, :channels] - ours).abs().max() / ours.abs().max())
