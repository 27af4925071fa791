"""Code images of any size within a memory limit: pad, decode in exact tiles, encode in strips."""
