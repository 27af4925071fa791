import numpy as np
import pytest
import torch

from olvae.models.large.padding import crop_to, decode_any, encode_any, pad_to_multiple
from tests.models.test_autoencoder import tiny

SIZES = [(1, 1), (1, 9), (7, 3), (8, 8), (13, 200), (31, 17), (5, 4), (9, 16)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_padding_is_numpys_and_crops_back(size, dtype):
    x = torch.randint(0, 256, (2, 3, *size)).to(dtype)
    padded = pad_to_multiple(x, 8)
    expected = x.numpy()
    for axis in (2, 3):
        pad = -expected.shape[axis] % 8
        widths = [(0, 0)] * axis + [(0, pad)] + [(0, 0)] * (3 - axis)
        expected = np.pad(expected, widths, mode="reflect" if pad < expected.shape[axis] else "edge")
    assert np.array_equal(padded.numpy(), expected)
    assert padded.dtype == dtype
    assert torch.equal(crop_to(padded, size), x)


def test_padding_leaves_what_fits_alone():
    x = torch.rand(1, 3, 8, 16)
    assert pad_to_multiple(x, 8) is x
    assert pad_to_multiple(x[..., :5, :7], 1).shape == (1, 3, 5, 7)


def test_padding_by_hand():
    row = torch.tensor([[1, 2, 3, 4, 5]])
    assert pad_to_multiple(row, 8)[0].tolist() == [1, 2, 3, 4, 5, 4, 3, 2]  # reflected without repeating the 5
    assert pad_to_multiple(row[:, :4], 8)[0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4]  # 4 are too few to reflect 4
    assert pad_to_multiple(row, 8).shape == (8, 8)


@pytest.mark.parametrize("size", SIZES)
def test_any_size_goes_in_and_comes_out(size):
    vae = tiny().eval()
    x = torch.rand(1, 3, *size) * 2 - 1
    posterior, kept = encode_any(vae, x)
    assert kept == size
    assert posterior.mean.shape[-2:] == (-(-size[0] // 8), -(-size[1] // 8))
    y = decode_any(vae, posterior.mode(), kept)
    assert y.shape == x.shape
    expected, _ = vae(pad_to_multiple(x, 8))
    torch.testing.assert_close(y, expected[..., : size[0], : size[1]])
    for choice in ({"tile": 1}, {"memory": 2**20}):
        torch.testing.assert_close(decode_any(vae, posterior.mode(), kept, **choice), y, rtol=0, atol=1e-5)
    within, _ = encode_any(vae, x, memory=1)
    torch.testing.assert_close(within.mean, posterior.mean, rtol=0, atol=1e-4)


def test_multiples_need_no_padding():
    vae = tiny().eval()
    x = torch.rand(1, 3, 16, 24)
    torch.testing.assert_close(encode_any(vae, x)[0].mean, vae.encode(x).mean)


def test_mistakes():
    vae = tiny()
    with pytest.raises(ValueError, match="17x16 pixels has a latent of 3x2, got 2x2"):
        decode_any(vae, torch.zeros(1, 4, 2, 2), (16, 17))
    with pytest.raises(ValueError, match="at least one pixel"):
        pad_to_multiple(torch.zeros(1, 3, 0, 4), 8)
    with pytest.raises(ValueError, match="multiple of 0"):
        pad_to_multiple(torch.zeros(1, 3, 4, 4), 0)
    for size in ((9, 8), (8, 0)):
        with pytest.raises(ValueError, match="can't crop 8x8"):
            crop_to(torch.zeros(1, 3, 8, 8), size)
