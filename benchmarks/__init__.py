"""Benchmarks; installed as ``fastgan.benchmarks``. ``fastgan bench`` runs that of the engine."""
