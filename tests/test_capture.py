"""The captured step on a CPU stand-in for CUDA graphs: replays equal steps that are taken as they
are written, to the bit; capturing changes no number; what cannot be captured is said, and runs.
"""

import contextlib
import copy
import logging

import numpy as np
import pytest
import torch
from fastgan.benchmarks import bench_engine, gpu_parts
from support.capture_guard import CaptureError, CaptureGuard
from support.numerics import needs_kernels
from support.tape_graph import TapeGraph
from torch import nn

import fastgan
from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, ImageSet, Loader, use_backend
from fastgan.engine import capture as captures
from fastgan.engine.capture import capture_step
from fastgan.errors import InputError
from fastgan.metrics.health import Vitals

SIZE, NZ, STEPS, CLASSES = 16, 6, 20, 3
BACKENDS = ["reference", pytest.param("cpp", marks=needs_kernels)]


@pytest.fixture(autouse=True)
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setitem(captures.GRAPHS, "cpu", TapeGraph)


def make(engine=Engine, channels=4, condition=None, **kwargs):
    torch.manual_seed(0)
    sizes = {"nz": NZ, "ngf": channels, "ndf": channels, "nc": 1, "image_size": SIZE}
    classes = {"n_classes": CLASSES, "condition": condition} if condition else {}
    networks = fastgan.build_model("dcgan", **sizes, **classes)
    return engine(*networks, device="cpu", **{"ema": 0.9, **kwargs})


def loaded(engine=Engine, n=20, batch=8, **kwargs):
    """With batches of two sizes where ``n`` is no multiple of ``batch``."""
    images = np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 1), dtype=np.uint8)
    made = make(engine, **kwargs)
    data = ImageSet(images, np.arange(n) % CLASSES, (), "test", "digest")
    made.attach(Loader(data, batch, flip=True))
    return made


def real(n=8, seed=0):
    return torch.rand(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def assert_same_state(a, b):
    assert bench_engine.differences(a.state_dict(), b.state_dict()) == []


def assert_differ(a, b):
    assert bench_engine.differences(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ({}, 2),
        ({"n_d": 2}, 3),
        ({"precision": "bf16", "backend": "reference"}, 2),
        ({"fuse_passes": False, "ema": 0.0}, 2),
        ({"r1": 1.0, "r1_every": 2, "instance_noise": 0.1}, 4),
        ({"monitor": Vitals(4), "diff_augment": ["translation", "color"]}, 4),
        ({"condition": "projection"}, 2),
    ],
    ids=["plain", "n_d", "bf16", "two passes", "lazy R1", "monitored", "conditional"],
)
def test_replays_equal_steps_as_they_are_written(backend, settings, graphs):
    settings = {"backend": backend, **settings}
    plain, captured = (loaded(capture=capture, **settings) for capture in (False, True))
    for _ in range(STEPS):
        want, got = plain.step(), captured.step()
        assert want.to_dict() == got.to_dict()
    assert_same_state(plain, captured)
    assert captured.captures == graphs and not captured.uncaptured_reason
    assert plain.captures == 0 and plain.uncaptured_reason == "capture=False"
    # As text: what is not measured is NaN, which is no equal of itself.
    assert str(captured.history.last(STEPS)) == str(plain.history.last(STEPS))
    assert torch.equal(plain.sample(3), captured.sample(3))
    for mine, theirs in zip(plain.netG.parameters(), captured.netG.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_recording_and_warming_up_change_no_number(monkeypatch):
    """At the second step, which is recorded; the first is taken to make the optimisers' state."""
    engine = loaded(capture=True)
    engine.step()
    seen = {}
    record = captures.CapturedStep._record

    def watched(self, key, args):
        seen["before"] = copy.deepcopy(engine.state_dict())
        seen["gradients"] = [p.grad.clone() for p in engine.netD.parameters()]
        recorded = record(self, key, args)
        seen["after"] = copy.deepcopy(engine.state_dict())
        return recorded

    monkeypatch.setattr(captures.CapturedStep, "_record", watched)
    engine.step()
    assert engine.captures == 1
    assert bench_engine.differences(seen["before"], seen["after"]) == []
    assert not torch.equal(seen["after"]["netG"]["main.0.weight"], engine.netG.main[0].weight)


def test_a_state_that_is_not_put_back_shows(monkeypatch):
    """A batch norm that drifts in the warm-up: the test above has to find it."""
    tensors = captures._State.tensors

    def without_statistics(self):
        statistics = {
            id(buffer)
            for module in self._modules
            for name, buffer in module.named_buffers()
            if name.endswith("running_mean")
        }
        return [tensor for tensor in tensors(self) if id(tensor) not in statistics]

    monkeypatch.setattr(captures._State, "tensors", without_statistics)
    plain, captured = loaded(capture=False), loaded(capture=True)
    for _ in range(4):
        plain.step()
        captured.step()
    differ = bench_engine.differences(plain.state_dict(), captured.state_dict())
    assert differ and all("running_mean" in name or "ema" in name for name in differ)


def test_a_resume_equals_never_having_stopped():
    whole = loaded(capture=True)
    for _ in range(4):
        whole.step()
    resumed = loaded(capture=True)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for _ in range(4):
        whole.step()
        resumed.step()
    assert_same_state(whole, resumed)
    # A state that is loaded lies elsewhere: what was recorded before is recorded anew.
    state, before = copy.deepcopy(whole.state_dict()), whole.captures
    whole.load_state_dict(state)
    plain = loaded(capture=False)
    plain.load_state_dict(copy.deepcopy(state))
    for _ in range(3):
        whole.step()
        plain.step()
    assert whole.captures > before
    assert_same_state(whole, plain)


def test_steps_on_batches_handed_in():
    """uint8 and floating, of two sizes in turn, with noise and without; and D and G alone."""
    plain, captured = make(capture=False), make(capture=True)
    bytes_ = torch.randint(0, 256, (6, SIZE, SIZE, 1), dtype=torch.uint8)
    for i in range(9):
        for engine in (plain, captured):
            if i % 3 == 0:
                engine.step(bytes_)
            elif i % 3 == 1:
                engine.step(real(8 - i // 3, seed=i), noise=torch.full((8 - i // 3, NZ), 0.1 * i))
            else:
                engine.d_step(real(seed=i))
                engine.g_step(5)
                engine.g_step(noise=torch.full((4, NZ), 0.1 * i))
    assert_same_state(plain, captured)
    assert not captured.uncaptured_reason and captured.captures >= 6


def test_the_gradients_are_those_of_the_last_step():
    """Also where another graph, of another size of batch, has written its own since."""
    plain, captured = make(capture=False), make(capture=True)
    addresses = {}
    for i in range(8):
        n = 4 + 4 * (i % 2)
        for engine in (plain, captured):
            engine.step(real(n, seed=i))
        gradients = [p.grad for p in captured.netD.parameters()]
        for mine, p in zip(gradients, plain.netD.parameters(), strict=True):
            assert torch.equal(mine, p.grad)
        if i >= 2:
            places = [g.data_ptr() for g in gradients]
            assert addresses.setdefault(n, places) == places


def move(weight):
    weight.data = 1.01 * weight.data


@pytest.mark.parametrize(
    "change",
    [
        lambda engine: engine.netG.main[1].eval(),
        lambda engine: engine.netG.main[0].weight.requires_grad_(False),
        lambda engine: engine.opt_g.param_groups[0].update(lr=1e-3),
        lambda engine: setattr(engine, "backend", "reference"),
        lambda engine: move(engine.netG.main[3].weight),
        lambda engine: engine.opt_g.param_groups[0]["lr"].fill_(1e-3),
    ],
    ids=["mode", "requires_grad", "lr, another", "backend", "memory", "lr, in place"],
)
def test_what_changes_between_steps_counts(change, request):
    plain, captured = loaded(n=16, capture=False), loaded(n=16, capture=True)
    for i in range(6):
        if i == 3:
            change(plain)
            change(captured)
        plain.step()
        captured.step()
    assert_same_state(plain, captured)
    # A rate that lies where it lay is read there.
    again = request.node.callspec.id != "lr, in place"
    assert captured.captures == 1 + again


def synchronising(module, args, out):
    if float(out.detach().mean()) > 1e9:
        raise AssertionError
    return out


class Stubborn(TapeGraph):
    """Refuses what CUDA refuses, as a real graph does."""

    @contextlib.contextmanager
    def record(self, generators):
        with CaptureGuard(generators), super().record(generators):
            yield


def test_a_network_that_synchronises_runs_uncaptured_with_the_reason(monkeypatch, caplog):
    monkeypatch.setitem(captures.GRAPHS, "cpu", Stubborn)
    plain, captured = loaded(capture=False), loaded(capture="auto")
    for engine in (plain, captured):
        engine.netD.main[2].register_forward_hook(synchronising)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            plain.step()
            captured.step()
    assert_same_state(plain, captured)
    assert "the step cannot be captured: CaptureError" in captured.uncaptured_reason
    said = [r for r in caplog.records if "one operation at a time" in r.getMessage()]
    assert len(said) == 1
    insisting = loaded(capture=True)
    insisting.netD.main[2].register_forward_hook(synchronising)
    insisting.step()
    with pytest.raises(InputError, match="capture=True: the step cannot be captured"):
        insisting.step()


class Reducing(Engine):
    calls = 0

    def reduce_gradients(self, params):
        self.calls += 1


def test_an_overridden_reduction_is_captured_only_by_request(caplog):
    engine = make(Reducing, capture=True)
    for i in range(4):
        engine.step(real(seed=i))
    # Of each network: a warm-up that finds the optimisers without state, the step that is taken as
    # it is written for that, and the runs of the recording.
    assert engine.calls == 2 * (1 + 1 + captures._WARM_UPS + 1)
    with caplog.at_level(logging.WARNING):
        left = make(Reducing, capture="auto")
    assert "reduce_gradients is overridden" in caplog.text
    assert "reduce_gradients is overridden" in left.uncaptured_reason
    for i in range(4):
        left.step(real(seed=i))
    assert (left.captures, left.calls) == (0, 8)


def test_an_optimiser_without_state_is_captured():
    torch.manual_seed(0)
    networks = DCGANGenerator(NZ, 4, 1, SIZE), DCGANDiscriminator(4, 1, SIZE)

    def run(capture):
        netG, netD = copy.deepcopy(networks)
        rates = {"lr": 0.01}
        engine = Engine(
            netG,
            netD,
            opt_g=torch.optim.SGD(netG.parameters(), **rates),
            opt_d=torch.optim.SGD(netD.parameters(), **rates, momentum=0.5),
            device="cpu",
            capture=capture,
        )
        for i in range(5):
            engine.step(real(seed=i))
        return engine

    plain, captured = run(False), run(True)
    assert captured.captures == 1
    assert_same_state(plain, captured)


def toy():
    """A step of one's own: a classifier with batch norm and dropout."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)
    )
    opt = torch.optim.Adam(net.parameters(), lr=torch.tensor(0.01), fused=True, capturable=True)

    def step(x, scale):
        opt.zero_grad()
        loss = (net(x) * scale).square().mean()
        loss.backward()
        opt.step()
        return {"loss": loss.detach()}

    return step, [net, opt]


def test_a_step_of_ones_own():
    (plain, state), (step, mine) = toy(), toy()
    captured = capture_step(step, mine, capture=True)
    for i in range(6):
        x = torch.randn(4 + i % 2, 4, generator=torch.Generator().manual_seed(i))
        torch.manual_seed(i)
        want = plain(x, 2.0 + i // 4)
        torch.manual_seed(i)
        got = captured(x, 2.0 + i // 4)
        assert torch.equal(want["loss"], got["loss"])
    assert captured.captures == 4 and captured.reason == ""
    for a, b in zip(state[0].state_dict().values(), mine[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    captured.reset()
    captured(torch.zeros(4, 4), 2.0)
    assert captured.captures == 5


@pytest.mark.parametrize("moved", ["parameter", "scale"])
def test_state_that_no_module_holds_is_looked_after_too(moved):
    """A parameter that is an optimiser's alone, and a scaler's scale, given other memory."""

    def late():
        p = nn.Parameter(torch.ones(3))
        opt = torch.optim.SGD([p], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))

        def step(x):
            opt.zero_grad()
            scaler.scale((p * x).square().sum()).backward()
            opt.step()

        return step, p, opt, scaler

    (plain, want, _, its), (step, p, opt, scaler) = late(), late()
    captured = capture_step(step, [opt, scaler], capture=True)
    for i in range(6):
        if i == 3 and moved == "parameter":
            want.data, p.data = want.data.clone(), p.data.clone()
        elif i == 3:
            its._scale, scaler._scale = its._scale * 2.0, scaler._scale * 2.0
        plain(torch.full((3,), 0.1))
        captured(torch.full((3,), 0.1))
        assert torch.equal(want, p)
    assert captured.captures == 2


def test_what_a_warm_up_has_made_is_in_every_graph():
    """State of an optimiser that comes late, with a parameter that has had no gradient before."""

    def late():
        torch.manual_seed(0)
        nets = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        opt = torch.optim.SGD(nets.parameters(), lr=0.1, momentum=0.9)

        def step(x, which):
            opt.zero_grad()
            nets[which](x).square().mean().backward()
            opt.step()

        return step, nets, opt

    (plain, want, _), (step, nets, opt) = late(), late()
    captured = capture_step(step, [nets, opt], capture=True)
    for which in (0, 0, 0, 1, 0, 1, 1, 0):
        x = torch.full((3, 4), 1.0 + which, requires_grad=True)
        plain(x, which)
        captured(x, which)
    # The first steps of either are taken as they are written; a graph of before has no late state.
    assert captured.captures == 3 and not captured.reason
    for a, b in zip(want.parameters(), nets.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimiser_that_always_makes_state_is_not_captured(caplog):
    class Hoarder(torch.optim.SGD):
        def step(self):
            super().step()
            first = self.param_groups[0]["params"][0]
            self.state[first][f"{len(self.state[first])}"] = first.detach().clone()

    net = nn.Linear(2, 1)
    opt = Hoarder(net.parameters(), lr=0.1)

    def step(x):
        net(x).sum().backward()
        opt.step()

    captured = capture_step(step, [net, opt])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            captured(torch.ones(1, 2))
    assert "makes new state in each step" in captured.reason
    assert len(opt.state[net.weight]) == 3


def test_a_scaler_is_put_back_too():
    net = nn.Linear(3, 1)
    opt = torch.optim.Adam(net.parameters(), lr=0.1, fused=True, capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    scaler.scale(torch.zeros(()))

    def step(x):
        opt.zero_grad()
        scaler.scale(net(x).square().mean()).backward()
        scaler.step(opt)
        scaler.update()
        return net.weight.detach().clone()

    captured = capture_step(step, [net, opt, scaler], capture=True)
    scales = []
    for _ in range(4):
        captured(torch.ones(2, 3))
        scales.append(scaler.get_scale())
    assert scales == [8.0, 16.0, 32.0, 64.0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "no device: it holds no tensor"),
        ([{"a": 1}], "a dict cannot be put back; give modules"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], "state is on cpu, meta"),
    ],
)
def test_a_state_that_cannot_be_put_back_is_refused(state, message):
    with pytest.raises(InputError, match=message):
        capture_step(lambda: None, state)


def test_capture_takes_three_values():
    with pytest.raises(InputError, match="capture='yes' is unknown"):
        capture_step(lambda: None, [torch.zeros(2)], capture="yes")


def test_too_many_graphs_are_said(caplog, monkeypatch):
    monkeypatch.setattr(captures, "_MOST_GRAPHS", 2)
    step, state = toy()
    captured = capture_step(step, state)
    with caplog.at_level(logging.WARNING):
        for n in (4, 4, 5, 6, 4):
            captured(torch.zeros(n, 4), 1.0)
    assert captured.captures == 4
    assert "captured for more than 2 sets" in caplog.text


def test_a_step_that_moves_its_state_is_not_captured(caplog):
    net = nn.Linear(3, 1)

    def step(x):
        net.weight.data = net.weight.data + x.mean()
        return net(x)

    captured = capture_step(step, [net])
    with caplog.at_level(logging.WARNING):
        captured(torch.ones(2, 3))
    assert "moves a parameter" in captured.reason


def next_arguments(engine):
    """Of the step that is captured, where every monitor measures."""
    batches = engine._batches(None, None, None, None, measured=engine._monitor is not None)
    return [x for batch in batches for x in batch]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_d": 2},
        {"precision": "bf16"},
        {"fuse_passes": False},
        {"monitor": Vitals(1)},
        {"loss": "wgan-gp"},
        {"r1": 1.0, "r1_every": 2},
        {"condition": "planes"},
        {"condition": "projection"},
        {
            "loss": "hinge",
            "diff_augment": ["color", "translation", "cutout"],
            "instance_noise": 0.1,
        },
    ],
    ids=str,
)
def test_the_step_does_nothing_that_a_graph_cannot_hold(backend, settings):
    """The very function that is captured, under the guard."""
    if settings.get("precision") and backend == "cpp":
        pytest.skip("the C++ kernels are float32")
    engine = loaded(n=64, capture=False, backend=backend, **settings)
    engine.step()
    guard = CaptureGuard(generators=[engine.generator])
    for _ in range(3):
        with engine._running():
            args = next_arguments(engine)
            guard.run(lambda args=args: engine._run("step", *args), engine._captured._state.parts)


def planted_sync(engine):
    loss = engine._discriminate

    def discriminate(*args):
        found = loss(*args)
        found.mean.sum().item()
        return found

    engine._discriminate = discriminate


def planted_counter(engine):
    counted = [0]

    def scaled(module, args, out):
        counted[0] += 1
        return out * (1.0 + 1e-3 * counted[0])

    engine.netG.main[0].register_forward_hook(scaled)


def planted_memory(engine):
    def moved(module, args, out):
        module.running_mean = module.running_mean + 0.0
        return out

    engine.netG.main[1].register_forward_hook(moved)


def planted_noise(engine):
    engine._noise = lambda n, generator: torch.randn(n, NZ, 1, 1)


def planted_host_data(engine):
    engine._noise = lambda n, generator: torch.tensor([[0.5] * NZ] * n)


@pytest.mark.parametrize(
    "plant",
    [planted_sync, planted_counter, planted_memory, planted_noise, planted_host_data],
)
def test_a_planted_fault_is_caught(plant):
    engine = loaded(n=64, capture=False, backend="reference")
    engine.step()
    plant(engine)
    guard = CaptureGuard(generators=[engine.generator])
    with pytest.raises(CaptureError), engine._running():
        for _ in range(3):
            args = next_arguments(engine)
            guard.run(lambda args=args: engine._run("step", *args), engine._captured._state.parts)


def test_a_python_counter_freezes():
    """What the guard is for: a graph replays what its recording has seen."""
    plain, captured = loaded(n=16, capture=False), loaded(n=16, capture=True)
    for engine in (plain, captured):
        planted_counter(engine)
        for _ in range(4):
            engine.step()
    assert_differ(plain, captured)


def test_the_gpu_checks_part_finds_a_difference(monkeypatch):
    """The part of ``gpu_check`` on captured steps, with the tape for a graph."""
    records = []
    assert gpu_parts.capture(gpu_parts.Job(dry_run=True), records.append)
    for row in records[-1]["rows"]:
        assert row["captures"] == 2 and not row["uncaptured"] and row["us"] > 0
    # One that forgets a launch.
    replay = TapeGraph.replay
    monkeypatch.setattr(TapeGraph, "replay", lambda self: (self.calls.pop(0), replay(self)))
    assert not gpu_parts.capture(gpu_parts.Job(dry_run=True), records.append)
    assert all("us" not in row for row in records[-1]["rows"])


def test_it_is_public():
    assert fastgan.capture_step is capture_step
    with use_backend("reference"):
        assert fastgan.CapturedStep is captures.CapturedStep


class FakeCuda:
    """The names of ``torch.cuda`` that a graph needs, each call of which is written down."""

    def __init__(self, monkeypatch, fail=""):
        self.log, self.fail = [], fail
        self.default = torch.Generator()
        names = ("CUDAGraph", "graph", "Stream", "current_stream", "stream", "device")
        for name in (*names, "get_sync_debug_mode", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name), raising=False)
        monkeypatch.setattr(torch.cuda, "default_generators", (self.default,), raising=False)
        monkeypatch.setattr(captures, "_streams", {})

    def CUDAGraph(self):  # noqa: N802
        return self

    def register_generator_state(self, generator):
        self.log.append(("register", generator))

    def replay(self):
        self.log.append("replay")

    @contextlib.contextmanager
    def graph(self, graph, **settings):
        self.log.append(("capture", settings))
        if self.fail:
            raise RuntimeError(self.fail)
        yield
        self.log.append("captured")

    def Stream(self, device):  # noqa: N802
        return self

    def current_stream(self, device):
        return self

    def wait_stream(self, other):
        self.log.append("wait")

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append("side stream")
        yield
        self.log.append("back")

    def device(self, device):
        return contextlib.nullcontext()

    def get_sync_debug_mode(self):
        return 0

    def set_sync_debug_mode(self, mode):
        self.log.append(("sync", mode))


def test_a_cuda_graph_is_made_as_torch_wants_it(monkeypatch):
    fake, generator = FakeCuda(monkeypatch), torch.Generator()
    graph = captures.CudaGraph(torch.device("cuda:0"), "pool")
    with graph.warm_up(strict=False):
        pass
    assert fake.log == ["wait", "side stream", "back", ("sync", 0), "wait"]
    fake.log.clear()
    with pytest.raises(RuntimeError, match="a wait"), graph.warm_up(strict=True):
        raise RuntimeError("a wait")
    # The side stream, and whether waiting is an error, are as before.
    assert fake.log == ["wait", "side stream", ("sync", "error"), ("sync", 0), "wait"]
    fake.log.clear()
    with graph.record([generator]):
        fake.log.append("step")
    graph.replay()
    settings = {"pool": "pool", "stream": fake, "capture_error_mode": "thread_local"}
    assert fake.log[:2] == [("register", generator), ("capture", settings)]
    assert fake.log[2:] == ["step", "captured", "replay"]


def test_a_failed_capture_leaves_its_generators_drawing(monkeypatch):
    """torch leaves them waiting for the rest of the capture: they get a state of their own."""
    fake, generator = FakeCuda(monkeypatch, fail="not permitted"), torch.Generator()
    left = []
    monkeypatch.setattr(captures, "_leave_capture", left.append)
    graph = captures.CudaGraph(torch.device("cuda:0"), "pool")
    with pytest.raises(RuntimeError, match="not permitted"), graph.record([generator]):
        pass
    assert left == [generator, fake.default]
