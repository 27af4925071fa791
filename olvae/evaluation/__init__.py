"""Evaluation: protocols, one pass over the images, results, and their bootstrap intervals.

``report`` writes tables and the page; ``latent_report`` describes latents. Imports
``olvae.models`` and below; commands import it."""
