"""From files to batches: how a picture becomes a tensor, transforms, the contract of a source, SRC opened.

``mapped`` holds sources whose pictures can be asked for by number, ``shards`` those read in sequence; they do not know
each other. ``audit`` is ``olvae data check``. Imports the foundations only; everything above may import it."""
