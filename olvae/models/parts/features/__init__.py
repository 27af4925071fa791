"""Parts that compare the latent with a vision encoder's features, and one for its continuity."""
