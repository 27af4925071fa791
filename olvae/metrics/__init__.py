"""The numbers of validation and evaluation, computed on uint8 images: one file per metric, their contract
(``metric.py``), and what makes them by name (``registry.py``).

Imports ``olvae.modules`` and the foundations. Validation and evaluation import it."""
