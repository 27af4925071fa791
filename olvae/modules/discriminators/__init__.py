"""PatchGAN, GigaGAN and UNetGAN: each maps (B, C, H, W) to a list of logit tensors and says how many in
``num_outputs``.

Plain modules for any trainer; imports ``olvae.modules`` only."""
