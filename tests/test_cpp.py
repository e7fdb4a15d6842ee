"""What the C++ ops share: the instruction set they run on, and the memory of their outputs."""

import copy
import itertools
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.numerics import error, needs_kernels

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, bn_act
from fastgan.ops import cpp
from fastgan.ops.backend import use_backend
from fastgan.ops.conv import conv

pytestmark = needs_kernels

# Every op in both directions, against the reference in float64.
STEP = """
import torch
from fastgan import bn_act, gan_loss
from fastgan.ops import cpp
from fastgan.ops.backend import use_backend
from fastgan.ops.conv import conv

def results(backend, dtype):
    torch.manual_seed(0)
    shapes = (6, 20, 8, 6), (5, 20, 4, 4), (5, 3, 4, 4)
    x, w, v = (torch.randn(shape).div(3).to(dtype).requires_grad_() for shape in shapes)
    with use_backend(backend):
        y = bn_act(conv(x, w, stride=2, padding=1), activation="tanh", groups=2)
        y = conv(y, v, stride=2, padding=1, transposed=True)
        loss, d = gan_loss(y, (1.0, 0.0))
        loss.sum().backward()
    return y, loss, d, x.grad, w.grad, v.grad

for got, want in zip(results("cpp", torch.float32), results("reference", torch.float64)):
    assert (got - want).norm() <= 1e-5 * want.norm()
print(cpp.kernels().isa())
"""


def python(*args, **environment):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_environment_names_the_instruction_set(isa):
    """Here the choice of it; the tests of each op compare all of them number by number."""
    if isa not in cpp.kernels().isas():
        pytest.skip(f"this CPU has no {isa}")
    result = python("-c", STEP, FASTGAN_CPU_ISA=isa)
    assert (result.returncode, result.stdout.split()) == (0, [isa]), result.stderr


def test_an_unknown_instruction_set_is_answered_in_one_line(tmp_path):
    result = python(
        *("-m", "fastgan", "dcgan", "--dataset", "fake", "--imageSize", "16", "--niter", "1"),
        *("--outf", str(tmp_path)),
        FASTGAN_CPU_ISA="mmx",
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "FASTGAN_CPU_ISA='mmx'" in line
    assert ", ".join(cpp.kernels().isas()) in line


def span(x):
    return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()


def test_tensors_that_live_never_share_memory():
    draw = random.Random(0)
    alive = []
    for i in range(2000):
        shape = draw.choice([(1,), (5, 3), (1000,), (1024,), (3, 7, 50), (1 << 19,), (600_000,)])
        if len(alive) > 20:
            x, value = alive.pop(draw.randrange(len(alive)))
            assert (x == value).all()
            del x
        alive.append((cpp.empty(*shape).fill_(i), i))
        spans = sorted(span(x) for x, _ in alive)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))


def test_memory_is_used_again():
    cpp.kernels().trim()
    first = cpp.empty(12_345)
    address = first.data_ptr()
    del first
    assert cpp.empty(12_345).data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [lambda x: x[3:], lambda x: x.detach(), lambda x: x.numpy(), lambda x: memoryview(x.numpy())],
    ids=["view", "detached", "numpy", "memoryview"],
)
def test_a_view_keeps_the_memory(keep):
    x = cpp.empty(12_345).fill_(1.0)
    kept = keep(x)
    del x
    others = [cpp.empty(12_345).fill_(2.0) for _ in range(3)]
    assert (np.asarray(kept) == 1.0).all()
    del others


def test_what_autograd_saves_keeps_its_memory(prefer):
    prefer("winograd2")  # The bound is of its rounding; a larger tile rounds more.
    x, weight = torch.randn(2, 5, 8, 8), torch.randn(6, 5, 4, 4)
    gradients = []
    for backend in ("cpp", "reference"):
        leaf = weight.clone().requires_grad_()
        with use_backend(backend):
            y = conv(x, leaf, stride=2, padding=1, activation="tanh")
            loss = bn_act(y, activation="relu").square().sum()
            shape = y.shape
            del y
            others = [cpp.empty_images(*shape).fill_(torch.nan) for _ in range(4)]
            loss.backward()
        del others
        gradients.append(leaf.grad)
    assert error(gradients[0], gradients[1].double()) <= 1e-5


def test_threads_share_the_pool():
    wrong = []

    def work(seed):
        draw = random.Random(seed)
        alive = []
        for i in range(300):
            alive.append((cpp.empty(draw.choice([10, 1000, 5000])).fill_(seed + i), seed + i))
            if len(alive) > 5:
                x, value = alive.pop(draw.randrange(5))
                if not (x == value).all():
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_output_is_a_tensor_like_any_other(tmp_path):
    x = cpp.empty_images(2, 3, 4, 5).fill_(1.0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.untyped_storage().nbytes() == 4 * x.numel()
    assert x._base is None
    copied = copy.deepcopy(x)
    assert span(copied)[0] != span(x)[0]
    torch.save(x, tmp_path / "x.pt")
    for same in (copied, torch.load(tmp_path / "x.pt"), x.clone()):
        assert torch.equal(same, x)
        assert same.stride() == x.stride()
    assert cpp.empty(0, 3).shape == (0, 3)


@pytest.mark.parametrize("change", [lambda y: F.leaky_relu_(y, 0.1), lambda y: y.mul_(3.0)])
@pytest.mark.parametrize("op", ["conv", "bn_act"])
def test_an_output_can_be_changed_in_place(prefer, op, change):
    prefer("winograd2")
    x, weight = torch.randn(2, 5, 8, 8), torch.randn(6, 5, 4, 4)
    found = []
    for backend in ("cpp", "reference"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = conv(leaf, weight, stride=2, padding=1) if op == "conv" else bn_act(leaf)
            y = change(y)
            y.pow(3).sum().backward()
        found.append((y.detach(), leaf.grad))
    for got, want in zip(*found, strict=True):
        assert error(got, want.double()) <= 1e-5


def test_a_change_of_what_the_gradient_needs_is_refused():
    x, weight = torch.randn(2, 5, 8, 8), torch.randn(6, 5, 4, 4, requires_grad=True)
    with use_backend("cpp"):
        y = conv(x, weight, stride=2, padding=1, activation="tanh")
        y.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_step_settles_on_what_it_holds():
    torch.manual_seed(0)
    engine = Engine(
        DCGANGenerator(8, 8, 3, 32), DCGANDiscriminator(8, 3, 32), backend="cpp", device="cpu"
    )
    cpp.kernels().trim()
    held = []
    for _ in range(8):
        engine.step(torch.zeros(16, 3, 32, 32))
        held.append(cpp.kernels().held_bytes())
    assert len(set(held[2:])) == 1


def test_sizes_of_the_past_are_given_up():
    """A run whose sizes change for ever holds at most twice what it ever used at once."""
    cpp.kernels().trim()
    before = cpp.kernels().held_bytes()
    for i in range(200):
        cpp.empty(1_000_000 + 100_000 * i)
    largest = 4 * (1_000_000 + 100_000 * 199)
    assert cpp.kernels().held_bytes() - before <= 2 * largest + (4 << 20)
    cpp.kernels().trim()
    assert cpp.kernels().held_bytes() <= before
