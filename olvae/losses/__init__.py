"""The training objective's terms and adversarial losses, as pure functions and small modules."""
