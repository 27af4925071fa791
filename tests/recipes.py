"""Recipes, each read once: several files ask for all of them while they are collected."""

import copy
from functools import cache
from pathlib import Path

from olvae.config import Config
from olvae.data.places import load


@cache
def _read(path: Path) -> Config:
    return load([path])


def recipe(path: Path) -> Config:
    """The config of a recipe's file; the caller may change it."""
    return copy.deepcopy(_read(path))
