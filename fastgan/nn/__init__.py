"""The networks: models, their registry, and one forward pass over several batches."""

from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.nn.grouped import grouped_forward, grouping_obstacle
from fastgan.nn.registry import build_model, model_names, register_model

__all__ = [
    "DCGANDiscriminator",
    "DCGANGenerator",
    "build_model",
    "grouped_forward",
    "grouping_obstacle",
    "model_names",
    "register_model",
]
