"""The alternating step of a GAN, its optimisers, and everything a resume needs."""

from fastgan.engine.engine import DStats, Engine, GStats, StepStats

__all__ = ["DStats", "Engine", "GStats", "StepStats"]
