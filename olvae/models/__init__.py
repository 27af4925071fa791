"""The autoencoder as a plain module, its training step, its validation, and trained ones in and out.

``loading`` finds every TARGET, ``large`` runs images of any size. Imports losses, metrics and data; training,
evaluation, export and bench import it."""
