"""Networks of other projects: encoders, decoders, and a diffusion transformer on latents."""
