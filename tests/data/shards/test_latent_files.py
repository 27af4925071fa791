"""A latent's files in a shard: what is drawn from them, and what is refused."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.latent_files import (
    LARGEST,
    LATENT_META,
    STATS,
    Latent,
    pixel_bytes,
    read_label,
    read_latent,
    read_stats,
)
from olvae.data.shards.tar_reading import Entry

META = {"key": "a", "width": 20, "height": 10, "image": [16, 8]}
MEAN, STD = torch.arange(12.0).view(3, 2, 2), torch.full((3, 2, 2), 0.5)


def entry(tensors: dict[str, Tensor] | bytes, meta: Any = META, **files: bytes) -> Entry:
    data = tensors if isinstance(tensors, bytes) else save(tensors)
    return Entry("0/a", "0.tar/a", data, {LATENT_META: json.dumps(meta).encode(), **files})


def test_a_draw_is_the_mean_and_the_deviation_times_noise():
    latent = Latent(MEAN.half(), STD.half())
    drawn = latent.draw(torch.Generator().manual_seed(3))
    noise = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(3))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, MEAN + 0.5 * noise)
    assert torch.equal(latent.draw(None), MEAN)  # the mode
    assert torch.equal(Latent(MEAN).draw(torch.Generator()), MEAN)  # it has no other


def test_a_latent_and_the_mirrored_images_are_read_with_what_is_beside_them():
    tensors = {"mean": MEAN, "std": STD, "mean_flip": MEAN + 1, "std_flip": STD + 1}
    latent, flipped, meta = read_latent(entry(tensors))
    assert torch.equal(latent.mean, MEAN)
    assert torch.equal(latent.std, STD)
    assert torch.equal(flipped.mean, MEAN + 1)
    assert torch.equal(flipped.std, STD + 1)
    assert meta == META
    latent, flipped, _ = read_latent(entry({"latent": MEAN.bfloat16()}))
    assert (latent.mean.dtype, latent.std, flipped) == (torch.bfloat16, None, None)


@pytest.mark.parametrize(
    ("tensors", "meta", "why"),
    [
        (b"no safetensors", META, "not a latent of `olvae encode`"),
        ({"mean": MEAN}, META, "std"),
        ({"mean": MEAN, "std": STD[:2]}, META, r"\(2, 2, 2\)"),
        ({"mean": MEAN[0], "std": STD[0]}, META, r"shape \(2, 2\)"),
        ({"latent": torch.zeros(3, 0, 2)}, META, r"\(3, 0, 2\)"),
        ({"latent": MEAN.int()}, META, "int32"),
        ({"latent": MEAN * float("nan")}, META, "latent has values that are not finite"),
        ({"latent": MEAN + 2 * LARGEST}, META, r"above 1e\+06"),
        ({"mean": MEAN, "std": -STD}, META, "std has negative values"),
        ({"latent": MEAN, "latent_flip": MEAN / 0}, META, "latent_flip has values"),
        ({"latent": MEAN}, {**META, "image": [16, 0]}, "16x0 pixels"),
        ({"latent": MEAN}, {**META, "image": [16]}, "not enough values"),
        ({"latent": MEAN}, {**META, "image": ["a", 1]}, "invalid literal"),
        ({"latent": MEAN}, {"image": [16, 8]}, "key"),
        ({"latent": MEAN}, [], "indices"),
    ],
)
def test_files_that_encode_did_not_write_are_refused(tensors, meta, why):
    with pytest.raises(UnreadableImageError, match=why) as raised:
        read_latent(entry(tensors, meta))
    assert raised.value.name == "0.tar/a"


def test_the_largest_latents_are_read():
    latent, _, _ = read_latent(entry({"latent": torch.full((1, 1, 1), -LARGEST)}))
    assert latent.mean.item() == -LARGEST


STATS_CONTENT = {
    "count": 9,
    "downscale": 8,
    "channels": 3,
    "size": 16,
    "latent_shape": [2, 4, 4],
    "shift_factor": 0.5,
    "scaling_factor": 2,
    "latents_mean": [0, -1],
    "latents_std": [1, 0],
    "means_std": [1, 0.5],
}


def described(folder: Path, **change: Any) -> dict[str, Any]:
    (folder / STATS).write_text(json.dumps({**STATS_CONTENT, **change}))
    return read_stats(folder)


def test_a_description_of_latents_has_numbers_of_their_kinds(tmp_path):
    """As JSON has no kinds, and others may have written it."""
    found = described(tmp_path, count=9.0, size=[16, 16], more="kept")
    assert found == {**STATS_CONTENT, "more": "kept"}
    assert type(found["count"]) is int
    assert [type(number) for number in found["latents_std"]] == [float, float]
    assert type(found["scaling_factor"]) is float
    oblong = described(tmp_path, size=[16, 24], latent_shape=[2.0, 2, 3])
    assert (oblong["size"], oblong["latent_shape"]) == ([16, 24], [2, 2, 3])
    native = described(tmp_path, size=0, latent_shape=None)
    assert (native["size"], native["latent_shape"]) == (0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": math.nan}, "scaling_factor: .*nan"),
        ({"scaling_factor": math.inf}, "scaling_factor: .*inf"),
        ({"scaling_factor": 0}, r"scaling_factor: .*0\.0"),
        ({"scaling_factor": -2.0}, r"scaling_factor: .*-2\.0"),
        ({"shift_factor": math.nan}, "shift_factor: .*nan"),
        ({"latents_mean": [0.5]}, "latents_mean: expected 2 numbers"),
        ({"latents_mean": [0.5, math.nan]}, "latents_mean: .*finite"),
        ({"latents_std": [1.0, math.nan]}, "latents_std: .*finite"),
        ({"latents_std": [1.0, -1.0]}, "latents_std: .*negative"),
        ({"means_std": [1.0]}, "means_std: expected 2 numbers"),
        ({"means_std": [-1e-9, 1.0]}, "means_std: .*negative"),
        ({"latent_shape": [3, 4, 4]}, "latents_mean: expected 3 numbers"),
        ({"latent_shape": None, "means_std": [1, 1, 1]}, "means_std: expected 2 numbers"),
        ({"size": -8}, "size must be at least 1"),
        ({"downscale": None}, "TypeError"),
    ],
)
def test_numbers_that_no_latents_have(tmp_path, change, message):
    """Of a description that was received: it is refused by the number's name."""
    with pytest.raises(ValueError, match=rf"stats\.json: not a description .*{message}"):
        described(tmp_path, **change)


@pytest.mark.parametrize("name", STATS_CONTENT)
def test_a_description_of_latents_without_a_number_is_refused_by_its_name(tmp_path, name):
    content = {**STATS_CONTENT}
    del content[name]
    (tmp_path / STATS).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"stats\.json: .*KeyError\('{name}'\)"):
        read_stats(tmp_path)


def test_latents_without_a_description_are_not_complete(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no stats\.json"):
        read_stats(tmp_path)


def test_a_label_is_a_number_or_none():
    assert read_label(entry({"latent": MEAN})) is None
    assert read_label(entry({"latent": MEAN}, cls=b"17\n")) == 17
    with pytest.raises(UnreadableImageError, match=r"\.cls"):
        read_label(entry({"latent": MEAN}, cls=b"cat"))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pixels_come_back_from_their_png_bit_for_bit(channels, mode):
    """Pillow reads it as a picture of that many channels; transparency is a channel like others."""
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), dtype=np.uint8)
    picture = Image.open(io.BytesIO(pixel_bytes(torch.from_numpy(pixels))))
    assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (7, 5))
    np.testing.assert_array_equal(
        np.asarray(picture).reshape(5, 7, channels), pixels.transpose(1, 2, 0)
    )
