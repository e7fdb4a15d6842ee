"""Batch norm + activation, forward and backward, over the feature maps of DCGAN.

``pytest benchmarks/bench_bn_act.py --benchmark-only``
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from fastgan.benchmarks import single_op
from fastgan.benchmarks.single_op import Run
from torch import Tensor

from fastgan.ops import cpp
from fastgan.ops.backend import use_backend
from fastgan.ops.bn_act import bn_act
from fastgan.seeding import generator

TORCH = {"torch NHWC": torch.channels_last, "torch NCHW": torch.contiguous_format}


class Case(NamedTuple):
    """``[groups·n, channels, side, side]``."""

    n: int
    channels: int
    side: int
    groups: int
    activation: str

    def __str__(self) -> str:
        images = f"{self.groups}x{self.n}" if self.groups > 1 else self.n
        return f"{images}x{self.channels}x{self.side}x{self.side} {self.activation}"


# G's, then D's on real and fake at once, at 64; the same at 28, where no side is a power of two.
CASES = (
    *(Case(64, 512 >> i, 4 << i, 1, "relu") for i in range(4)),
    *(Case(64, 512 >> i, 4 << i, 2, "leaky_relu") for i in range(3)),
    *(Case(128, 128 >> i, 7 << i, 1, "relu") for i in range(2)),
    Case(128, 128, 7, 2, "leaky_relu"),
)


def ways(case: Case) -> tuple[str, ...]:
    return tuple(TORCH) if cpp.missing_reasons() else (*TORCH, "cpp")


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[Tensor, ...]:
    """``x``, ``dy``, weight, bias."""
    draw = generator(0, "bench_bn_act")
    images = (case.groups * case.n, case.channels, case.side, case.side)
    x, dy = torch.randn(2, *images, generator=draw)
    weight, bias = torch.randn(2, case.channels, generator=draw)
    return x, dy, 1.0 + 0.02 * weight, 0.1 * bias


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> list[Tensor]:
    """The case in float64."""
    return _forward_backward(case, "reference", *(tensor.double() for tensor in _inputs(case)))


def setup(case: Case, way: str) -> Run:
    """``y``, ``dx``, ``dweight`` and ``dbias``, in training."""
    x, dy, weight, bias = _inputs(case)
    layout = TORCH.get(way, torch.channels_last)
    x, dy = (tensor.contiguous(memory_format=layout) for tensor in (x, dy))
    backend = "reference" if way in TORCH else way
    return lambda: _forward_backward(case, backend, x, dy, weight, bias)


def _forward_backward(
    case: Case, backend: str | None, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor
) -> list[Tensor]:
    """On ``backend``; None is the one in force."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    running = torch.zeros(2, case.channels, dtype=weight.dtype, device=x.device)
    with use_backend(backend) if backend else contextlib.nullcontext():
        y = bn_act(*leaves, *running, groups=case.groups, activation=case.activation)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def pytest_generate_tests(metafunc: Any) -> None:
    single_op.parametrize(metafunc, CASES, ways)


def test_speed(benchmark: Any, case: Case, way: str) -> None:
    single_op.speed(benchmark, case, setup(case, way), truth(case))


def test_memory(benchmark: Any, case: Case, way: str) -> None:
    single_op.memory(benchmark, case, setup(case, way), truth(case))
