"""Rules of a start by themselves: a frozen encoder's images, classes that extend, what fits."""

from types import SimpleNamespace
from typing import Any

import pytest

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.training.start_from import _check_encoder, _extends, weights_that_fit
from tests.conftest import tiny, tiny_config
from tests.models.parts.flow.generating import one_step_config


def checked(
    old: int = 3,
    new: int = 3,
    padding: str = "zeros",
    values: list | None = None,
    loaded: Any = EIGHT_BITS,
) -> None:
    """Check a frozen encoder of ``old`` channels for images of ``new`` ones."""
    node = {"params": {"padding": "zeros"}}
    before: Any = SimpleNamespace(in_channels=old, pixel_range=loaded)
    after: Any = SimpleNamespace(in_channels=new, config={"encoder_config": node})
    config = {"data": {"params": {} if values is None else {"range": values}}}
    params = {"encoder_config": {"params": {"padding": padding}}}
    _check_encoder(config, params, before, after, "it")


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 3), (4, 3), (3, 1), (1, 1)])
def test_a_frozen_encoder_may_see_fewer_channels_or_repeat_one(old, new):
    checked(old, new)


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 4)])
def test_a_frozen_encoder_does_not_see_channels_that_are_added(old, new):
    with pytest.raises(ConfigError, match=r"it: .*freeze_encoder"):
        checked(old, new)


def test_a_frozen_encoder_keeps_its_padding():
    with pytest.raises(ConfigError, match="padding: reflect, but it has zeros"):
        checked(padding="reflect")


@pytest.mark.parametrize(
    ("values", "eight_bits", "asks"),
    [([0, 9], False, True), ([0, 9], True, False), (None, False, False), (None, True, False)],
)
def test_a_frozen_encoder_gets_images_of_the_range_that_it_states(values, eight_bits, asks):
    asked: list[PixelRange] = []
    stated = SimpleNamespace(eight_bits=eight_bits, check_data=asked.append)
    checked(values=values, loaded=stated)
    assert asked == [PixelRange.from_node([0, 9])] * asks


def test_a_class_extends_another_but_not_itself():
    nodes = (tiny_config()["model"]["params"]["decoder_config"], one_step_config())
    assert [[_extends(given, found) for found in nodes] for given in nodes] == [
        [False, False],
        [True, False],
    ]


def test_an_extended_decoder_of_other_shapes_starts_fresh():
    """And one of the same shapes keeps all that it does not add."""
    node = tiny_config()["model"]["params"]["decoder_config"]
    node["params"]["linear"] = True
    model = tiny(decoder_config=node)
    for channels, fresh in ((8, False), (16, True)):
        params = {**model.config, "decoder_config": one_step_config(channels=channels)}
        weights, is_fresh = weights_that_fit(model, params, "it")
        assert is_fresh is fresh
        state = model.state_dict()
        kept = {name for name in state if not (fresh and name.startswith("decoder."))}
        assert weights.keys() == kept
