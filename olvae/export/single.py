"""An autoencoder as one safetensors file, which is loaded back and compared before it appears."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from olvae.checkpoint import write_tensors
from olvae.files import atomic_write, nearest

__all__ = ["check_file", "export_file"]

SUFFIX = ".safetensors"


def check_file(file: Path, force: bool) -> None:
    """Raise unless ``file`` can be written.

    Raises:
        ValueError: the name does not end with .safetensors.
        FileExistsError: it is a folder, leads through a file, or exists and is not to be replaced.
    """
    if file.is_dir():
        raise FileExistsError(f"{file}: a folder, but this format is one file: name it, as in {file / 'vae'}{SUFFIX}")
    if file.suffix != SUFFIX:
        raise ValueError(f"{file}: this format is one file: its name ends with {SUFFIX}")
    if not (place := nearest(file.absolute().parent)).is_dir():
        raise FileExistsError(f"{file}: {place} is a file")
    if file.exists() and not force:
        raise FileExistsError(f"{file}: exists: --force replaces it")


def export_file(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], compare: Callable[[Path], None]
) -> None:
    """Write a file beside its place, call ``compare``, which raises if it is not as it should be, and move it there.

    Args:
        file: see :func:`check_file`; folders that it lies in are created, and a link stays a link.
        metadata: for the file's header, which has the checksum too.
    """
    place = file.resolve()
    with atomic_write(place, folder=nearest(place.parent)) as partial:
        write_tensors(partial, tensors, metadata)
        compare(partial)
        place.parent.mkdir(parents=True, exist_ok=True)
