"""Is the GAN any good? The quality of its samples, copies among them, its health while it trains.

A leaf: it may import ``data``, and ``train`` and ``cli`` use it.
"""
