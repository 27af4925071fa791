"""The gain over the linear code in a training's last line."""

from types import SimpleNamespace
from typing import Any

import pytest

from olvae.training.summary import describe_gain


@pytest.mark.parametrize(
    ("psnr", "start", "beside"),
    [
        (27.126, 27.0, ", 0.13 above the linear code"),
        (26.874, 27.0, ", 0.13 below the linear code"),
        (27.004, 27.0, ", as the linear code"),
        (26.996, 27.0, ", as the linear code"),
        (27.0, None, ""),
    ],
)
def test_the_gain_over_the_linear_code_is_named_where_it_shows(psnr, start, beside):
    model: Any = SimpleNamespace(validation_values={"val/psnr": psnr}, linear_psnr=start)
    assert describe_gain(model) == f": {psnr:.2f} dB in the last validation{beside}"


def test_without_a_validation_nothing_is_said():
    model: Any = SimpleNamespace(validation_values={}, linear_psnr=27.0)
    assert describe_gain(model) == ""
