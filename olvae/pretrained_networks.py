"""Find files of the pretrained networks of metrics and losses: VGG, AlexNet, Inception, DINOv2."""

import http.client
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from olvae.checkpoint import _read_torch
from olvae.files import file_sha256, first_line

# The environment variable with a folder of pretrained weights.
FOLDER_VARIABLE = "OLVAE_WEIGHTS"

# Seconds that a server may be silent, before it answers or during a download.
SILENCE_S = 10.0


@dataclass(frozen=True)
class WeightsFile:
    """A published file of pretrained weights."""

    # The network, for messages.
    what: str
    url: str
    sha256: str
    # Another name under which the same file is published.
    alias: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


VGG16 = WeightsFile(
    "VGG16",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)

VGG19 = WeightsFile(
    "VGG19",
    "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",
)

ALEXNET = WeightsFile(
    "AlexNet",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
)

INCEPTION = WeightsFile(
    "Inception",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    # torch-fidelity's name.
    alias="weights-inception-2015-12-05-6726825d.pth",
)

DINOV2 = WeightsFile(
    "DINOv2",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)


class MissingWeights(FileNotFoundError):  # noqa: N818  (it reads as what it says)
    """Weights that were not found and can't be downloaded; one line, with the remedy."""


def find_weights(
    file: WeightsFile,
    weights_dir: str | Path | None = None,
    remedy: str = "name its folder in `weights_dir`",
) -> Path:
    """Find a file of pretrained weights, or download it.

    It is looked for in ``weights_dir``, in the folder that OLVAE_WEIGHTS names, and in torch hub's
    cache, which a download goes to. Without internet a download fails soon: MissingWeights, with
    ``remedy``, what else the user can do.
    """
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise NotADirectoryError(f"{weights_dir}: no such folder of weights")

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(place) for place in (weights_dir, os.environ.get(FOLDER_VARIABLE)) if place]
    places.append(cache)
    for place in places:
        for name in (file.name, file.alias):
            if name is not None and (place / name).is_file():
                return place / name

    # torch's download sets no timeout of its own.
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(cache / file.name), hash_prefix=file.sha256)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        # RuntimeError: a wrong checksum.
        why = " ".join(str(getattr(error, "reason", error)).split())
        raise MissingWeights(
            f"{file.name} is not in {', '.join(map(str, places))} and could not be downloaded "
            f"({why}): download {file.url} into {cache}, or {remedy}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return cache / file.name


# The file of weights in a repository of timm's networks.
ON_HUB = "model.safetensors"


def find_on_hub(repo_id: str) -> Path:
    """Find a timm network's weights in the hub's cache, or download them there.

    MissingWeights if ``repo_id`` is no id of the hub, or they can't be downloaded.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise MissingWeights(f"{repo_id}: no such file, and not an id of the hub (OWNER/NAME)")
    # Takes longer to import than this package.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, ON_HUB))
    except Exception as error:  # of many kinds, by what the hub answers
        raise MissingWeights(
            f"{repo_id}: {ON_HUB} is not in the hub's cache and could not be downloaded "
            f"({first_line(error)})"
        ) from error


def read_weights_file(path: Path, file: WeightsFile, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a published file whose names start with ``prefix``.

    ValueError if the file is cut off, of another kind, or has non-finite values.
    """
    wrong = f"{path} is not a file of {file.what} weights"
    again = f"download {file.url} again"
    try:
        # torchvision's VGG is of the legacy format.
        content = _read_torch(path, legacy=True)
    except ValueError as error:
        raise ValueError(f"{wrong}: it is cut off, or another kind of file; {again}") from error
    named = content if isinstance(content, dict) else {}
    if not named or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named.items()
    ):
        raise ValueError(f"{wrong}: it holds more than tensors; {again}")
    chosen = {name: tensor for name, tensor in named.items() if name.startswith(prefix)}
    for name, tensor in chosen.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{wrong}: {name} has non-finite values; {again}")
    return chosen


def load_weights_file(
    path: Path, file: WeightsFile, prefix: str, tensors: Mapping[str, Tensor]
) -> None:
    """Copy a file's values into ``tensors``, by their names after ``prefix``.

    ValueError if a tensor is missing or of another shape.
    """
    state = read_weights_file(path, file, prefix)
    wrong = f"{path} is not a file of {file.what} weights"
    for own_name, own in sorted(tensors.items()):
        name = prefix + own_name
        found = state.get(name)
        if found is None:
            raise ValueError(f"{wrong}: {name} is missing")
        if found.shape != own.shape:
            raise ValueError(f"{wrong}: {name} is {tuple(found.shape)} for {tuple(own.shape)}")
        own.copy_(found)


def provenance(path: Path, file: WeightsFile) -> dict[str, object]:
    """Describe a file beside a result: its name and SHA-256, and if it is the published file."""
    state = path.stat()
    digest = _sha256(path.resolve(), state.st_size, state.st_mtime_ns)
    return {"file": path.name, "sha256": digest, "published": digest == file.sha256}


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001
    """Return a file's SHA-256, cached until its size or time changes."""
    return file_sha256(path)
