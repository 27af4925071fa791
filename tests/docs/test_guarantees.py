"""Each promise of docs/guarantees.md names a test, which exists."""

import re

import pytest

from tests.docs.markdown import ROOT

PROMISES = re.findall(
    r"^\| (\w.*?) \| (.*`) \|$",
    (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"),
    re.M,
)


def test_promises_of_reliability_are_found():
    assert len(PROMISES) > 10


@pytest.mark.parametrize(("promise", "tests"), PROMISES, ids=lambda text: text[:40])
def test_the_test_of_a_reliability_promise_exists(promise, tests):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"`(.*?)`", tests):
        path, _, function = name.partition("::")
        if name.startswith("make "):
            assert re.search(rf"^{name.removeprefix('make ')}:", makefile, re.M), name
        else:
            assert (ROOT / path).exists(), name
            assert (
                f"def {function}" in (ROOT / path).read_text(encoding="utf-8") if function else True
            ), name
