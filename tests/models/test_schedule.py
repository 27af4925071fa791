import pytest

from olvae.models.schedule import lr_factor


def test_warm_up_then_constant():
    assert [lr_factor(s, "constant", 4, 100, 0.0) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]


def test_cosine():
    values = [lr_factor(s, "cosine", 10, 110, 0.1) for s in (10, 60, 110, 500)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_no_warm_up():
    assert lr_factor(0, "cosine", 0, 10, 0.0) == 1.0
    assert lr_factor(0, "constant", 0, 10, 0.0) == 1.0
