"""Exports of trained models, shards of latents and back, reconstructions of images of any size.

Imports ``olvae.models`` and below, and of evaluation what model cards show; commands import it.
"""
