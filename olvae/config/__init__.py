"""Read configs, check them, and build objects from them, in the open-LiteVAE and latent-diffusion dialect of YAML.

A node names a ``target`` and its ``params``. A config's top level has ``model``, ``data``, ``lightning`` (``trainer``,
``callbacks`` and ``logger``), and in a run folder ``run``, the command's own settings.
"""

from olvae.config.nodes import (
    Node,
    check,
    check_arguments,
    instantiate,
    resolve_class,
    resolve_target,
    unknown_keys,
    validate,
    with_paths,
)
from olvae.config.reading import (
    ABSENT,
    CONFIG_BYTES,
    Config,
    ConfigError,
    differences,
    load,
    nearest_recipes,
    read_received,
    recipes,
    save,
)

__all__ = [
    "ABSENT",
    "CONFIG_BYTES",
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
    "resolve_class",
    "resolve_target",
    "save",
    "unknown_keys",
    "validate",
    "with_paths",
]
