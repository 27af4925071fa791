"""From files to batches: how a picture becomes a tensor, the contract of a source, how SRC is opened.

``dataset``, ``picture_folder`` and ``hub`` are sources of numbered pictures; ``shards`` has those that are read in
sequence. ``audit`` is ``olvae data check``. Imports the foundations only; everything above may import it."""
