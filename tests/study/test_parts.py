"""The study's question of parts: its configs, and its table in the document."""

from pathlib import Path

import pytest

from olvae import config as cfg
from olvae.data.places import load
from study.parts import PARTS, RECIPE, node, read, table

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_the_study_is_a_valid_config(name):
    assert cfg.validate(load([RECIPE], node(name))) == []


def test_the_table_of_parts_is_that_of_the_files_in_the_repository():
    assert table(read()) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
