"""Observers: one file for each thing that an evaluation looks at besides its metrics.

``observer`` has the contract. They may import all of ``olvae.evaluation`` except its runner."""
