"""Train a config into a run folder: the run, its processes, Lightning's callbacks, progress."""
