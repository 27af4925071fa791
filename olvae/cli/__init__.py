"""The commands: one file each, heavy imports inside the function, and how mistakes are told.

Imports everything; nothing imports it."""
