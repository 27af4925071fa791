"""From files to batches: how a picture becomes a tensor, transforms, the contract of a source, how SRC is opened.

``mapped`` has the sources of numbered pictures, ``shards`` those that are read in sequence; they do not import each
other. ``audit`` is ``olvae data check``. Imports the foundations only; everything above may import it."""
