"""Training: datasets, steps, parallelism, checkpoints. They need the extra `train`."""
