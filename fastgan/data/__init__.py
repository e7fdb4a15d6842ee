"""From a folder, archive, array or data set to batches: sources, uint8 sets, the loader.

Everything but the loader is free of torch, so that a bad data set is refused before torch loads.
"""
