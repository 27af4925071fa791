"""open-LiteVAE: train, evaluate and export LiteVAE autoencoders for latent diffusion."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olvae.export.diffusers_model import AutoencoderLiteVAE
    from olvae.models.autoencoder import LiteVAE

__all__ = ["AutoencoderLiteVAE", "LiteVAE", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The classes on demand, so that `import olvae` and `olvae --help` do not wait for torch."""
    if name == "LiteVAE":
        from olvae.models.autoencoder import LiteVAE

        return LiteVAE
    if name == "AutoencoderLiteVAE":
        from olvae.export.diffusers_model import AutoencoderLiteVAE

        return AutoencoderLiteVAE
    raise AttributeError(f"module 'olvae' has no attribute {name!r}")
