"""open-LiteVAE: train, evaluate and export LiteVAE autoencoders for latent diffusion.

docs/api.md documents the public names, with an example each; ``__init__.pyi`` beside this file
lists them. A name is imported when it is first used, so that ``import olvae`` and the list of
commands do not wait for torch.
"""

from typing import Any

import lazy_loader

_import, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    try:
        return _import(name)
    except ModuleNotFoundError as error:
        from olvae.config import missing_package

        missing = missing_package(error)
        if missing is None:
            raise
        raise ImportError(f"olvae.{name} {missing}") from error
