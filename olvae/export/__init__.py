"""Exports of trained models (diffusers, ONNX, ...), shards of latents and back, reconstructions of any size.

Imports ``olvae.models`` and below, and of evaluation what model cards show; commands import it."""
