"""The day after training: exports, diffusers, ONNX, shards of latents and back, pictures of any size.

Imports ``olvae.models`` and below, and nothing of evaluation or training; commands import it."""
