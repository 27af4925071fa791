"""From targets and images to numbers that can be trusted: protocol, one pass over the images, results, intervals.

``report`` writes tables and the page, ``latents`` describes latents. Imports ``olvae.models`` and below; commands
import it."""
