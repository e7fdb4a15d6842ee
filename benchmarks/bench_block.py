"""Convolution + batch norm + activation, forward and backward, as DCGAN's layers have them.

``pytest benchmarks/bench_block.py --benchmark-only``
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from fastgan.benchmarks import single_op
from fastgan.benchmarks.single_op import Run
from torch import Tensor

from fastgan.ops import cpp
from fastgan.ops.backend import use_backend
from fastgan.ops.block import conv_bn_act, conv_transpose_bn_act
from fastgan.seeding import generator

TORCH = {"torch NHWC": torch.channels_last, "torch NCHW": torch.contiguous_format}


class Case(NamedTuple):
    """A block between ``[n, cl, side, side]`` and ``[n, ch, 2·side, 2·side]``.

    G's goes from the low side to the high one, D's the other way, over two groups.
    """

    network: str
    n: int
    cl: int
    ch: int
    side: int

    @property
    def groups(self) -> int:
        return 1 if self.network == "G" else 2

    def __str__(self) -> str:
        return f"{self.network} {self.cl}-{self.ch} {self.side}x{self.side} n{self.n}"


CASES = (
    *(Case(network, 64, 512 >> i, 256 >> i, 4 << i) for network in "GD" for i in range(3)),
    *(Case(network, 128, 128, 64, 7) for network in "GD"),
)


def ways(case: Case) -> tuple[str, ...]:
    return tuple(TORCH) if cpp.missing_reasons() else (*TORCH, "cpp", "auto")


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[Tensor, ...]:
    """``x``, ``dy``, the convolution's weight, batch norm's weight and bias."""
    draw = generator(0, "bench_block")
    low = torch.randn(case.groups * case.n, case.cl, case.side, case.side, generator=draw)
    high = torch.randn(case.groups * case.n, case.ch, *[2 * case.side] * 2, generator=draw)
    x, dy = (low, high) if case.network == "G" else (high, low)
    weight = 0.02 * torch.randn(case.cl, case.ch, 4, 4, generator=draw)
    bn_weight, bn_bias = torch.randn(2, dy.shape[1], generator=draw)
    return x, dy, weight, 1.0 + 0.02 * bn_weight, 0.1 * bn_bias


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> list[Tensor]:
    """The case in float64."""
    return _forward_backward(case, "reference", *(tensor.double() for tensor in _inputs(case)))


def setup(case: Case, way: str) -> Run:
    """``y`` and the gradients of ``x``, the weight, and batch norm's weight and bias."""
    x, dy, weight, *bn = _inputs(case)
    layout = TORCH.get(way, torch.channels_last)
    x, dy, weight = (tensor.contiguous(memory_format=layout) for tensor in (x, dy, weight))
    backend = "reference" if way in TORCH else way
    return lambda: _forward_backward(case, backend, x, dy, weight, *bn)


def _forward_backward(
    case: Case, backend: str, x: Tensor, dy: Tensor, *parameters: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *parameters)]
    x, weight, bn_weight, bn_bias = leaves
    running = torch.zeros(2, dy.shape[1], dtype=x.dtype)
    block = conv_transpose_bn_act if case.network == "G" else conv_bn_act
    with use_backend(backend):
        y = block(x, weight, None, bn_weight, bn_bias, *running, groups=case.groups)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def pytest_generate_tests(metafunc: Any) -> None:
    single_op.parametrize(metafunc, CASES, ways)


def test_speed(benchmark: Any, case: Case, way: str) -> None:
    single_op.speed(benchmark, case, setup(case, way), truth(case))


def test_memory(benchmark: Any, case: Case, way: str) -> None:
    single_op.memory(benchmark, case, setup(case, way), truth(case))
