"""Find, read and write shards: tar files in WebDataset's format, of images, latents or both."""
