"""Evaluation: protocols, one pass over the images, results, and their bootstrap intervals.

``report`` writes tables and the page; ``latents`` describes the distribution of latents. Imports ``olvae.models`` and
below; commands import it."""
