"""Observers: one file for each thing that an evaluation looks at besides its metrics.

``observer`` has the contract. They import the rest of ``olvae.evaluation`` but for its runner."""
