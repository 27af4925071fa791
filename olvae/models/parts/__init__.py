"""Parts: ways to train that a config adds to the model by their class path, one file each."""
