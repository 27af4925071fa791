"""Train a config into a run folder: the run, Lightning's callbacks, progress.

Imports ``olvae.models`` and below; only the command imports it."""
