"""Benchmarks of speed and memory beside named peers, and networks beside their published figures.

Imports ``olvae.models`` and below; ``olvae bench`` and ``olvae tables`` import it."""
