"""The networks and what they are made of: plain ``nn.Module``s and functions of tensors.

Imports nothing of this package but the foundations (``olvae/*.py``), and neither Lightning nor OmegaConf; everything
else may import it."""
