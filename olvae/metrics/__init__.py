"""What evaluation and validation compute on uint8 images: one file per metric, the contract they share, the registry.

Imports ``olvae.modules`` and the foundations; validation, evaluation and the benchmarks import it."""
