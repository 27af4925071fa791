"""The autoencoder: a plain module, its training step and validation, and its files."""
