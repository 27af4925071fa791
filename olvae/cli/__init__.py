"""One file per command, with heavy imports inside the function; imports everything, and nothing imports it."""
