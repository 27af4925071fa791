"""Read configs, check them, and build objects from them.

The YAML is in the dialect of open-LiteVAE and latent-diffusion: a node names a ``target`` and its
``params``. A config's top level has ``model``, ``data``, ``lightning`` (``trainer``, ``callbacks``
and ``logger``), and in a run folder ``run``, the command's own settings.
"""

from olvae.config.nodes import ADDRESS as ADDRESS
from olvae.config.nodes import Config as Config
from olvae.config.nodes import ConfigError as ConfigError
from olvae.config.nodes import Node as Node
from olvae.config.nodes import check as check
from olvae.config.nodes import check_name_or_path as check_name_or_path
from olvae.config.nodes import import_extra as import_extra
from olvae.config.nodes import instantiate as instantiate
from olvae.config.nodes import key_places as key_places
from olvae.config.nodes import missing_package as missing_package
from olvae.config.nodes import resolve_class as resolve_class
from olvae.config.nodes import resolve_target as resolve_target
from olvae.config.nodes import validate as validate
from olvae.config.nodes import with_paths as with_paths
from olvae.config.reading import merge_files as merge_files
from olvae.config.reading import read_received as read_received
from olvae.config.reading import recipes as recipes
from olvae.config.reading import save as save
