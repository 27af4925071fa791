"""Speed and memory beside something named, in one run; and the tables of networks beside their published figures.

Imports ``olvae.models`` and below, and ``olvae.export`` to time it; ``olvae bench`` and ``olvae tables`` import it."""
