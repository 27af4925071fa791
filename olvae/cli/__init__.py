"""One file per command, with heavy imports inside the function.

Imports everything, and nothing imports it.
"""
