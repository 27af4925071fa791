"""Find, download and read the pretrained weights of published networks: VGG, AlexNet, Inception."""

import http.client
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from olvae.checkpoint import read_torch
from olvae.files import file_sha256

VARIABLE = "OLVAE_WEIGHTS"
"""The environment variable that names a folder of weights."""

TIMEOUT_S = 10.0
"""How long a server may be silent, before it answers or during a download."""


@dataclass(frozen=True)
class WeightsFile:
    """A published file of pretrained weights.

    Args:
        what: the network, for messages.
        name: of the file.
        url: where it is published.
        sha256: the first eight digits of its checksum, with which its name ends.
        aliases: other names under which the same file is published.
    """

    what: str
    name: str
    url: str
    sha256: str
    aliases: tuple[str, ...] = ()


VGG16 = WeightsFile("VGG16", "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
VGG19 = WeightsFile("VGG19", "vgg19-dcbb9e9d.pth", "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d")
ALEXNET = WeightsFile(
    "AlexNet", "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"
)
INCEPTION = WeightsFile(
    "Inception",
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    aliases=("weights-inception-2015-12-05-6726825d.pth",),  # torch-fidelity's name for it
)


class MissingWeights(FileNotFoundError):  # noqa: N818  (it reads as what it says)
    """Weights were not found and can't be downloaded; one line, with the remedy."""


def find_weights(
    file: WeightsFile, weights_dir: str | Path | None = None, remedy: str = "name its folder in `weights_dir`"
) -> Path:
    """Look for a file in ``weights_dir``, in the folder that OLVAE_WEIGHTS names, and in torch hub's cache; if it is in
    none of them, download it into the cache, which fails soon where there is no internet.

    Args:
        remedy: what else the user can do, for the message.

    Raises:
        MissingWeights: the file was not found and could not be downloaded.
        NotADirectoryError: ``weights_dir`` is not a folder.
    """
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise NotADirectoryError(f"{weights_dir}: no such folder of weights")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(place) for place in (weights_dir, os.environ.get(VARIABLE)) if place]
    for place in (*places, cache):
        for name in (file.name, *file.aliases):
            if (place / name).is_file():
                return place / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _socket_timeout():
            torch.hub.download_url_to_file(file.url, str(cache / file.name), hash_prefix=file.sha256)
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: wrong checksum
        reason = " ".join(str(getattr(error, "reason", error)).split())
        searched = ", ".join(map(str, (*places, cache)))
        raise MissingWeights(
            f"{file.name} is not in {searched} and could not be downloaded ({reason}): "
            f"download {file.url} into {cache}, or {remedy}"
        ) from error
    return cache / file.name


def read_weights_file(path: Path, file: WeightsFile, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a file whose names begin with ``prefix``; code in the file is not executed.

    Raises:
        ValueError: it is cut off, is another kind of file, or has non-finite values.
    """
    wrong = f"{path} is not a file of {file.what} weights"
    try:
        content = read_torch(path, legacy=True)  # torchvision's VGG is of that format
    except ValueError as error:
        raise ValueError(f"{wrong}: it is cut off, or another kind of file; download {file.url} again") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{wrong}: it holds more than tensors; download {file.url} again")
    chosen = {name: tensor for name, tensor in content.items() if name.startswith(prefix)}
    for name, tensor in chosen.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{wrong}: {name} has non-finite values; download {file.url} again")
    return chosen


def load_weights_file(path: Path, file: WeightsFile, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's values into ``tensors``, by their names in the file, which begin with ``prefix``.

    Raises:
        ValueError: as :func:`read_weights_file`, or a tensor is missing or has another shape.
    """
    state = read_weights_file(path, file, prefix)
    for name, own in sorted(tensors.items()):
        found = state.get(name)
        if found is None or found.shape != own.shape:
            wrong = "is missing" if found is None else f"is {tuple(found.shape)} for {tuple(own.shape)}"
            raise ValueError(f"{path} is not a file of {file.what} weights: {name} {wrong}")
        own.copy_(found)


def provenance(path: Path, file: WeightsFile) -> dict[str, object]:
    """Describe a file beside a result: its name, its SHA-256, and whether that is the published file's."""
    state = path.stat()
    digest = _sha256(path.resolve(), state.st_size, state.st_mtime_ns)
    return {"file": path.name, "sha256": digest, "published": digest.startswith(file.sha256)}


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001  (they invalidate the cache)
    return file_sha256(path)


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """Give sockets a timeout, which torch's download does not set."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
