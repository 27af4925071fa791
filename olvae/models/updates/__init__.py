"""Updates: optimizers, averages, gradients, skipped steps, several processes."""
