"""The guard refuses what a CUDA graph cannot hold, one thing at a time, and lets the rest pass; the
tape replays what it recorded and leaves no trace of recording.
"""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.capture_guard import CaptureError, CaptureGuard
from support.numerics import needs_kernels
from support.tape_graph import TapeGraph
from torch import nn

from fastgan import DCGANDiscriminator, DCGANGenerator, bce_loss, use_backend
from fastgan.engine.adam import Adam
from fastgan.ops import bn_act, tuning

X = torch.arange(6.0).view(2, 3)
KNOWN, UNKNOWN = torch.Generator(), torch.Generator()
BACKENDS = ["reference", pytest.param("cpp", marks=needs_kernels)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: X.sum().item(), "item waits"),
        (lambda: X.tolist(), "tolist waits"),
        (lambda: X.numpy(), "numpy waits"),
        (lambda: np.asarray(X), "__array__ waits"),
        (lambda: X.cpu(), "cpu waits"),
        (lambda: bool(X.sum() > 1), "__bool__ waits"),
        (lambda: float(X.sum()), "_local_scalar_dense waits"),
        (lambda: int(X.sum()), "_local_scalar_dense waits"),
        (lambda: [0] * 9 and list(range(9))[X[0, 1].long()], "__index__ waits"),
        (lambda: torch.equal(X, X), "equal waits"),
        (lambda: X.nonzero(), "nonzero has a shape"),
        (lambda: X[X > 1.0], "index by a mask"),
        (lambda: X.clone().index_put_((X > 1.0,), torch.zeros(4)), "index_put_ by a mask"),
        (lambda: X.index_put((X > 1.0,), torch.zeros(4)), "index_put by a mask"),
        (lambda: X.masked_select(X > 1.0), "masked_select has a shape"),
        (lambda: X.unique(), "_unique2 has a shape"),
        (lambda: torch.bincount(X.long().flatten()), "bincount has a shape"),
        (lambda: X.repeat_interleave(REPEATS, 0), "repeat_interleave has a shape"),
        (lambda: torch.allclose(X, X), "allclose waits"),
        (lambda: X.pin_memory(), "_pin_memory waits"),
        (lambda: torch.linalg.inv(torch.eye(2)), "_linalg_check_errors waits"),
        (lambda: torch.tensor([1.0, 2.0]), "lift_fresh takes data"),
        (lambda: torch.as_tensor(np.ones(2)), "takes data from the host|lift_fresh"),
        (lambda: torch.from_numpy(np.ones(2)), "from_numpy takes data"),
        (lambda: torch.frombuffer(bytearray(8), dtype=torch.float32), "frombuffer takes data"),
        (lambda: torch.from_dlpack(np.ones(2)), "from_dlpack takes data"),
        (lambda: np.from_dlpack(X), "__dlpack__ waits"),
        (lambda: HOST + 1.0, "add takes data from the host"),
        (lambda: X.to("meta"), "copies between cpu, meta"),
        (lambda: torch.cuda.synchronize(), "synchronize waits"),
        (lambda: torch.cuda.Event.synchronize(None), "Event.synchronize waits"),
        (lambda: torch.cuda.Stream.synchronize(None), "Stream.synchronize waits"),
        (lambda: torch.rand(3), "rand draws"),
        (lambda: torch.randn(3, generator=UNKNOWN), "randn draws"),
        (lambda: nn.functional.dropout(X, 0.5), "draws"),
        (lambda: X.clone().uniform_(), "uniform_ draws"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(CaptureError, match=message), CaptureGuard([KNOWN], [HOST]):
        call()


HOST, REPEATS = torch.ones(2), torch.tensor([1, 2])


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.randn(3, generator=KNOWN),
        lambda: nn.functional.dropout(X, 0.5, training=False),
        lambda: X.repeat_interleave(REPEATS, 0, output_size=3),
        lambda: X[torch.zeros(2, dtype=torch.int64)],
        lambda: torch.where(X > 1.0, X, 0.0),
        lambda: X.clone().masked_fill_(X > 1.0, 2.0),
        lambda: X.to(torch.bfloat16).to(torch.float32),
        lambda: torch.full((2,), 3.0) + torch.zeros_like(X[0, :2]),
        lambda: X.view(-1)[2:].sum().square(),
    ],
)
def test_what_passes(call):
    with CaptureGuard([KNOWN], [HOST]):
        call()


def test_the_default_generator_may_be_known():
    with CaptureGuard([torch.default_generator]):
        nn.functional.dropout(X, 0.5)
        with pytest.raises(CaptureError, match="randn draws"):
            torch.randn(3, generator=UNKNOWN)


class ReadingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, dy):
        return dy * sum(dy.tolist())


def hooked(x):
    y = x * 2.0
    y.register_hook(lambda dy: dy * float(dy.numpy().sum()))
    return y


@pytest.mark.parametrize("reading", [ReadingBackward.apply, hooked])
def test_the_backward_pass_is_watched(reading):
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(CaptureError, match=r"tolist waits|numpy waits"), CaptureGuard():
        reading(x).sum().backward()


def test_other_threads_are_left_alone():
    with CaptureGuard(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: torch.from_numpy(np.ones(2)).tolist()).result() == [1.0, 1.0]
    assert X.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert "tolist" not in vars(torch.Tensor)


@pytest.mark.parametrize(
    "call",
    [
        lambda: X * random.random(),
        lambda: X * np.random.rand(),
        lambda: X * complex(0.0, random.random()),
        lambda: X.to((torch.float64, torch.bfloat16)[next(COUNT) % 2]),
        lambda: torch.randn(2, generator=(KNOWN, UNKNOWN)[next(COUNT) % 2]),
    ],
    ids=["random", "numpy", "complex", "dtype", "generator"],
)
def test_what_python_bakes_in_is_found(call):
    guard = CaptureGuard([KNOWN, UNKNOWN])
    guard.run(call, [])
    with pytest.raises(CaptureError, match="call 0 was"):
        guard.run(call, [])


def test_what_stays_the_same_passes():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)

    def step():
        p.data.mul_(1.0).masked_fill_(p.data > 9.0, float("nan"))
        p.grad = None

    guard = CaptureGuard()
    for _ in range(3):
        guard.run(step, [p])


def keeping():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    opt = Adam(net.parameters(), lr=torch.tensor(0.01), fused=True, capturable=True)

    def step():
        opt.zero_grad()
        net(X).square().mean().backward()
        opt.step()

    step()
    return net, opt, step


def test_a_step_that_keeps_its_places_passes():
    net, opt, step = keeping()
    guard = CaptureGuard()
    for _ in range(3):
        guard.run(step, [net, opt])
    assert len(guard.tape) > 20


def renew(moments):
    moments["exp_avg"] = moments["exp_avg"].clone()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda net, opt: setattr(net[0].weight, "data", net[0].weight.data.clone()), "0.weight"),
        (lambda net, opt: setattr(net[1], "running_mean", net[1].running_mean + 0), "running_mean"),
        (lambda net, opt: renew(next(iter(opt.state.values()))), "state0.exp_avg"),
        (lambda net, opt: opt.param_groups[0].update(lr=torch.full((), 0.01)), "group0.lr"),
        (lambda net, opt: setattr(net[0].weight, "grad", SPARE[next(COUNT)]), "0.weight.grad"),
        (
            lambda net, opt: opt.param_groups[0].update(betas=(0.9, 0.9 - next(COUNT) * 0.01)),
            "call",
        ),
        (lambda net, opt: net[0].bias.data.mul_(1.0 + next(COUNT)), "call .* was aten::mul_"),
        (lambda net, opt: next(COUNT) % 2 and net[0].bias.data.mul_(1.0), "calls|call"),
    ],
    ids=["parameter", "buffer", "moments", "rate", "gradient", "setting", "counter", "branch"],
)
def test_what_is_moved_or_counted_is_found(fault, message):
    net, opt, step = keeping()
    guard = CaptureGuard()

    def faulty():
        step()
        fault(net, opt)

    with pytest.raises(CaptureError, match=message):
        for _ in range(3):
            guard.run(faulty, [net, opt])


COUNT = itertools.count()
SPARE = [torch.zeros(4, 3) for _ in range(100)]


@needs_kernels
def test_the_bodies_of_ops_are_watched(monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    shape = bn_act._cpp_shape

    def waiting(x, groups):
        x.sum().item()
        return shape(x, groups)

    def call():
        with use_backend("cpp"):
            bn_act.bn_act(x)

    guard = CaptureGuard()
    guard.run(call, [x])
    assert {"fastgan::bn_act_forward", "aten::rsqrt_"} <= {name for name, _ in guard.tape}
    monkeypatch.setattr(bn_act, "_cpp_shape", waiting)
    with pytest.raises(CaptureError, match="item waits"):
        guard.run(call, [x])


def gan(n):
    """An alternating step by hand on fastgan's networks; returns it and all that it keeps."""
    torch.manual_seed(0)
    netG, netD = DCGANGenerator(6, 4, 1, 16), DCGANDiscriminator(4, 1, 16)
    draw = torch.Generator().manual_seed(1)
    rate = {"fused": True, "capturable": True}
    opt_g, opt_d = (
        Adam(net.parameters(), lr=torch.tensor(2e-3), betas=(0.5, 0.999), **rate)
        for net in (netG, netD)
    )
    real = {m: torch.rand(m, 1, 16, 16, generator=draw) for m in n}

    def step(m):
        fake = netG(torch.randn(m, 6, 1, 1, generator=draw))
        opt_d.zero_grad()
        both = torch.cat([real[m], fake.detach()])
        bce_loss(netD.forward_grouped(both, 2), [1.0, 0.0])[0].sum().backward()
        opt_d.step()
        opt_g.zero_grad()
        loss, _ = bce_loss(netD(fake), [1.0])
        loss.sum().backward()
        opt_g.step()
        return loss.detach()

    return step, (netG, netD, opt_g, opt_d), draw


def values(kept):
    *nets, opt_g, opt_d = kept
    found = [v.clone() for net in nets for v in net.state_dict().values()]
    for opt in (opt_g, opt_d):
        found += [v.clone() for state in opt.state.values() for v in state.values()]
    return found


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("auto", marks=needs_kernels)])
def test_an_alternating_step_passes(backend, monkeypatch, tmp_path):
    """Even where the first run measures, which a graph's recording never does."""
    step, kept, draw = gan((3,))
    guard, stranger = CaptureGuard([draw]), CaptureGuard()
    with use_backend(backend):
        step(3)  # in which Adam makes its moments
        monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))
        monkeypatch.setattr(tuning, "_times", {})
        for _ in range(3):
            guard.run(lambda: step(3), kept)
        assert any(tuning._times.values()) or backend != "auto"
        with pytest.raises(CaptureError, match="randn draws"):
            stranger.run(lambda: step(3), kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_replays_are_twenty_steps(backend):
    """To the bit, with a second tape of another size of batch in between."""
    (plain, kept, _), (taped, mine, draw) = gan((3, 5)), gan((3, 5))
    with use_backend(backend):
        plain(3)
        taped(3)
        tapes, losses = {}, {}
        for m in (3, 5):
            before, state = values(mine), draw.get_state()
            tapes[m] = TapeGraph()
            with tapes[m].record([draw]):
                losses[m] = taped(m)
            assert all(map(torch.equal, before, values(mine)))
            assert torch.equal(state, draw.get_state())
            assert losses[m].isnan().all()
        for i in range(20):
            m = 3 + 2 * (i % 3 == 1)
            want = plain(m)
            tapes[m].replay()
            assert torch.equal(want, losses[m])
    assert all(map(torch.equal, values(kept), values(mine)))


def averaging(cast, set_to_none):
    """A step with casts, a momentum by ``torch._foreach`` and an average kept through ``.data``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    opt = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)
    average = [p.detach().clone() for p in net.parameters()]

    def step():
        opt.zero_grad(set_to_none)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = net(X)
        loss = out.float().square().mean()
        loss.backward()
        opt.step()
        torch._foreach_lerp_(average, [p.data for p in net.parameters()], 0.1)
        average[0].view(-1)[1:].mul_(0.5)
        return loss.detach()

    return step, net, average


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_replays_with_casts_views_and_lists_of_tensors(cast, around, set_to_none):
    (plain, net, average), (taped, mine, kept) = (averaging(cast, set_to_none) for _ in range(2))
    tape = TapeGraph()
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        plain()
        taped()
        with tape.record():
            loss = taped()
        gradients = [p.grad for p in mine.parameters()]
        for _ in range(5):
            want = plain()
            tape.replay()
            assert torch.equal(want, loss)
    assert all(map(torch.equal, net.state_dict().values(), mine.state_dict().values()))
    assert all(map(torch.equal, average, kept))
    for p, same, gradient in zip(net.parameters(), mine.parameters(), gradients, strict=True):
        assert same.grad is gradient
        assert torch.equal(p.grad, gradient)


def test_a_counter_stays_as_it_was_recorded():
    total, counted = torch.zeros(()), [0]

    def step():
        counted[0] += 1
        total.add_(counted[0])

    tape = TapeGraph()
    with tape.record():
        step()
    assert float(total) == 0.0
    for _ in range(3):
        tape.replay()
    assert (float(total), counted) == (3.0, [1])


def test_a_failed_recording_leaves_no_trace():
    x = torch.ones(2)
    with pytest.raises(RuntimeError), TapeGraph().record():
        x.add_(1.0)
        raise RuntimeError
    assert torch.equal(x, torch.ones(2))
