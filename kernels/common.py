"""What the Triton kernels share: where they run, their memory, the activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read when a kernel is decorated, so no later change of the environment matters.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def launcher(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, which launches kernels, on the device of the first tensor that it is given."""

    @functools.wraps(function)
    def launch(*args: object) -> None:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device_of(first):
            function(*args)

    return launch


def target_backend() -> str:
    """``cuda`` or ``hip``: for what the kernels are compiled."""
    return "cuda" if INTERPRETED else triton.runtime.driver.active.get_current_target().backend


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of 2 that holds ``size``, within bounds that are powers of 2."""
    return min(max(triton.next_power_of_2(size), least), most)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, negative_slope):
    """``act(z)``, float32. NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z < 0.0, z * negative_slope, z)
    elif ACTIVATION == "tanh":
        z = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return z


@triton.jit
def activation_gradient(y, ACTIVATION: tl.constexpr, negative_slope):
    """``act'(z)`` from ``y = act(z)``; for ``relu`` and ``leaky_relu``, ``y`` may be ``z``."""
    if ACTIVATION == "relu":
        return tl.where(y <= 0.0, 0.0, 1.0)
    if ACTIVATION == "leaky_relu":
        return tl.where(y > 0.0, 1.0, negative_slope)
    if ACTIVATION == "tanh":
        return 1.0 - y * y
    return tl.full(y.shape, 1.0, tl.float32)
