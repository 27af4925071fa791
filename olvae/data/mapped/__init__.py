"""Sources of pictures that can be asked for by number: folders, lists, torchvision, Hugging Face, the samples.

Imports ``olvae.data``'s own files, and nothing of ``olvae.data.shards``."""
