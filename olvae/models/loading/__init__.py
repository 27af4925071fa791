"""Every TARGET: runs, checkpoints, exports, the hub, diffusers' autoencoders, latent-diffusion's files.

Imports ``olvae.models``' autoencoder and its files; commands import it."""
