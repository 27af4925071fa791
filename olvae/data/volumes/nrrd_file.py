"""Read and write NRRD, .nrrd and .nhdr, by pynrrd."""

from pathlib import Path
from typing import Any

import numpy as np

from olvae.config import import_extra
from olvae.data.pixels.size_and_range import Array
from olvae.data.volumes.volume import (
    RealArray,
    Volume,
    check_bytes,
    check_dtype,
    check_shape,
    to_stored,
)
from olvae.files import atomic_write, file_state

# Fields of a header that say where another file's values are.
DETACHED = ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip")
PACKED_ENCODINGS = ("gzip", "gz", "bzip2", "bz2")
READ_ENCODINGS = ("raw", *PACKED_ENCODINGS)
IN_SPACE = ("domain", "space")
SEVERAL = "its values are in several files: save them in one"
# Of a file's values: pynrrd's words, and NumPy's where packed ones end within a value.
WRONG_LENGTH = ("Size of the data", "element size")


class Nrrd(Volume):
    """A volume of a NRRD file; a header's detached values are written into one file with it."""

    suffix = ".nrrd"

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        header = self.header()
        self.shape = check_shape(header["sizes"], "save each volume in a file of its own")
        kinds = [str(kind) for kind in header.get("kinds", ())]
        if not all(kind in IN_SPACE for kind in kinds[: len(header["sizes"])]):
            raise ValueError(f"its axes are {', '.join(kinds)}: expected three in space")
        if header.get("encoding") not in READ_ENCODINGS:
            raise ValueError(f"its encoding is {header.get('encoding')}: save it as raw or gzip")
        values_file = header.get("data file", header.get("datafile"))
        self.values_file = path if values_file is None else path.parent / str(values_file)
        if not self.values_file.is_file():
            raise ValueError(f"its values are in {values_file}, which is no file: save them in one")
        least = np.dtype(np.uint8)  # of bytes a value
        packed = header["encoding"] in PACKED_ENCODINGS
        check_bytes(self.values_file, int(np.prod(self.shape)), least, packed)

        # Steps along the axes and the origin, in millimetres.
        self.affine = np.eye(4)
        steps = header.get("space directions")
        if steps is not None and np.shape(steps) == (3, 3):
            self.affine[:3, :3] = np.asarray(steps, dtype=np.float64).T
            self.affine[:3, 3] = np.asarray(header.get("space origin", (0, 0, 0)), dtype=np.float64)
        elif len(header.get("spacings", ())) == 3:
            self.affine[:3, :3] = np.diag(np.asarray(header["spacings"], dtype=np.float64))
        if not np.isfinite(self.affine).all() or not np.linalg.det(self.affine):
            raise ValueError("its space directions have no inverse: the header is broken")

    def header(self) -> dict[str, Any]:
        nrrd = import_extra("nrrd", "pynrrd", "reading NRRD")
        try:
            found: dict[str, Any] = nrrd.read_header(str(self.path))
        except ValueError as error:
            # A list of files is lines that pynrrd can't part into names and values.
            raise ValueError(SEVERAL if "unpack" in str(error) else str(error)) from error
        for field in ("type", "dimension", "encoding", "sizes"):
            if field not in found:
                raise ValueError(f"its header has no {field}")
        return found

    def state(self) -> str:
        """As of any volume; also of the file beside its header."""
        return "\n".join(map(file_state, dict.fromkeys((self.path, self.values_file))))

    def read(self) -> Array:
        nrrd = import_extra("nrrd", "pynrrd", "reading NRRD")
        try:
            values, _ = nrrd.read(str(self.path))
        except (ValueError, nrrd.NRRDError) as error:
            if not any(words in str(error) for words in WRONG_LENGTH):
                raise
            claimed = f"{int(np.prod(self.shape))} values of type {self.header()['type']}"
            size = self.values_file.stat().st_size
            raise ValueError(
                f"its header claims {claimed}, and {self.values_file.name} has {size} bytes: "
                "it was changed or cut off perhaps: copy it again"
            ) from error
        check_dtype(values.dtype)
        array: Array = values.reshape(self.shape[::-1]).T
        return array

    def write_file(self, values: RealArray, place: Path) -> Path:
        nrrd = import_extra("nrrd", "pynrrd", "writing NRRD")
        stored, header = nrrd.read(str(self.path))
        copy = to_stored(values.T, 1.0, 0.0, stored.dtype).reshape(stored.shape)
        kept = {name: value for name, value in header.items() if name not in DETACHED}
        result = place.with_name(place.name + self.suffix)
        with atomic_write(result) as partial:
            nrrd.write(str(partial), copy, kept)
        return result
