"""Write encoder and decoder as ONNX files for any batch, height and width, checked in onnxruntime.

Needs the extra: ``pip install 'open-litevae[onnx]'``.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.config import import_extra
from olvae.models.autoencoder import LiteVAE

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
TOLERANCE = 1e-4  # largest difference between onnxruntime and torch, relative to the largest value
TRACED, CHECKED = (
    (2, 3, 4),
    ((1, 5, 3), (2, 2, 6), (3, 1, 1)),
)  # batch, and height and width in latent positions


class Half(nn.Module):
    """Encoder or decoder as a module: a method of the model, its input's channels, and the factor of its sides."""

    def __init__(
        self, model: LiteVAE, function: Callable[[Tensor], Tensor], channels: int, factor: int
    ) -> None:
        super().__init__()
        self.model, self.function = model, function
        self.channels, self.factor = channels, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def example(self, batch: int, height: int, width: int) -> Tensor:
        """Random input for a latent of this size, the same in every call."""
        shape = (batch, self.channels, self.factor * height, self.factor * width)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def export_onnx(model: LiteVAE, folder: Path) -> dict[str, float]:
    """Write ``encoder.onnx`` and ``decoder.onnx``, folded, and check them at sizes other than the traced one.

    The encoder maps ``image`` in [-1, 1] to ``moments`` (means, then log-variances, unclamped), the decoder ``latent``
    to ``image`` (unclamped). Return each file's largest difference from torch, relative to the largest value; raise
    ValueError if it is above :data:`TOLERANCE`, or the model is not float32.
    """
    if {p.dtype for p in model.parameters()} != {torch.float32}:
        raise ValueError("ONNX files are written and checked in float32: leave `dtype` at float32")
    onnxruntime = import_extra("onnxruntime", "onnx", "ONNX")
    import_extra("onnxscript", "onnx", "ONNX")
    folded = model if model.folded else model.fold().eval()
    differences: dict[str, float] = {}
    means = (
        folded.latent_channels if folded.deterministic else None
    )  # log-variances of -30 would hide a difference
    for name, names, half, compared in (
        (
            ENCODER,
            ("image", "moments"),
            Half(folded, folded.moments, folded.in_channels, folded.downscale),
            means,
        ),
        (
            DECODER,
            ("latent", "image"),
            Half(folded, folded.decode, folded.latent_channels, 1),
            None,
        ),
    ):
        _write(half, names, folder / name)
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        differences[name] = max(
            _difference(half, session, names, size, compared) for size in CHECKED
        )
        if not differences[name] < TOLERANCE:
            raise ValueError(
                f"{name}: onnxruntime differs from torch by {differences[name]:.1e} of the largest value"
            )
    return differences


def _write(half: Half, names: tuple[str, str], file: Path) -> None:
    dim, factor = torch.export.Dim, half.factor
    height, width = (
        dim("latent_height", min=2),
        dim("latent_width", min=2),
    )  # torch.export treats 1 as a constant
    sides = {2: height, 3: width} if factor == 1 else {2: factor * height, 3: factor * width}
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
    x = half.example(*size)
    (theirs,) = session.run([names[1]], {names[0]: x.numpy()})
    ours = half(x)
    if tuple(theirs.shape) != tuple(ours.shape):
        return float("inf")
    ours = ours[:, :channels]
    return float((torch.from_numpy(theirs)[:, :channels] - ours).abs().max() / ours.abs().max())
