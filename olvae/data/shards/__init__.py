"""Streams of tar files, as WebDataset has them: read, found, indexed, shuffled, written; of images and of latents.

Imports ``olvae.data``'s own files, and nothing of ``olvae.data.mapped``."""
