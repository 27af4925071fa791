"""Speed and memory beside something named, in one run; and the tables of networks beside their published figures.

Imports ``olvae.models`` and below; ``olvae bench`` and ``olvae tables`` import it."""
