"""LiteVAE's own networks under their published class paths: encoder, decoder, self-modulated convolution.

Imported by whoever builds an autoencoder; imports ``olvae.modules`` only."""
