"""Encoder and decoder as ONNX files (and torch.export programs) for any batch, height and width.

ONNX needs the extra: ``pip install 'open-litevae[onnx]'``.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.models.autoencoder import LiteVAE

__all__ = ["Half", "export_onnx", "export_program", "halves"]

TOLERANCE = 1e-4
"""The largest difference between onnxruntime and torch, relative to the largest value."""

TRACED = (2, 3, 4)
"""Batch, and height and width in latent positions, at which a network is traced."""

CHECKED = ((1, 5, 3), (2, 2, 6), (3, 1, 1))
"""The same for the sizes at which an ONNX file is checked."""


class Half(nn.Module):
    """The encoder (images to moments) or the decoder (latents to images) as a module, and the shapes of its inputs.

    Args:
        function: the forward pass, a method of ``model``.
        name: of the file, without its extension.
        input_name, output_name: of the graph's tensors.
        channels: of the input.
        factor: that the input's height and width are multiples of.
    """

    def __init__(
        self,
        model: LiteVAE,
        function: Callable[[Tensor], Tensor],
        name: str,
        input_name: str,
        output_name: str,
        channels: int,
        factor: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.function = function
        self.name = name
        self.input_name, self.output_name = input_name, output_name
        self.channels, self.factor = channels, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def example(self, batch: int, height: int, width: int) -> Tensor:
        """Random input for a latent of this size, the same in every call, in the model's dtype."""
        shape = (batch, self.channels, self.factor * height, self.factor * width)
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return x.to(next(self.model.parameters()).dtype)

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        dim = torch.export.Dim
        height, width = dim("latent_height", min=2), dim("latent_width", min=2)  # torch.export treats 1 as a constant
        sides = {2: height, 3: width} if self.factor == 1 else {2: self.factor * height, 3: self.factor * width}
        return {"x": {0: dim("batch", min=1), **sides}}


def halves(model: LiteVAE) -> tuple[Half, Half]:
    """Encoder (``image`` in [-1, 1] to ``moments``: means, then log-variances, unclamped) and decoder (``latent`` to
    ``image``, unclamped), folded: see :meth:`LiteVAE.fold`.
    """
    model = model if model.folded else model.fold().eval()
    return (
        Half(model, model.moments, "encoder", "image", "moments", model.in_channels, model.downscale),
        Half(model, model.decode, "decoder", "latent", "image", model.latent_channels, 1),
    )


@torch.no_grad()
def export_program(half: Half) -> torch.export.ExportedProgram:
    """A half as a program of torch.export, for any batch and for latents of 2x2 and larger."""
    return torch.export.export(half.eval(), (half.example(*TRACED),), dynamic_shapes=half.dynamic_shapes)


def export_onnx(model: LiteVAE, folder: Path) -> dict[str, float]:
    """Write ``encoder.onnx`` and ``decoder.onnx``, and check them in onnxruntime at sizes other than the traced one.

    Returns:
        For each file the largest difference from torch, relative to the largest value.

    Raises:
        ModuleNotFoundError: the ``onnx`` extra is not installed.
        ValueError: the difference is above :data:`TOLERANCE`, or the model is not float32.
    """
    if {p.dtype for p in model.parameters()} != {torch.float32}:
        raise ValueError("ONNX files are written and checked in float32: leave --dtype at float32")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX needs {error.name}: pip install 'open-litevae[onnx]'") from error
    errors: dict[str, float] = {}
    for half in halves(model):
        file = folder / f"{half.name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                half,
                (half.example(*TRACED),),
                dynamic_shapes=half.dynamic_shapes,
                input_names=[half.input_name],
                output_names=[half.output_name],
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.save(file, external_data=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        errors[file.name] = max(_difference(half, session, size) for size in CHECKED)
        if not errors[file.name] < TOLERANCE:
            raise ValueError(
                f"{file.name}: onnxruntime differs from torch by {errors[file.name]:.1e} of the largest value"
            )
    return errors


@torch.no_grad()
def _difference(half: Half, session: Any, size: tuple[int, int, int]) -> float:
    x = half.example(*size)
    (theirs,) = session.run([half.output_name], {half.input_name: x.numpy()})
    ours = half(x)
    if tuple(theirs.shape) != tuple(ours.shape):
        return float("inf")
    return float((torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max())
