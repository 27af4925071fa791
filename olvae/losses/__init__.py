"""The terms of the training objective and both sides' adversarial losses, as pure functions and small modules."""
