"""Compare autoencoders side by side in a browser (`olvae app`).

Imports models and export; only its command imports it."""
