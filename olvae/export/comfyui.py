"""A LiteVAE as one file for ComfyUI, whose own loader refuses it and whose node in integrations/comfyui loads it.

ComfyUI tells autoencoders apart by single names, such as ``decoder.conv_in.weight``, and loads without strictness: it
would take a LiteVAE for Stable Diffusion's and decode noise. So every name has a prefix that it does not know.
"""

import json
from pathlib import Path

import torch

from olvae.checkpoint import PRIVATE_PREFIX
from olvae.export.compare import as_exported, check_equal, check_factors, check_tensors, distance
from olvae.export.single import check_file, export_file
from olvae.models.autoencoder import LiteVAE
from olvae.models.pretrained import CONFIG_KEY

__all__ = ["export_comfyui"]


def export_comfyui(
    model: LiteVAE, file: Path, dtype: torch.dtype = torch.float32, fold: bool = False, force: bool = False
) -> dict[str, float]:
    """Write one file with the config in its header, load it back and compare it, before it appears.

    Args:
        model: in float32.
        file: ends with .safetensors.
        dtype: to round the weights to.
        fold: write the self-modulated convolutions as ordinary ones.
        force: replace the file.

    Returns:
        The relative differences, by what was compared.

    Raises:
        FileExistsError: see :func:`check_file`.
        ValueError: a network is not of this package, weights are non-finite, also after rounding, or a comparison
            fails.
    """
    check_file(file, force)
    out, differences = as_exported(model, dtype, fold)
    weights = {PRIVATE_PREFIX + name: tensor for name, tensor in out.state_dict().items()}

    def compare(partial: Path) -> None:
        check_tensors(partial, weights)
        back = LiteVAE.from_pretrained(partial)
        check_factors(file, back.for_diffusion, out.for_diffusion)
        differences["loaded back"] = check_equal("loading it back", distance(out, back.moments, back.decode))

    export_file(file, weights, {CONFIG_KEY: json.dumps(out.export_config())}, compare)
    return differences
