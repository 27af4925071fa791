"""LiteVAE's networks under their published class paths: encoder, decoder, convolution (SMC)."""
