"""What ``olvae data check`` finds in a source by reading all of it, and how it is shown.

Imports the rest of ``olvae.data``; only the command imports it."""
