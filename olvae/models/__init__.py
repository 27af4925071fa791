"""The autoencoder as a plain module, its training step and validation, and the files of trained ones."""
