"""Read configs, check them, and build objects from them, in the open-LiteVAE and latent-diffusion dialect of YAML.

A node names a ``target`` and its ``params``. A config's top level has ``model``, ``data``, ``lightning`` (``trainer``,
``callbacks`` and ``logger``), and in a run folder ``run``, the command's own settings.
"""

from olvae.config.nodes import (
    Config,
    ConfigError,
    Node,
    check,
    instantiate,
    resolve_class,
    resolve_target,
    validate,
    with_paths,
)
from olvae.config.reading import load, read_received, recipes, save

__all__ = [
    "Config",
    "ConfigError",
    "Node",
    "check",
    "instantiate",
    "load",
    "read_received",
    "recipes",
    "resolve_class",
    "resolve_target",
    "save",
    "validate",
    "with_paths",
]
