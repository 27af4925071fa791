from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.image import (
    FILTERS,
    RESIZES,
    EvalTransform,
    MultiBand,
    Photo,
    RandomScaleCrop,
    array_to_picture,
    image_to_tensor,
    resize_shorter_side,
)
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides
from tests.data.images import picture, saved


def gradient(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(
        np.stack((columns, rows, np.zeros_like(rows)), axis=-1).round().astype(np.uint8)
    )


def spans(crop: Image.Image) -> tuple[float, float]:
    """The fraction of width and height that a crop of a gradient covers, except border pixels."""
    array = np.asarray(crop).astype(float)
    return np.ptp(array[..., 0]) / 255, np.ptp(array[..., 1]) / 255


def test_eval_transform_is_pillows_bicubic_and_crop():
    image = Image.effect_noise((90, 61), 80).convert("RGB")
    expected = image.resize((47, 32), Image.Resampling.BICUBIC).crop((7, 0, 39, 32))
    assert np.array_equal(np.asarray(EvalTransform(32)(image)), np.asarray(expected))


def test_eval_transform_covers_oblongs_and_crops():
    image = Image.effect_noise((90, 61), 80).convert("RGB")
    expected = image.resize((59, 40), Image.Resampling.BICUBIC).crop((21, 0, 37, 40))
    assert np.array_equal(np.asarray(EvalTransform([40, 16])(image)), np.asarray(expected))
    expected = image.resize((45, 30), Image.Resampling.BOX).resize(
        (45, 30), Image.Resampling.BICUBIC
    )
    assert np.array_equal(
        np.asarray(EvalTransform([10, 45], "adm")(image)),
        np.asarray(expected.crop((0, 10, 45, 20))),
    )
    # Halved while at least twice too large in both: 64 x 48 twice for 16 x 12, once for 17 or 13.
    image = image.resize((64, 48))
    for sides, halves in (([12, 16], 2), ([12, 17], 1), ([13, 16], 1), ([12, 33], 0)):
        half = image
        for _ in range(halves):
            half = half.resize((half.width // 2, half.height // 2), Image.Resampling.BOX)
        wanted = EvalTransform(sides)(half)
        assert np.array_equal(np.asarray(EvalTransform(sides, "adm")(image)), np.asarray(wanted))
    image = image.resize((90, 61))
    assert EvalTransform([80, 16]).enlarges(image)
    assert EvalTransform([61, 91]).enlarges(image)
    assert not EvalTransform([61, 90]).enlarges(image)
    assert [EvalTransform(size).describe() for size in ([8, 9], 8)] == [
        "bicubic antialiased resize of both sides until they cover it (Pillow), centre crop",
        "bicubic antialiased resize of the shorter side (Pillow), centre crop",
    ]
    for wrong in ({"resize": "longer side"}, {"resample": "cubic"}):
        with pytest.raises(ValueError, match="resize must be one of shorter side, adm"):
            EvalTransform(8, **wrong)


@pytest.mark.parametrize("seed", range(5))
def test_oblong_crops_keep_proportions_and_reach_every_part(seed):
    """They keep proportions, reach every part, and cut whole pixels where nothing is resized."""
    rng = np.random.default_rng(seed)
    width, height = spans(RandomScaleCrop([20, 60], min_fraction=0.5)(gradient(400, 300), rng))
    assert 0.5 - 0.04 < width <= 1
    assert width * 400 * 60 / 59 == pytest.approx(height * 300 * 20 / 19 * 3, abs=8)
    for size, sides in (
        ([20, 60], (300, 20)),
        ([56, 72], (72, 100)),  # 72 / (72 / 56) is not quite 56
    ):
        whole = Image.effect_noise(sides, 80)
        crop = np.asarray(RandomScaleCrop(size, min_fraction=0.1, flip=False)(whole, rng))
        places = np.lib.stride_tricks.sliding_window_view(np.asarray(whole), size)
        assert (crop == places).all((2, 3)).any()


@pytest.mark.parametrize("seed", range(6))
def test_a_crop_is_the_window_that_its_random_numbers_say(seed):
    """Drawn in this order: height, left, top, filter, mirror image."""
    image = Image.effect_noise((90, 61), 80).convert("RGB")
    crop = RandomScaleCrop([20, 30], 0.25, ("box", "lanczos"))(image, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    # 60 x 90 at most, 20 x 30 at least.
    high = 20 + rng.random() * (60 - 20)
    left = rng.random() * (90 - high * 1.5)
    top = rng.random() * (61 - high)
    resample = FILTERS[("box", "lanczos")[rng.integers(2)]]
    box = (left, top, left + high * 1.5, top + high)
    wanted = image.resize((30, 20), resample, box=box)
    if rng.random() < 0.5:
        wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(np.asarray(crop).astype(int) - np.asarray(wanted)).max() <= 1


def test_a_window_of_nearly_the_results_size_is_resized():
    image = Image.effect_noise((21, 21), 80)
    crop = RandomScaleCrop(20, 1.0, ["box"], flip=False)(image, np.random.default_rng(0))
    assert crop == image.resize((20, 20), Image.Resampling.BOX)


def test_a_jpeg_is_decoded_at_a_fraction_where_twice_the_result_is_left(monkeypatch):
    asked = []

    def read(photo: Photo, *args: object) -> Image.Image:
        asked.append(args)
        return gradient(*photo.size)

    monkeypatch.setattr(Photo, "read", read)
    for filters in (["box"], ["nearest"]):
        for side in (63, 64, 127, 128, 255, 256, 600):
            photo = Photo(Image.new("L", (side, side)), "it")
            RandomScaleCrop(16, 1.0, filters)(photo, np.random.default_rng(0))
    fractions = [1, 2, 2, 4, 4, 8, 8]
    assert asked == [(n, masks) for masks in (False, True) for n in fractions]


def test_nearest_transforms_keep_the_values_of_masks():
    mask = Image.fromarray(np.random.default_rng(0).choice([3, 90, 200], (50, 70)).astype(np.uint8))
    transform = RandomScaleCrop(16, min_fraction=0.9, filters=["nearest"])
    assert transform.evaluation == EvalTransform(16, resample="nearest")
    assert RandomScaleCrop(16).evaluation == EvalTransform(16)
    evaluated = [replace(transform.evaluation, resize=resize) for resize in RESIZES]
    for cropped in (transform(mask, np.random.default_rng(1)), *(one(mask) for one in evaluated)):
        assert {value for _, value in cropped.getcolors()} == {3, 90, 200}
    for one in evaluated:
        assert one.describe() == "nearest resize of the shorter side (Pillow), centre crop"


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (64, 64), (10, 300), (1, 1)])
def test_transforms_give_their_size_from_any_picture(size):
    image = gradient(*size)
    assert min(resize_shorter_side(image, 32).size) == 32
    assert EvalTransform(32)(image).size == (32, 32)
    assert RandomScaleCrop(32)(image, np.random.default_rng(0)).size == (32, 32)


def test_random_scale_crop_covers_the_range_of_fractions():
    image = gradient(400, 400)
    crop = RandomScaleCrop(16, min_fraction=0.25)
    covered = [spans(crop(image, np.random.default_rng(i)))[0] for i in range(300)]
    assert 0.2 < min(covered) < 0.3
    assert 0.9 < max(covered) <= 1.0
    assert 0.5 < np.mean(covered) < 0.66


def test_random_scale_crop_enlarges_nothing_where_the_picture_allows():
    crop = RandomScaleCrop(32, min_fraction=0.1, flip=False)
    image = gradient(40, 40)
    assert all(spans(crop(image, np.random.default_rng(i)))[0] > 31 / 40 - 0.05 for i in range(50))


def test_random_scale_crop_flips_half():
    crop = RandomScaleCrop(16, min_fraction=1.0)
    image = gradient(64, 64)
    rising = [np.asarray(crop(image, np.random.default_rng(i)))[0, :, 0] for i in range(200)]
    assert 70 < sum(row[0] > row[-1] for row in rising) < 130
    never = RandomScaleCrop(16, min_fraction=1.0, flip=False)
    assert all(np.asarray(never(image, np.random.default_rng(i)))[0, 0, 0] < 30 for i in range(20))


def test_shuffle_channels_changes_their_places():
    image = Image.new("RGB", (32, 32), (10, 20, 30))
    crop = RandomScaleCrop(16, shuffle_channels=1.0)

    def pixel(transform: RandomScaleCrop, seed: int) -> tuple[int, ...]:
        return tuple(
            image_to_tensor(transform(image, np.random.default_rng(seed)))[:, 0, 0].tolist()
        )

    seen = {pixel(crop, i) for i in range(100)}
    assert seen == set(permutations((10, 20, 30)))
    half = RandomScaleCrop(16, shuffle_channels=0.5)
    kept = sum(pixel(half, i) == (10, 20, 30) for i in range(300))
    assert 140 < kept < 210  # a half, and a sixth of the other half
    deep = array_to_picture(np.full((32, 32, 3), (1000, 2000, 3000), dtype=np.uint16))
    values = image_to_tensor(crop(deep, np.random.default_rng(0)))
    assert (str(values.dtype), sorted(values[:, 0, 0].tolist())) == (
        "torch.uint16",
        [1000, 2000, 3000],
    )


def test_multi_bands_are_transformed_as_a_picture_is():
    image = Image.effect_noise((90, 61), 80).convert("RGB")
    bands = MultiBand(image.split())
    for transform in (
        EvalTransform(32),
        lambda p: RandomScaleCrop(32)(p, np.random.default_rng(1)),
    ):
        assert torch.equal(image_to_tensor(transform(bands)), image_to_tensor(transform(image)))


def test_random_scale_crop_uses_every_filter():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    crop = RandomScaleCrop(16, min_fraction=1.0, filters=("box", "lanczos"), flip=False)
    seen = {np.asarray(crop(image, np.random.default_rng(i))).tobytes() for i in range(30)}
    expected = {
        np.asarray(image.resize((16, 16), FILTERS[name])).tobytes() for name in ("box", "lanczos")
    }
    assert seen == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_fraction": 0.0}, "min_fraction"),
        ({"min_fraction": 1.5}, "min_fraction"),
        ({"filters": ("cubic",)}, "bicubic"),
        ({"filters": ()}, "some of"),
        ({"shuffle_channels": 2.0}, "shuffle_channels"),
        ({"shuffle_channels": -0.1}, "shuffle_channels"),
        ({"filters": ("box", "cubic")}, "bicubic"),
        ({"augment": {"turn": True}}, "augment: turn: its settings are turns, flip_vertical, int"),
        ({"augment": {"turns": True}, "size": [8, 16]}, "augment.turns: `size` is 8x16, and only"),
        ({"augment": {"intensity_scale": 1.0}}, "intensity_scale must be at least 0 and below 1"),
        ({"augment": {"intensity_shift": -0.1}}, "intensity_shift must be at least 0 and below 1"),
        ({"augment": {"intensity_shift": 0.1}, "filters": ["nearest"]}, "values of masks"),
    ],
)
def test_random_scale_crop_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomScaleCrop(**{"size": 16, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_fraction": 1.0},
        {"shuffle_channels": 1.0},
        {"filters": tuple(FILTERS)},
        {"augment": {"turns": False}, "size": [8, 16]},
        {"augment": {"intensity_scale": 0.0, "intensity_shift": 0.99}},
        {"augment": {"intensity_scale": 0, "turns": True}, "filters": ["nearest"]},
    ],
)
def test_random_scale_crop_takes_the_ends_of_its_settings(arguments):
    transform = RandomScaleCrop(**{"size": 16, **arguments})
    crop = transform(gradient(40, 30), np.random.default_rng(0))
    assert crop.size == tuple(reversed(Sides.of(transform.size)))


def test_random_crops_are_from_all_sides_as_often():
    crop = RandomScaleCrop(16, min_fraction=0.25, flip=False)
    crops = [
        np.asarray(crop(gradient(400, 300), np.random.default_rng(i)), dtype=float) / 255
        for i in range(300)
    ]
    for channel in (0, 1):
        first, last = (np.array([end(c[..., channel]) for c in crops]) for end in (np.min, np.max))
        assert first.max() > 0.6
        assert last.min() < 0.4
        assert abs(np.mean(first + last) - 1.0) < 0.06


def test_sixteen_bits_do_not_wrap_where_a_filter_overshoots():
    edge = np.repeat(np.array([0, 65535], dtype=np.uint16), 20)[None, :, None].repeat(40, 0)
    crop = RandomScaleCrop(30, min_fraction=1.0, filters=["lanczos"], flip=False)
    values = image_to_tensor(crop(array_to_picture(edge), np.random.default_rng(0))).int()[0]
    assert values[:, :12].max() < 20000
    assert values[:, -12:].min() > 45000


@pytest.mark.parametrize("seed", range(3))
def test_a_jpeg_that_is_decoded_at_a_fraction_gives_nearly_the_same_crop(seed):
    """Within 1 of 255 on average for a smooth picture; exact where the crop needs every pixel."""
    content, crop = saved(picture(seed, (900, 701)), "JPEG", quality=95), RandomScaleCrop(64)
    photo, whole = Photo(content, "a.jpg"), Photo(content, "a.jpg").read()
    a, b = (np.asarray(crop(p, np.random.default_rng(seed)), dtype=float) for p in (photo, whole))
    assert 0 < np.abs(a - b).mean() < 1
    photo = Photo(content, "a.jpg")
    a, b = (RandomScaleCrop(300)(p, np.random.default_rng(seed)) for p in (photo, whole))
    assert a == b


def test_turns_and_flips_give_all_eight_views_of_the_same_crop():
    """The window and the mirror image are the ones without ``augment``, drawn before."""
    image = gradient(64, 48)
    plain = RandomScaleCrop(16)
    turned = RandomScaleCrop(16, augment={"turns": True, "flip_vertical": True})
    found = Counter()
    for seed in range(200):
        crop = image_to_tensor(plain(image, np.random.default_rng(seed)))
        views = {}
        for flipped in (False, True):
            for turns in range(4):
                view = crop.flip(1) if flipped else crop
                views[flipped, turns] = torch.rot90(view, turns, (1, 2))
        view = image_to_tensor(turned(image, np.random.default_rng(seed)))
        (which,) = (name for name, tensor in views.items() if torch.equal(tensor, view))
        found[which] += 1
    assert len(found) == 8
    assert min(found.values()) > 10


CHANGED = {"intensity_scale": 0.3, "intensity_shift": 0.2}


@pytest.mark.parametrize(
    ("array", "values", "low", "high"),
    [
        (np.arange(768, dtype=np.uint8).reshape(16, 16, 3), None, 0, 255),
        (np.arange(768, dtype=np.uint16).reshape(16, 16, 3) * 80, [0, 50000], 0, 50000),
        (
            np.linspace(-1000, 2000, 512, dtype=np.float32).reshape(16, 16, 2),
            [[-1000, 2000], [-500, 3000]],
            np.array([-1000, -500])[:, None, None],
            np.array([2000, 3000])[:, None, None],
        ),
    ],
    ids=["uint8", "uint16", "float32"],
)
@pytest.mark.parametrize(
    "changed", [CHANGED, *({name: value} for name, value in CHANGED.items())], ids=str
)
def test_intensity_is_scaled_and_shifted_in_the_range(array, values, low, high, changed):
    """By hand in float64, with the numbers that come next from the same generator."""
    pixel_range = replace(PixelRange.from_node(values), outside="clip")
    if values is None:
        pixel_range = EIGHT_BITS
    photo = Photo(array_to_picture(array), "it", array.shape[2], pixel_range)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        crop = image_to_tensor(RandomScaleCrop(12)(photo, rng))
        scale, shift = (changed.get(f"intensity_{name}", 0.0) for name in ("scale", "shift"))
        gain, moved = 1 + scale * rng.uniform(-1, 1), shift * rng.uniform(-1, 1)
        expected = crop.double().numpy() * gain + moved * (high - low)
        found = image_to_tensor(
            RandomScaleCrop(12, augment=changed)(photo, np.random.default_rng(seed))
        )
        assert found.dtype == crop.dtype
        least = 0.01 if found.dtype == torch.float32 else 0.51 + 0.5 * gain
        assert np.abs(found.double().numpy() - expected.clip(low, high)).max() < least


def test_alpha_keeps_its_values():
    image = gradient(16, 16)
    image.putalpha(Image.linear_gradient("L").resize((16, 16)))
    before, after = (
        image_to_tensor(RandomScaleCrop(16, 1.0, augment=augment)(image, np.random.default_rng(3)))
        for augment in (None, CHANGED)
    )
    assert torch.equal(before[3], after[3])
    assert not torch.equal(before[:3], after[:3])
