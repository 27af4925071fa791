"""Which tests mirror a source."""

import sys

import pytest

from tests.docs.markdown import ROOT


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        (
            "olvae/losses/gan_losses.py",
            ["losses/test_gan_losses.py", "losses/test_gan_losses_r1_and_lecam.py"],
        ),
        ("olvae/metrics/__init__.py", ["metrics/test_metrics.py"]),
        ("olvae/checkpoint.py", ["test_checkpoint.py"]),
        ("olvae/recipes/demo.yaml", ["configs"]),
        ("tests/data/test_image.py", ["data/test_image.py"]),
        ("tests/data/images.py", []),
        ("README.md", ["docs"]),
        ("pyproject.toml", []),
    ],
)
def test_tests_have_the_name_of_their_source(monkeypatch, source, tests):
    """Of a package's own file, the package's."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("changed_tests", None)
    from changed_tests import tests_of

    assert sorted(path.relative_to(ROOT / "tests").as_posix() for path in tests_of(source)) == tests
