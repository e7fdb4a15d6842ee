"""The networks: models, their registry, and one forward pass over several batches."""
