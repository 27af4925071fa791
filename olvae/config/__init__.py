"""YAML to objects, in the open-LiteVAE and latent-diffusion dialect: nodes of ``target`` and ``params``.

A config's top level has ``model``, ``data``, ``lightning`` (``trainer``, ``callbacks`` and ``logger``), and in a run
folder ``run``, the command's own settings.
"""

from olvae.config.check import check, check_arguments, validate
from olvae.config.files import (
    ABSENT,
    CONFIG_BYTES,
    RECIPES,
    differences,
    load,
    nearest_recipes,
    read_received,
    recipes,
    save,
)
from olvae.config.mistakes import ConfigError, unknown_keys
from olvae.config.nodes import Config, Node, instantiate, resolve_target, with_paths

__all__ = [
    "ABSENT",
    "CONFIG_BYTES",
    "RECIPES",
    "Config",
    "ConfigError",
    "Node",
    "check",
    "check_arguments",
    "differences",
    "instantiate",
    "load",
    "nearest_recipes",
    "read_received",
    "recipes",
    "resolve_target",
    "save",
    "unknown_keys",
    "validate",
    "with_paths",
]
