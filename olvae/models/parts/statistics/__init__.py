"""Parts that give the latent statistics which a diffusion model learns easily."""
