"""Losses of decoders that generate: flow matching, and its distillation to one step."""
