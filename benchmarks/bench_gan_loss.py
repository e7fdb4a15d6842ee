"""The adversarial loss, forward and backward, over the logits of D's and G's update.

``pytest benchmarks/bench_gan_loss.py --benchmark-only``
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
from fastgan.ops.gan_loss import KINDS, gan_loss
from fastgan.seeding import generator


class Case(NamedTuple):
    """``shape`` of the logits, one target for each group of them, the kind of the loss."""

    shape: tuple[int, ...]
    targets: tuple[float, ...]
    kind: str = "bce"

    def __str__(self) -> str:
        update = "D" if len(self.targets) == 2 else "G"
        return f"{'x'.join(map(str, self.shape))} {update} {self.kind}"


# DCGAN's logit an image, and the 30x30 of a discriminator of patches (Isola et al. 2017).
CASES = (
    *(
        Case((len(targets) * n, *rest), targets)
        for n, rest in ((64, ()), (128, ()), (64, (1, 30, 30)))
        for targets in ((1.0, 0.0), (1.0,))
    ),
    *(Case((256,), (1.0, 0.0), kind) for kind in KINDS if kind != "bce"),
)


def ways(case: Case) -> tuple[str, ...]:
    return ("torch",) if cpp.missing_reasons() else ("torch", "cpp")


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> Tensor:
    return torch.randn(case.shape, generator=generator(0, "bench_gan_loss"))


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> list[Tensor]:
    """The case in float64."""
    return _forward_backward(case, "reference", _inputs(case).double())


def setup(case: Case, way: str) -> Run:
    """The losses with ``d``, and the gradient of the logits."""
    logits = _inputs(case)
    backend = "reference" if way == "torch" else way
    return lambda: _forward_backward(case, backend, logits)


def _forward_backward(case: Case, backend: str, logits: Tensor) -> list[Tensor]:
    leaf = logits.detach().requires_grad_()
    with use_backend(backend):
        loss, d = gan_loss(leaf, case.targets, kind=case.kind)
        (dlogits,) = torch.autograd.grad(loss.sum(), leaf)
    return [torch.cat((loss.detach(), d)), dlogits]


def pytest_generate_tests(metafunc: Any) -> None:
    single_op.parametrize(metafunc, CASES, ways)


def test_speed(benchmark: Any, case: Case, way: str) -> None:
    single_op.speed(benchmark, case, setup(case, way), truth(case))


def test_memory(benchmark: Any, case: Case, way: str) -> None:
    single_op.memory(benchmark, case, setup(case, way), truth(case))
