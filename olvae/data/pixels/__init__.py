"""Pixels of any kind: arrays read from files, and what is stated of images, their size and the range of values."""
