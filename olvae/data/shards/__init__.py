"""Streams of tar files in WebDataset's format: found, indexed, read, shuffled; of images, of latents, of both."""
