"""What is made from an evaluation's results: tables for the terminal and for files, and one HTML page with pictures.

Imports ``olvae.evaluation``; commands import it."""
