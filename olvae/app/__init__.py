"""Autoencoders side by side in a browser (`olvae app`), here and as a Space of the Hugging Face hub.

Imports models and export; only its command imports it."""
