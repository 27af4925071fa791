"""SHA-256 of weights: in a file beside them that ``sha256sum -c`` understands, or in the header of a single file."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from olvae.files import atomic_write, file_sha256

__all__ = ["SUMS", "check_sums", "check_tensors_sum", "sum_of_tensors", "with_sum", "write_sums"]

SUMS = "SHA256SUMS"
"""The file in a folder of weights; each line is a file's checksum, two spaces and its name."""

KEY = "olvae.sha256"
"""In the header of a single safetensors file."""


def write_sums(folder: Path) -> None:
    """Write the checksums of the safetensors files in a folder."""
    lines = [f"{file_sha256(file)}  {file.name}\n" for file in sorted(folder.glob("[!.]*.safetensors"))]
    with atomic_write(folder / SUMS) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def check_sums(file: Path) -> None:
    """Compare a file with its checksum, if one lies beside it.

    Raises:
        ValueError: they differ.
    """
    sums = file.parent / SUMS
    if not sums.is_file():
        return
    with sums.open(encoding="utf-8", errors="replace") as content:
        found = re.findall(r"(?m)^([0-9a-fA-F]{64}) [ *](.+)$", content.read(2**20))
    expected = {name: digest.lower() for digest, name in found}.get(file.name)
    if expected is not None and expected != file_sha256(file):
        raise ValueError(
            f"{file}: damaged: its SHA-256 is not that of {SUMS}; if you have put other weights there, delete {sums}"
        )


def with_sum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The header's entries with the checksum of the tensors and of themselves."""
    return {**metadata, KEY: sum_of_tensors(tensors, repr(sorted(metadata.items())))}


def check_tensors_sum(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare what was read from a safetensors file with the checksum in its header, if there is one.

    Raises:
        ValueError: they differ.
    """
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    expected = metadata.pop(KEY, None)
    if expected is not None and with_sum(tensors, metadata)[KEY] != expected:
        raise ValueError(f"{file}: damaged: its SHA-256 is not the one in its header")


def sum_of_tensors(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """A SHA-256 of the names, shapes, dtypes and values of tensors, in hexadecimal.

    Args:
        more: that is to be in it.
    """
    digest = hashlib.sha256(more.encode())
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
