"""Load TARGETs: runs, checkpoints, exports, the hub, diffusers' and latent-diffusion's files."""
