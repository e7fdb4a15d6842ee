"""Measured choices: measured once, kept, and taken over. Their times are made up here."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.numerics import error, needs_cuda, needs_kernels, needs_triton

from fastgan.ops import backend as backends
from fastgan.ops import conv as convs
from fastgan.ops import cpp, cuda, triton, tuning
from fastgan.ops.augment import augment
from fastgan.ops.backend import use_backend
from fastgan.ops.block import conv_bn_act, conv_transpose_bn_act
from fastgan.ops.bn_act import bn_act
from fastgan.ops.conv import conv
from fastgan.ops.gan_loss import gan_loss
from fastgan.ops.tuning import fastest, tuning_file, use_choices


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing is known yet in this process; what is written goes to the test's own cache."""
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(tuning, "_times", {})


class Ways:
    """Ways that take as many seconds as they are told to, and count their calls."""

    def __init__(self, monkeypatch, **seconds):
        self.calls = dict.fromkeys(seconds, 0)
        self.now = 0.0
        self.ways = {name: self.way(name, s) for name, s in seconds.items()}
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.now)

    def way(self, name, seconds):
        def call():
            self.calls[name] += 1
            # A first call is slow, whoever makes it.
            self.now += seconds + (100.0 if self.calls[name] == 1 else 0.0)

        return call

    def fastest(self, problem, *among):
        return fastest(problem, self.ways, among or tuple(self.ways))


def stored():
    return json.loads(tuning_file().read_text())


def test_the_fastest_is_taken_and_measured_once(monkeypatch):
    ways = Ways(monkeypatch, slow=3.0, quick=1.0, medium=2.0)
    assert [ways.fastest("p") for _ in range(3)] == ["quick"] * 3
    assert len(set(ways.calls.values())) == 1
    once = dict(ways.calls)
    assert ways.fastest("another") == "quick"
    assert ways.calls == {name: 2 * calls for name, calls in once.items()}


def test_one_choice_needs_no_measurement(monkeypatch):
    ways = Ways(monkeypatch, slow=3.0, quick=1.0)
    assert ways.fastest("p", "slow") == "slow"
    assert ways.calls == {"slow": 0, "quick": 0}
    assert not tuning_file().exists()


def test_a_named_backend_chooses_among_its_own(monkeypatch):
    """From the same measurement, which is of all ways."""
    ways = Ways(monkeypatch, slow=3.0, medium=2.0, torch=1.0)
    assert ways.fastest("p", "slow", "medium") == "medium"
    once = dict(ways.calls)
    assert ways.fastest("p") == "torch"
    assert ways.calls == once


def test_choices_outlive_the_process(monkeypatch):
    ways = Ways(monkeypatch, slow=3.0, quick=1.0)
    ways.fastest("p")
    assert stored() == {"p": {"slow": 3000.0, "quick": 1000.0}}
    forget(monkeypatch)
    # Now it would be the other way round.
    ways = Ways(monkeypatch, slow=1.0, quick=3.0)
    assert ways.fastest("p") == "quick"
    assert ways.calls == {"slow": 0, "quick": 0}


def test_what_another_process_wrote_stays(monkeypatch):
    ways = Ways(monkeypatch, slow=3.0, quick=1.0)
    ways.fastest("p")
    written = {**stored(), "theirs": {"slow": 1.0, "quick": 2.0}}
    tuning_file().write_text(json.dumps(written))
    ways.fastest("q")
    assert stored().keys() == {"p", "q", "theirs"}


def test_a_way_that_was_not_known_is_measured(monkeypatch):
    Ways(monkeypatch, old=2.0, torch=3.0).fastest("p")
    forget(monkeypatch)
    ways = Ways(monkeypatch, old=2.0, new=1.0, torch=3.0)
    assert ways.fastest("p") == "new"
    assert stored()["p"].keys() == {"old", "new", "torch"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"p": {"slow": 1.0',
        b"[]",
        b"null",
        b'{"p": 3}',
        b'{"p": {"slow": null}}',
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_a_damaged_file_is_said_and_replaced(monkeypatch, caplog, content):
    ways = Ways(monkeypatch, slow=3.0, quick=1.0)
    tuning_file().parent.mkdir(parents=True, exist_ok=True)
    tuning_file().write_bytes(content)
    assert ways.fastest("p") == "quick"
    assert str(tuning_file()) in caplog.text
    assert "measuring again" in caplog.text
    assert stored() == {"p": {"slow": 3000.0, "quick": 1000.0}}
    assert all(len(record.getMessage().splitlines()) == 1 for record in caplog.records)


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "file"))
    ways = Ways(monkeypatch, slow=3.0, quick=1.0)
    assert ways.fastest("p") == ways.fastest("p") == "quick"
    assert "cannot be written" in caplog.text


def test_choices_of_ones_own_come_first(monkeypatch):
    ways = Ways(monkeypatch, slow=3.0, quick=1.0)
    ways.fastest("p")
    once = dict(ways.calls)
    choices = {"p": {"slow": 1.0, "quick": 2.0}}
    with use_choices(choices):
        assert ways.fastest("p") == "slow"
    assert ways.fastest("p") == "quick"
    assert ways.calls == once


def test_choices_of_ones_own_gather_what_is_met(monkeypatch):
    ways = Ways(monkeypatch, slow=3.0, quick=1.0)
    ways.fastest("before")
    choices = {}
    with use_choices(choices):
        ways.fastest("before")
        ways.fastest("p")
    ways.fastest("after")
    assert choices.keys() == {"before", "p"}
    # The machine's file has all, whoever met them.
    assert stored().keys() == {"before", "p", "after"}


@needs_kernels
def test_the_file_is_of_one_instruction_set(use_isa):
    names = set()
    for isa in cpp.kernels().isas():
        use_isa(isa)
        names.add(tuning_file())
    assert len(names) == len(cpp.kernels().isas())


def convolve(n=2):
    x, weight = torch.zeros(n, 5, 8, 8, requires_grad=True), torch.zeros(6, 5, 4, 4)
    conv(x, weight.requires_grad_(), stride=2, padding=1).sum().backward()


@needs_kernels
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_a_convolution_asks_for_each_direction_once(monkeypatch, backend):
    measured = []
    monkeypatch.setattr(
        tuning,
        "_measure",
        lambda ways, device: measured.append(set(ways)) or dict.fromkeys(ways, 1.0),
    )
    with use_backend(backend):
        convolve()
        convolve()
    own = {"winograd4", "winograd2"}
    assert measured == [own | {"torch"}] * 3
    assert [problem.split()[0] for problem in stored()] == ["dgrad", "fprop", "wgrad"]
    with use_backend(backend):
        convolve(n=3)
    assert len(stored()) == 6


@needs_kernels
@pytest.mark.parametrize(
    ("backend", "taken"), [("auto", {"torch"}), ("cpp", {"winograd2"})], ids=str
)
def test_only_auto_takes_torchs(monkeypatch, backend, taken):
    times = {"winograd4": 3.0, "winograd2": 2.0, "torch": 1.0}
    monkeypatch.setattr(tuning, "_measure", lambda ways, device: times)
    took = set()
    for name in ("forward", "wgrad"):
        run = getattr(convs._Cpp, name)
        monkeypatch.setattr(
            convs._Cpp,
            name,
            lambda self, way, *args, run=run: took.add(way) or run(self, way, *args),
        )
    with use_backend(backend):
        convolve()
    assert took == taken


@needs_kernels
def test_a_choice_has_its_own_number_of_threads(threads):
    for count in (1, 2):
        threads(count)
        convolve()
    assert len(stored()) == 6


def test_other_ops_have_nothing_to_choose():
    bn_act(torch.randn(2, 3, 4, 4))
    assert not tuning_file().exists()


@needs_kernels
def test_the_next_process_takes_the_same_ways(tmp_path):
    program = (
        "import torch; from fastgan.ops import tuning; from fastgan.ops.conv import conv\n"
        "measure, count = tuning._measure, []\n"
        "tuning._measure = lambda *args: count.append(1) or measure(*args)\n"
        "torch.manual_seed(0)\n"
        "y = conv(torch.randn(2, 5, 8, 8), torch.randn(6, 5, 4, 4), stride=2, padding=1)\n"
        "print(len(count), y.double().sum().item())"
    )
    lines = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert [line[0] for line in lines] == ["1", "0"]
    assert lines[0][1] == lines[1][1]


def test_nothing_is_said_where_all_is_well(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        Ways(monkeypatch, slow=3.0, quick=1.0).fastest("p")
    assert not caplog.records


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as it matters here; sets what is being captured on it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(tuning.triton, "version", lambda: "3.8.0")
    monkeypatch.setattr(tuning, "_gpu_turn", lambda way: way())

    def capture(capturing):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    capture(False)
    return capture


def test_a_gpu_has_times_of_its_own(gpu):
    ways = {"slow": lambda: 2.0, "quick": lambda: 1.0}
    assert fastest("p", ways, tuple(ways), GPU) == "quick"
    assert len({tuning_file(), tuning_file(GPU), tuning_file(torch.device("cuda", 1))}) == 3
    assert json.loads(tuning_file(GPU).read_text()) == {"p": {"quick": 1.0, "slow": 2.0}}
    assert not tuning_file().exists()


def test_nothing_is_measured_while_a_graph_is_captured(gpu):
    calls = []
    ways = {"first": lambda: calls.append(1) or 2.0, "second": lambda: calls.append(2) or 1.0}
    gpu(True)
    assert fastest("p", ways, tuple(ways), GPU) == "first"
    assert not calls
    assert not tuning_file(GPU).exists()
    gpu(False)
    assert fastest("p", ways, tuple(ways), GPU) == "second"
    gpu(True)
    assert fastest("p", ways, tuple(ways), GPU) == "second"


@pytest.fixture
def gpu_backends(monkeypatch):
    """On the CPU `auto` chooses among what it has on a GPU; what each op ran is in the list."""
    names = ("cuda", "triton")
    monkeypatch.setitem(backends._KERNELS, "cpu", names)
    ran = []
    for module, wrapped in ((cuda, "launch"), (triton, "kernels")):
        call = getattr(module, wrapped)

        def spied(*args, call=call, module=module):
            # What the ops run, and not what they ask of sizes.
            if module is cuda or args != ("common",):
                ran.append(module.__name__.rpartition(".")[2])
            return call(*args)

        monkeypatch.setattr(module, wrapped, spied)
    return ran


@pytest.fixture
def timed(monkeypatch):
    """Sets what each way takes; a way that is not named takes longest."""
    times = {}

    def measured(ways, device):
        return {name: times.get(name, 9.0) for name in ways}

    monkeypatch.setattr(tuning, "_times", {})
    monkeypatch.setattr(tuning, "_measure", measured)
    return times


def loss_and_images():
    leaf = torch.randn(4, 1, requires_grad=True)
    gan_loss(leaf, (1.0, 0.0))[0].sum().backward()
    return augment(torch.zeros(2, 4, 4, 3, dtype=torch.uint8)), leaf.grad


def normalised():
    x = torch.randn(4, 8, 3, 3, requires_grad=True)
    bn_act(x, groups=2, activation="relu").sum().backward()
    return (x.grad,)


@needs_triton
@needs_cuda
@pytest.mark.parametrize("fastest", ["cuda", "triton"])
@pytest.mark.parametrize("call", [loss_and_images, normalised])
def test_auto_runs_the_backend_that_measures_fastest(gpu_backends, timed, call, fastest):
    timed[fastest] = 1.0
    call()
    assert set(gpu_backends) == {fastest}


@needs_triton
@needs_cuda
@pytest.mark.parametrize("way", ["direct", "64x64", "torch", "16x16x16 warps 4 stages 4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_auto_convolves_the_way_that_measures_fastest(gpu_backends, timed, way, transposed):
    """Whose statistics another may write in other tiles."""
    timed[way] = 1.0
    x, weight = torch.randn(4, 20 if transposed else 3, 6, 6), torch.randn(20, 3, 4, 4)
    call = conv_transpose_bn_act if transposed else conv_bn_act
    with use_backend("reference"):
        want = call(x.double(), weight.double(), groups=2)
    got = call(x, weight, groups=2)
    assert error(got, want) < 1e-6
    assert "cuda" in gpu_backends or way != "direct"


@needs_triton
@needs_cuda
def test_auto_measures_the_interpreter_the_cuda_kernels_and_torch(gpu_backends, tmp_path):
    """As it measures on a GPU: one result, whichever wins, and a file that says which."""
    x, weight = torch.randn(2, 20, 3, 3), torch.randn(20, 3, 4, 4)
    got = conv(x, weight, stride=2, padding=1, transposed=True)
    want = F.conv_transpose2d(x.double(), weight.double(), stride=2, padding=1)
    assert error(got, want) < 1e-6
    times = json.loads(tuning_file().read_text())
    (problem,) = times
    assert problem.startswith("dgrad n2 low 20x3x3 high 3x6x6")
    assert {"direct", "64x64", "torch"} < times[problem].keys() and len(times[problem]) == 4
    # What is fastest is kept for the next time.
    before = tuning_file().read_bytes()
    conv(x, weight, stride=2, padding=1, transposed=True)
    assert tuning_file().read_bytes() == before


def test_a_gpu_is_timed_without_triton_too(monkeypatch):
    """By events, on which a call counts as what came between."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    def call():
        clock[0] += 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(tuning.triton, "missing_reasons", lambda: ["none"])
    assert tuning._gpu_turn(call) == pytest.approx(2.5)
