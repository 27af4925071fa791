"""Observers that compare pixels: bands, colours, patterns, values and transparency, passes."""
