"""Pixels of any kind: arrays read from files, and the stated range of their values."""
