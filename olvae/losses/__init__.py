"""The terms of the training objective and both sides' adversarial losses, as pure functions and small modules.

Imports ``olvae.modules`` and the foundations; ``olvae.models`` and other people's trainers import it."""
