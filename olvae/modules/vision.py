"""Vision encoders from timm: frozen networks whose feature maps a latent is aligned with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.constant import Constant, Normalise
from olvae.modules.precision import island

__all__ = ["VisionEncoder", "published_weights"]

PIXELS = 16
"""Of the image to a feature: VA-VAE shows DINOv2, whose patches have 14 pixels, an image of 256 at 224."""


def published_weights(name: str) -> str:
    """The id on the hub of a timm model's weights.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: timm has no such model, or no weights for it on the hub.
    """
    import timm

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # it knows the model, and not the tag
        config = None
    if config is None or not config.hf_hub_id:
        near = ", ".join(timm.list_pretrained(f"*{name.partition('.')[0]}*")[:3])
        raise ValueError(f"timm has no published weights of {name}{f': did you mean {near}?' if near else ''}")
    return str(config.hf_hub_id)


class VisionEncoder(Constant):
    """The last feature map of a timm network, after its last norm; frozen: see :class:`Constant`.

    Args:
        name: of a timm model, which takes images of any size; a tag after a dot, as in
            ``vit_large_patch14_dinov2.lvd142m``, names its published weights.
        weights: its tensors, under timm's names or its publisher's; None for fresh ones, to count the network.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: there is no such model, it gives no feature maps, or these are not its weights.
    """

    def __init__(self, name: str, weights: Mapping[str, Tensor] | None) -> None:
        network = _network(name, weights)
        config, last = network.pretrained_cfg, network.feature_info[-1]
        super().__init__(nn.Sequential(Normalise(config["mean"], config["std"]), network))
        self.channels = int(last["num_chs"])
        """Of the features."""
        self._stride = int(last["reduction"])  # pixels that the network sees, to a feature

    @torch.no_grad()
    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Features of images without gradients, in the precision of autocast.

        The network sees the images resized so that 16 of their pixels make one feature; the features are then resized
        to the grid.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            grid: h, w.

        Returns:
            (B, channels, h, w) in float32.
        """
        normalise, network = self.network.children()
        size = [self._stride * max(1, round(side / PIXELS)) for side in x.shape[-2:]]
        seen = normalise(_resized(x, size, "bicubic"))  # (B, 3, stride H/16, stride W/16)
        intermediates: Any = network.forward_intermediates
        (features,) = intermediates(seen, indices=1, norm=True, intermediates_only=True)  # (B, d, h', w')
        return _resized(features, grid, "bilinear")


def _network(name: str, weights: Mapping[str, Tensor] | None) -> Any:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}: timm.list_models() names them")
    settings: dict[str, Any] = {"pretrained": weights is not None}
    if weights is not None:
        settings["pretrained_cfg_overlay"] = {"state_dict": dict(weights), "custom_load": False}
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **settings)
        except TypeError:  # of a network without position embeddings, which takes any size
            network = timm.create_model(name, **settings)
    except (RuntimeError, KeyError) as error:  # of load_state_dict, or of a conversion from the publisher's names
        reason = " ".join(str(error).split("\n\t")[-1].split())[:100]
        raise ValueError(f"these are not the weights of {name}: {reason}") from error
    network.pretrained_cfg.pop("state_dict", None)  # a second copy
    if not hasattr(network, "forward_intermediates") or not getattr(network, "feature_info", None):
        raise ValueError(f"timm's {name} gives no feature maps: take a ViT, such as vit_large_patch14_dinov2.lvd142m")
    return network


def _resized(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """In float32."""
    x = island(x)
    return x if list(x.shape[-2:]) == list(size) else F.interpolate(x, size=list(size), mode=mode, antialias=True)
