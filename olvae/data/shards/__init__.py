"""Streams of tar files in WebDataset's format: found, indexed, read, shuffled; of images and of latents.

Imports ``olvae.data``'s own files, and nothing of ``olvae.data.mapped``."""
