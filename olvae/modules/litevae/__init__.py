"""LiteVAE's own networks under their published class paths: encoder, decoder, self-modulated convolution."""
