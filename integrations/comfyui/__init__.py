"""A ComfyUI node that loads a LiteVAE written by ``olvae export --format comfyui``,
for ComfyUI's own VAE nodes."""

from typing import Any

import folder_paths

from olvae import GIB

from .vae import VAE

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "LoadLiteVAE"]


class LoadLiteVAE:
    """The node: a file of models/vae to a VAE."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = "Loads a LiteVAE that olvae export --format comfyui has written."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        return {
            "required": {"vae_name": (folder_paths.get_filename_list("vae"),)},
            "optional": {
                "memory_gib": (
                    "FLOAT",
                    {
                        "default": 2.0,
                        "min": 0.1,
                        "max": 1024.0,
                        "step": 0.1,
                        "tooltip": (
                            "What encoding and decoding may take beside images and weights. "
                            "Larger images are computed in parts; the result is the same."
                        ),
                    },
                )
            },
        }

    def load(self, vae_name: str, memory_gib: float = 2.0) -> tuple[VAE]:
        """The VAE of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not one of ours.
        """
        path = folder_paths.get_full_path("vae", vae_name)
        if path is None:
            raise FileNotFoundError(f"{vae_name}: no such file in models/vae")
        return (VAE.from_file(path, int(memory_gib * GIB)),)


NODE_CLASS_MAPPINGS = {"LoadLiteVAE": LoadLiteVAE}

NODE_DISPLAY_NAME_MAPPINGS = {"LoadLiteVAE": "Load LiteVAE"}
