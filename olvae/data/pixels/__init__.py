"""Pixels of any kind: arrays read from files, their stated range, percentiles to state it by."""
