import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.pixels.size_and_range import PixelRange
from olvae.evaluation.baselines import Bicubic
from olvae.evaluation.round_trip import RoundTrip

KEYS = [f"image{i}" for i in range(7)]


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)


def test_bicubic_is_pillows(images):
    reconstruction = RoundTrip(Bicubic(8))(KEYS, images).images
    for x, y in zip(images, reconstruction, strict=True):
        picture = Image.fromarray(x.permute(1, 2, 0).numpy())
        small = picture.resize((4, 4), Image.Resampling.BICUBIC)
        back = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(back, y.permute(1, 2, 0).numpy())


def test_bicubic_keeps_the_sides_of_oblongs_and_rounds_eight_bits_alone():
    x = torch.randint(0, 256, (3, 16, 32), dtype=torch.uint8)
    picture = Image.fromarray(x.permute(1, 2, 0).numpy())
    back = picture.resize((4, 2), Image.Resampling.BICUBIC).resize(
        (32, 16), Image.Resampling.BICUBIC
    )
    y = ((Bicubic(8)(x[None] / 127.5 - 1)[0][0] + 1) * 127.5).round()
    assert np.array_equal(np.asarray(back), y.permute(1, 2, 0).numpy())
    deep = torch.rand(1, 2, 16, 16) * 2 - 1
    torch.testing.assert_close(Bicubic(1, 2, PixelRange.from_node([0, 65535]))(deep)[0], deep)
