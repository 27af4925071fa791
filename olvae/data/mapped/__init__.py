"""Sources of numbered pictures: folders, lists, torchvision, Hugging Face, the sample photographs.

Imports ``olvae.data``'s own files, and nothing of ``olvae.data.shards``."""
