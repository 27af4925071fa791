"""From a config to a run folder: the run, Lightning's callbacks, what is printed on the way.

Imports ``olvae.models`` and below; only the command imports it."""
