"""The study behind docs/results.md: scripts that use the package, and are no part of it."""
