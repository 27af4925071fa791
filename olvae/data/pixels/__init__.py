"""Pixels of any kind: arrays read from files, and the stated size of images and range of their values."""
