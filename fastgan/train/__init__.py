"""Training runs: configuration, the loop, checkpoints, samples, logs, the report."""
