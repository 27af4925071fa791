"""The autoencoder as a plain module, its training step and validation, and the files of trained ones.

``loading`` finds every TARGET, ``large`` runs images of any size. Imports losses, metrics and data; training,
evaluation, export and bench import it."""
