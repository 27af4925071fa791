"""The distribution of a model's latents over images, as numbers, figures and tables.

Imports ``olvae.models`` and below; ``olvae latents`` imports it."""
