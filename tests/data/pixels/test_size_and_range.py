"""Sizes from configs and commands, and back; the range against formulas in float64.

What both refuse.
"""

import json
import math

import numpy as np
import pytest
import torch

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import (
    EIGHT_BITS,
    PixelRange,
    Sides,
    TooManyPixelsError,
    check_size,
    nearest_float32,
    to_uint8,
)


def logc3(v: np.ndarray) -> np.ndarray:
    """ARRI's formula for exposure index 800, in float64."""
    curve = 0.247190 * np.log10(5.555556 * np.maximum(v, 0) + 0.052272) + 0.385537
    return np.where(v > 0.010591, curve, 5.367655 * v + 0.092809)


def pq(v: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084's formula, as it stands there, in float64."""
    power = (v / 10000) ** (2610 / 4096 / 4)
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    return ((c1 + c2 * power) / (1 + c3 * power)) ** (2523 / 4096 * 128)


CURVES = {"linear": lambda v: v, "log": np.log, "log1p": np.log1p, "logc3": logc3, "pq": pq}
RANGES = [
    {"pairs": [0, 65535]},
    {"pairs": [[0, 11517], [-5, 5.5]]},
    {"pairs": [0.1, 80], "values": "log"},
    {"pairs": [[0, 9000], [-0.5, 12]], "values": "log1p"},
    {"pairs": [[0, 55], [-0.01, 4]], "values": "logc3"},
    {"pairs": [[0, 10000], [0.005, 1000]], "values": "pq"},
]


@pytest.mark.parametrize("node", RANGES, ids=json.dumps)
def test_pixel_range_normalises_and_restores_as_in_float64(node):
    stated = PixelRange.from_node(node)
    pairs = np.broadcast_to(np.array(node["pairs"], dtype=float), (2, 2))
    curve = CURVES[node.get("values", "linear")]
    fractions = np.random.default_rng(0).random((2, 30, 20))
    low, high = (end[:, None, None] for end in pairs.T)
    x = (low + fractions * (high - low)).astype(np.float32)
    unit = stated.normalise(torch.from_numpy(x)[None])[0]
    expected = 2 * (curve(x.astype(float)) - curve(low)) / (curve(high) - curve(low)) - 1
    np.testing.assert_allclose(unit, expected, atol=2e-6)
    np.testing.assert_allclose(
        stated.restore(unit[None])[0], x, rtol=4e-6, atol=2e-6 * np.ptp(pairs)
    )
    np.testing.assert_allclose(
        stated.real(stated.levels(torch.from_numpy(x)[None]))[0], x, rtol=9e-6, atol=2e-2
    )
    ends = torch.tensor([-7.0, 7.0]).expand(1, 2, 1, 2)
    np.testing.assert_allclose(stated.restore(ends)[0, :, 0], pairs, rtol=5e-7, atol=1e-8)
    assert PixelRange.from_node(json.loads(json.dumps(stated.as_node()))) == stated


@pytest.mark.parametrize(
    ("curve", "high", "known"),
    [
        # ARRI: middle grey is 400 of 1023. ITU-R BT.2390 and BT.2408: PQ of 100 and 1000 cd/m2.
        ("logc3", 55.0796, {0.0: 0.0928, 0.18: 0.3910, 55.0796: 1.0}),
        ("pq", 10000.0, {0.0: 7.3e-7, 100.0: 0.5081, 203.0: 0.5807, 1000.0: 0.7518, 10000.0: 1.0}),
    ],
)
def test_hdr_curves_have_their_standards_values_and_keep_the_dark(curve, high, known):
    stated = PixelRange.from_node({"pairs": [0, high], "values": curve})
    low = CURVES[curve](np.zeros(1))
    for value, signal in known.items():
        unit = stated.normalise(torch.full((1, 1, 1, 1), value))
        found = low + (float(unit) + 1) / 2 * (CURVES[curve](np.array([high])) - low)
        np.testing.assert_allclose(found, signal, atol=6e-5)
    dark = torch.logspace(-4, math.log10(high), 500).view(1, 1, 20, 25)
    back = stated.restore(stated.normalise(dark))
    np.testing.assert_allclose(back, dark, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(back[dark > 0.01], dark[dark > 0.01], rtol=1e-4)
    assert float(stated.restore(stated.normalise(torch.zeros(1, 1, 1, 1)))) < 1e-9


def test_a_range_of_sixteen_bits_loses_less_than_half_a_step():
    ramp = torch.arange(65536).reshape(1, 1, 256, 256).to(torch.uint16)
    stated = PixelRange.from_node([0, 65535])
    for back in (stated.restore(stated.normalise(ramp)), stated.real(stated.levels(ramp))):
        assert (back.double() - ramp.double()).abs().max() < 0.02


def test_eight_bits_are_normalised_as_ever():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(EIGHT_BITS.normalise(x), x.float() / 127.5 - 1)
    for same in (
        EIGHT_BITS.restore(EIGHT_BITS.normalise(x)),
        EIGHT_BITS.levels(x),
        EIGHT_BITS.picture(x),
    ):
        assert same.dtype == torch.uint8
        assert torch.equal(same, x)
    assert PixelRange.from_node(None) is EIGHT_BITS
    assert EIGHT_BITS.as_node() is None


def test_pictures_of_a_range_are_by_its_shown_channels_and_stretch():
    stated = PixelRange.from_node({"pairs": [0, 100], "shown": [2, 1, 0], "stretch": [0.2, 0.6]})
    x = torch.tensor([10.0, 40.0, 70.0, 99.0])[None, :, None, None]
    assert stated.picture(stated.levels(x)).flatten().tolist() == [255, 127, 0]
    levels = np.linspace(0.1, 254.9, 999)
    wanted = ((levels - 51) * 2.5).clip(0, 255)
    found = stated.picture(torch.from_numpy(levels).float().expand(3, 1, -1))[0, 0]
    assert np.abs(found.double().numpy() - wanted).max() < 0.501


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"pairs": [0, 10]},
            "12 at row 1, column 2, channel 0, .* and 2 in all: outside the range, 0 to 10",
        ),
        ({"pairs": [0, 100], "nodata": 12}, "12 at row 1, column 2, channel 0.*: no data"),
        ({"pairs": [0, 100]}, "nan at row 2, column 0, channel 1.*: not a number"),
    ],
)
def test_pixel_range_names_the_place_of_what_has_no_value(node, message):
    array = np.ones((3, 4, 2), dtype=np.float32)
    array[1, 2, 0] = 12
    array[2, 0, 1] = math.nan if "nan" in message else 50
    with pytest.raises(ValueError, match=message):
        PixelRange.from_node(node).checked(array)


def test_a_files_own_missing_value_and_clipping():
    array = np.array([[[-9999], [3], [700]]], dtype=np.int16)
    stated = PixelRange.from_node({"pairs": [0, 500], "outside": "clip"})
    assert stated.checked(array).flatten().tolist() == [0, 3, 500]
    with pytest.raises(ValueError, match="-9999 at row 0"):
        stated.checked(array, nodata=-9999.0)
    assert stated.checked(array.astype(np.uint16), nodata=-9999.0)[0, 1] == 3  # no value of uint16
    with pytest.raises(ValueError, match="8 bits"):
        stated.checked(array.astype(np.uint8))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ([1, 0], "the first below the second"),
        ([0, math.inf], "finite"),
        ([16777216, 16777217], "the first below the second"),  # one number in float32
        ([-3e38, 3e38], "finite distance in float32"),
        ([0, 1e39], "finite"),
        ({"pairs": [1e-46, 1], "values": "log"}, "above 0 for log"),
        ("0 to 5", "expected a pair"),
        ({"values": "log"}, "expected a pair"),
        ({"pairs": [0, 5], "curve": "log"}, "expected a pair"),
        ({"pairs": [0, 5], "values": "log"}, "above 0 for log"),
        (
            {"pairs": [0, 10001], "values": "pq"},
            r"pq takes luminances of 0 to 10000 cd/m2, got \[\[0",
        ),
        ({"pairs": [-1, 100], "values": "pq"}, "pq takes luminances of 0 to 10000"),
        ({"pairs": [0, 5], "values": "lgo"}, "values is linear, log, log1p, logc3 or pq"),
        ({"pairs": [0, 5], "shown": [0, 1]}, "one or three channels"),
        ({"pairs": [0, 5], "shown": [-1]}, "one or three channels"),
        ({"pairs": [0, 5], "stretch": [0.5, 0.2]}, "two fractions"),
        ({"pairs": [0, 5], "stretch": [0.5, 0.5]}, "two fractions"),
        ({"pairs": [0, 5], "stretch": [0, 1.5]}, "two fractions"),
        ({"pairs": [0, 5], "stretch": [-0.5, 1]}, "two fractions"),
        ({"pairs": [0, 5], "stretch": [0, 0.5, 1]}, "two fractions"),
        ({"pairs": [0, 1e-39]}, "finite distance in float32"),
        ({"pairs": [-1, 5], "values": "log1p"}, "above -1 for log1p"),
        ({"pairs": [0, 255], "eight_bits": True}, "values is linear"),
        ({"pairs": [0, 5], "stretch": 3}, "expected a pair"),
        ({"pairs": [0, 5], "stretch": ["a", "b"]}, "shown, stretch and nodata are numbers"),
        ({"pairs": [0, 5], "shown": ["a"]}, "shown, stretch and nodata are numbers"),
        ({"pairs": [0, 5], "nodata": "abc"}, "shown, stretch and nodata are numbers"),
        ({"pairs": [0, 5], "nodata": 10**400}, "shown, stretch and nodata are numbers"),
        ({"pairs": [0, 10**400]}, "expected a pair"),
        ({"pairs": [0, 5], "values": ["linear"]}, "values is linear, log, log1p, logc3 or pq"),
        ({"pairs": [0, 5], "outside": ["clip"]}, "outside clip or error"),
    ],
)
def test_mistakes_in_a_range_are_one_line(node, message):
    with pytest.raises(ConfigError, match=rf"data.params.range: .*{message}") as error:
        PixelRange.from_node(node)
    assert len(error.value.mistakes) == 1


@pytest.mark.parametrize("high", [8e-39, 1.0, 1e38])
def test_ends_may_be_as_near_and_far_as_float32_divides(high):
    ends = torch.tensor([-7.0, 0.0, high, 7.0 * high])
    found = PixelRange.from_node([0, high]).normalise(ends.view(4, 1, 1))
    assert found.flatten().tolist() == [-1, -1, 1, 1]
    assert PixelRange.from_node([-1, 1]).low == (-1,)


def test_rounding_does_not_lead_out_of_the_range():
    for high in range(1, 200):
        ends = torch.tensor([0.0, high]).view(2, 1, 1)
        lowest, highest = PixelRange.from_node([0, high]).normalise(ends).flatten().tolist()
        assert lowest == -1
        assert 1 - 2e-7 < highest <= 1


def test_ranges_fit_the_channels():
    with pytest.raises(ConfigError, match=r"2 pairs .*3 channels"):
        PixelRange.from_node([[0, 1], [0, 2]]).check_channels(3)
    with pytest.raises(ConfigError, match=r"shown: \[3, 2, 1\]"):
        PixelRange.from_node({"pairs": [0, 1], "shown": [3, 2, 1]}).check_channels(3)
    PixelRange.from_node({"pairs": [0, 1], "shown": [2, 1, 0]}).check_channels(3)
    PixelRange.from_node([[0, 1], [0, 2]]).check_channels(2)


def test_ends_are_of_one_pair_or_of_each_channels():
    several = PixelRange.from_node([[0, 1], [-3, 0.1], [0, 1]])
    assert several.ends_of(0) == (0, 1)
    assert several.ends_of(1) == (-3, np.float32(0.1))
    assert PixelRange.from_node([2, 4]).ends_of(2) == (2, 4)
    assert PixelRange.from_node([[0, 1], [-3, 4]]).ends_of(1) == (-3, 4)
    assert str(several) == "0 to 1, -3 to 0.1, linear"
    assert str(EIGHT_BITS) == "8 bits, 0 to 255"


def test_values_at_the_ends_are_inside():
    stated = PixelRange.from_node([-2, 5])
    ends = np.array([[[-2], [5]]], dtype=np.float64)
    found = stated.checked(ends)
    assert (found.dtype, found.tolist()) == (np.float32, ends.tolist())
    for outside in (-2.1, 5.1):
        with pytest.raises(ValueError, match="outside the range"):
            stated.checked(np.full((1, 1, 1), outside))


def test_what_leaves_the_range_becomes_its_ends_in_8_bits():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    stated = PixelRange.from_node([0, 10])
    assert stated.to_levels(torch.tensor([-2.0, -1.0, 0.5, 2.0])).tolist() == [0, 0, 191.25, 255]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_pictures_show_three_channels_at_most_unless_they_have_8_bits(channels):
    levels = 10.0 * torch.arange(channels).view(channels, 1, 1)
    shown = PixelRange.from_node([0, 1]).picture(levels)
    assert shown.flatten().tolist() == [0, 10, 20][:channels]
    eight = levels.to(torch.uint8)
    assert torch.equal(EIGHT_BITS.picture(eight), eight)


def test_a_missing_value_is_compared_in_float32():
    largest = np.finfo(np.float32).max
    assert [nearest_float32(value) for value in (0.1, 1e39, -1e39)] == [
        np.float32(0.1),
        largest,
        -largest,
    ]
    assert np.isnan(nearest_float32(math.nan))


@pytest.mark.parametrize("size", [(12_800, 12_500), (100, 1), (1, 100), (1, 1)])
def test_pictures_of_160_million_pixels_and_of_1_to_100_are_read(size):
    check_size(*size)


def test_a_picture_is_refused_by_its_pixels_or_by_its_longer_side():
    with pytest.raises(TooManyPixelsError, match=r"12501x12800 .*160 million"):
        check_size(12_501, 12_800)
    for size in ((101, 1), (2, 201)):
        with pytest.raises(ValueError, match="100 times") as raised:
            check_size(*size, most=math.inf)
        assert type(raised.value) is ValueError
    check_size(12_501, 12_800, most=math.inf)
    with pytest.raises(TooManyPixelsError):
        check_size(4, 4, most=15)


def test_sides_of_squares_are_one_number_and_others_two():
    assert Sides.of(64) == Sides.of([64, 64]) == Sides.read("64") == (64, 64)
    assert Sides.of([80, 256]) == Sides.read("80x256") == (80, 256)
    assert [(s.node, s.short, str(s)) for s in (Sides(64, 64), Sides(80, 256))] == [
        (64, "64", "64x64"),
        ([80, 256], "80x256", "80x256"),
    ]


def test_sides_are_cropped_to_multiples():
    assert Sides(80, 256).fits(16)
    assert not Sides(80, 250).fits(16)
    assert not Sides(90, 256).fits(16)
    assert Sides(90, 250).multiples(16) == ((80, 240), (96, 256))
    assert Sides(5, 40).multiples(16) == ((16, 32), (16, 48))
    assert Sides(80, 81).multiples(16) == ((80, 80), (80, 96))
    assert Sides(80, 256) // 8 == (10, 32)


def test_sides_of_one_pixel_are_a_size():
    assert Sides.of(1) == Sides.of([1, 1]) == Sides.read("1x1") == (1, 1)


@pytest.mark.parametrize("size", [0, [80], [80, 0], [80, 256, 3], [80, 25.6], -8, "64"])
def test_sides_refuse_what_is_no_size(size):
    with pytest.raises(ValueError, match="size must"):
        Sides.of(size)


@pytest.mark.parametrize("text", ["", "0", "80x", "x80", "80x256x3", "8.5", "[80, 256]"])
def test_sides_read_refuses_text_that_is_no_size(text):
    with pytest.raises(
        ConfigError,
        match=r"^`size` .*: expected pixels",
    ):
        Sides.read(text)


def test_a_configs_nodata_replaces_the_files():
    stated = PixelRange.from_node({"pairs": [-10, 10], "nodata": 3})
    array = np.array([[[-7.0], [4.0]]], dtype=np.float32)
    assert stated.checked(array, nodata=-7.0).flatten().tolist() == [-7.0, 4.0]
    with pytest.raises(ValueError, match="3 at row 0"):
        stated.checked(np.full_like(array, 3.0), nodata=-7.0)


def test_a_model_takes_its_range_however_it_is_shown():
    range_of = PixelRange.from_node
    model = range_of([0, 4000])
    model.check_data(
        range_of(
            {"pairs": [0, 4000], "stretch": [0, 0.5], "outside": "clip", "shown": [0], "nodata": -1}
        )
    )
    for other in (None, [0, 4001], [-1, 4000], {"pairs": [0, 4000], "values": "log1p"}):
        with pytest.raises(ConfigError, match="0 to 4000, linear"):
            model.check_data(range_of(other))
