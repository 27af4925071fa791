"""Pretrained weights of other people's networks: which files, where they are looked for, what was found."""

import http.client
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from olvae.files import file_sha256

__all__ = [
    "ALEXNET",
    "INCEPTION",
    "VARIABLE",
    "VGG16",
    "MissingWeights",
    "WeightsFile",
    "find_weights",
    "provenance",
    "read_weights_file",
]

VARIABLE = "OLVAE_WEIGHTS"
"""The environment variable that names a folder of weights."""

PATIENCE = 5.0
"""Seconds that a server has to answer at all; STALL is how long a running download may pause."""

STALL = 30.0


@dataclass(frozen=True)
class WeightsFile:
    """A published file of pretrained weights.

    Args:
        what: the network, for messages.
        name: of the file.
        url: where it is published.
        sha256: the first eight digits of its checksum, which its name ends with.
        aliases: other names that the same file is published under.
    """

    what: str
    name: str
    url: str
    sha256: str
    aliases: tuple[str, ...] = ()


VGG16 = WeightsFile("VGG16", "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
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
    """Weights that are in none of the places and can't be downloaded; one line, with the remedy."""


def find_weights(
    file: WeightsFile, weights_dir: str | Path | None = None, remedy: str = "name its folder with --weights-dir"
) -> Path:
    """The file in ``weights_dir``, in the folder that OLVAE_WEIGHTS names, or in torch hub's cache, in this order;
    or else a fresh download into that cache, which is given up after seconds where there is no internet.

    Args:
        remedy: what else the user can do, for the message.

    Raises:
        MissingWeights: it can't be had.
        NotADirectoryError: ``weights_dir`` is no folder.
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
        _ask(file.url)
        with _impatient_sockets():
            torch.hub.download_url_to_file(file.url, str(cache / file.name), hash_prefix=file.sha256)
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: another checksum
        reason = " ".join(str(getattr(error, "reason", error)).split())
        searched = ", ".join(map(str, (*places, cache)))
        raise MissingWeights(
            f"{file.name} is not in {searched} and could not be downloaded ({reason}): "
            f"get {file.url} into {cache}, or {remedy}"
        ) from error
    return cache / file.name


def read_weights_file(path: Path, file: WeightsFile, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a found file whose names begin with ``prefix``; code in it is not run.

    Raises:
        ValueError: it is cut off, is no such file, or holds values that are not finite.
    """
    wrong = f"{path} is not a file of {file.what} weights"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises of every kind
        raise ValueError(f"{wrong}: it is cut off or of another kind; get {file.url} again") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{wrong}: it holds more than tensors; get {file.url} again")
    chosen = {name: tensor for name, tensor in content.items() if name.startswith(prefix)}
    for name, tensor in chosen.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{wrong}: {name} has values that are not finite; get {file.url} again")
    return chosen


def provenance(path: Path, file: WeightsFile) -> dict[str, object]:
    """What to write beside a number: the file's name, its SHA-256, and whether that is the published file's."""
    state = path.stat()
    digest = _sha256(path.resolve(), state.st_size, state.st_mtime_ns)
    return {"file": path.name, "sha256": digest, "published": digest.startswith(file.sha256)}


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001  (they tell a changed file from a known one)
    return file_sha256(path)


def _ask(url: str) -> None:
    """Returns if a server answers for ``url`` in time. In a thread, because no timeout holds for resolving a name."""
    failure: list[Exception] = [TimeoutError(f"no answer in {PATIENCE:g} s")]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                failure.clear()
        except (OSError, http.client.HTTPException) as error:
            failure[:] = [error]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if failure:
        raise failure[0]


@contextmanager
def _impatient_sockets() -> Iterator[None]:
    """torch's download sets no timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
