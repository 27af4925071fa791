"""The networks and what they are made of: plain ``nn.Module``s and functions of tensors."""
