"""Streams of tar files in WebDataset's format: found, indexed, read, shuffled; of images, of latents, of both.

Imports ``olvae.data``'s own files, and nothing of ``olvae.data.mapped``."""
