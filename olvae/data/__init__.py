"""From files to batches: pictures become tensors, sources deliver them, SRC is opened.

``dataset``, ``picture_folder`` and ``hub`` are sources of numbered pictures; ``shards`` has sources
that are read in sequence. ``audit`` is ``olvae data check``. Imports the foundations only;
everything above may import it."""
