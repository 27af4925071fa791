"""Exports of trained models (diffusers, ONNX, ...), shards of latents and back, reconstructions of any size.

Imports ``olvae.models`` and below, and nothing of evaluation or training; commands import it."""
