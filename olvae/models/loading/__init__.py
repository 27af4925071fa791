"""Every TARGET: runs, checkpoints, exports, the hub, diffusers' autoencoders, latent-diffusion's files."""
