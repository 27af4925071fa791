import numpy as np
import pytest

from olvae.data.value_range import measure_range
from tests.data.pixels.files import tiff, tiff_of_pages, values

BANDS = np.moveaxis(values("uint16", 40, (24, 32)), -1, 0)


@pytest.mark.parametrize(
    ("content", "stack"),
    [
        (tiff(BANDS), True),
        (tiff_of_pages(BANDS), True),
        (tiff(BANDS, imagej=True, metadata={"axes": "CYX"}), False),
        (tiff(BANDS, planarconfig="separate"), False),
        (tiff(np.moveaxis(BANDS, 0, -1), planarconfig="contig"), False),
    ],
    ids=["shaped", "pages", "channels", "planes", "interleaved"],
)
def test_pages_that_may_be_a_stack_are_named(content, stack, root):
    (root / "a.tif").write_bytes(content)
    found = measure_range(str(root))
    assert len(found.percentiles) == 40
    assert found.stack == (str(root / "a.tif") if stack else None)
