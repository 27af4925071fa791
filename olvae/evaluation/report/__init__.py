"""What an evaluation leaves behind: tables on the terminal and in files, and one HTML page.

Imports ``olvae.evaluation``'s results; commands import it."""
